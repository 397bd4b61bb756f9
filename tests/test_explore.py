"Chapter 01: against brute force, hand values, and the whole challenge's labels"

import json, subprocess, sys
from pathlib import Path
import matplotlib; matplotlib.use('agg')
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st

from lungdet.core import XYXY
from lungdet.evaluate import rsna_score
from lungdet.explore import (box_heatmap, box_stats, boxes_per_image, challenge_tables, class_counts, plot_counts, rate_by, shortcut_auc,
                             show_case)
from lungdet.formats import Annotations
from real import REAL

def table(b, ids=None):
    b = np.asarray(b, float).reshape(-1,4)
    return pd.DataFrame(b, columns=['x1','y1','x2','y2']).assign(image_id=ids if ids is not None else [f'i{k}' for k in range(len(b))])

# --- heatmap

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0,99)]*2, *[st.floats(.1,60)]*2), min_size=1, max_size=8), st.integers(1,40),
       st.sampled_from([(100,100),(100,160),(130,100)]))
def test_heatmap_is_brute_force(bs, bins, size):
    h,w = size
    off = lambda v: round(v,3)+.0001234 # no edge on the centre of a cell, where rounding decides
    b = np.array([[off(x),off(y),min(off(x)+off(dx),w),min(off(y)+off(dy),h)] for x,y,dx,dy in bs])
    b = b[(b[:,2]>b[:,0])&(b[:,3]>b[:,1])]
    want = np.zeros((bins,bins))
    for x1,y1,x2,y2 in b:
        for i in range(bins):
            for j in range(bins):
                if x1<=(j+.5)/bins*w<x2 and y1<=(i+.5)/bins*h<y2: want[i,j] += 1
    got = box_heatmap(table(b), size, bins)*len(b)
    np.testing.assert_allclose(got, want, atol=1e-9)

def test_heatmap_exact_and_with_image_sizes():
    rng = np.random.default_rng(0)
    xy = rng.integers(0, 900, (200,2)); b = np.c_[xy, xy+rng.integers(1,124,(200,2))]
    want = np.zeros((1024,1024))
    for x1,y1,x2,y2 in b: want[y1:y2,x1:x2] += 1
    np.testing.assert_allclose(box_heatmap(table(b), 1024, 1024)*200, want, atol=1e-9)
    boxes = table([[0,0,50,100],[0,0,10,5]], ['a','b'])
    images = pd.DataFrame(dict(image_id=['b','a','c'], height=[10,100,7], width=[20,100,7]))
    np.testing.assert_array_equal(box_heatmap(boxes, images, 2), [[1,0],[.5,0]])
    with pytest.raises(ValueError, match="'b'"): box_heatmap(boxes, images[images.image_id=='a'])

def test_heatmap_of_boxes_that_touch_the_rim():
    assert box_heatmap(table([[0,0,100,100]]), 100, 8).min()==1
    assert box_heatmap(table([[-5,-5,120,300]]), 100, 8).min()==1
    assert box_heatmap(table([[0,0,100,100]]*3, ['a']*3), 100, 4).max()==3 # three boxes on one image

# --- numbers by hand

def test_counts_and_stats():
    images = pd.DataFrame(dict(image_id=list('abcd'), category=['Normal','Lung Opacity','Lung Opacity',None]))
    c = class_counts(images)
    assert c.loc['Lung Opacity','n']==2 and c.loc['Lung Opacity','share']==.5 and c.n.sum()==4
    boxes = table([[0,0,10,20],[5,5,35,65],[1,2,4,4]], ['b','b','c'])
    s = box_stats(boxes)
    assert s.columns.tolist()==['n','5%','50%','95%'] and s.n.tolist()==[3,3,3,3,2]
    assert s['50%'].round(6).tolist()==[10,20,200,2,1.5]
    assert boxes_per_image(boxes).to_dict()=={1:1,2:1} and boxes_per_image(boxes, images).to_dict()=={0:2,1:1,2:1}
    assert [t.get_text() for t in plot_counts(images).texts][0].strip().startswith('2')

def test_rate_by():
    g = rate_by(pd.DataFrame(dict(category=['Lung Opacity']*5+['Normal']*6, view=['AP']*10+['PA'])), 'view')
    assert g.loc['AP',['n','hits','rate']].tolist()==[10,5,.5]
    np.testing.assert_allclose(g.loc['AP',['low','high']].astype(float), [.2366,.7634], atol=1e-4) # Wilson 95 % of 5/10
    assert abs(g.loc['PA','low'])<1e-12 and .7<g.loc['PA','high']<.8

def test_show_case():
    im = np.zeros((64,80), np.uint8)
    boxes = table([[1,2,30,40],[5,5,9,9]], ['a','b'])
    assert len(show_case(im, boxes).patches)==4 and len(show_case(im).patches)==0

@pytest.mark.parametrize('call,why', [
    (lambda b,i: class_counts(i.head(0)), 'empty'),
    (lambda b,i: class_counts(b), 'category'),
    (lambda b,i: class_counts([1]), 'list'),
    (lambda b,i: box_stats(b.head(0)), 'empty'),
    (lambda b,i: box_stats(b.drop(columns='x2')), 'x2'),
    (lambda b,i: box_stats(b.assign(x2=np.nan)), 'negative image'),
    (lambda b,i: box_stats(b.assign(x2=0)), 'xywh'),
    (lambda b,i: box_heatmap(b.assign(y1=np.inf)), 'row 0'),
    (lambda b,i: rate_by(i, 'view'), 'view'),
    (lambda b,i: boxes_per_image(b, i.head(0)), 'images is empty'),
    (lambda b,i: show_case(i.iloc[0]), 'path')])
def test_bad_tables(call, why):
    with pytest.raises(ValueError, match=why): call(table([[0,0,5,5]]), pd.DataFrame(dict(image_id=['a'], category=['Normal'])))

# --- what age, sex and view give away

def people(n, seed=0, planted=False):
    "`n` images whose category is drawn by lot, or, `planted`, follows from the view"
    rng = np.random.default_rng(seed)
    view = rng.choice(['AP','PA'], n)
    hit = view=='AP' if planted else rng.random(n)<.3
    return pd.DataFrame(dict(image_id=[f'i{k}' for k in range(n)], age=rng.integers(1,90,n).astype(float), sex=rng.choice(['F','M'],n), view=view,
                             category=np.where(hit, 'Lung Opacity', 'Normal')))

def test_shortcut_of_labels_by_lot_is_a_coin():
    assert shortcut_auc(people(4000)).auc.between(.46,.54).all()

def test_shortcut_that_is_planted_is_found_where_it_is():
    a = shortcut_auc(people(600, planted=True)).auc
    assert a.index.tolist()==['age','sex','view','age + sex + view']
    assert a['view']==1 and a['age + sex + view']>.999 and abs(a['age']-.5)<.1 and abs(a['sex']-.5)<.1

def test_shortcut_by_age():
    im = people(1000); im['category'] = np.where(im.age>60, 'Lung Opacity', 'Normal')
    assert shortcut_auc(im, ['age']).auc['age']==1
    assert shortcut_auc(im.assign(category=np.where(im.age>60, 'a', 'b')), ['age'], category='b').auc['age']==1

def test_shortcut_keeps_a_person_on_one_side():
    im = people(400).assign(patient_id=[f'p{k//4}' for k in range(400)])
    im['category'] = np.where(im.index//4%2, 'Lung Opacity', 'Normal')
    im['bed'] = im.patient_id
    assert shortcut_auc(im, ['bed']).auc['bed']==pytest.approx(.5)
    assert shortcut_auc(im.drop(columns='patient_id'), ['bed']).auc['bed']>.99
    assert shortcut_auc(im.assign(patient_id=pd.NA), ['bed']).auc['bed']>.99 # unknown: every image a person

@pytest.mark.parametrize('age', [float, 'Float64'])
def test_shortcut_with_gaps_is_repeatable(age):
    im = people(300, planted=True).assign(nothing=pd.NA)
    im['age'] = im.age.where(im.index%7>0).astype(age)
    im['view'] = im['view'].where(im.index%5>0)
    a,b = shortcut_auc(im, ('age','view','nothing')),shortcut_auc(im, ('age','view','nothing'))
    pd.testing.assert_frame_equal(a, b)
    assert a.auc['view']>.85 and a.auc['nothing']==.5

@pytest.mark.parametrize('change,why', [(lambda i: i.drop(columns='sex'), 'sex'), (lambda i: i.head(0), 'empty'), (lambda i: i.assign(category='Normal'), '5 folds'),
                                        (lambda i: i.assign(patient_id='one'), 'found 1')])
def test_shortcut_says_what_is_wrong(change, why):
    with pytest.raises(ValueError, match=why): shortcut_auc(change(people(60)))

# --- the whole challenge

@pytest.fixture(scope='module')
def challenge(): return challenge_tables()

def test_challenge_tables_hold_what_the_files_say(challenge, challenge_labels, challenge_headers):
    images,boxes = challenge
    assert images.columns.tolist()=='image_id path patient_id height width age sex view category'.split() and boxes.columns.tolist()==['image_id',*XYXY,'label']
    assert set(images.image_id)==set(challenge_labels.patientId) and images.image_id.is_unique and images.path.isna().all()
    b = challenge_labels[challenge_labels.Target==1]
    np.testing.assert_array_equal(boxes[XYXY].to_numpy(), np.c_[b.x, b.y, b.x+b.width, b.y+b.height])
    assert boxes.image_id.tolist()==b.patientId.tolist() and (boxes.label=='Lung Opacity').all()
    h = challenge_headers.set_index('PatientID').loc[images.image_id]
    assert h.PatientSex.tolist()==images.sex.tolist() and h.ViewPosition.tolist()==images['view'].tolist()
    old = (h.PatientAge>120).to_numpy()
    assert sorted(h.PatientAge[old])==[148,150,151,153,155] and images.age.isna().tolist()==old.tolist()
    assert images.age[~old].tolist()==h.PatientAge[~old].tolist() and (images.age.min(), images.age.max())==(1,92)
    assert len(Annotations(images.assign(split=pd.NA), boxes, ['Lung Opacity']).boxes)==9555 # passes every check of the label tables

def test_challenge_tables_without_the_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match='pip install torchxrayvision'): challenge_tables()
    class Empty: submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr('importlib.util.find_spec', lambda name: Empty)
    with pytest.raises(FileNotFoundError, match='kaggle_stage_2_train_labels'): challenge_tables()

def test_challenge_tables_do_not_import_the_package():
    run = "import sys; from lungdet.explore import challenge_tables; print(len(challenge_tables()[1]), 'torchxrayvision' in sys.modules)"
    assert subprocess.run([sys.executable,'-c',run], capture_output=True, text=True, check=True).stdout.split()==['9555','False']

def test_whole_challenge(challenge):
    images,boxes = challenge
    c = class_counts(images)
    assert c.n.sum()==26684 and c.loc['Lung Opacity','n']==6012 and c.loc['No Lung Opacity','n']==11821+8851
    assert boxes_per_image(boxes, images).to_dict()=={0:20672, 1:2614, 2:3266, 3:119, 4:13}
    s = box_stats(boxes)
    assert s.loc['width','n']==9555 and s.loc['per_image','n']==6012
    assert (s.loc['width','50%'], s.loc['height','50%'])==(217, 298)
    np.testing.assert_allclose(s.loc['aspect',['5%','50%','95%']].astype(float), [.68,1.45,2.52], atol=.005)

def test_what_the_page_says_about_the_challenge(challenge):
    images,boxes = challenge
    v = rate_by(images, 'view').rate
    assert round(v.AP,2)==.38 and round(v.PA,2)==.09
    heat = box_heatmap(boxes, images)
    assert heat[:10].max()<.01 and heat[64,62:66].max()<.2 and heat[50:70,25:45].max()>.4 # neck, spine, right lung
    n,left = boxes.groupby('image_id').size(), ((boxes.x1+boxes.x2)/2<512).groupby(boxes.image_id).sum()
    assert ((n==2)&(left==1)).sum()/(n==2).sum()>.97 and .6<left[n==1].mean()<.64

def test_challenge_shortcut(challenge):
    a = shortcut_auc(challenge[0])
    assert .70<a.auc['age + sex + view']<.73 and .70<a.auc['view']<.715 and .52<a.auc['age']<.54 and .50<a.auc['sex']<.52
    assert a.sd.max()<.02

@pytest.mark.skipif(not (REAL/'rsna_full'/'nih_map.csv').exists(), reason='no list of the people of the challenge')
def test_challenge_shortcut_with_the_people_known(challenge):
    "The same, so the page's figure is honest; trees, which bend more, owe a part of theirs to people on both sides"
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_score
    images = challenge[0]
    who = pd.read_csv(REAL/'rsna_full'/'nih_map.csv').set_index('patientId').nih_patient.reindex(images.image_id).to_numpy()
    assert pd.Series(who).nunique()<len(images)/2
    apart,known = shortcut_auc(images).auc, shortcut_auc(images.assign(patient_id=who)).auc
    assert abs(known-apart).max()<.005
    y,tree = images.category=='Lung Opacity',HistGradientBoostingClassifier(max_iter=50, random_state=0)
    age = lambda split: cross_val_score(tree, images[['age']], y, groups=who, scoring='roc_auc', cv=split(5, shuffle=True, random_state=0)).mean()
    with pytest.warns(UserWarning, match='groups'): leaky = age(StratifiedKFold)
    assert leaky>age(StratifiedGroupKFold)+.02

# --- the page's short version of the challenge's score

@pytest.fixture(scope='module')
def image_score():
    "The function of the notebook, which it does not export"
    nb = json.loads((Path(__file__).resolve().parent.parent/'nbs'/'01_explore.ipynb').read_text())
    src, = [''.join(c['source']) for c in nb['cells'] if c['cell_type']=='code' and 'def image_score(' in ''.join(c['source'])]
    exec(src, found := dict(np=np))
    return found['image_score']

def test_image_score_is_the_metric(image_score):
    rng = np.random.default_rng(0)
    def some(n): xy = rng.integers(0,6,(n,2))*20.; return np.c_[xy, xy+rng.integers(2,6,(n,2))*20.]
    for _ in range(150):
        t,p = some(rng.integers(0,5)),some(rng.integers(0,5))
        ann = Annotations(pd.DataFrame(dict(image_id=['a'], height=400, width=400)), pd.DataFrame(t, columns=XYXY).assign(image_id='a', label='L'), ['L'])
        pred = pd.DataFrame(p, columns=XYXY).assign(image_id='a', label='L', score=np.linspace(.9,.1,len(p)))
        assert image_score(t,p)==pytest.approx(rsna_score(ann, pred), abs=1e-12, nan_ok=True)

def test_floors_of_the_page_with_the_proper_metric(challenge):
    images,boxes = challenge
    ann = Annotations(images.assign(split=pd.NA), boxes, ['Lung Opacity'])
    half = np.where((boxes.x1+boxes.x2)/2<512, 'left', 'right')
    two = boxes.groupby(half)[XYXY].median().assign(label='Lung Opacity', score=[.9,.8])
    everywhere = images[['image_id']].merge(two, how='cross')
    assert rsna_score(ann, everywhere.head(0))==0
    assert rsna_score(ann, everywhere)==pytest.approx(.021, abs=.0006)
    assert rsna_score(ann, everywhere[everywhere.image_id.isin(boxes.image_id)])==pytest.approx(.095, abs=.0006)
    perfect = boxes.assign(score=.9) # the cap that the page names, and its exercise
    negative = images.image_id[images.category!='Lung Opacity']
    alarm = lambda ids: pd.concat([perfect, pd.DataFrame(dict(image_id=ids, x1=100., y1=100., x2=300., y2=300., label='Lung Opacity', score=.5))])
    assert rsna_score(ann, alarm(negative))==pytest.approx(6012/26684)
    assert rsna_score(ann, alarm(negative[::10]))==pytest.approx(.744, abs=.0005)
