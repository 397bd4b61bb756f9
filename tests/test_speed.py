"The faster copy"
import pytest, torch
from torch import nn
from lungdet.retinanet import *
from lungdet.single import Backbone
from lungdet.speed import *

def awake(**kw):
    "A model whose norms have statistics of their own"
    torch.manual_seed(0)
    m = RetinaNet(Backbone(kw.pop('backbone','resnet18')), width=32, depth=2, **kw)
    for b in m.modules():
        if hasattr(b,'running_mean'): b.running_mean.normal_(0,.1); b.running_var.uniform_(.5,2); b.weight.data.uniform_(.5,1.5); b.bias.data.normal_(0,.1)
    return m

@pytest.mark.parametrize('kw', [dict(),dict(norm='frozen'),dict(head_norm='group'),dict(n_categories=3),dict(neck='bifpn'),dict(backbone='tf_efficientnet_lite0'),dict(backbone='densenet121')], ids=str)
def test_folded_norms_change_nothing(kw):
    m,x = awake(**kw).train(),torch.randn(2,3,64,64)
    n = sum(hasattr(b,'running_mean') for b in m.modules())
    fast = optimise_for_inference(m, x, torch.float32)
    left = sum(hasattr(b,'running_mean') for b in fast.modules())
    assert m.training and not fast.training and left<n
    assert left==0 or 'densenet' in str(kw) # a densenet has norms before its convolutions
    with torch.no_grad(): want,got = m.eval()(x),fast(x)
    assert len(want)==len(got)
    for a,b in zip(want,got): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert sum(hasattr(b,'running_mean') for b in m.modules())==n # the original is as it was

def test_half_precision_gives_float32():
    m,x = awake(),torch.rand(1,3,64,64)
    fast = optimise_for_inference(m, x, torch.bfloat16)
    with torch.no_grad(): a,b = m.eval()(x),fast(x)
    assert all(o.dtype==torch.float32 for o in b)
    assert 0<(a[0].sigmoid()-b[0].sigmoid()).abs().max()<.01

def test_a_second_reader_is_noticed():
    class Odd(RetinaNet):
        def __init__(self):
            super().__init__(Backbone('resnet18'), width=32, depth=1)
            self.first,self.bn = nn.Conv2d(3,3,1),nn.BatchNorm2d(3)
            self.bn.running_var.fill_(9.)
        def forward(self, x):
            y = self.first(x)
            return super().forward(self.bn(y)+9*y)
    with pytest.raises(ValueError, match='answers differently'): optimise_for_inference(Odd(), torch.rand(1,3,64,64)*9)
