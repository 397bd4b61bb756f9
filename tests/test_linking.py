"Lesions come back from their slices, whatever the order of the rows; and two files of one data set train one model"
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from fastai.vision.all import set_seed
from lungdet.core import XYXY
from lungdet.evaluate import froc, image_level, precision_recall
from lungdet.formats import Annotations
from lungdet.readers import read_coco, read_voc
from lungdet.data import detection_dls
from lungdet.learner import retinanet_learner
from lungdet.bootstrap import intervals
from lungdet.volumes import LESION, Volume, make_volume, slices_of
from lungdet.linking import *
from lungdet.linking import PLACE
from real import REAL

needs_brain = pytest.mark.skipif(not (REAL/'brain_mri').is_dir(), reason='no real data: set LUNGDET_REAL to its folder')

def slices(n=30, series=('s',), mm=(.5,.7,4.)):
    return pd.DataFrame([dict(image_id=f'{s}_{k}', series=s, slice=k, patient_id=f'p{s}', **dict(zip(PLACE[2:], [*mm,np.prod(mm)]))) for s in series for k in range(n)])

def tracks(seed, n, series='s', drop=0):
    "Boxes of `n` lesions that drift in lanes of their own and are missed on at most `drop` slices in a row, and the lesion that each is of"
    g,rows = np.random.default_rng(seed),[]
    for i in range(n):
        k,x,w = g.integers(0,8),100*i+g.uniform(20,30),g.uniform(20,40)
        for _ in range(g.integers(2,6)):
            rows.append((f'{series}_{k}', x, 50, x+w, 50+w, g.uniform(.1,1), i))
            k,x = k+1+g.integers(0,drop+1),x+g.uniform(-.15,.15)*w
    return pd.DataFrame(rows, columns=['image_id',*XYXY,'score','true']).assign(label='lesion')

def same(a, b): return pd.DataFrame(dict(a=a,b=b)).drop_duplicates().pipe(lambda o: o.a.is_unique and o.b.is_unique)

@given(st.integers(0,2**31-1), st.integers(1,6), st.integers(0,3))
@settings(max_examples=50, deadline=None)
def test_known_tracks_come_back_under_lost_slices(seed, n, gap):
    t = tracks(seed, n, drop=gap).sample(frac=1, random_state=seed%1000)
    out = link_boxes(t, slices(40), gap=gap)
    assert (out.lesion>0).all() and same(out.lesion, t.true) and sorted(out.lesion.unique())==[*range(1,n+1)]

@given(st.integers(0,2**31-1), st.integers(1,3))
@settings(max_examples=30, deadline=None)
def test_one_slice_more_than_the_gap_breaks_a_lesion(seed, gap):
    t = tracks(seed, 1)
    k = t.image_id.str[2:].astype(int)
    t['image_id'] = [f's_{o+(gap+1 if o>k.min() else 0)}' for o in k]
    assert link_boxes(t, slices(40), gap=gap, min_len=1).lesion.nunique()==2
    assert link_boxes(t, slices(40), gap=gap+1, min_len=1).lesion.nunique()==1

@given(st.integers(0,2**31-1), st.integers(0,40), st.integers(0,2), st.integers(1,3))
@settings(max_examples=50, deadline=None)
def test_any_boxes_in_any_order(seed, n, gap, min_len):
    "The order of the rows changes nothing; a lesion has one class, one scan, one box on a slice, and no gap too long"
    g = np.random.default_rng(seed)
    xy = g.integers(0,12,(n,2))*4
    b = pd.DataFrame(np.c_[xy,xy+g.integers(3,9,(n,2))*4], columns=XYXY, dtype=float)
    b['image_id'],b['label'],b['score'] = [f'{s}_{k}' for s,k in zip(g.choice([*'ab'],n),g.integers(0,8,n))],g.choice(['x','y'],n),g.integers(0,4,n)/4
    ims = slices(8, 'ab')
    out = link_boxes(b, ims, gap, min_len, .2)
    mixed = b.sample(frac=1, random_state=seed%999)
    again = link_boxes(mixed, ims, gap, min_len, .2)
    assert again.index.equals(mixed.index) and out.index.equals(b.index)
    key = ['series','lesion','label',*LESION,'score','slices','ml']
    pd.testing.assert_frame_equal(lesion_table(out, ims)[key], lesion_table(again, ims)[key])
    for (_,lesion),o in out[out.lesion>0].groupby(['series','lesion']):
        k = np.sort(o['slice'])
        assert o.label.nunique()==1 and len(set(k))==len(k)>=min_len and (np.diff(k)<=gap+1).all()

def test_two_lesions_that_cross():
    "Each moves 6 px a slice through the other, and overlaps more with where it was than the other does"
    rows = [(f's_{k}', 6*k if i else 60-6*k, 0 if i else 8, 6*k+30 if i else 90-6*k, 30 if i else 38, .5, i) for k in range(11) for i in (0,1)]
    t = pd.DataFrame(rows, columns=['image_id',*XYXY,'score','true']).assign(label='lesion')
    assert same(link_boxes(t, slices()).lesion, t.true)

def test_classes_and_scans_stay_apart():
    t = pd.concat([tracks(1,2,'a'),tracks(1,2,'b'),tracks(1,2,'a').assign(label='other')], ignore_index=True)
    out = link_boxes(t, slices(40,'ab'))
    assert lesion_table(out, slices(40,'ab')).groupby(['series','label']).size().tolist()==[2,2,2]

def test_nothing_to_link():
    none = tracks(0,1).head(0)
    out = lesion_table(link_boxes(none, slices()), slices())
    assert len(out)==0 and {*LESION,'score','ml'}<=set(out)
    ann,p = as_scans(out, out, slices())
    assert len(ann)==1 and len(p)==0 and np.isnan(froc(ann,p)['mean'])

@given(st.integers(0,2**31-1), st.floats(.1,10), st.floats(.1,10), st.floats(.5,20))
@settings(max_examples=30, deadline=None)
def test_measures_scale_with_the_spacing(seed, x, y, z):
    t = link_boxes(tracks(seed,3), slices(mm=(1,1,1)))
    a = lesion_table(t, slices(mm=(1,1,1)))
    b = lesion_table(t.drop(columns=PLACE), slices(mm=(x,y,z)))
    np.testing.assert_allclose(b[LESION], a[LESION]*([x,y,z]*2), rtol=1e-9)
    np.testing.assert_allclose(b.ml, a.ml*x*y*z, rtol=1e-9)
    assert (a.z2-a.z1==a['last']-a['first']+1).all()

def test_a_missed_slice_does_not_change_the_volume():
    t = pd.DataFrame([(f's_{k}',0,0,w,10,.5) for k,w in ((0,10),(1,12),(2,14))], columns=['image_id',*XYXY,'score']).assign(label='x')
    whole,holed = (lesion_table(link_boxes(o, slices()), slices()).ml[0] for o in (t,t[t.image_id!='s_1']))
    assert whole==pytest.approx(holed)==pytest.approx(np.pi/4*10*36*.5*.7*4/1000)

def volumes_of(n, seed):
    g = np.random.default_rng(seed)
    xyz,size = g.uniform(0,60,(n,3)),g.uniform(4,30,(n,3))
    df = pd.DataFrame(np.c_[xyz,xyz+size], columns=LESION)
    return df.assign(series=g.choice([*'abc'],n), label='lesion', lesion=range(1,n+1), score=g.integers(0,6,n)/5)

@given(st.integers(0,2**31-1), st.integers(0,8), st.integers(0,12), st.sampled_from([None,5.,25.]))
@settings(max_examples=60, deadline=None)
def test_matching_against_loops(seed, n, m, within):
    t,f = volumes_of(n, seed),volumes_of(m, seed+1)
    out = match_lesions(t, f, within=within)
    def one(a, b):
        if a.series!=b.series: return 0
        if within is not None: d = np.linalg.norm([(a[LESION[i]]+a[LESION[i+3]]-b[LESION[i]]-b[LESION[i+3]])/2 for i in range(3)]); return 1/(1+d) if d<=within else 0
        side = [max(0,min(a[LESION[i+3]],b[LESION[i+3]])-max(a[LESION[i]],b[LESION[i]])) for i in range(3)]
        v = lambda o: np.prod([o[LESION[i+3]]-o[LESION[i]] for i in range(3)])
        i = np.prod(side); i = i/(v(a)+v(b)-i)
        return i if i>.1 else 0
    free,claims = set(range(n)),[-1]*m
    for i in f.sort_values(['score',*LESION], ascending=False).index:
        fits = {j:o for j in sorted(free) if (o := one(f.loc[i],t.loc[j]))>0}
        if fits: claims[i] = max(fits, key=fits.get); free.remove(claims[i])
    assert out.claims.tolist()==claims
    ims = slices(2,'abc')
    for repeats in ('wrong','ignore'):                                     # the detour keeps every count
        ann,p = as_scans(t, f, ims, repeats, within=within)
        kept = out if repeats=='wrong' else out[(out.claims>=0)|(out.near<0)]
        pr = precision_recall(ann, p)
        for r in pr.itertuples():
            hit = (kept.claims[kept.score>=r.score]>=0)
            assert (r.tp,r.fp)==(hit.sum(),(~hit).sum())
        assert len(ann)==3 and len(ann.boxes)==n

def test_scans_without_a_lesion_count():
    t,f = volumes_of(3,0).assign(series='a'),volumes_of(4,1).assign(series='b')
    ann,p = as_scans(t, f, slices(2,'abc'))
    assert froc(ann, p, rates=(4/3,)).iloc[0]==0 and image_level(ann, p, 0.)['fp']==1 and image_level(ann, p, 0.)['fn']==1
    assert intervals(ann, p, figures=['FROC'], n=20).value.iloc[0]==0

@given(st.integers(0,10**6))
@settings(max_examples=5, deadline=None)
def test_true_boxes_become_true_lesions(tmp_path_factory, seed):
    vol,mask,known = make_volume(seed, lesions=1, flashes=0)
    ann = slices_of([vol], tmp_path_factory.mktemp('v'), [mask])
    one = lesion_table(ann.boxes, ann.images)
    two = lesion_table(link_boxes(ann.boxes.drop(columns='lesion'), ann.images, iou=0), ann.images)
    centre = (one[LESION[:3]].to_numpy()+one[LESION[3:]].to_numpy())/2
    assert abs(centre-known[[*'xyz']].to_numpy()).max()<=3.5
    key = lambda df: df.sort_values('x1')[[*LESION,'ml']].to_numpy()
    np.testing.assert_allclose(key(one), key(two))
    assert set(match_lesions(one, two.assign(score=1.), iou=.99).claims)=={0}

def brain():
    "The slices with boxes from COCO, rounded to whole pixels, and from VOC, whose integers count from 1; rows in one order"
    d = REAL/'brain_mri'
    c,v = read_coco(d/'annotations.coco.json', d/'images'),read_voc(d/'voc', d/'images', offset=(1,1))
    c.boxes[XYXY] = c.boxes[XYXY].round()
    return [Annotations(a.images.sort_values('image_id'), a.boxes.sort_values(['image_id',*XYXY]), a.classes) for a in (c,v)]

@needs_brain
def test_brain_slices_from_coco_and_voc_are_the_same_tables():
    c,v = brain()
    assert len(c)==len(v)==300 and (c.images.image_id==v.images.image_id).all()
    assert (c.images.path==v.images.path).all() and (c.images[['height','width']].to_numpy()==v.images[['height','width']].to_numpy()).all()
    assert len(c.boxes)==228 and c.boxes[['image_id',*XYXY,'label']].equals(v.boxes[['image_id',*XYXY,'label']])

@needs_brain
def test_brain_slices_from_coco_and_voc_train_the_same_model():
    "Weights equal to the last bit; and with the unrounded boxes of COCO they are not, or the test would see nothing"
    def trained(ann):
        ids = sorted(ann.images.image_id)[::6]
        ann = ann.where(ann.images.image_id.isin(ids))
        ann.images['split'] = np.where(ann.images.image_id.isin(ids[::5]), 'valid', 'train')
        set_seed(0, reproducible=True)
        learn = retinanet_learner(detection_dls(Annotations(ann.images, ann.boxes, ann.classes), size=64, bs=8), 'resnet18', False, width=16, depth=1)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
        return learn.model.state_dict()
    c,v = map(trained, brain())
    assert c.keys()==v.keys() and all(torch.equal(c[k],v[k]) for k in c)
    d = REAL/'brain_mri'
    raw = read_coco(d/'annotations.coco.json', d/'images')
    raw = trained(Annotations(raw.images.sort_values('image_id'), raw.boxes.sort_values(['image_id',*XYXY]), raw.classes))
    assert not all(torch.equal(c[k],raw[k]) for k in c)

def test_a_lesion_on_a_leaning_grid_keeps_its_volume(tmp_path):
    "The same slices, each pushed 30 degrees further: every slice and so the lesion keep their volume"
    mask = np.zeros((6,20,20), np.uint8); mask[1:5,5:15,4:14] = 1
    def ml(shift):
        a = np.diag([2.,2,5,1]); a[1,2] = shift
        ann = slices_of([Volume(mask.astype(np.int16), a)], tmp_path, [mask])
        return lesion_table(ann.boxes, ann.images).ml[0]
    assert ml(0)==pytest.approx(np.pi/4*20*20*20/1000) and ml(5*np.tan(np.radians(30)))==pytest.approx(ml(0))

@pytest.mark.parametrize('boxes,images,why', [
    (lambda b: b.drop(columns='image_id'), None, r"the boxes have no \['image_id'\]"), (lambda b: b.drop(columns='x1'), None, r"the boxes have no \['x1'\]"),
    (lambda b: b.drop(columns='label'), None, r"the boxes have no \['label'\]"), (None, lambda i: i.drop(columns='image_id'), r"the images have no \['image_id'\]"),
    (None, lambda i: i.drop(columns='voxel'), 'from slices_of'), (None, lambda i: pd.concat([i,i]), 'one id for several slices'),
    (None, lambda i: i.assign(slice=np.nan), 'no slice'), (None, lambda i: i.assign(series=None), 'no slice')])
def test_tables_that_cannot_be_linked(boxes, images, why):
    same = lambda o: o
    with pytest.raises(ValueError, match=why): link_boxes((boxes or same)(tracks(0,2)), (images or same)(slices(40)))

@pytest.mark.parametrize('iou', [30, -.1, np.nan])
def test_overlaps_are_shares(iou):
    for f in (lambda: link_boxes(tracks(0,2), slices(40), iou=iou), lambda: match_lesions(volumes_of(2,0), volumes_of(2,1), iou=iou)):
        with pytest.raises(ValueError, match=r'iou=\S+, but an overlap is a share'): f()

def test_lesions_that_cannot_be_judged():
    t,f = volumes_of(3,0),volumes_of(3,1)
    for a,b,ims,why in ((t,f.drop(columns='score'),slices(2,'abc'),r"have no \['score'\]"), (t,f,slices(2,'abc').drop(columns='patient_id'),'whose they are'),
                        (t.drop(columns='x1'),f,slices(2,'abc'),r"true lesions have no \['x1'\]"), (t.drop(columns='label'),f,slices(2,'abc'),r"\['label'\]")):
        with pytest.raises(ValueError, match=why): as_scans(a, b, ims)
    with pytest.raises(ValueError, match="1 is not '001'"): match_lesions(t.assign(series='1'), f.assign(series=1))
