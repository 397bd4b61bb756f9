"Runs by name, and what is said of them"
import numpy as np, pandas as pd
from lungdet.config import read_config
from lungdet.study import *
from lungdet.train import schema

def test_names():
    a,b,c = (read_config(None, schema, o) for o in ([],['loss.gamma=2'],['loss.gamma=1']))
    assert run_name(a)==run_name(b)!=run_name(c)
    a['loss']['gamma'],b['train']['seed'] = 1.,5
    assert run_name(a)==run_name(c)!=run_name(b)

def test_differences_are_paired():
    g = np.random.default_rng(0)
    base = g.normal(size=5)
    runs = pd.DataFrame([dict(variant=v, seed=s, AP50=base[s]+d) for s in range(5) for v,d in (('x',0),('y',.25))])
    out = summary(runs, ['AP50'])
    assert out.loc['y','AP50 -']=='+0.250 [+0.250, +0.250]' and out.loc['x','AP50 -']=='' and list(out.index)==['x','y']
