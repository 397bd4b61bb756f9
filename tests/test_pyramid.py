"The necks against torchvision's, and what they promise"
import pytest, torch
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from lungdet.anchors import Anchors
from lungdet.pyramid import *

def feats(h=64, w=96, channels=(8,12,16)): return [torch.randn(2,c,-(-h//s),-(-w//s)) for c,s in zip(channels,(8,16,32))]

@pytest.mark.parametrize('p6', ['p5','c5'])
def test_fpn_is_torchvisions(p6):
    ours,theirs = FPN([8,12,16], 24, p6=p6),FeaturePyramidNetwork([8,12,16], 24, LastLevelP6P7(24 if p6=='p5' else 16, 24))
    for i in range(3):
        theirs.inner_blocks[i][0].load_state_dict(ours.lateral[i].state_dict()); theirs.layer_blocks[i][0].load_state_dict(ours.smooth[i].state_dict())
    theirs.extra_blocks.p6.load_state_dict(ours.p6.state_dict()); theirs.extra_blocks.p7.load_state_dict(ours.p7.state_dict())
    f = feats()
    for a,b in zip(ours(f), theirs({str(i):o for i,o in enumerate(f)}).values()): torch.testing.assert_close(a, b)

@pytest.mark.parametrize('neck', list(necks))
@pytest.mark.parametrize('levels', [(3,4,5,6,7),(3,4,5),(4,5,6),(4,5,6,7),(5,6,7),(4,5)])
@pytest.mark.parametrize('size', [(64,96),(100,131)])
def test_levels_fit_the_anchors_and_all_is_used(neck, levels, size):
    m = necks[neck]([8,12,16], 16, levels)
    out = m(feats(*size))
    assert [tuple(o.shape[-2:]) for o in out]==Anchors([(32,)]*len(levels), levels=levels).grid(*size)
    sum(o.square().sum() for o in out).backward()
    assert all(p.grad is not None for p in m.parameters())

def test_fewer_levels_are_the_same_levels():
    "P4 to P6 alone give what they give among all five"
    whole,f = FPN([8,12,16], 16),feats()
    part = FPN([8,12,16], 16, (4,5,6))
    for i in range(2):
        part.lateral[i].load_state_dict(whole.lateral[i+1].state_dict()); part.smooth[i].load_state_dict(whole.smooth[i+1].state_dict())
    part.p6.load_state_dict(whole.p6.state_dict())
    for a,b in zip(part(f), whole(f)[1:4]): torch.testing.assert_close(a, b)

@pytest.mark.parametrize('levels', [(2,3,4),(3,5),(6,7),(3,),(3,4),(4,3),(5,6,7,8),()])
def test_levels_that_cannot_be(levels):
    with pytest.raises(ValueError, match='must follow one another'): FPN([8,12,16], 16, levels)

def test_bifpn_weights_are_shares():
    m = BiFPN([8,12,16], 16)
    for f in m.modules():
        if isinstance(f, Fuse):
            f.v.data.normal_()
            assert (f.weights()>=0).all() and f.weights().sum()<=1

def test_bifpn_survives_weights_that_are_all_negative():
    m = BiFPN([8,12,16], 16)
    for f in m.modules():
        if isinstance(f, Fuse): f.v.data.fill_(-1)
    assert all(o.isfinite().all() for o in m(feats()))
