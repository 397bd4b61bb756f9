"""Fusion of tables: all images at once against `fuse_boxes` image by image, and what the ways cost for as many images as the challenge has.

    .venv/bin/python bench/fusion.py 26684

Image by image is run for one image of forty and scaled up. Best of --repeat rounds, in which all take turns."""
import argparse, time
from _ratio import add_csv, note

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('images', type=int, nargs='?', default=26684); p.add_argument('--repeat', type=int, default=3)
add_csv(p); args = p.parse_args()

import numpy as np, pandas as pd, torch
from lungdet.boxes import fuse_boxes
from lungdet.core import XYXY
from lungdet.ensemble import fuse_predictions

def tables(images, models=3, mean=6, seed=0):
    "Boxes of `models` on a third of the lesions each, and alarms; about `mean` an image and model"
    g,out = np.random.default_rng(seed),[]
    for _ in range(models):
        img = np.repeat(np.arange(images), g.poisson(mean, images))
        xy,wh = g.uniform(0,700,(len(img),2)),g.uniform(100,320,(len(img),2))
        out.append(pd.DataFrame(np.hstack([xy,xy+wh]), columns=XYXY).assign(image_id=np.char.mod('i%06d', img), label='a', score=g.beta(1,4,len(img))))
    return out

def one_by_one(preds):
    d = pd.concat([p.assign(model=i) for i,p in enumerate(preds)])
    for _,o in d.groupby('image_id'):
        each = [o[o.model==k] for k in range(len(preds))]
        fuse_boxes([torch.tensor(p[XYXY].to_numpy()) for p in each], [torch.tensor(p.score.to_numpy()) for p in each])

torch.set_num_threads(1)
n = args.images
preds,few = tables(n),tables(max(1,n//40))
print(f'{n} images, {sum(map(len,preds))} boxes of 3 models')
ways = {'one by one':lambda: one_by_one(few)}|{how:lambda how=how: fuse_predictions(preds, how) for how in ('wbf','soft','nms')}
best = dict.fromkeys(ways, np.inf)
for _ in range(args.repeat):
    for k,f in ways.items():
        begin = time.perf_counter(); f(); best[k] = min(best[k], time.perf_counter()-begin)
ratio = best['one by one']*n/max(1,n//40)/best['wbf']
for how in ('wbf','soft','nms'):
    print(f'{how:5s} {best[how]:6.1f} s, {n/best[how]:8.0f} images/s'+(f', {ratio:.0f} times as fast as fuse_boxes image by image' if how=='wbf' else ''))
note(args.csv, 'boxes fusion, all images at once', 'fuse_boxes, image by image', ratio, 80, f'{n:,} images, 3 models')
