"Runs by name, and what is said of them"
import numpy as np, pandas as pd, pytest
from lungdet.config import read_config
from lungdet.formats import Annotations
from lungdet.study import *
from lungdet.bootstrap import Figures, compare
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

def made_up(n=60, seed=0):
    "A study, and detections of two models that hit some of it"
    g = np.random.default_rng(seed)
    ims = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(n)], patient_id=[f'p{k//2}' for k in range(n)], height=100, width=100, split='valid'))
    boxes = pd.DataFrame(dict(image_id=ims.image_id[::2], x1=10., y1=10., x2=60., y2=60., label='opacity'))
    def model(p, wrong):
        hit = boxes[g.random(len(boxes))<p]
        odd = boxes.assign(image_id=ims.image_id[1::2].to_numpy())[g.random(len(boxes))<wrong]
        df = pd.concat([hit, odd], ignore_index=True)
        return df.assign(score=g.random(len(df)))
    return Annotations(ims, boxes, ['opacity']),model

def test_one_seed_is_compare():
    ann,model = made_up()
    a,b = model(.5,.3),model(.9,.2)
    res = over_patients(ann, dict(a=[(a,.3)], b=[(b,.4)]), n=200)
    ref = compare(ann, a, b, .3, .4, ['AP50','RSNA','AUC'], n=200)
    for k in ref.index:
        np.testing.assert_allclose(res.loc[('b',k),['diff','diff_lo','diff_hi']].astype(float), ref.loc[k,['difference','lo','hi']].astype(float), atol=1e-12)
        assert abs(res.loc[('a',k),'value']-ref.loc[k,'a'])<1e-12

def test_mean_of_seeds():
    ann,model = made_up()
    runs = [(model(.7,.3),.3) for _ in range(3)]
    res = over_patients(ann, dict(m=runs), ['AP50'], n=50)
    each = [float(Figures(ann, p, t, ['AP50'])().iloc[0].AP50) for p,t in runs]
    assert abs(res.value.iloc[0]-np.mean(each))<1e-12 and res.lo.iloc[0]<res.value.iloc[0]<res.hi.iloc[0]

def test_results_come_back(tmp_path):
    ann,model = made_up()
    res = over_patients(ann, {'our model':[(model(.7,.3),.3)]}, ['AP50','AUC'], n=50)
    keep_results(res, tmp_path/'a.csv', 'made up', ann, 1); keep_results(res, tmp_path/'b.csv', 'other data', ann, 1)
    t = read_results(tmp_path)
    assert list(t.index)==[('made up','our model'),('other data','our model')] and (t.images==60).all()
    assert t.AP50.iloc[0].startswith(f'{res.value.iloc[0]:.3f} (')
    keep_results(res, tmp_path/'c.csv', 'made up', ann, 1)
    with pytest.raises(ValueError, match='two results'): read_results(tmp_path)
