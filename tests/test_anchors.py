"Anchors, matching and the box coder against torchvision and the published values"
import pytest, torch
from hypothesis import given, settings, strategies as st
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from lungdet.anchors import *
from lungdet.anchors import BACKGROUND, IGNORE, MAX_LOG, sizes_512
from lungdet.boxes import iou
from test_boxes import random_boxes

@pytest.mark.parametrize('h,w', [(128,128),(256,256),(256,512),(1024,1024),(128,640)])
def test_anchors_equal_torchvision(h, w):
    gen = AnchorGenerator(sizes_512, ((.5,1.,2.),)*5)
    feats = [torch.zeros(1,1,h//s,w//s) for s in (8,16,32,64,128)]
    theirs = gen(ImageList(torch.zeros(1,3,h,w), [(h,w)]), feats)[0]
    assert torch.equal(Anchors()(h,w), theirs)

def test_published_cell():
    want = [[-23,-11,23,11],[-28,-14,28,14],[-35,-18,35,18],[-16,-16,16,16],[-20,-20,20,20],[-25,-25,25,25],[-11,-23,11,23],[-14,-28,14,28],[-18,-35,18,35]]
    assert cell_anchors((32,40,50)).tolist()==want

@given(st.integers(0,2**31), st.integers(1,6))
@settings(max_examples=100, deadline=None)
def test_matching_equals_torchvision_where_every_box_meets_an_anchor(seed, m):
    o = iou(random_boxes(m,seed,200.), random_boxes(400,seed+1,200.))
    if (o.max(1).values==0).any(): return
    for low in (True,False):
        assert torch.equal(match(o, low_quality=low), Matcher(.5,.4,allow_low_quality_matches=low)(o))

@given(st.integers(0,2**31))
@settings(max_examples=100, deadline=None)
def test_what_matching_promises(seed):
    g = torch.Generator().manual_seed(seed)
    o = (torch.rand(4,50,generator=g)*10).round()/10 # many ties
    o[0] = 0
    m = match(o)
    assert not (m==0).any() # a box that meets no anchor gets none
    for j in range(50):
        i,best = m[j].item(),o[:,j].max()
        if i>=0: assert o[i,j]==best or (o[:,j]==o.max(1).values).any()
        elif i==IGNORE: assert .4<=best<.5
        else: assert i==BACKGROUND and best<.4
    for i in range(1,4):
        if o[i].max()>0: assert (m[o[i]==o[i].max()]>=0).all()

def test_torchvisions_tie_at_zero_is_the_one_difference():
    o = torch.tensor([[0.,0,0],[.6,.1,0]])
    assert Matcher(.5,.4,allow_low_quality_matches=True)(o).tolist()==[1,1,0]
    assert match(o).tolist()==[1,BACKGROUND,BACKGROUND]

@given(st.integers(0,2**31), st.integers(0,40))
@settings(max_examples=50, deadline=None)
def test_coder_equals_torchvision_and_goes_there_and_back(seed, n):
    b,a = random_boxes(n,seed),random_boxes(n,seed+1)
    coder,d = BoxCoder((1.,)*4),encode(b,a)
    torch.testing.assert_close(d, coder.encode_single(b,a))
    ok = (d[:,2:]<MAX_LOG).all(1) # more than that is not stretched
    torch.testing.assert_close(decode(d,a)[ok], b[ok], atol=1e-3, rtol=1e-4)
    wild = torch.randn(n,4,generator=torch.Generator().manual_seed(seed))*5
    if n: torch.testing.assert_close(decode(wild,a), coder.decode_single(wild,a), atol=1e-2, rtol=1e-4)

def test_decoding_half_precision_is_done_in_float32():
    a = torch.tensor([[1000.,1000,1030,1030]])
    assert decode(torch.zeros(1,4,dtype=torch.bfloat16),a).tolist()==a.tolist()

def test_coverage_of_the_challenge(challenge_boxes):
    "Published shares for all 9,555 boxes"
    for size,iou_,missed in ((224,.759,.0136),(256,.765,.0068),(512,.770,.0001)):
        r = anchor_report(Anchors(), challenge_boxes*size/1024, size)
        assert abs(r['mean_best_iou']-iou_)<.0006 and abs(r['missed']-missed)<.0001
