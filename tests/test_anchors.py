"Anchors and the box coder against torchvision and the published values"
import math, pytest, torch
from hypothesis import given, settings, strategies as st
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from lungdet.anchors import *
from lungdet.anchors import MAX_LOG, sizes_512
from test_boxes import random_boxes

def theirs(sizes, ratios, h, w, strides=(8,16,32,64,128)):
    feats = [torch.zeros(1,1,math.ceil(h/s),math.ceil(w/s)) for s in strides]
    return AnchorGenerator(sizes, (ratios,)*len(sizes))(ImageList(torch.zeros(1,3,h,w), [(h,w)]), feats)[0]

@pytest.mark.parametrize('h,w', [(128,128),(256,256),(256,512),(1024,1024),(128,640)])
def test_anchors_equal_torchvision(h, w):
    assert torch.equal(Anchors()(h,w), theirs(sizes_512, (.5,1.,2.), h, w))

@pytest.mark.parametrize('h,w', [(224,224),(320,160),(96,352)])
def test_anchors_equal_torchvision_where_the_coarse_levels_do_not_fit(h, w):
    "torchvision divides the picture by the map, so strides agree only on the levels that fit"
    levels = tuple(l for l in (3,4,5) if h%2**l==0 and w%2**l==0)
    assert torch.equal(Anchors(sizes_512[:len(levels)], levels=levels)(h,w), theirs(sizes_512[:len(levels)], (.5,1.,2.), h, w, [2**l for l in levels]))

@given(st.lists(st.floats(1,900), min_size=1, max_size=4), st.lists(st.floats(.1,10), min_size=1, max_size=4), st.integers(1,4), st.integers(1,4))
@settings(max_examples=60, deadline=None)
def test_any_sizes_and_ratios_equal_torchvision(sizes, ratios, rows, cols):
    both = (tuple(sizes),tuple(2*s for s in sizes))
    a = Anchors(both, ratios, levels=(4,5))
    assert torch.equal(a(32*rows,32*cols), theirs(both, tuple(ratios), 32*rows, 32*cols, (16,32)))
    assert a.per_cell==len(sizes)*len(ratios) and sum(a.counts(32*rows,32*cols))==len(a(32*rows,32*cols))

def test_published_cell():
    want = [[-23,-11,23,11],[-28,-14,28,14],[-35,-18,35,18],[-16,-16,16,16],[-20,-20,20,20],[-25,-25,25,25],[-11,-23,11,23],[-14,-28,14,28],[-18,-35,18,35]]
    assert cell_anchors((32,40,50)).tolist()==want

@pytest.mark.parametrize('levels', [(3,4,5,6,7),(4,5,6),(5,),(2,4)])
@pytest.mark.parametrize('h,w', [(512,512),(500,333),(1,1)])
def test_levels_and_picture_may_be_any(levels, h, w):
    a = Anchors.of_scales(3, (1,1.5), (.7,1.4), levels)
    assert a.strides==tuple(2**l for l in levels) and a.grid(h,w)==[(math.ceil(h/s),math.ceil(w/s)) for s in a.strides]
    assert a.counts(h,w)==[len(a.on_level(i,h,w)) for i in range(len(levels))] and torch.equal(a(h,w), torch.cat([a.on_level(i,h,w) for i in range(len(levels))]))
    assert a.sizes[-1]==(3*2**levels[-1],4.5*2**levels[-1])

def test_grid_is_that_of_strided_convolutions():
    "Any picture: halved `l` times by 3x3 convolutions of stride 2 with padding 1"
    for n in (1,31,100,255,257,333):
        x,sides = torch.zeros(1,1,n,n),{}
        for l in range(1,8): x = torch.nn.functional.conv2d(x, torch.zeros(1,1,3,3), stride=2, padding=1); sides[l] = x.shape[-1]
        assert [r for r,_ in Anchors().grid(n,n)]==[sides[l] for l in (3,4,5,6,7)]

def test_grid_is_kept_for_each_shape_and_device():
    a = Anchors()
    assert a(128,256) is a(128,256) and a(128,256) is a(128,256,torch.device('cpu')) and a(128,256) is not a(256,128)
    meta = a(128,256,'meta')
    assert meta.device.type=='meta' and meta is a(128,256,'meta') and a(128,256).device.type=='cpu' and meta.shape==a(128,256).shape

def test_grid_is_float32_in_every_mode():
    want = Anchors()(96,160).clone()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(Anchors()(96,160), want) and Anchors()(96,160).dtype==torch.float32
    finally: torch.set_default_dtype(torch.float32)
    for dtype in (torch.bfloat16,torch.float16):
        with torch.autocast('cpu', dtype): assert torch.equal(Anchors()(96,160), want) and Anchors()(96,160).dtype==torch.float32

def test_grid_made_while_predicting_can_train():
    a = Anchors()
    with torch.inference_mode(): a(64,64)
    x = torch.ones(len(a(64,64)),4,requires_grad=True)
    (x*a(64,64)).sum().backward() # keeps the grid for the way back
    assert torch.equal(x.grad, a(64,64))

@pytest.mark.parametrize('args,text', [((sizes_512,(.5,0.)),'positive'), ((((32,-1),),(1.,),(3,)),'positive'), ((((32,float('nan')),),(1.,),(3,)),'positive'),
    ((sizes_512,(1.,),(3,4,4,5,6)),'increase'), ((sizes_512[:2],(1.,),(5,4)),'increase'), ((((1,2),(3,)),(1.,),(3,4)),'same number'),
    ((sizes_512,(1.,),(3,4)),'one tuple of sizes for each level'), (((32,64),(1.,),(3,4)),'one tuple of sizes for each level')])
def test_bad_grids_are_refused(args, text):
    with pytest.raises(ValueError, match=text): Anchors(*args)

def test_repr_makes_the_same_grid():
    for a in (Anchors(), Anchors.of_scales(), Anchors.of_scales(2.5, (1,1.3), (.62,1.87), (4,5))):
        assert torch.equal(eval(repr(a))(256,256), a(256,256))

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

def test_published_correction_and_limit():
    b,a = torch.tensor([[8.,4,40,68]]),torch.tensor([[0.,0,32,32]])
    torch.testing.assert_close(encode(b,a), torch.tensor([[.25,.625,0,.693147]]))
    assert MAX_LOG==pytest.approx(4.135166556742356, abs=1e-12)
    assert torch.equal(decode(torch.tensor([[0.,0,50,50]]),a), decode(torch.tensor([[0.,0,MAX_LOG,MAX_LOG]]),a))

def test_decoding_half_precision_is_done_in_float32():
    a = torch.tensor([[1000.,1000,1030,1030]])
    assert decode(torch.zeros(1,4,dtype=torch.bfloat16),a).tolist()==a.tolist()
