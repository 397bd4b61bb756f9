"""Intervals by weights beside evaluating every resample anew: the same patients, the same figures, the same answers.

    OMP_NUM_THREADS=1 .venv/bin/python bench/bootstrap.py

Simulated tables, no pictures. Anew means: copy the rows of the drawn images, give the copies ids of their own, and call the functions of chapter 11 on them;
it is run for --anew resamples and scaled up. Prints the resamples a second, their ratio, and how far the answers are apart at most."""
import argparse, resource, time
from _ratio import add_csv, note

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--images', type=int, nargs='+', default=[2000]); p.add_argument('--n', type=int, default=1000); p.add_argument('--anew', type=int, default=5)
add_csv(p); args = p.parse_args()

import numpy as np, pandas as pd
from lungdet.evaluate import coco_map, froc, image_level, rsna_score
from lungdet.formats import Annotations
from lungdet.splits import patients
from lungdet.bootstrap import FIGURES, Figures, intervals, patient_weights

def clinic(n, rng):
    "As the challenge: 22 % positive, five predictions an image, four of five lesions found"
    ids = np.array([f'i{k}' for k in range(n)])
    images = pd.DataFrame(dict(image_id=ids, height=1024, width=1024, patient_id=[f'p{o}' for o in rng.integers(0,n//2,n)]))
    who = np.repeat(ids, np.where(rng.random(n)<.225, rng.integers(1,3,n), 0))
    def table(who, **kw):
        xy,wh = rng.uniform(0,600,(len(who),2)),rng.uniform(100,400,(len(who),2))
        return pd.DataFrame(np.c_[xy,xy+wh], columns=['x1','y1','x2','y2']).assign(image_id=who, label='Lung Opacity', **kw)
    boxes,noise = table(who),rng.choice(ids, round(4.6*n))
    found = boxes[rng.random(len(boxes))<.8]
    found = found.assign(score=rng.beta(5,2,len(found)), **{c:found[c]+rng.normal(0,15,len(found)) for c in ('x1','y1','x2','y2')})
    return Annotations(images, boxes, ['Lung Opacity']),pd.concat([found,table(noise, score=rng.beta(2,5,len(noise)))], ignore_index=True)

def anew(ann, preds, w):
    "AP50, AP, FROC, RSNA and AUC of one resample, made and judged"
    ids = np.repeat(ann.images.image_id.to_numpy(), w)
    copies = pd.DataFrame(dict(image_id=ids, new=[str(k) for k in range(len(ids))]))
    def made(df): return copies.merge(df, on='image_id').drop(columns='image_id').rename(columns={'new':'image_id'})
    a,q = Annotations(made(ann.images), made(ann.boxes), ann.classes),made(preds)
    coco = coco_map(a,q)
    return [coco.AP50, coco.AP, froc(a,q)['mean'], rsna_score(a,q,.5), image_level(a,q,.5).AUC]

for n in args.images:
    ann,preds = clinic(n, np.random.default_rng(0))
    start = time.perf_counter(); table = intervals(ann, preds, n=args.n); ours = time.perf_counter()-start
    w = next(patient_weights(patients(ann.images), args.anew)).astype(int)
    start = time.perf_counter(); theirs = np.array([anew(ann,preds,o) for o in w]); each = (time.perf_counter()-start)/args.anew
    apart = np.abs(Figures(ann,preds)(w)[['AP50','AP','FROC','RSNA','AUC']].to_numpy()-theirs).max()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    print(f'{n} images, {len(preds)} predictions, {args.n} resamples, {len(FIGURES)} figures: {ours:.1f} s by weights, {each*args.n:.0f} s anew, ratio {each*args.n/ours:.0f}; '
          f'apart at most {apart:.0e}; peak memory of the process {peak:.2f} GiB', flush=True)
    note(args.csv, f'intervals over patients, {args.n} resamples', 'every resample evaluated anew', each*args.n/ours, 100, f'{n:,} images, {len(FIGURES)} figures')
