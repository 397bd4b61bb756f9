"Splits without leaks, boxes that move with their picture"
import cv2, numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import set_seed
from hypothesis import given, settings, strategies as st
from lungdet.data import *
from lungdet.data import PAD
from lungdet.formats import Annotations, read_rsna
from real import REAL, needs_real

def toy(folder, n=8, boxes=True, size=128, **kw):
    im = np.zeros((size,size), np.uint8); im[30:70,75:105] = 255
    cv2.imwrite(str(folder/'box.png'), im)
    ims = pd.DataFrame(dict(image_id=[f'i{i}' for i in range(n)], path=str(folder/'box.png'), height=4*size, width=4*size, split=['train']*(n-2)+['valid']*2))
    b = pd.DataFrame([dict(image_id=f'i{i}', x1=300, y1=120, x2=420, y2=280, label='a') for i in range(n if boxes else 0)], columns=['image_id','x1','y1','x2','y2','label'])
    return Annotations(ims, b, ['a'])

@given(st.integers(0,2**31), st.integers(2,60), st.floats(.1,.6))
@settings(max_examples=60, deadline=None)
def test_no_patient_on_both_sides(seed, n, valid):
    g = np.random.default_rng(seed)
    ims = pd.DataFrame(dict(image_id=[str(i) for i in range(n)], height=10, width=10, patient_id=[f'p{o}' for o in g.integers(0,n,n)],
                            category=g.choice(['Normal','Lung Opacity','No Lung Opacity / Not Normal'],n)))
    k = g.choice(n, n//3, replace=False)
    ann = Annotations(ims, pd.DataFrame(dict(image_id=ims.image_id[k], x1=1, y1=1, x2=5, y2=5, label='a')), ['a'])
    if ann.images.patient_id.nunique()<2: return
    res = split_patients(ann, valid, seed%1000)
    assert (res.images.groupby('patient_id').split.nunique()==1).all()
    assert set(res.images.split)=={'train','valid'}

def test_split_is_stratified_and_repeatable():
    n = 500
    ims = pd.DataFrame(dict(image_id=[str(i) for i in range(n)], height=10, width=10, patient_id=[f'p{i//2}' for i in range(n)], category='Normal'))
    pos = [str(i) for i in range(100)]
    ann = Annotations(ims, pd.DataFrame(dict(image_id=pos, x1=1, y1=1, x2=5, y2=5, label='a')), ['a'])
    a,b,c = (split_patients(ann, .2, s).images.split for s in (1,1,2))
    assert a.equals(b) and not a.equals(c)
    assert (a=='valid').sum()==100 and split_patients(ann,.2,1).part('valid').boxes.image_id.nunique()==20

@pytest.mark.parametrize('mode,channels', [('gray',1),('repeat',3),('stack',3)])
def test_batches_are_in_pixels_of_the_picture(tmp_path, mode, channels):
    dls = detection_dls(toy(tmp_path), size=64, bs=2, mode=mode, aug=None)
    x,boxes,labels = dls.one_batch()
    assert x.shape==(2,channels,64,64) and labels.tolist()==[[0],[0]]
    torch.testing.assert_close(boxes[0].as_subclass(torch.Tensor), torch.tensor([[37.5,15,52.5,35]]))

@pytest.mark.parametrize('seed', range(4))
def test_boxes_move_with_their_picture(tmp_path, seed):
    set_seed(seed)
    dls = detection_dls(toy(tmp_path, 34), size=128, bs=32, aug=dict(max_rotate=20., max_zoom=1.4, min_zoom=.8, max_warp=0., max_lighting=0., p_affine=1., pad_mode='zeros'))
    (x,boxes,labels),seen = dls.one_batch(),0
    for im,b,l in zip(dls.train.pictures(x), boxes, labels):
        yx = np.argwhere(im[...,0]>.5)
        tight = torch.tensor([*yx.min(0)[::-1],*(yx.max(0)[::-1]+1)]).float()
        if l[0]==PAD or b[0].min()<=0 or b[0].max()>=128: continue # cut at the edge, a turned rectangle leaves a corner of its box empty
        assert (tight-b[0]).abs().max()<2.5
        seen += 1
    assert seen>=10

def test_negatives_only(tmp_path):
    dls = detection_dls(toy(tmp_path, boxes=False), size=64, bs=4)
    x,boxes,labels = dls.one_batch()
    assert boxes.shape==(4,1,4) and labels.dtype==torch.int64 and (labels==PAD).all()
    dls.show_batch(max_n=2)

def test_last_small_batch_and_workers(tmp_path):
    dls = detection_dls(toy(tmp_path, 7), size=32, bs=4, num_workers=1)
    assert [len(b[0]) for b in dls.train]==[4,1] and [len(b[0]) for b in dls.valid]==[2]

def test_missing_picture_is_named(tmp_path):
    ann = toy(tmp_path)
    ann.images['path'] = str(tmp_path/'gone.png')
    with pytest.raises(ValueError, match='gone.png'): detection_dls(ann, size=32, bs=2).one_batch()

@needs_real
def test_real_patients_do_not_leak():
    ann = split_patients(read_rsna(REAL/'rsna'))
    assert len(ann)==605 and len(ann.boxes)==342 and ann.boxes.image_id.nunique()==223
    assert ann.images.category.value_counts().to_dict()=={'No Lung Opacity / Not Normal':286,'Lung Opacity':223,'Normal':96}
    assert (ann.images.groupby('patient_id').split.nunique()==1).all() and ann.images.patient_id.nunique()<605
