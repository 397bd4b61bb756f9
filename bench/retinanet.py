"""The speed of our RetinaNet beside torchvision's: same architecture, same weights, same pictures, in one run.

    .venv/bin/python bench/retinanet.py --backbones resnet18 resnet34 resnet50 --sizes 256 512 --batches 1 8

Prints the best of --repeat rounds in milliseconds, in which the two take turns, and how many times faster ours is. Inference is from picture
to boxes, with a hundred scores of a picture above the threshold; a training step is forward, loss, backward and AdamW (fused in ours, PyTorch's default in torchvision's). Half of the pictures of a batch
(all, if it is one) have two opacities of the challenge's median size; `four` has four on each picture, the most that one picture of the challenge
has, and `sixty` a crowd of sixty. The last columns are other models: `fast` is
`optimise_for_inference`, `P4-P6` drops P3 and P7; the coverage of the challenge's boxes at 512 is printed first, also for the levels that
`anchor_report` keeps. --memory prints the peak of one training step,
of all its tensors, and of the process, each of which is one of its own that gives what it frees back at once (MALLOC_MMAP_THRESHOLD_), or else it is what
the allocator keeps that is measured; code and caches of libraries are part of it. --detector FILE --annotations FOLDER (as `save_detector` and `Annotations.save` wrote them) prints what the fast copy does
to the scores and to the average precision of a trained model."""
import argparse, math, os, subprocess, sys, time, warnings
from itertools import accumulate
from types import SimpleNamespace
from _ratio import add_csv, note
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--backbones', nargs='*', default=['resnet18','resnet34','resnet50']); p.add_argument('--sizes', type=int, nargs='+', default=[256,512])
p.add_argument('--batches', type=int, nargs='+', default=[1,8]); p.add_argument('--repeat', type=int, default=5); p.add_argument('--device', default='cpu')
p.add_argument('--threads', type=int); p.add_argument('--memory', action='store_true'); p.add_argument('--step', help=argparse.SUPPRESS)
p.add_argument('--detector'); p.add_argument('--annotations'); p.add_argument('--brief', action='store_true', help='no crowd of sixty, no multiply-adds')
add_csv(p); args = p.parse_args()
warnings.filterwarnings('ignore')

import pandas as pd, torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torchvision.models.detection import RetinaNet as TVRetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from lungdet.all import *
if args.threads: torch.set_num_threads(args.threads)
pd.set_option('display.width', 200)
few = Anchors(sizes_512[1:4], levels=(4,5,6))
truth = torch.tensor(challenge_tables()[1][XYXY].to_numpy('float32'))/2 # boxes of the whole challenge at 512
report = anchor_report(truth, Anchors(), 512)
for k,a in {'all levels':Anchors(), 'P4-P6':few, f'what `anchor_report` keeps, {report.trimmed.levels}':report.trimmed}.items(): print(f'{k}: {anchor_report(truth,a,512).title}')

def theirs(arch, size):
    body = resnet_fpn_backbone(backbone_name=arch, weights=None, trainable_layers=5, returned_layers=[2,3,4], extra_blocks=LastLevelP6P7(256,256), norm_layer=nn.BatchNorm2d)
    return TVRetinaNet(body, num_classes=1, min_size=size, max_size=size, image_mean=[0.]*3, image_std=[1.]*3, detections_per_img=100).to(args.device)

def batch(n, size, each=None):
    "Pictures (n,3,size,size), boxes (n,M,4), labels (n,M); `each` boxes on each picture, or two on every other"
    g = torch.Generator().manual_seed(0)
    x,m = torch.rand(n,3,size,size,generator=g),each or 2
    wh = torch.tensor([217.,298])*size/1024*torch.empty(n,m,1).uniform_(.6,1.5,generator=g)
    at = torch.tensor([[.15,.35],[.55,.35]]) if not each else torch.rand(n,m,2,generator=g)*.6
    b = torch.cat([at*size+0*wh, at*size+wh], 2).clamp(max=size)
    l = torch.zeros(n,m,dtype=torch.long)
    if n>1 and not each: l[1::2] = PAD
    return [o.to(args.device) for o in (x,b,l)]

def sync():
    if args.device!='cpu': torch.cuda.synchronize()

def race(fs, n=args.repeat):
    "Best time of each of `fs`, ms, which take turns"
    best = dict.fromkeys(fs, float('inf'))
    for i in range(n+1):
        for k,f in fs.items():
            sync(); t = time.perf_counter(); f(); sync()
            if i: best[k] = min(best[k], 1e3*(time.perf_counter()-t)) # the first round warms up
    return best

def tv_infer(m, x):
    with torch.inference_mode(): return m(list(x))
def infer(m, x, anchors):
    with torch.inference_mode(): return postprocess(m(x), anchors, x.shape[-2:], max_det=100)
def infer_raw(m, x):
    with torch.inference_mode(): return m(x)
def tv_step(m, opt, x, b, l):
    opt.zero_grad(); sum(m(list(x), [dict(boxes=o[k>=0],labels=k[k>=0]) for o,k in zip(b,l)]).values()).backward(); opt.step()
def step(m, opt, loss, x, b, l):
    opt.zero_grad(); loss(m(x), b, l).backward(); opt.step()

def models(arch, size):
    torch.manual_seed(0)
    tv,ours,less = theirs(arch, size),RetinaNet(Backbone(arch)).to(args.device),RetinaNet(Backbone(arch), levels=few.levels).to(args.device)
    x = batch(1, size)[0]
    for m in (ours,less): # as if trained: a hundred scores of a picture are above the threshold
        z = infer_raw(m.eval(), x)[0].flatten()
        m.cls_head.out.bias.data += math.log(.05/.95)-z.topk(100).values[-1]
    tv.load_state_dict(to_torchvision(ours))
    return tv,ours,less
def adamw(m, fused): return torch.optim.AdamW(m.parameters(), 1e-6, fused=fused or None)
def steps(arch, size, n, each=None, which=('torchvision','ours','P4-P6')):
    if len(which)>1: tv,ours,less = models(arch, size)
    elif which==('torchvision',): tv = theirs(arch, size) # alone, for its memory
    else: ours = RetinaNet(Backbone(arch)).to(args.device)
    b,fs = batch(n, size, each),{}
    if 'torchvision' in which: tv.train(); o1 = adamw(tv, False); fs['torchvision'] = lambda: tv_step(tv, o1, *b)
    for k in which[which[0]=='torchvision':]:
        m,a = (ours,Anchors()) if k=='ours' else (less,few)
        m.train(); fs[k] = lambda m=m,o=adamw(m,True),loss=RetinaLoss(a,(size,size)): step(m, o, loss, *b)
    return fs

def live(f):
    "The most that all tensors made while `f` runs hold at once, MiB: on a CPU what `torch.cuda.max_memory_allocated` is on a GPU"
    if args.device!='cpu':
        before = torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats(); f()
        return (torch.cuda.max_memory_allocated()-before)/2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: f()
    at = sorted((o.start_ns(),o.nbytes()) for o in prof.profiler.kineto_results.events() if o.name()=='[memory]')
    return max(accumulate(n for _,n in at))/2**20

if args.step: # a process of its own, to measure its memory
    arch,size,n,who = args.step.split(',')
    f = steps(arch, int(size), int(n), which=(who,))[who]
    f(); f()
    hwm = next(o for o in open('/proc/self/status') if o.startswith('VmHWM')) # getrusage would count the parent's too
    print(live(f), int(hwm.split()[1])/1024)
    sys.exit()

def lookers(arch, size, n):
    "From pictures to boxes, one function for each model"
    tv,ours,less = (m.eval() for m in models(arch, size))
    x = batch(n, size)[0]
    fast,lfast = (optimise_for_inference(m, x) for m in (ours,less))
    fs = {'torchvision':lambda: tv_infer(tv,x), 'ours':lambda: infer(ours,x,Anchors()), 'fast':lambda: infer(fast,x,Anchors())}
    if size>=512: fs |= {'P4-P6':lambda: infer(less,x,few), 'P4-P6 fast':lambda: infer(lfast,x,few)}
    return fs
NAMES = {'ours':'', 'fast':', optimised', 'P4-P6':', pruned to P4-P6', 'P4-P6 fast':', pruned and optimised'}
TARGETS = {('inference','ours'):1, ('inference','fast'):2, ('inference','P4-P6'):1.8, ('inference','P4-P6 fast'):3.5, ('training step','ours'):1.2, ('training step','P4-P6'):1.2}
def ratios(t, what, setting):
    "Times `t` as text, with how many times as fast as torchvision each is, which is noted too"
    for k,v in t.items():
        if k!='torchvision': note(args.csv, f'RetinaNet, {what}{NAMES[k]}', "torchvision's", t['torchvision']/v, 2.2 if (what,k)==('inference','P4-P6') and setting.startswith('resnet18') else TARGETS[what,k], setting, args.device)
    return {k:f'{v:.0f}' if k=='torchvision' else f'{v:.0f} ({t["torchvision"]/v:.2f}x)' for k,v in t.items()}
inference,training = {},{}
for arch in args.backbones:
    for size in args.sizes:
        for n in args.batches:
            inference[arch,size,n] = ratios(race(lookers(arch, size, n)), 'inference', f'{arch}, {size} px, batch of {n}')
            print('inference', arch, size, n, inference[arch,size,n], flush=True)
            for each,name in ((None,''),(4,', four'),(60,', sixty'))[:1 if n==1 else 2 if args.brief else 3]:
                which = ('torchvision','ours')+(('P4-P6',) if size>=512 else ())
                t = race(steps(arch, size, n, each, which), max(2,args.repeat//2))
                training[arch,size,f'{n}{name}'] = ratios(t, 'training step', f'{arch}, {size} px, batch of {n}{name and name+" boxes a picture"}')
                print('training', arch, size, f'{n}{name}', training[arch,size,f'{n}{name}'], flush=True)
if args.backbones:
    print(f'\nInference, ms per batch ({args.device}, {torch.get_num_threads()} threads, fast is {best_dtype(args.device)})'); print(pd.DataFrame(inference).T.fillna('').to_string())
    print('\nTraining step, ms per batch'); print(pd.DataFrame(training).T.fillna('').to_string())

rows = {}
for arch in [] if args.brief else args.backbones:
    for k,m,a in (('all levels',models(arch,512)[1],Anchors()),('P4-P6',models(arch,512)[2],few)):
        m.eval()
        with torch.no_grad(): levels = m.fpn(m.backbone(torch.zeros(1,3,512,512,device=args.device)))
        work = macs(m, torch.zeros(1,3,512,512,device=args.device), dict(backbone=m.backbone, neck=m.fpn))
        heads = {f'heads P{l}': sum(macs(h,[o])['all'] for h in (m.cls_head,m.box_head)) for l,o in zip(a.levels,levels)}
        rows[arch,k] = {n:v/1e9 for n,v in (work|heads|dict(all=sum(work.values())+sum(heads.values()))).items()}
if rows: print('\nBillion multiply-adds for one picture of 512'); print(pd.DataFrame(rows).T.round(2).fillna(0).to_string())

if args.memory:
    print('\nPeak memory of a training step, MiB: of its tensors, and of the whole process')
    rows,parts = {},('tensors','process')
    for arch in args.backbones:
        for size in args.sizes:
            for n in args.batches:
                row = rows[arch,size,n] = {}
                for who in ('torchvision','ours'):
                    cmd = [sys.executable,__file__,'--device',args.device,'--step',f'{arch},{size},{n},{who}']
                    out = subprocess.run(cmd, check=True, capture_output=True, text=True, env=os.environ|{'MALLOC_MMAP_THRESHOLD_':'262144'}).stdout
                    row |= {(k,who):float(o) for k,o in zip(parts, out.split()[-2:])}
                row |= {(k,'ratio'):row[k,'ours']/row[k,'torchvision'] for k in parts}
    print(pd.DataFrame(rows).T.sort_index(axis=1, level=0, ascending=False, sort_remaining=False).round(3).to_string())

if args.detector:
    model,cfg = load_detector(args.detector)
    anchors,size,ann = Anchors(cfg['sizes'], cfg['ratios'], cfg['levels']),(cfg['size'],)*2,Annotations.load(args.annotations)
    dls = detection_dls(ann, size=cfg['size'], bs=8, mode=cfg['mode'], stats=cfg['stats'], device=args.device)
    x = dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    rows,cls = {},infer_raw(model.to(args.device), x)[0]
    for k,m in dict(ours=model, folded=optimise_for_inference(model, x, torch.float32), fast=optimise_for_inference(model, x)).items():
        preds = detect(SimpleNamespace(dls=dls, model=m, loss_func=SimpleNamespace(anchors=anchors, size=size)))
        valid = ann.part('valid')
        rows[k] = {'largest change of a score':(infer_raw(m,x)[0].sigmoid()-cls.sigmoid()).abs().max().item(), 'AP50':coco_map(valid,preds).AP50,
                   'RSNA':best_threshold(valid,preds)[1], 'AUC':image_level(valid,preds)['AUC']}
    print(f'\n{len(valid)} validation images, {len(valid.boxes)} boxes, {cfg["size"]} px'); print(pd.DataFrame(rows).T.astype(float).round(4).to_string())
