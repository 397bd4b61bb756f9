"Weights, draws, thresholds and confusion of several classes: against plain loops, on odd input, and in a run from the shell to the report"
import json, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from lungdet.classes import *
from lungdet.classes import NOTHING
from lungdet.config import read_config
from lungdet.core import XYXY, data_path
from lungdet.data import repeat_factors
from lungdet.evaluate import image_level, pair_iou
from lungdet.formats import Annotations, read_rsna
from lungdet.imagewise import image_table, per_class
from lungdet.loss import RetinaLoss
from lungdet.anchors import Anchors
from lungdet.operate import OperatingPoint, level_scores
from lungdet.train import evaluate_run, main, schema, train
from lungdet.bootstrap import class_intervals, intervals

seeds = st.integers(0, 2**31)
NAMES = ['a','b','c']

def random_set(seed, n=40, classes=NAMES, lesions=60, boxes=150):
    "Images of half as many patients, lesions and boxes of random classes on a small grid, so that they meet"
    rng = np.random.default_rng(seed)
    ids = np.array([f'i{k}' for k in range(n)])
    def rows(m):
        x,y = 25.*rng.integers(0,3,(2,m))
        return pd.DataFrame(dict(image_id=ids[rng.integers(0,n,m)], x1=x, y1=y, x2=x+rng.integers(15,25,m), y2=y+rng.integers(15,25,m), label=np.array(classes)[rng.integers(0,len(classes),m)]))
    images = pd.DataFrame(dict(image_id=ids, patient_id=[f'p{k//2}' for k in range(n)], height=100, width=100))
    return Annotations(images, rows(lesions), list(classes)),rows(boxes).assign(score=rng.integers(0,50,boxes)/50)

# Weights

@given(st.lists(st.integers(1,500), min_size=1, max_size=8), st.floats(.01,.99), st.sampled_from([0.,.5,.9,.99,.999,.9999]))
@settings(max_examples=60, deadline=None)
def test_class_alpha_is_the_formula_and_weighs_all_lesions_as_before(n, alpha, beta):
    labels = np.repeat(np.arange(len(n)).astype(str), n)
    images = pd.DataFrame(dict(image_id=[str(i) for i in range(len(labels))], height=9, width=9))
    ann = Annotations(images, pd.DataFrame(dict(image_id=images.image_id, x1=1, y1=1, x2=5, y2=5, label=labels)), sorted(set(labels)))
    n = np.array([n[int(c)] for c in ann.classes])
    a = np.array(class_alpha(ann, alpha, beta))
    odds = a/(1-a)/(alpha/(1-alpha))
    assert ((0<a)&(a<1)).all() and (odds*n).sum()/n.sum()==pytest.approx(1)
    effective = np.array([sum(beta**i for i in range(k)) for k in n])
    np.testing.assert_allclose(odds/odds[0], effective[0]/effective, rtol=1e-6)
    RetinaLoss(Anchors(), (64,64), alpha=a.tolist()).check_classes(len(a))

def test_class_alpha_refuses():
    ann,_ = random_set(0)
    for kw in (dict(alpha=0.),dict(alpha=1.),dict(beta=1.),dict(beta=-.1)):
        with pytest.raises(ValueError, match='alpha lies between 0 and 1'): class_alpha(ann, **kw)
    for kw in (dict(alpha=[.2,.3,.4]),dict(alpha=None),dict(alpha='.25'),dict(beta=[.9])):
        with pytest.raises(ValueError, match='each is one number'): class_alpha(ann, **kw)
    for bad in ('yes',None,[.5]):
        with pytest.raises(ValueError, match='no share of the images'): class_draws(ann, bad)
    with pytest.raises(ValueError, match="no lesion of class 'd'"): class_alpha(Annotations(ann.images, ann.boxes, [*NAMES,'d']))

# Draws

@given(seeds, st.floats(0,1))
@settings(max_examples=25, deadline=None)
def test_class_draws_are_what_weights_give(seed, balance):
    ann,_ = random_set(seed, lesions=25)
    often = repeat_factors(ann, ann.images.image_id.tolist(), balance)
    got = class_draws(ann, balance)
    for c in NAMES:
        has = ann.images.image_id.isin(ann.boxes.image_id[ann.boxes.label==c]).to_numpy()
        assert got.images[c]==has.sum()
        assert got.drawn[c]==pytest.approx((often.to_numpy()*has).sum()/often.sum()*len(ann))

def test_class_without_an_image():
    ann,_ = random_set(1)
    t = class_draws(Annotations(ann.images, ann.boxes, [*NAMES,'d']), .5)
    assert t.loc['d',['images','drawn']].tolist()==[0,0] and np.isnan(t.times['d'])

# Thresholds

@given(seeds)
@settings(max_examples=5, deadline=None)
def test_no_threshold_has_a_larger_index(seed):
    ann,preds = random_set(seed)
    preds = preds[preds.score>0]
    point,table = tune_classes(ann, preds)
    for c,(a,p) in per_class(ann, preds).items():
        def youden(t): return image_level(a, p, t)[['sensitivity','specificity']].sum()-1
        best,others = youden(table.threshold[c]),{t:youden(t) for t in p.score.unique()}
        assert table.youden[c]==pytest.approx(best)
        assert all(j<=best+1e-9 and (t<=table.threshold[c]+1e-9 or j<best-1e-9) for t,j in others.items()) # of equals the highest
    calls = image_table(ann, point.apply(preds), .5)
    np.testing.assert_allclose(calls.loc[NAMES,['sensitivity','specificity']], table[['sensitivity','specificity']])
    assert point.score==pytest.approx(table.youden.mean()) and point.n==len(ann)

def test_classes_that_nobody_has_or_nobody_finds_are_never_called():
    ann,preds = random_set(3)
    only = preds[preds.label!='b']
    point,table = tune_classes(Annotations(ann.images, ann.boxes[ann.boxes.label!='c'], NAMES), only)
    assert not point.apply(only).label.isin(['b','c']).any() and table.positive['c']==0 and np.isnan(table.sensitivity['c'])
    sure = preds.assign(score=1.)
    assert len(tune_classes(ann, sure)[0].apply(sure)) in {0,*preds.label.value_counts().cumsum(),*preds.label.value_counts()} # scores of 1 have log-odds as well
    for bad in ((ann,preds[:0]),(Annotations(ann.images, ann.boxes[:0], NAMES),preds)):
        with pytest.raises(ValueError, match='leave nothing to choose'): tune_classes(*bad)

@given(seeds, st.lists(st.floats(1e-6,1-1e-6), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_levelled_scores_keep_the_order_and_the_calls(seed, t):
    _,p = random_set(seed)
    by = dict(zip(NAMES,t))
    p = pd.concat([p, pd.DataFrame(dict(label=NAMES, score=t)), pd.DataFrame(dict(label=NAMES, score=np.nextafter(t,0)))], ignore_index=True)
    q = level_scores(p, by)
    assert ((q.score>=.5)==(p.score>=p.label.map(by))).all() and q.score.between(0,1).all()
    for c in NAMES:
        o = p[p.label==c].score.sort_values()
        assert q.score[o.index].is_monotonic_increasing

def test_a_point_with_thresholds_survives_a_file(tmp_path):
    ann,preds = random_set(5)
    point,_ = tune_classes(ann, preds)
    back = OperatingPoint.load(point.save(tmp_path/'p.json'))
    assert back==point and back.lowest==pytest.approx(min(point.by_class.values())) and 'a from' in repr(back)
    pd.testing.assert_frame_equal(back.apply(preds), point.apply(preds))
    assert OperatingPoint(.3).lowest==.3 and OperatingPoint(.2, by_class=dict(a=.5)).lowest==pytest.approx(.2)
    for bad in (0.,1.,-.1):
        with pytest.raises(ValueError, match='must lie between 0 and 1'): OperatingPoint(.5, by_class=dict(a=bad))
    with pytest.raises(ValueError, match="no threshold for 'b'"): OperatingPoint(.5, by_class=dict(a=.5)).apply(preds)

def test_cross_tune_never_sees_the_patient():
    "The thresholds of a hand do not change with the truth of its own patients"
    ann,preds = random_set(7, n=60, lesions=100, boxes=300)
    got = cross_tune(ann, preds, k=3)
    assert got.index.equals(preds.index) and got[['image_id',*XYXY,'label']].equals(preds[['image_id',*XYXY,'label']])
    from lungdet.splits import deal
    hand = deal(ann, 3, 42)
    for i in range(3):
        rest = ann.where(hand!=i)
        by = tune_classes(rest, preds[preds.image_id.isin(rest.images.image_id)])[0].by_class
        mine = preds.image_id.isin(ann.images.image_id[hand==i])
        assert ((got[mine].score>=.5)==(preds[mine].score>=preds[mine].label.map(by))).all()

def test_cross_tune_of_an_index_that_repeats():
    ann,preds = random_set(7, n=60, lesions=100, boxes=300)
    twice = preds.set_axis(np.arange(300)%100)
    got = cross_tune(ann, twice, k=3)
    assert got.index.equals(twice.index)
    pd.testing.assert_frame_equal(got.reset_index(drop=True), cross_tune(ann, preds, k=3).reset_index(drop=True))
    with pytest.raises(ValueError, match='no image of this id'): cross_tune(ann.where(ann.images.image_id!='i0'), preds)

# Intervals

def test_intervals_of_each_class_are_those_of_the_class_alone():
    ann,preds = random_set(11)
    by = class_intervals(ann, preds, dict(a=.2,b=.5,c=.7), ('AP50','AUC','sensitivity'), n=50)
    for (c,(a,p)),t in zip(per_class(ann, preds).items(), (.2,.5,.7)):
        pd.testing.assert_frame_equal(by.loc[c], intervals(a, p, t, ('AP50','AUC','sensitivity'), n=50), check_names=False)
    assert by.loc[('macro','AUC'),'value']==pytest.approx(by.xs('AUC', level='figure').value[NAMES].mean())
    width = (by.hi-by.lo).xs('AP50', level='figure')
    assert width['macro']<=width[NAMES].max()

# Confusion

def slow_confusion(ann, preds, threshold, iou):
    t = pd.DataFrame(0, index=[*ann.classes,NOTHING], columns=[*ann.classes,NOTHING])
    for i in ann.images.image_id:
        lesions,free = ann.of(i),[True]*len(ann.of(i))
        for _,p in preds[(preds.image_id==i)&(preds.score>=threshold)].sort_values('score', ascending=False, kind='stable').iterrows():
            o = [float(pair_iou(p[XYXY].to_numpy(float), l[XYXY].to_numpy(float))) if f else -1 for f,(_,l) in zip(free,lesions.iterrows())]
            k = int(np.argmax(o)) if o else -1
            if o and o[k]>iou: free[k] = False; t.loc[lesions.label.iloc[k],p.label] += 1
            else: t.loc[NOTHING,p.label] += 1
        for f,l in zip(free,lesions.label): t.loc[l,NOTHING] += f
    return t

@given(seeds, st.sampled_from([0.,.3,.9]), st.sampled_from([.3,.5]))
@settings(max_examples=12, deadline=None)
def test_class_confusion_is_the_plain_loop(seed, threshold, iou):
    ann,preds = random_set(seed, n=12, lesions=20, boxes=60)
    got = class_confusion(ann, preds, threshold, iou)
    assert (got.to_numpy()==slow_confusion(ann, preds, threshold, iou).to_numpy()).all()
    assert got.loc[NAMES].sum(axis=1).tolist()==ann.boxes.label.value_counts().reindex(NAMES, fill_value=0).tolist()

def test_class_confusion_of_nothing():
    ann,preds = random_set(2)
    t = class_confusion(ann, preds, 1.)
    assert t.loc[NAMES,NOTHING].sum()==len(ann.boxes) and t.to_numpy().sum()==len(ann.boxes)
    healthy = Annotations(ann.images, ann.boxes[:0], NAMES)
    assert class_confusion(healthy, preds).loc[NOTHING].sum()==len(preds)
    plot_confusion(class_confusion(healthy, preds))
    with pytest.raises(ValueError, match="'nothing'"): class_confusion(Annotations(ann.images, ann.boxes[:0], ['nothing']), preds[:0])

def test_class_confusion_refuses_what_it_would_lose():
    ann,preds = random_set(2)
    with pytest.raises(ValueError, match="a label that is none of"): class_confusion(ann, preds.assign(label=preds.label.where(preds.index>0, 'd')))
    with pytest.raises(ValueError, match='no image of this id'): class_confusion(ann, preds.assign(image_id='x'))
    for t in (50,-1,np.nan):
        with pytest.raises(ValueError, match='in percent'): class_confusion(ann, preds, t)
    with pytest.raises(ValueError, match='no threshold for'): class_confusion(ann, preds, dict(a=.5))
    with pytest.raises(ValueError, match='must lie between 0 and 1'): class_confusion(ann, preds, dict(a=.5,b=0,c=1))

@given(seeds, st.lists(st.floats(.05,.95), min_size=3, max_size=3))
@settings(max_examples=10, deadline=None)
def test_class_confusion_at_a_threshold_for_each_class(seed, t):
    ann,preds = random_set(seed, n=12, lesions=20, boxes=60)
    by = dict(zip(NAMES,t))
    got = class_confusion(ann, preds, by)
    assert (got.to_numpy()==slow_confusion(ann, level_scores(preds, by), .5, .5).to_numpy()).all()
    assert got.sum().iloc[:-1].sum()==(preds.score>=preds.label.map(by)).sum()

# From the shell to the report

TINY = ['format=saved','images=30','png_size=64','dls.size=64','dls.bs=8','backbone=resnet18','pretrained=false','width=16','depth=1','frozen=0','classify=1','epochs=1','prior=0.3']

def test_a_run_with_several_classes(tmp_path, capsys):
    ann = read_rsna(data_path())
    b = ann.boxes
    names = np.where((b.y2-b.y1)/(b.x2-b.x1)>1.3, 'tall', 'wide')
    Annotations(ann.images, b.assign(label=names), ['tall','wide']).save(tmp_path/'data')
    (tmp_path/'e.toml').write_text('')
    changes = [*TINY, f'path={tmp_path/"data"}', 'balance=0.5', 'loss.alpha=[0.2, 0.5]']
    assert main([str(tmp_path/'e.toml'), *changes, '--out', str(tmp_path), '--name', 'run'])==0, capsys.readouterr().err
    cfg = read_config(tmp_path/'run'/'config.toml', schema)
    assert cfg['loss']['alpha']==(.2,.5) and cfg['dls']['balance']==.5
    point = OperatingPoint.load(tmp_path/'run'/'point.json')
    assert set(point.by_class)=={'tall','wide'}
    report = evaluate_run(tmp_path/'run')
    assert report.point==point and report.tuned_here and {'macro AUC','macro sensitivity','macro specificity'}<=set(report.headline().index)
    page = (tmp_path/'run'/'report.html').read_text()
    assert 'macro sensitivity' in page and 'AP50 by class' in page and 'shifted by its own threshold' in page
    figures = pd.DataFrame(json.loads((tmp_path/'run'/'report.json').read_text())['figures'])
    assert {'tall','wide','macro'}<=set(figures[figures.part=='class'].group) and not figures[figures.part=='class'].duplicated(['group','figure']).any()
    with pytest.raises(ValueError, match='alpha has 2 numbers, and there are 3 classes'):
        three = Annotations(ann.images, b.assign(label=np.resize(['tall','wide','x'], len(b))), ['tall','wide','x'])
        three.save(tmp_path/'three')
        train(read_config(None, schema, [*TINY, f'path={tmp_path/"three"}', 'loss.alpha=[0.2, 0.5]']), tmp_path/'other')
