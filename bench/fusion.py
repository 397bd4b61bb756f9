"Fusion of tables: all images at once against `fuse_boxes` image by image, and what the ways cost for 26,684 images. Run: python bench/fusion.py [images]"
import sys, time, numpy as np, pandas as pd, torch
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

def seconds(f): t = time.perf_counter(); f(); return time.perf_counter()-t

if __name__=='__main__':
    torch.set_num_threads(1)
    n = int(sys.argv[1]) if len(sys.argv)>1 else 26684
    preds,few = tables(n),tables(n//40)
    print(f'{n} images, {sum(map(len,preds))} boxes of 3 models')
    slow = seconds(lambda: one_by_one(few))/(n//40)
    for how in ('wbf','soft','nms'):
        t = seconds(lambda: fuse_predictions(preds, how))
        print(f'{how:5s} {t:6.1f} s, {n/t:8.0f} images/s'+(f', {slow*n/t:.0f} times as fast as fuse_boxes image by image' if how=='wbf' else ''))
