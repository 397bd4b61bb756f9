"""What a run on the whole challenge will take: an estimate, from what is measured here.

    .venv/bin/python bench/estimate.py rsna_r34_512
    .venv/bin/python bench/estimate.py rsna_r34_512 --device cuda

Builds what `lungdet-train` would build, on synthetic studies, and measures: multiply-adds of a picture; the time of a training step; the memory that
the step keeps for its way back (every tensor that autograd saves, each counted once), beside weights, gradients, the optimiser's two moments and the mean of the weights; pictures that the loaders
and DICOMs that the converter get through in a second. From that: hours and memory for --images, of which the split leaves four fifths for training.

On a GPU that is here, the step is measured on it. For one that is not, --tflops is what its maker promises for matrices of 16 bits (65 for a T4, 312
for an A100), of which training is taken to reach --share: a guess, and the least certain number here. The slower of step and loaders sets the pace."""
import argparse, tempfile, time, warnings
from pathlib import Path
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('experiment', nargs='?', default='rsna_r34_512'); p.add_argument('changes', nargs='*', help='key=value, as for lungdet-train')
p.add_argument('--images', type=int, default=26_684); p.add_argument('--device', default='cpu'); p.add_argument('--bs', type=int, help='of the measured step; 2 on a CPU, else that of the experiment')
p.add_argument('--tflops', type=float, nargs='+', default=[65,312]); p.add_argument('--share', type=float, default=.25); p.add_argument('--cores', type=int, default=4, help='of the machine with the GPU, for its loaders and the converter'); p.add_argument('--repeat', type=int, default=3)
args = p.parse_args()
warnings.filterwarnings('ignore')

import pandas as pd, torch
from torch.autograd.graph import saved_tensors_hooks
from lungdet.all import *
plain,gib = torch.Tensor,2**30
device = torch.device(args.device)
cfg = read_config(config_file(args.experiment), schema, ['data.path=none','images=32','pretrained=false','frozen=0',f'dls.bs={args.bs or 2}' if args.device=='cpu' or args.bs else 'dls.num_workers=0','dls.num_workers=0',*args.changes])
whole = read_config(config_file(args.experiment), schema, args.changes)
bs,epochs,size,n_train = whole['dls']['bs'],whole['train']['frozen']+whole['train']['epochs'],cfg['dls']['size'],round(.8*args.images)
bf16 = cfg['train']['precision']!='float32'

def best(f, n=args.repeat):
    "Shortest time of `f`, seconds; the first call warms up"
    ts = []
    for _ in range(n+1):
        if device.type=='cuda': torch.cuda.synchronize()
        t = time.perf_counter(); f()
        if device.type=='cuda': torch.cuda.synchronize()
        ts.append(time.perf_counter()-t)
    return min(ts[1:])

ann = load_images(**cfg['data'])
learn = build_learner(ann, cfg)
learn.dls.to(device); model = learn.model.to(device).train()
x,*y = (o.to(device).as_subclass(plain) if isinstance(o, plain) else o for o in learn.dls.train.one_batch())
loss,opt = learn.loss_func,torch.optim.AdamW(model.parameters(), 1e-6, fused=True)
def forward():
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16): preds = model(x)
    return loss(preds, *y)
def step(): opt.zero_grad(); forward().backward(); opt.step()

kept,own = {},{o.untyped_storage().data_ptr() for o in [*model.parameters(),*model.buffers()]}
def keep(o):
    if (at := o.untyped_storage().data_ptr()) not in own: kept[at] = o.untyped_storage().nbytes()
    return o
with saved_tensors_hooks(keep, lambda o: o): forward()
n_params = sum(o.numel() for o in model.parameters())
activations = sum(kept.values())/len(x)
fixed = 4*n_params*(4+(whole['train']['ema']>0))                                # weights, gradients, two moments, mean of the weights
work = macs(model, x[:1])['all']
flops = 6*work                                                                  # multiply and add; forward, and twice that on the way back
seconds = best(step)/len(x)

dl = learn.dls.train
def epoch(): return sum(len(b[0]) for b in dl)
loader = epoch()/best(epoch, 1)
dicoms = [Path(o) for o in sorted((data_path(32)/'stage_2_train_images').glob('*.dcm'))]
def convert():
    with tempfile.TemporaryDirectory() as d: convert_folder(dicoms, d, size=cfg['data']['png_size'], progress=False, n_workers=1)
converter = len(dicoms)/best(convert, 1)

print(f"{args.experiment}, {whole['model']['backbone']} at {size} px, batches of {bs}, {epochs} epochs of {n_train:,} pictures{', bf16' if bf16 else ''}\n")
print('Measured here')
print(f'  multiply-adds of one picture          {work/1e9:8.1f} billion')
print(f'  training step, per picture            {1e3*seconds:8.1f} ms on {device.type}, {torch.get_num_threads()} threads, batches of {len(x)}')
print(f'  kept for the way back, per picture    {activations/gib:8.3f} GiB')
print(f'  weights, gradients, moments, mean     {fixed/gib:8.2f} GiB ({n_params/1e6:.1f} million weights)')
print(f'  pictures augmented in the main process{loader:8.0f} per second')
print(f'  DICOMs converted by one core          {converter:8.0f} per second')
if device.type=='cuda': print(f'  peak of the allocator                 {torch.cuda.max_memory_allocated()/gib:8.2f} GiB at batches of {len(x)}')

hours = lambda s: f'{s*n_train*epochs/3600:.1f}'
rows = {f'{device.type}, measured':(seconds, hours(seconds))}
for t in args.tflops: rows[f'GPU of {t:g} TFLOPS, estimated'] = ((s := flops/(args.share*t*1e12)), hours(max(s, 1/(loader*args.cores))))
print(f'\nEstimate of the whole run, which nobody has run yet; GPUs at {100*args.share:.0f} % of their promise, loaders on {args.cores} cores')
print(pd.DataFrame([{'on':k,'ms per picture':f'{1e3*s:.1f}','training, hours':h,'memory, GiB':f'{(fixed+bs*activations)/gib:.1f}'} for k,(s,h) in rows.items()]).to_string(index=False))
print(f'  and once, before: {args.images:,} DICOMs to PNG in {args.images/converter/args.cores/60:.1f} minutes on {args.cores} cores')
