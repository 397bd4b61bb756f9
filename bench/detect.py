"""What the way from the file to the findings costs: images per second of a detector on a folder of DICOMs, and of its model alone.

    .venv/bin/python bench/detect.py --n 64 --size 512 --backbone resnet18
    .venv/bin/python bench/detect.py --detector runs/baseline --folder DICOMS

Without --detector an untrained one is timed, since weights do not matter for speed; without --folder synthetic studies of 1024 px are made. "model alone"
runs the same batches of ready pictures through network and decoding of boxes, "reading alone" makes the pictures and throws them away, "one after the other"
is what the two would take without overlap, and "detector(folder)" is the real thing. Best of --repeat runs in turn. `OMP_NUM_THREADS` decides how many cores the
network gets; the threads that read share them."""
import argparse, tempfile, time, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from _ratio import add_csv, note

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--n', type=int, default=64); p.add_argument('--size', type=int, default=512); p.add_argument('--bs', type=int, default=8); p.add_argument('--backbone', default='resnet18')
p.add_argument('--detector'); p.add_argument('--folder'); p.add_argument('--engine', default='torch'); p.add_argument('--device', default='cpu'); p.add_argument('--repeat', type=int, default=3)
add_csv(p); args = p.parse_args()
warnings.filterwarnings('ignore')

import pandas as pd, torch
from lungdet.core import IMAGES, make_studies
from lungdet.detector import Detector, items_of, read_item
from lungdet.retinanet import RetinaNet
from lungdet.single import Backbone

tmp = tempfile.TemporaryDirectory()
folder = args.folder or make_studies(Path(tmp.name)/'studies', args.n)/IMAGES
def untrained():
    cfg = dict(backbone=args.backbone, in_channels=3, mode='repeat', stats=[[.485,.456,.406],[.229,.224,.225]], classes=['Lung Opacity'], size=args.size, width=256, depth=4,
               sizes=[[32,40,50],[64,80,101],[128,161,203],[256,322,406],[512,645,812]], ratios=[.5,1.,2.], levels=[3,4,5,6,7], categories=[], model=dict(n_categories=0))
    return Detector(RetinaNet(Backbone(args.backbone)), cfg, dict(png_size=args.size, fit='stretch', mode='gray'), engine=args.engine, device=args.device)
det = Detector.load(args.detector, engine=args.engine, device=args.device) if args.detector else untrained()
items = dict(list(items_of(folder).items())[:args.n])
todo = list(items.values())

def read():
    with ThreadPoolExecutor() as ex: return [(im,row|dict(image_id=str(o), source='')) for o,(im,row) in zip(todo, ex.map(lambda o: det.picture(*read_item(o, str(o))), todo))]
def model():
    for k in range(0, len(ready), args.bs): list(det.look(ready[k:k+args.bs]))
def whole(): list(det.stream(items, bs=args.bs))
ready,best = read(),{}
for _ in range(args.repeat):
    for name,f in {'model alone':model, 'reading alone':read, 'detector(folder)':whole}.items():
        begin = time.perf_counter(); f()
        best[name] = min(best.get(name, 1e9), time.perf_counter()-begin)
best['one after the other'] = best['model alone']+best['reading alone']
print(f"{len(items)} DICOMs, {det}, {torch.get_num_threads()} threads of the network\n")
print(pd.DataFrame([(k,len(items)/v,best['model alone']/v) for k,v in best.items()], columns=['','images/s','of the model alone']).round(2).to_string(index=False))
setting = f'{args.backbone}, {args.size} px, {len(items)} DICOMs' if not args.detector else f'{det}, {len(items)} DICOMs'
note(args.csv, 'files to findings', 'its model alone, on ready pictures', best['model alone']/best['detector(folder)'], .9, setting, args.device)
note(args.csv, 'files to findings', 'reading, then the model', best['one after the other']/best['detector(folder)'], 1, setting, args.device)
