"""Engines beside each other: the same detector, the same pictures, in one run.

    .venv/bin/python bench/engines.py --backbones resnet18 resnet50 tf_efficientnet_lite0 --sizes 256 512 --batches 1 8
    .venv/bin/python bench/engines.py --backbones --run FOLDER

Prints the best of --repeat rounds, in which the engines take turns, in milliseconds from pictures to raw answers, and how many times faster than
eager PyTorch in float32 each is. All use the same number of threads. The slowest engine of 16 bits in OpenVINO is printed last; it should be at
least twice as fast. --run is a folder of `lungdet-train`: for its detector, what the engines find on the validation images is compared with
what it finds itself, and the average precision printed; the 8 bits are calibrated on --calibrate images of the training part, once for neck
and heads (what `make_engine` does) and once for the backbone too."""
import argparse, logging, tempfile, time, warnings
from pathlib import Path
from types import SimpleNamespace
from _ratio import add_csv, note
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--backbones', nargs='*', default=['resnet18','resnet50','tf_efficientnet_lite0']); p.add_argument('--sizes', type=int, nargs='+', default=[256,512])
p.add_argument('--batches', type=int, nargs='+', default=[1,8]); p.add_argument('--repeat', type=int, default=5); p.add_argument('--threads', type=int)
p.add_argument('--run', type=Path); p.add_argument('--calibrate', type=int, default=48)
add_csv(p); args = p.parse_args()
warnings.filterwarnings('ignore'); logging.disable(logging.WARNING)

import pandas as pd, torch
from lungdet.metadata import *
from lungdet.anchors import *
from lungdet.data import *
from lungdet.decode import *
from lungdet.engines import *
from lungdet.evaluate import *
from lungdet.formats import *
from lungdet.learner import *
from lungdet.retinanet import *
from lungdet.single import *
if args.threads: torch.set_num_threads(args.threads)
pd.set_option('display.width', 220)
plain = torch.Tensor
kinds = [('torch',None),('torch','float32'),('torch','bfloat16'),('onnxruntime','float32'),('onnxruntime','int8'),('openvino','float32'),('openvino','bfloat16'),('openvino','int8')]
def title(name, dtype): return f'{name} {dtype}' if dtype else 'eager'

def race(fs, x):
    "Best time of each of `fs` on `x`, ms, which take turns"
    best = dict.fromkeys(fs, float('inf'))
    with torch.inference_mode():
        for i in range(args.repeat+1):
            for k,f in fs.items():
                t = time.perf_counter(); f(x)
                if i: best[k] = min(best[k], 1e3*(time.perf_counter()-t)) # the first round warms up
    return best

rows = {}
for arch in args.backbones:
    torch.manual_seed(0)
    model = RetinaNet(Backbone(arch)).eval()
    fs = {title(*k): make_engine(model, *k, x=torch.randn(4,3,128,128)) for k in kinds}
    for size in args.sizes:
        for n in args.batches:
            t = race(fs, torch.randn(n,3,size,size))
            rows[arch,size,n] = {k:f'{v:.0f}' if k=='eager' else f'{v:.0f} ({t["eager"]/v:.2f}x)' for k,v in t.items()}|{'ratio':t['eager']/t['openvino bfloat16']}
            print(arch, size, n, rows[arch,size,n], flush=True)
            note(args.csv, 'OpenVINO in bfloat16', 'eager PyTorch in float32', rows[arch,size,n]['ratio'], 2, f'{arch}, {size} px, batch of {n}')
if rows:
    print(f'\nms per batch, {torch.get_num_threads()} threads, AVX512 bf16: {torch.cpu.get_capabilities().get("avx512_bf16")}')
    print(pd.DataFrame(rows).T.drop(columns='ratio').to_string())
    print(f'\nOpenVINO in bfloat16 is at least {min(o["ratio"] for o in rows.values()):.2f}x as fast as eager PyTorch in float32')

if args.run:
    model,cfg = load_detector(args.run/'detector.safetensors')
    ann,anchors,size = Annotations.load(args.run/'annotations'),Anchors(cfg['sizes'], cfg['ratios'], cfg['levels']),(cfg['size'],)*2
    dls = detection_dls(ann, cfg['size'], 8, cfg['mode'], aug=None, stats=cfg['stats'], metadata=cfg['model'].get('fields'))
    valid,told,n = ann.part('valid'),bool(cfg['model'].get('fields')),-(-args.calibrate//8)
    cal = [torch.cat(o)[:args.calibrate].as_subclass(plain) for o in zip(*[b[:1+told] for b,_ in zip(dls.train, range(n))])]
    seen = [[o.as_subclass(plain) for o in b[:1+told]] for b in dls.test_dl(valid.images.to_dict('records'))]
    class Replay(torch.nn.Module):
        "A model that gives answers which it was given, in turn"
        def __init__(self, outs): super().__init__(); self.outs = iter(outs)
        def forward(self, *_): return next(self.outs)
    made = {title(*k): make_engine(model, *k, *cal) for k in kinds}
    with tempfile.TemporaryDirectory() as d: whole = quantise(export_onnx(model, Path(d)/'m.onnx').read_bytes(), *cal, parts=('/backbone/','/fpn/','_head/tower/'))
    made['onnxruntime int8, backbone too'] = OnnxEngine(whole)
    first,rows = None,{}
    for k,m in made.items():
        with torch.inference_mode(): outs = [m(*b) for b in seen]
        found = torch.cat([postprocess(o, anchors, size) for o in outs])
        first = found if first is None else first
        preds = detect(SimpleNamespace(dls=dls, model=Replay(outs), loss_func=SimpleNamespace(anchors=anchors, size=size)))
        rows[k] = {**detection_diff(first, found), 'AP50':coco_map(valid, preds).AP50, 'AUC':image_level(valid, preds)['AUC']}
        print(k, {n:round(float(v), 4) for n,v in rows[k].items()}, flush=True)
    print(f'\n{cfg["backbone"]}, {cfg["size"]} px, {len(valid)} validation images, {len(valid.boxes)} boxes, calibrated on {len(cal[0])}')
    print(pd.DataFrame(rows).T.astype(float).round(4).to_string())
