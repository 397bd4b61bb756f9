"Tables of truth and predictions made of chance, for the tests of the two chapters 11i"
import numpy as np, pandas as pd
from lungdet.core import XYXY
from lungdet.formats import Annotations

def random_case(seed, classes=('a',), images=12, boxes=1.2, preds=3, tie='between', step=20):
    "Few coordinates, so that overlaps tie; scores tie `between` pictures, 'all' over, or not at all"
    rng = np.random.default_rng(seed)
    ids = [f'i{k:03d}' for k in range(images)]
    def table(mean):
        who = rng.choice(ids, rng.poisson(mean*images))
        xy,wh = rng.integers(0,6,(len(who),2))*step,rng.integers(1,6,(len(who),2))*step
        return pd.DataFrame(np.c_[xy,xy+wh].astype(float), columns=XYXY).assign(image_id=pd.Series(who,dtype=object), label=rng.choice(list(classes), len(who)))
    p = table(preds)
    if tie=='between': # the same ladder of scores on every picture, for each class
        p = p[p.groupby(['image_id','label']).cumcount()<8].reset_index(drop=True)
        p['score'] = 1-p.groupby(['image_id','label']).cumcount()/8
    else: p['score'] = rng.integers(1,4,len(p))/4 if tie=='all' else rng.random(len(p))
    p = p.sample(frac=1, random_state=seed, ignore_index=True)
    df = pd.DataFrame(dict(image_id=ids, height=400, width=400, patient_id=rng.choice([f'p{k}' for k in range(images*2//3)]+[None], images)))
    return Annotations(df, table(boxes), list(classes)),p
