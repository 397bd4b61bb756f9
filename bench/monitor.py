"""What scores in fastai's table cost, the share of an epoch that `DetectionScores` takes at the settings of chapter 10; and what `check_learner` costs.

    OMP_NUM_THREADS=1 .venv/bin/python bench/monitor.py --epochs 3
    .venv/bin/python bench/monitor.py --epochs 0 --pictures 1000 5000

Prints the seconds of `check_learner`, and for each epoch its seconds, those spent on parts of the loss and decoding (after each validation batch) and on scores (after the last),
and their share; then seconds to score so many --pictures, a quarter with two lesions each, with 20 and with 100 detections on every picture."""
import argparse, time, warnings
from pathlib import Path
from _ratio import add_csv, note
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--epochs', type=int, default=3); p.add_argument('--pictures', type=int, nargs='*', default=[1000,5000])
p.add_argument('--images', type=int, default=320); p.add_argument('--size', type=int, default=192); p.add_argument('--bs', type=int, default=8)
p.add_argument('--width', type=int, default=96); p.add_argument('--depth', type=int, default=2); p.add_argument('--backbone', default='tf_efficientnet_lite0')
add_csv(p); args = p.parse_args()
warnings.filterwarnings('ignore')

import numpy as np, pandas as pd
from fastai.vision.all import Callback, GradientClip, set_seed
from lungdet.all import *
from lungdet.monitor import *
from lungdet.checks import check_learner

class Timed(DetectionScores):
    "`DetectionScores` that counts its seconds"
    def before_epoch(self): self.began,self.batches,self.end = time.perf_counter(),0.,0.
    def after_batch(self):
        t = time.perf_counter(); super().after_batch(); self.batches += time.perf_counter()-t
    def after_validate(self):
        t = time.perf_counter(); super().after_validate(); self.end += time.perf_counter()-t

class Rows(Callback):
    "Prints what `Timed` counted"
    order,shares = 60,[]
    def after_epoch(self):
        o = self.learn.timed
        total = time.perf_counter()-o.began
        self.shares.append((o.batches+o.end)/total)
        print(f'epoch {self.epoch}: {total:6.1f} s, loss parts and decoding {o.batches:.2f} s, scores of {sum(map(len,o.found))} detections {o.end:.2f} s, '
              f'together {self.shares[-1]:.1%}')

if args.epochs:
    path = data_path(args.images)
    ann = split_patients(read_rsna(path).sample(args.images))
    ann = ann.use_pngs(convert_folder([Path(o) for o in ann.images.path], work_path('png_256', path.name), size=256, progress=False))
    dls = detection_dls(ann, size=args.size, bs=args.bs, cache=work_path('pictures'))
    set_seed(42)
    learn = retinanet_learner(dls, args.backbone, width=args.width, depth=args.depth, cbs=[GradientClip(1.),Timed(),Rows()])
    t = time.perf_counter(); res = check_learner(learn)
    print(f'check_learner: {time.perf_counter()-t:.1f} s, ok: {res.ok}')
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(args.epochs, slice(5e-4/20,5e-4))
    note(args.csv, 'an epoch with scores', 'the same without', 1-max(Rows.shares), .98, f'{args.backbone}, {args.size} px, {args.images} images')

g = np.random.default_rng(0)
def table(ids, **more):
    xy = g.uniform(0, 120, (len(ids),2))
    return pd.DataFrame(np.c_[xy,xy+g.uniform(20,70,(len(ids),2))], columns=XYXY).assign(image_id=ids.astype(str), label=0, **more)
for n in args.pictures:
    truth = table(np.repeat(np.arange(0,n,4), 2))
    for d in (20,100):
        found = table(np.repeat(np.arange(n), d), score=g.random(n*d))
        t = time.perf_counter(); picture_scores(truth, found, n)
        print(f'{n} pictures, {d} detections each: {time.perf_counter()-t:.1f} s')
