"""What scoring costs, as ratios: the challenge's score against a plain loop, all thresholds against one, COCO by faster-coco-eval against pycocotools.

    OMP_NUM_THREADS=1 .venv/bin/python bench/metrics.py

Truth: the 26,684 images and 9,555 boxes of the challenge's training labels. Predictions: 132,000 simulated boxes, of which one lies near each true box.
Each row is the smallest of --times runs, alternating; the first two must agree to 1e-12, those of COCO to 1e-9."""
import argparse, contextlib, io, time, warnings
from _ratio import add_csv, note
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--boxes', type=int, default=132_000, help='predictions'); p.add_argument('--times', type=int, default=5)
p.add_argument('--coco', type=int, default=2000, help='images with a lesion in the comparison of COCO evaluators, beside as many without')
add_csv(p); args = p.parse_args()
warnings.filterwarnings('ignore')

import numpy as np, pandas as pd
from lungdet.core import XYXY
from lungdet.evaluate import RSNA_IOUS, coco_map, rsna_score, threshold_sweep
from lungdet.explore import challenge_tables
from lungdet.formats import Annotations

def simulate(ann, n, seed=0):
    "One box near each true one, the rest anywhere"
    rng,t = np.random.default_rng(seed),ann.boxes[XYXY].to_numpy()
    near = t+rng.normal(0, .08, t.shape)*np.tile(t[:,2:]-t[:,:2], 2)
    xy = rng.uniform(50, 650, (max(n-len(t),0),2))
    df = pd.DataFrame(np.concatenate([near, np.concatenate([xy,xy+rng.uniform(100,350,xy.shape)],1)]).clip(0,1024), columns=XYXY)
    score = np.r_[rng.beta(5,2,len(t)),rng.beta(2,5,len(xy))]
    ids = [*ann.boxes.image_id,*rng.choice(ann.images.image_id.to_numpy(), len(xy))]
    return df.assign(image_id=ids, label=ann.classes[0], score=score).sample(frac=1, random_state=seed, ignore_index=True)

def iou(a, b):
    w,h = min(a[2],b[2])-max(a[0],b[0]),min(a[3],b[3])-max(a[1],b[1])
    if w<=0 or h<=0: return 0.
    return w*h/((a[2]-a[0])*(a[3]-a[1])+(b[2]-b[0])*(b[3]-b[1])-w*h)

def plain_image(truth, preds):
    "The rule of the challenge, word for word"
    total = 0.
    for thr in RSNA_IOUS:
        free,tp = list(range(len(truth))),0
        for p in preds:
            best,at = thr,None
            for k in free:
                o = iou(p, truth[k])
                if o>best: best,at = o,k
            if at is not None: free.remove(at); tp += 1
        total += tp/(len(preds)+len(truth)-tp)
    return total/len(RSNA_IOUS)

def plain_rsna(ann, preds):
    "As one writes it: two dicts of lists, then a loop over images"
    truth,found,scores = {},{},[]
    for i,*b in ann.boxes[['image_id',*XYXY]].itertuples(index=False): truth.setdefault(i,[]).append(b)
    for i,s,*b in preds[['image_id','score',*XYXY]].itertuples(index=False): found.setdefault(i,[]).append((s,b))
    for i in ann.images.image_id:
        t,f = truth.get(i,[]),sorted(found.get(i,[]), key=lambda o: -o[0])
        if t and f: scores.append(plain_image(t, [b for _,b in f]))
        elif t or f: scores.append(0.)
    return sum(scores)/len(scores)

def pycoco(ann, preds):
    "The same numbers by COCO's own code: AP, AP50, AP75, AR"
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    num = {o:i+1 for i,o in enumerate(ann.images.image_id)}
    def rows(df): return [dict(id=k+1, image_id=num[i], category_id=1, iscrowd=0, score=s, bbox=[x1,y1,x2-x1,y2-y1], area=(x2-x1)*(y2-y1))
                          for k,(i,s,x1,y1,x2,y2) in enumerate(df.assign(score=df.get('score',1.))[['image_id','score',*XYXY]].itertuples(index=False))]
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(); gt.dataset = dict(images=[dict(id=i) for i in num.values()], annotations=rows(ann.boxes), categories=[dict(id=1, name='x')]); gt.createIndex()
        ev = COCOeval(gt, gt.loadRes(rows(preds)), 'bbox'); ev.evaluate(); ev.accumulate(); ev.summarize()
    return ev.stats[[0,1,2,8]]

def race(a, b):
    "Smallest seconds of both, and what they returned"
    best,res = [np.inf]*2,[None]*2
    for _ in range(args.times):
        for k,f in enumerate((a,b)):
            t = time.perf_counter(); res[k] = f(); best[k] = min(best[k], time.perf_counter()-t)
    return best,res

ann = Annotations(*challenge_tables(), ['Lung Opacity'])
preds = simulate(ann, args.boxes)
(plain,ours),(x,y) = race(lambda: plain_rsna(ann, preds), lambda: rsna_score(ann, preds))
assert abs(x-y)<1e-12, (x,y)
(one,sweep),(_,table) = race(lambda: rsna_score(ann, preds), lambda: threshold_sweep(ann, preds))
pick = table.iloc[np.linspace(0, len(table)-1, 50).astype(int)]
assert np.allclose(pick.rsna, [rsna_score(ann, preds, t) for t in pick.threshold], rtol=0, atol=1e-12)
positive = ann.images.category.eq('Lung Opacity').to_numpy(bool)
small = ann.where(np.isin(np.arange(len(ann)), [i for k in (True,False) for i in np.flatnonzero(positive==k)[:args.coco]]))
some = preds[preds.image_id.isin(small.images.image_id)].reset_index(drop=True)
(theirs,fast),(x,y) = race(lambda: pycoco(small, some), lambda: coco_map(small, some))
assert np.allclose(x, y[['AP','AP50','AP75','AR']], rtol=0, atol=1e-9), (x,y)
print(f"{len(ann):,} images, {len(preds):,} predictions; COCO on {len(small):,} images, {len(some):,} predictions")
print(pd.DataFrame([('challenge: plain loop / rsna_score', plain, ours, plain/ours), (f'{len(table):,} thresholds / one', sweep, one, sweep/one),
                    ('COCO: pycocotools / coco_map', theirs, fast, theirs/fast)], columns=['what','first, s','second, s','ratio']).round(3).to_string(index=False))
setting = f'{len(ann):,} images, {len(preds):,} boxes'
note(args.csv, 'score of the challenge', 'a plain loop', plain/ours, 10, setting)
note(args.csv, f'score at {len(table):,} thresholds', 'at one threshold', one/sweep, .7, setting)
note(args.csv, "COCO's average precision", 'pycocotools', theirs/fast, 2.5, f'{len(small):,} images, {len(some):,} boxes')
