"Post-processing against torchvision's, and what it promises"
import pytest, torch
from hypothesis import given, settings, strategies as st
from torchvision.models.detection import RetinaNet as TVRetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from lungdet.anchors import *
from lungdet.boxes import area
from lungdet.data import PAD
from lungdet.decode import *

SIZE = (128,160)
anchors = Anchors()
A = len(anchors(*SIZE))
levels = [r*c*9 for r,c in anchors.grid(*SIZE)]

@pytest.fixture(scope='module')
def tv():
    body = resnet_fpn_backbone(backbone_name='resnet18', weights=None, returned_layers=[2,3,4], extra_blocks=LastLevelP6P7(256,256))
    return TVRetinaNet(body, num_classes=3)

def raw(seed, n=2, K=3, bias=-4., spread=.1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n,A,K,generator=g)*1.5+bias,torch.randn(n,A,4,generator=g)*spread

@given(st.integers(0,2**31), st.sampled_from([-9.,-5.,-3.,0.]), st.sampled_from([3,50,1000]), st.sampled_from([5,300]))
@settings(max_examples=25, deadline=None)
def test_equals_torchvision(tv, seed, bias, topk, max_det):
    logits,deltas = raw(seed, bias=bias)
    deltas = deltas.clamp(-.4,.4) # so that no box leaves the picture: torchvision keeps those without area
    tv.score_thresh,tv.nms_thresh,tv.topk_candidates,tv.detections_per_img = .05,.5,topk,max_det
    want = tv.postprocess_detections(dict(cls_logits=list(logits.split(levels,1)), bbox_regression=list(deltas.split(levels,1))),
                                     [list(anchors(*SIZE).split(levels))]*2, [SIZE]*2)
    got = postprocess((logits,deltas), anchors, SIZE, topk=topk, max_det=max_det)
    for w,g in zip(want,got):
        g = g[g[:,5]!=PAD]
        assert (area(w['boxes'])>0).all()
        torch.testing.assert_close(g[:,4], w['scores'], atol=2e-7, rtol=0)
        w = torch.cat([w['boxes'],w['scores'][:,None],w['labels'][:,None]], 1)
        d = ((g[:,None]-w[None]).abs()*torch.tensor([1,1,1,1,1e4,1e3])).amax(-1) # of equal scores either may come first
        assert not len(d) or (d.amin(1).max()<.01 and d.amin(0).max()<.01)

@pytest.mark.parametrize('merge', ['nms','soft','fuse'])
def test_what_every_merge_promises(merge):
    logits,deltas = raw(0, n=3, bias=-5, spread=.3)
    logits[1] = -20
    out = postprocess((logits,deltas), anchors, SIZE, topk=40, max_det=20, merge=merge)
    assert out.shape==(3,20,6) and (out[1,:,5]==PAD).all() and (out[1,:,:5]==0).all()
    for o in out[[0,2]]:
        o = o[o[:,5]!=PAD]
        assert len(o)>3 and (o[:,4].diff()<=0).all() and (area(o[:,:4])>0).all() and (o[:,:4]>=0).all()
        assert (o[:,[0,2]]<=SIZE[1]).all() and (o[:,[1,3]]<=SIZE[0]).all() and set(o[:,5].tolist())<={0.,1.,2.}

def test_images_and_classes_do_not_suppress_each_other():
    logits,deltas = torch.full((2,A,2),-20.),torch.zeros(2,A,4)
    logits[:,500] = 3.
    out = postprocess((logits,deltas), anchors, SIZE)
    assert (out[...,5]!=PAD).sum(1).tolist()==[2,2] and sorted(out[0,:2,5].tolist())==[0.,1.]

def test_each_image_alone_gives_the_same():
    p = raw(3, n=4, bias=-5)
    whole = postprocess(p, anchors, SIZE)
    for i in range(4): assert torch.equal(whole[i], postprocess(tuple(o[i:i+1] for o in p), anchors, SIZE)[0])

def test_boxes_without_area_are_dropped():
    logits,deltas = torch.full((1,A,1),-20.),torch.zeros(1,A,4)
    logits[0,0],deltas[0,0,0] = 5.,-9. # far to the left of the picture
    assert (postprocess((logits,deltas), anchors, SIZE)[...,5]==PAD).all()

def test_image_head_multiplies():
    p = raw(5, bias=-3)
    out,half = postprocess(p, anchors, SIZE, 0.),postprocess((*p,torch.zeros(2,1)), anchors, SIZE, 0.)
    torch.testing.assert_close(half[...,4], out[...,4]/2)
    sure = postprocess((*p,torch.tensor([[-99.,0,0],[0,-99,99]])), anchors, SIZE)
    torch.testing.assert_close(lesion_prob(torch.tensor([[0.,1,2]])), torch.tensor([0.,1,2]).softmax(0)[2:])
    assert torch.equal(sure[1], postprocess(p, anchors, SIZE)[1])

def test_half_precision_is_decoded_in_float32():
    p = tuple(o.bfloat16() for o in raw(6, bias=-4))
    assert torch.equal(postprocess(p, anchors, SIZE), postprocess(tuple(o.float() for o in p), anchors, SIZE))

@given(st.integers(0,2**31), st.integers(0,60), st.integers(1,5), st.integers(1,7))
@settings(max_examples=100, deadline=None)
def test_best_of_each_group(seed, n, groups, k):
    g = torch.Generator().manual_seed(seed)
    s,of = torch.rand(n,generator=g),torch.randint(groups,(n,),generator=g)
    want = [i for j in range(groups) for i in sorted((i for i in range(n) if of[i]==j), key=lambda i:-s[i])[:k]]
    assert best_of(s, of, k).tolist()==want
