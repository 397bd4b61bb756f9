"Chapter 01: against brute force, hand values, and the whole challenge's labels"

import matplotlib; matplotlib.use('agg')
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st

from lungdet.explore import box_heatmap, box_stats, boxes_per_image, class_counts, plot_counts, rate_by, show_case

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

# --- the whole challenge

@pytest.fixture(scope='module')
def challenge(challenge_labels, challenge_headers):
    "images and boxes of all 26,684 studies"
    b = challenge_labels.dropna()
    boxes = pd.DataFrame(dict(image_id=b.patientId, x1=b.x, y1=b.y, x2=b.x+b.width, y2=b.y+b.height))
    images = challenge_headers.rename(columns=dict(PatientID='image_id', PatientAge='age', ViewPosition='view'))
    return images.assign(category=np.where(images.image_id.isin(boxes.image_id), 'Lung Opacity', 'none')), boxes

def test_whole_challenge(challenge):
    images,boxes = challenge
    c = class_counts(images)
    assert c.n.sum()==26684 and c.loc['Lung Opacity','n']==6012 and c.loc['none','n']==11821+8851
    assert boxes_per_image(boxes, images).to_dict()=={0:20672, 1:2614, 2:3266, 3:119, 4:13}
    s = box_stats(boxes)
    assert s.loc['width','n']==9555 and s.loc['per_image','n']==6012
    assert (s.loc['width','50%'], s.loc['height','50%'])==(217, 298)
    np.testing.assert_allclose(s.loc['aspect',['5%','50%','95%']].astype(float), [.68,1.45,2.52], atol=.005)

def test_what_the_page_says_about_the_challenge(challenge):
    images,boxes = challenge
    v = rate_by(images, 'view').rate
    assert round(v.AP,2)==.38 and round(v.PA,2)==.09
    assert sorted(images.age[images.age>120])==[148,150,151,153,155]
    heat = box_heatmap(boxes)
    assert heat[:10].max()<.01 and heat[64,62:66].max()<.2 and heat[50:70,25:45].max()>.4 # neck, spine, right lung
