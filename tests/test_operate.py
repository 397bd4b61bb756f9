"Operating points against brute force, seals that keep their secret, and points that refuse"
import json
from dataclasses import FrozenInstanceError, replace
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import set_seed
from hypothesis import given, settings, strategies as st
from torchvision.ops import nms as torch_nms
from lungdet.evaluate import best_threshold, image_level, precision_recall, rsna_score
from lungdet.formats import Annotations
from lungdet.learner import detect, retinanet_learner
from lungdet.data import detection_dls
from lungdet.operate import *
from test_data import toy
from test_evaluate import ONE, XYXY, annot, frame, random_case, slow_iou

def many(seed, patients=False): # a larger random case
    parts = [random_case(4*seed+k, ('A','B')) for k in range(3)]
    def named(df, k): return df.assign(image_id=f'{k}.'+df.image_id.astype(str))
    def both(i): return pd.concat([named(o[0].boxes if i else o[1], k) for k,o in enumerate(parts)], ignore_index=True)
    images = pd.concat([named(o[0].images, k) for k,o in enumerate(parts)], ignore_index=True)
    if patients: images['patient_id'] = [f'p{i//2}' for i in range(len(images))]
    return Annotations(images, both(1), ['A','B']),both(0)

# ---------- the knobs ----------
def slow_nms(p, thr):
    keep = []
    for i in p.sort_values('score', ascending=False, kind='stable').index:
        r = p.loc[i]
        same = [k for k in keep if p.image_id[k]==r.image_id and p.label[k]==r.label]
        if all(slow_iou(r[XYXY].tolist(), p.loc[k,XYXY].tolist())<=thr+1e-6 for k in same): keep.append(i)
    return p.loc[sorted(keep)]

@pytest.mark.parametrize('thr', [0.,.21,.47,1.])
def test_nms_equals_a_slow_one(thr):
    for seed in range(12):
        p = many(seed)[1]
        pd.testing.assert_frame_equal(nms_table(p,thr), slow_nms(p,thr))

def test_nms_equals_torchvision_far_from_the_origin():
    "Many images at once must not cost precision, as offsetting the boxes of each would"
    g = np.random.default_rng(0); n = 900
    xy = g.integers(0,3000,(n,2)); b = np.concatenate([xy,xy+g.integers(900,2000,(n,2))],1).astype(float)
    p = pd.DataFrame(b, columns=XYXY).assign(image_id=[f'i{o:03}' for o in g.integers(0,300,n)], label='A', score=g.random(n).astype('float32'))
    want = np.concatenate([d.index[torch_nms(torch.tensor(d[XYXY].to_numpy()), torch.tensor(d.score.to_numpy(float)), .4).numpy()] for _,d in p.groupby('image_id')])
    assert nms_table(p,.4).index.tolist()==sorted(want)

def test_nms_keeps_index_columns_and_is_done_once():
    p = many(3)[1].assign(extra=1).sample(frac=1, random_state=0)
    one = nms_table(p,.3)
    assert one.index.isin(p.index).all() and (one.index==p.index[p.index.isin(one.index)]).all() and list(one)==list(p)
    pd.testing.assert_frame_equal(nms_table(one,.3), one)
    assert len(nms_table(p[:0],.3))==0

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0,900),st.floats(0,900),st.floats(1,200),st.floats(1,200)), min_size=1, max_size=9), st.floats(.05,1))
def test_shrink_keeps_centre_and_proportion(rows, by):
    p = frame({'a':rows}, np.linspace(.1,.9,len(rows)))
    q,b = shrink_boxes(p,by)[XYXY].to_numpy(),p[XYXY].to_numpy()
    assert q[:,:2]+q[:,2:]==pytest.approx(b[:,:2]+b[:,2:]) and q[:,2:]-q[:,:2]==pytest.approx(by*(b[:,2:]-b[:,:2]), rel=1e-6)

def test_shrink_by_1_is_to_the_last_digit():
    p = frame({'a':[[.1,.2,.3,.7]]}, [.5])
    pd.testing.assert_frame_equal(shrink_boxes(p,1), p, check_exact=True)

@pytest.mark.parametrize('k,score', [(1,1),(.875,1),(.85,.875),(.8,.625)])
def test_shrunk_truth_scores_what_it_should(k, score):
    ann = annot({'a':[[100,100,320,400]],'b':[[10,500,217,298]]})
    assert rsna_score(ann, OperatingPoint(.5, shrink=k).apply(ann.boxes.assign(score=.9)))==score

# ---------- apply ----------
def test_order_of_threshold_and_nms_does_not_matter():
    for seed in range(12):
        p = many(seed)[1]
        for t in (.2,.5,.8): pd.testing.assert_frame_equal(nms_table(p[p.score>=t],.25), nms_table(p,.25).query('score>=@t'))

def test_apply_is_the_three_steps():
    for seed in range(8):
        p = many(seed)[1]
        want = shrink_boxes(slow_nms(p,.21), .9)
        pd.testing.assert_frame_equal(OperatingPoint(.4,.21,.9).apply(p), want[want.score>=.4])
        pd.testing.assert_frame_equal(OperatingPoint().apply(p), p)

def test_apply_to_nothing_and_to_the_wrong_thing():
    p = frame({'a':ONE}, [.5])
    assert len(OperatingPoint(.5,.2,.9).apply(p[:0]))==0 and len(OperatingPoint(.5).apply(p))==1 and len(OperatingPoint(.51).apply(p))==0
    with pytest.raises(ValueError, match=r"lack \['score'\]"): OperatingPoint(.5).apply(p.drop(columns='score'))

def test_apply_leaves_its_input_alone():
    p = many(1)[1]; before = p.copy()
    OperatingPoint(.4,.2,.9).apply(p); tune_rsna(*many(1))
    pd.testing.assert_frame_equal(p, before)

def test_point_on_what_detect_finds(tmp_path):
    set_seed(0)
    learn = retinanet_learner(detection_dls(toy(tmp_path), size=64, bs=2), 'mobilenetv3_small_050', pretrained=False, width=16, depth=1)
    found = detect(learn, score_thr=.001, nms_thr=.5)
    t = found.score.quantile(.6)
    shown = OperatingPoint(t, .2, .8).apply(found)
    assert 0<len(shown)<len(found) and (shown.score>=t).all() and list(shown)==list(found)
    strict = detect(learn, score_thr=.001, nms_thr=.2, max_det=10**4)
    assert strict.score.max()==shown.score.max() # the best box of an image survives every NMS
    for pt in (OperatingPoint(t, .2, .8), OperatingPoint(.001, .3, detect_nms=.6)): # `detect` does it all by itself
        want = pt.apply(detect(learn, score_thr=min(.05, pt.threshold), nms_thr=pt.detect_nms)).reset_index(drop=True)
        assert len(want); pd.testing.assert_frame_equal(detect(learn, point=pt), want)

# ---------- values ----------
@pytest.mark.parametrize('kw,match', [(dict(threshold=50),'percent'), (dict(threshold=-.1),'threshold'), (dict(threshold=np.nan),'threshold'), (dict(nms=1.2),'nms'),
    (dict(shrink=0),'shrink=0'), (dict(shrink=1.1),'shrink'), (dict(nms=.6),'looser'), (dict(nms=.4, detect_nms=.3),'looser'), (dict(detect_nms=2),'detect_nms')])
def test_impossible_points(kw, match):
    with pytest.raises(ValueError, match=match): OperatingPoint(**kw)

def test_point_is_frozen_hashable_and_plain():
    o = OperatingPoint(np.float32(.5), np.float64(.2), score=np.float64(.1), seen=['b','a'])
    assert type(o.threshold) is type(o.nms) is type(o.score) is float and o.seen==frozenset('ab') and hash(o)==hash(replace(o)) and o==replace(o)
    with pytest.raises(FrozenInstanceError): o.threshold = 0
    assert 'threshold 0.5, nms 0.2' in repr(o) and 'nms' not in repr(OperatingPoint(.3))

# ---------- tuning ----------
@pytest.mark.parametrize('strict', [True,False])
def test_tuning_equals_brute_force(strict):
    n = 0
    for seed in range(14):
        ann,p = many(seed)
        if not (len(p) and len(ann.boxes)): continue
        o,table = tune_rsna(ann, p, shrinks=(1,.9,.7), nmss=(None,.3), strict=strict)
        slow = {(m,s):best_threshold(ann, shrink_boxes(p if m is None else slow_nms(p,m), s), strict) for m in (None,.3) for s in (1,.9,.7)}
        assert o.score==pytest.approx(max(v for _,v in slow.values())) and rsna_score(ann, o.apply(p), strict=strict)==pytest.approx(o.score)
        for r in table.itertuples(): assert (r.threshold,r.rsna)==pytest.approx(slow[(None if np.isnan(r.nms) else r.nms),r.shrink])
        n += 1
    assert n>10

def test_of_equals_the_gentlest():
    ann = annot({'a':[[100,100,300,300]],'b':[]})
    p = frame({'a':[[100,100,300,300]]}, [.6])
    o,table = tune_rsna(ann, p, shrinks=(.9,1.,.95), nmss=(.1,None,.4)) # any order
    assert (o.nms,o.shrink,o.threshold,o.score)==(None,1.,.6,1.) and (table.rsna==1).all()

def test_several_score_thresholds_pick_the_highest():
    assert tune_rsna(annot({'a':ONE}), frame({'a':ONE},[.7]), shrinks=[1.], nmss=[None])[0].threshold==.7

def test_tuning_needs_something():
    for ann,p in ((annot({'a':[]}),frame({'a':ONE},[.5])), (annot({'a':ONE}),frame({},[]))):
        with pytest.raises(ValueError, match='nothing to choose|is this the right split'): tune_rsna(ann, p)
    with pytest.raises(ValueError, match='no sensitivity'): tune_sensitivity(annot({'a':[]}), frame({'a':ONE},[.5]))
    with pytest.raises(ValueError, match='0 of 1 are found'): tune_sensitivity(annot({'a':ONE}), frame({},[]))
    with pytest.raises(ValueError, match='looser'): tune_rsna(annot({'a':ONE}), frame({'a':ONE},[.7]), nmss=(.2,.4), detect_nms=.3)
    with pytest.raises(ValueError, match='no image of this id'): tune_rsna(annot({'b':ONE}), frame({'a':ONE},[.7]))

@pytest.mark.parametrize('level', ['image','box'])
@pytest.mark.parametrize('at_least', [.1,.5,2/3,.8,1.])
def test_sensitivity_is_reached_by_the_highest_threshold(level, at_least):
    reached = 0
    for seed in range(8):
        ann,noise = many(seed)
        p = pd.concat([noise, ann.boxes[::2 if seed%4==0 else 1].assign(score=np.random.default_rng(seed).integers(0,9,len(ann.boxes))[::2 if seed%4==0 else 1]/8)], ignore_index=True)
        def sens(t): # by another road
            q = p[p.score>=t]
            if level=='image': return image_level(ann, p, t).sensitivity
            return precision_recall(ann, q).recall.iloc[-1] if len(q) else 0.
        if not len(ann.boxes): continue
        good = [t for t in p.score.unique() if sens(t)>=at_least-1e-9]
        if good:
            o = tune_sensitivity(ann, p, at_least, level)
            assert o.threshold==max(good) and o.score==pytest.approx(sens(o.threshold)) and level in o.goal
            reached += 1
        else:
            with pytest.raises(ValueError, match='at any threshold'): tune_sensitivity(ann, p, at_least, level)
    assert reached>2

@pytest.mark.parametrize('kw,match', [(dict(at_least=90),'percent'), (dict(at_least=0),'percent'), (dict(level='lesion'),"'image' or 'box'")])
def test_bad_wishes(kw, match):
    with pytest.raises(ValueError, match=match): tune_sensitivity(annot({'a':ONE}), frame({'a':ONE},[.7]), **kw)

def test_expected_sensitivity_on_new_images_is_that_of_the_order_statistic():
    "The answer of the chapter's exercise: 19 of 20 promises 19/21"
    g = np.random.default_rng(0)
    ann = annot({f'i{k}':ONE for k in range(20)})
    def one():
        s = g.random(20)
        return 1-tune_sensitivity(ann, frame({f'i{k}':ONE for k in range(20)}, s), .95).threshold # uniform scores
    assert np.mean([one() for _ in range(300)])==pytest.approx(19/21, abs=.012)

def test_picture_of_the_table():
    table = tune_rsna(*many(1), shrinks=(1,.9), nmss=(None,.3,.1))[1].assign(rsna=[.1,.2,.3,.25,.1,.28])
    ax = plot_tuning(table)
    assert [o.get_text() for o in ax.get_yticklabels()]==['as is','0.3','0.1'] and len(ax.texts)==6
    assert ax.patches[0].get_xy()==(.5,.5) and {o.get_position():o.get_text() for o in ax.texts}[1,1]=='0.300' # shrink 1, NMS .3
    plt.close('all')

# ---------- refusal ----------
def test_a_point_knows_images_and_people():
    ann,p = many(0, patients=True)
    n = len(ann)
    first = ann.where(ann.images.index<3) # p0, and one of the two images of p1
    o = tune_rsna(ann, p, shrinks=[1.], nmss=[None])[0]
    assert o.known(ann)==dict(images=n, patients=0) and o.n==n
    o = tune_sensitivity(annot({i:ONE for i in first.images.image_id}, patient_id=first.images.patient_id.tolist()), frame({i:ONE for i in first.images.image_id},[.5]*3), .5)
    assert o.known(ann)==dict(images=3, patients=1) and o.known(ann.where(ann.images.index>3))==dict(images=0, patients=0)
    for part in (ann, first, ann.where(ann.images.index==3)):
        with pytest.raises(ValueError, match='would flatter'): o.check(part)
        assert o.check(part, force=True) is o
    assert o.check(ann.where(ann.images.index>3)) is o

def test_unknown_patients_are_strangers():
    ids = list('abcd')
    ann = annot({i:ONE for i in ids}) # nobody's patient is known
    o = tune_sensitivity(ann.where([True,True,False,False]), frame({'a':ONE,'b':ONE},[.5,.6]), 1.)
    assert o.known(ann)==dict(images=2, patients=0)
    named = annot({i:ONE for i in ids}, patient_id=['a','b','a','b']) # later the patients are known; the images are still recognised
    assert o.known(named)==dict(images=2, patients=0)

def test_image_ids_and_patient_ids_are_not_mixed_up():
    o = tune_sensitivity(annot({'x':ONE}, patient_id=['7']), frame({'x':ONE},[.5]), 1.)
    assert o.known(annot({'7':ONE,'y':ONE}, patient_id=['x','q']))==dict(images=0, patients=0)

def test_a_point_of_nobody_judges_anybody(): assert OperatingPoint(.3).check(annot({'a':ONE})).n==0

def test_seals_do_not_depend_on_order_but_on_the_data_set():
    ann = annot({i:ONE for i in 'abc'}); p = frame({i:ONE for i in 'abc'},[.5,.6,.7])
    back = Annotations(ann.images[::-1], ann.boxes, ann.classes)
    a,b = tune_sensitivity(ann,p,.5),tune_sensitivity(back,p,.5)
    assert a==b and len(a.seen)==6
    part = tune_sensitivity(ann.where([True,True,False]), p[:2], .5)
    assert not part.seen & a.seen # a patient in common does not show

# ---------- written down ----------
def test_round_trip(tmp_path):
    ann,p = many(2, patients=True)
    for o in (tune_rsna(ann,p)[0], tune_sensitivity(ann,p,.3), OperatingPoint(), OperatingPoint(.1,.2,.3,.4,'ä',.5,6,frozenset('x'),'y')):
        path = o.save(tmp_path/'new'/'point.json')
        assert OperatingPoint.load(path)==o==OperatingPoint.from_dict(o.to_dict()) and [f.name for f in path.parent.iterdir()]==['point.json']
        assert json.loads(path.read_text())==o.to_dict()
    text = tune_rsna(ann,p)[0].save(path).read_text()
    assert not any(f'"{i}"' in text for i in [*ann.images.image_id,*ann.images.patient_id])

def test_loaded_point_refuses_and_applies_alike(tmp_path):
    ann,p = many(2, patients=True)
    o = tune_rsna(ann,p)[0]; back = OperatingPoint.load(o.save(tmp_path/'p.json'))
    pd.testing.assert_frame_equal(back.apply(p), o.apply(p))
    with pytest.raises(ValueError, match='would flatter'): back.check(ann)

@pytest.mark.parametrize('text', ['', '{', '[]', '3', '{"threshold":50}', '{"treshold":0.5}', '{"nms":0.9}', '{"threshold":"high"}', '{"threshold":null,"seen":3}'])
def test_damaged_files(tmp_path, text):
    (tmp_path/'p.json').write_text(text)
    with pytest.raises(ValueError, match='p.json holds no operating point'): OperatingPoint.load(tmp_path/'p.json')
    with pytest.raises(ValueError, match='holds no operating point'): OperatingPoint.load(tmp_path/'none.json')

@pytest.mark.parametrize('d', [{}, dict(threshold=None), dict(threshold=.5, salt=None), dict(threshold=.5, seen='abc'), dict(threshold=.5, shrink=None)])
def test_points_that_lack_something(d):
    with pytest.raises(ValueError): OperatingPoint.from_dict(d)
