"Flags, errors, curves: by hand, by properties, and against plain loops"
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from lungdet.agree import *
from lungdet.core import XYXY
from lungdet.evaluate import pred_cols
from lungdet.formats import Annotations
from lungdet.bootstrap import bootstrap_ci

def boxes(rows, classes=2):
    g = np.random.default_rng(rows[0])
    n = rows[1]
    xy,wh = g.uniform(0,60,(n,2)),g.uniform(5,40,(n,2))
    return pd.DataFrame(np.hstack([xy,xy+wh]), columns=XYXY).assign(image_id=[f'i{k}' for k in g.integers(6,size=n)], label=[f'c{k}' for k in g.integers(classes,size=n)], score=g.uniform(.01,.99,n).round(2))[pred_cols]

def study(seed, n=8):
    images = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(6)], height=100, width=100, patient_id=['p0','p0','p1','p2','p3','p4']))
    return Annotations(images, boxes((seed+99,n)).drop(columns='score'), ['c0','c1'])

def overlap(a, b):
    w,h = min(a.x2,b.x2)-max(a.x1,b.x1),min(a.y2,b.y2)-max(a.y1,b.y1)
    i = max(w,0)*max(h,0)
    return i/((a.x2-a.x1)*(a.y2-a.y1)+(b.x2-b.x1)*(b.y2-b.y1)-i)

seeds,counts = st.integers(0,2**31),st.integers(0,25)

@given(seeds, counts, counts, st.sampled_from([0,.3,.6]))
@settings(max_examples=40, deadline=None)
def test_flags_are_those_of_a_loop(seed, n, m, iou):
    ann,a,b = study(seed),boxes((seed,n)),boxes((seed+1,m))
    B,I = agreement(ann, a, b, iou)
    def best(r, other): return max((overlap(r,o) for o in other.itertuples() if o.image_id==r.image_id and o.label==r.label), default=0.)
    want = [best(r,b) for r in a.itertuples()]+[best(r,a) for r in b.itertuples()]
    np.testing.assert_allclose(B.support, want, atol=1e-12)
    assert len(I)==6 and I.alone.sum()==(B.flag&(B.model=='sensitive')).sum() and I.shown.sum()==n
    for r in I.itertuples():
        lonely = B[(B.image_id==r.image_id)&B.flag&(B.model=='sensitive')].score
        assert r.flag==(len(lonely)>0) and r.suspicion==(lonely.max() if len(lonely) else 0)

@given(seeds, counts, counts)
@settings(max_examples=30, deadline=None)
def test_a_model_confirms_itself_and_silence_nothing(seed, n, m):
    ann,a,b = study(seed),boxes((seed,n)),boxes((seed+1,m))
    B,I = agreement(ann, a, a)
    assert not B.flag.any() and not I.flag.any() and (I.suspicion==0).all()
    B,I = agreement(ann, a[:0], b)
    assert B.flag.all() and (I.shown==0).all()
    B,I = agreement(ann, a, b[:0])
    assert B.flag.all() and not I.flag.any()
    assert support(a, b).shape==(n,) and agreement(ann, a[:0], b[:0])[0].empty

@given(seeds, counts, counts)
@settings(max_examples=30, deadline=None)
def test_errors_add_up(seed, n, m):
    ann,a,b = study(seed),boxes((seed,n)),boxes((seed+1,m))
    B,I = add_errors(ann, *agreement(ann, a, b))
    assert len(B)==n+m and (I.missed>=0).all() and (I.error==(I.missed>0)).all()
    assert len(ann.boxes)-I.missed.sum()==(~B.error[B.model=='precise']).sum()
    r = reread(ann, I)
    assert r.sensitivity['all']==1 and r.pictures.tolist()==[0,I.flag.mean(),1]
    np.testing.assert_allclose(r.sensitivity['as shown'], (~B.error[B.model=='precise']).sum()/len(ann.boxes))
    assert r.sensitivity['as shown']<=r.sensitivity['flagged']<=1
    shuffled = add_errors(ann, B.sample(frac=1, random_state=0).drop(columns='error'), I.sample(frac=1, random_state=0).drop(columns=['missed','error']))
    assert shuffled[1].set_index('image_id').missed.loc[I.image_id].tolist()==I.missed.tolist()

def test_intervals_are_those_of_a_bootstrap_over_patients():
    ann = study(0)
    items = pd.DataFrame(dict(image_id=[f'i{k}' for k in (0,0,1,2,3,4,5,5)], flag=[1,1,0,1,0,1,0,1], error=[1,0,0,1,1,1,0,0])).astype(dict(flag=bool,error=bool))
    v = flag_value(ann, items, n=300, seed=3)
    np.testing.assert_allclose(v.value, [3/5,1/3,3/5-1/3,9/5])
    assert v['items'].tolist()[:2]==[5,3] and v.errors.tolist()[:2]==[3,1]
    def stat(rows): # of resampled images
        o = pd.concat([items[items.image_id==f'i{int(k)}'] for k in rows[:,0]]) if len(rows) else items[:0]
        return o.error[o.flag].mean()
    lo,hi = bootstrap_ci(np.arange(6.)[:,None], 300, seed=3, groups=ann.images.patient_id, stat=stat)
    np.testing.assert_allclose(v.loc['flagged',['lo','hi']].astype(float), [lo,hi])

def test_flags_that_cannot_be_judged():
    ann = study(0)
    none = pd.DataFrame(dict(image_id=[], flag=[], error=[]))
    assert flag_value(ann, none, n=5).value.isna().all()
    alone = Annotations(ann.images.assign(patient_id='p'), ann.boxes, ann.classes)
    v = flag_value(alone, pd.DataFrame(dict(image_id=['i0'], flag=[True], error=[True])), n=5)
    assert v.value['flagged']==1 and v.n.sum()==0
    for iou in (1,-.1,50):
        with pytest.raises(ValueError, match='no overlap'): agreement(ann, boxes((0,3)), boxes((1,3)), iou)
    with pytest.raises(ValueError, match='no image of this id'): agreement(ann, boxes((0,3)).assign(image_id='x'), boxes((1,3)))

errors = st.lists(st.integers(0,3), min_size=1, max_size=30)

@given(errors, st.data())
@settings(max_examples=60, deadline=None)
def test_curves(e, data):
    p = data.draw(st.lists(st.integers(0,5), min_size=len(e), max_size=len(e)))
    c = finding_curve(e, p)
    if sum(e)==0: assert c.found.isna().all() and np.isnan(found_early(e,p)); return
    assert c.iloc[0].tolist()==[0,0] and c.iloc[-1].tolist()==[1,1] and (c.diff()[1:]>=0).all().all()
    np.testing.assert_allclose(found_early(e,p)+found_early(e,-np.array(p)), 1)          # the reverse order finds late what this finds early
    np.testing.assert_allclose(found_early(e,[0]*len(e)), .5)
    assert found_early(e,e)>=found_early(e,p)-1e-12                                      # nothing beats knowing
    g,mean = np.random.default_rng(0),[]
    for _ in range(300): # ties in a random order, on average
        o = np.lexsort([g.random(len(e)), -np.array(p)])
        mean.append(np.trapezoid(np.r_[0,np.cumsum(np.array(e)[o])]/sum(e), np.linspace(0,1,len(e)+1)))
    assert abs(np.mean(mean)-found_early(e,p))<.07

@given(seeds, counts, st.floats(0,1))
@settings(max_examples=30, deadline=None)
def test_own_doubt_is_what_the_same_model_says_alone(seed, n, t):
    "With boxes of an image far apart, so that no box confirms another"
    ann = study(seed)
    g = np.random.default_rng(seed)
    k = np.arange(n)
    p = pd.DataFrame(dict(image_id=[f'i{o}' for o in k%6], x1=k//6*20., y1=0., x2=k//6*20.+10, y2=10., label='c0', score=g.random(n)))[pred_cols]
    np.testing.assert_allclose(agreement(ann, p[p.score>=t], p)[1].suspicion, own_doubt(ann, p, t))

def test_thresholds():
    ann = Annotations(pd.DataFrame(dict(image_id=['i0'], height=100, width=100)), pd.DataFrame(dict(image_id=['i0'], x1=[0.], y1=[0.], x2=[10.], y2=[10.], label=['c0'])), ['c0'])
    p = pd.DataFrame(dict(image_id='i0', x1=[0.,50], y1=[0.,50], x2=[10.,60], y2=[10.,60], label='c0', score=[.6,.7]))[pred_cols]
    assert precise_threshold(ann, p, .5)==.6
    with pytest.raises(ValueError, match='the best is 0.500'): precise_threshold(ann, p, .9)
    with pytest.raises(ValueError, match='in percent'): precise_threshold(ann, p, 90)

def test_tables_that_have_not_been_judged_and_other_splits():
    ann = study(0)
    raw = agreement(ann, boxes((0,9)), boxes((1,9)))
    B,I = add_errors(ann, *raw)
    with pytest.raises(ValueError, match="lacks .'error'.*add_errors"): flag_value(ann, raw[1])
    with pytest.raises(ValueError, match="lacks .'missed'.*add_errors"): reread(ann, raw[1])
    other = Annotations(ann.images.assign(image_id=['x',*ann.images.image_id[1:]]), ann.boxes[ann.boxes.image_id!='i0'], ann.classes)
    for a in (other, ann.where(ann.images.image_id!='i0')):
        with pytest.raises(ValueError, match='another split'): reread(a, I)
    with pytest.raises(ValueError, match='another split'): add_errors(ann, raw[0], raw[1][1:])
    for n in (0,-1):
        with pytest.raises(ValueError, match='give no interval'): flag_value(ann, I, n=n)

def test_an_order_that_is_none():
    for f in (finding_curve,found_early):
        with pytest.raises(ValueError, match='priority of item 2 is NaN'): f([0,1,1], [.2,.3,np.nan])
        with pytest.raises(ValueError, match='errors of item 0 is NaN'): f([np.nan,1], [.2,.3])
        for p in ([.1],[.1,.2,.3],[[.1,.2]],.1):
            with pytest.raises(ValueError, match='one of each'): f([0,1], p)
    assert len(finding_curve([], []))==1

def test_a_doubt_on_a_shown_box_is_a_doubt_and_no_flag():
    ann = study(0)
    p = pd.DataFrame(dict(image_id='i0', x1=[0.,1], y1=0., x2=[10.,11], y2=10., label='c0', score=[.9,.4]))[pred_cols]
    assert own_doubt(ann, p, .5)[0]==.4 and agreement(ann, p[p.score>=.5], p)[1].suspicion[0]==0
