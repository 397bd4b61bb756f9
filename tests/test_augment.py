"Boxes that are found again in the pixels, whatever was done to the picture"
import math, numpy as np, pytest, torch
from fastai.vision.all import set_seed
from hypothesis import given, settings, strategies as st
from torch import Tensor
from lungdet.augment import *
from lungdet.boxes import iou

SIZE = 256
OFF = dict(flip=0, rotate=0, zoom=(1,1), shift=0, brightness=0, contrast=0, gamma=0)

def rectangles(n, seed, side=(16,44)):
    "Black pictures with one white rectangle each, away from the edge"
    g = np.random.default_rng(seed)
    x,boxes = torch.zeros(n,1,SIZE,SIZE),torch.zeros(n,1,4)
    for i in range(n):
        w,h = g.integers(*side, 2)
        x1,y1 = g.integers(60, SIZE-60-w),g.integers(60, SIZE-60-h)
        x[i,:,y1:y1+h,x1:x1+w] = 1; boxes[i,0] = torch.tensor([x1,y1,x1+w,y1+h])
    return x,boxes,torch.zeros(n,1,dtype=torch.int64)

def half_height(p):
    "Where the profile `p` passes half of its height, px"
    half = p.max()/2
    i,j = (int(o) for o in (p>=half).nonzero()[[0,-1],0])
    q = torch.cat([torch.zeros(1),p,torch.zeros(1)]) # nothing outside
    return i+.5-float((q[i+1]-half)/(q[i+1]-q[i])), j+.5+float((q[j+1]-half)/(q[j+1]-q[j+2]))

def found(im):
    (x1,x2),(y1,y2) = half_height(im.sum(0)),half_height(im.sum(1))
    return torch.tensor([x1,y1,x2,y2])

WAYS = dict(flip=dict(flip=.5), rotate=dict(rotate=10), zoom=dict(zoom=(.8,1.25)), shift=dict(shift=.15), crop=dict(zoom=(1.2,1.2), shift=.1),
            all=dict(flip=.5, rotate=10, zoom=(.9,1.15), shift=.05))
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('seed', range(3))
def test_the_rectangle_is_found_again_within_2_px(way, seed, record_property):
    set_seed(seed)
    x,boxes,labels = rectangles(48, seed)
    x,boxes,labels = Augment(**OFF|WAYS[way]|dict(p=1.)).encodes((x,boxes,labels))
    whole = (labels[:,0]==0)&(boxes[:,0,:2]>0).all(1)&(boxes[:,0,2:]<SIZE).all(1)
    assert whole.sum()>=30
    worst = max(float((found(x[i,0].as_subclass(Tensor))-boxes[i,0].as_subclass(Tensor)).abs().max()) for i in whole.nonzero()[:,0])
    record_property('worst', worst)
    assert worst<2, worst

@given(st.floats(-45,45), st.floats(15,60), st.floats(15,60))
@settings(max_examples=100, deadline=None)
def test_points_on_sides_are_tighter_than_corners_for_a_spot(deg, a, b):
    "The box around a turned ellipse is known: half widths sqrt(a²cos²+b²sin²), sqrt(a²sin²+b²cos²)"
    t = math.radians(deg)
    m = torch.tensor([[[math.cos(t),-math.sin(t),0],[math.sin(t),math.cos(t),0]]])
    box = torch.tensor([[[-a,-b,a,b]]])+128
    w,h = math.hypot(a*math.cos(t),b*math.sin(t)),math.hypot(a*math.sin(t),b*math.cos(t))
    cw,ch = a*abs(math.cos(t))+b*abs(math.sin(t)),a*abs(math.sin(t))+b*abs(math.cos(t))
    true,corners = (torch.tensor([[-p,-q,p,q]])+128 for p,q in ((w,h),(cw,ch)))
    sides = warp_boxes(box, m, SIZE)[0]
    assert iou(true,sides)>=min(.8, float(iou(true,corners)))-1e-3
    if abs(deg)>=8: assert iou(true,sides)>iou(true,corners)

@given(st.integers(0,2**31))
@settings(max_examples=40, deadline=None)
def test_boxes_stay_in_the_picture_and_padding_stays_padding(seed):
    set_seed(seed%2**31)
    n,m = 4,3
    a,b = torch.rand(n,m,2)*64,torch.rand(n,m,2)*64
    boxes = torch.cat([torch.minimum(a,b), torch.maximum(a,b)+1], -1).clamp(max=64)
    labels = torch.randint(-1, 2, (n,m))
    boxes = boxes*(labels!=PAD)[...,None]
    aug = Augment(zoom=(.5,2.), rotate=45, shift=.3, cutout=.5, mixup=.5, mosaic=.5, p=1., keep=.3)
    x,new,l = aug.encodes((torch.rand(n,1,64,64),boxes,labels))
    assert x.shape==(n,1,64,64) and 0<=x.min() and x.max()<=1 and new.shape[:2]==l.shape
    real = new[l!=PAD]
    assert (real>=0).all() and (real<=64).all() and (real[:,2:]-real[:,:2]>=1).all()
    assert (new[l==PAD]==0).all() and set(l.unique().tolist())<={-1,0,1}

def test_what_is_hidden_is_let_go():
    x,boxes,labels = torch.ones(1,1,100,100),torch.tensor([[[10.,10,30,30],[60,60,80,80]]]),torch.zeros(1,2,dtype=torch.int64)
    hidden = torch.tensor([[.9,.1]])
    assert in_view(boxes, labels, 100, .2, hidden)[1].tolist()==[[PAD,0]]
    assert in_view(boxes, labels, 100, 0., hidden)[1].tolist()==[[0,0]]
    aug,hit = Augment(**OFF|dict(cutout=1., p=1., keep=.5)),0
    for seed in range(20):
        set_seed(seed)
        new,_,l = aug.encodes((x,boxes,labels))
        new = new.as_subclass(Tensor)
        for b,k in zip(boxes[0].int().tolist(), l[0].tolist()):
            seen = float(new[0,0,b[1]:b[3],b[0]:b[2]].mean())
            assert (k==0)==(seen>=.5); hit += k==PAD
    assert hit>2

def test_keep_decides():
    boxes,labels = torch.tensor([[[-15.,0,5,20]]]),torch.zeros(1,1,dtype=torch.int64) # a quarter in view
    assert [in_view(boxes, labels, 100, k)[1].item() for k in (0.,.24,.26,1.)]==[0,0,PAD,PAD]
    assert in_view(boxes, labels, 100)[0].tolist()==[[[0,0,5,20]]]

def test_mixup_is_the_sum_and_mosaic_the_four():
    set_seed(0)
    x,boxes,labels = rectangles(4, 0)
    on = torch.ones(4, dtype=torch.bool)
    mx,mb,ml = mixup(x, boxes, labels, on)
    assert ml.tolist()==[[0,0]]*4
    for i in range(4): # both boxes are there, each over its share of the white
        shares = [float(mx[i,0,int(b[1]+b[3])//2,int(b[0]+b[2])//2]) for b in mb[i]]
        assert all(.05<s<=1 for s in shares) and (boxes[i,0]==mb[i]).all(1).any()
    fx,fb,fl = mosaic(x, boxes, labels, on)
    assert fl.tolist()==[[0]*4]*4
    for i in range(4):
        assert all(fx[i,0,int(b[1]+b[3])//2,int(b[0]+b[2])//2]==1 for b in fb[i])
        corners = {(float(b[0])>=128,float(b[1])>=128) for b in fb[i]}
        assert len(corners)==4
        assert len({tuple((b%128).tolist()) for b in fb[i]})==4 # four different ones

@pytest.mark.parametrize('n', [1,2,3])
def test_small_batches_can_be_mixed(n):
    x,boxes,labels = rectangles(n, 1)
    for seed in range(5):
        set_seed(seed)
        new,b,l = Augment(mixup=1., mosaic=1.).encodes((x,boxes,labels))
        assert new.shape==x.shape and len(b)==len(l)==n

def test_light_only_changes_light():
    set_seed(0)
    x,boxes,labels = rectangles(8, 0)
    new,b,l = Augment(**OFF|dict(brightness=.2, contrast=.3, gamma=.3, blur=2., noise=.05, p=1.)).encodes((x*.6+.2,boxes,labels))
    assert torch.equal(b.as_subclass(Tensor), boxes) and torch.equal(l.as_subclass(Tensor), labels) and not torch.equal(new.as_subclass(Tensor), x)
    means = new.mean((1,2,3))
    assert means.std()>.01 # each picture its own

def test_the_input_is_left_alone_and_seeds_repeat():
    x,boxes,labels = rectangles(6, 3)
    before = x.clone(),boxes.clone(),labels.clone()
    aug,out = Augment(cutout=.3, noise=.1, blur=1., mixup=.5, mosaic=.5),[]
    for _ in range(2):
        set_seed(5); out.append(aug.encodes((x,boxes,labels)))
    assert all(torch.equal(a.as_subclass(Tensor), b.as_subclass(Tensor)) for a,b in zip(*out))
    assert all(torch.equal(a,b) for a,b in zip(before,(x,boxes,labels)))

def test_probability_of_moving():
    set_seed(0)
    m = draw_affine(4000, flip=.3, rotate=10., p=.6)
    assert abs((m[:,0,0]*m[:,1,1]<0).float().mean()-.3)<.03 and abs((m[:,0,1]!=0).float().mean()-.6)<.03

@pytest.mark.parametrize('kw', [dict(flip=-.1), dict(p=1.5), dict(rotate=-3), dict(zoom=(0,1)), dict(keep=2), dict(blur=math.nan), dict(contrast=1.5)])
def test_senseless_values_are_refused(kw):
    with pytest.raises(ValueError, match=next(iter(kw))): Augment(**kw)
