"A convolution that goes back to a window only, against the one that goes everywhere"
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from lungdet.localconv import *

@given(st.integers(0,2**31), st.integers(1,4), st.integers(1,17), st.integers(1,17), st.integers(0,6), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_gradients_are_those_of_conv2d(seed, n, h, w, places, bias, last):
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    ours,plain = LocalConv2d(3,5,bias),nn.Conv2d(3,5,3,padding=1,bias=bias)
    plain.load_state_dict(ours.state_dict())
    fmt = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(n,3,h,w,generator=g).contiguous(memory_format=fmt).requires_grad_()
    grad = torch.zeros(n,5,h,w)
    for _ in range(places):
        i,k,r,c = (int(torch.randint(m,(),generator=g)) for m in (n,5,h,w))
        grad[i,k,r,c] = torch.randn((),generator=g)
    a,b = (torch.autograd.grad(m(x), (x,*m.parameters()), grad, allow_unused=True) for m in (ours,plain))
    for p,q in zip(a,b): torch.testing.assert_close(torch.zeros_like(q) if p is None else p+0, q, atol=1e-5, rtol=1e-4)

def test_stacked_in_a_head_with_relus():
    torch.manual_seed(0)
    ours = nn.Sequential(*[m for _ in range(4) for m in (LocalConv2d(4,4),nn.ReLU(inplace=True))])
    plain = nn.Sequential(*[m for _ in range(4) for m in (nn.Conv2d(4,4,3,padding=1),nn.ReLU())])
    plain.load_state_dict(ours.state_dict())
    x,g = torch.randn(3,4,40,40),torch.zeros(3,4,40,40)
    g[0,:,0,0],g[0,:,12,20],g[2,:,39,39] = 1,2,3
    a,b = x.clone().requires_grad_(),x.clone().requires_grad_()
    (ours(a)*g).sum().backward(); (plain(b)*g).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    for p,q in zip(ours.parameters(),plain.parameters()): torch.testing.assert_close(p.grad, q.grad)

def test_frozen_weights_and_frozen_input():
    conv = LocalConv2d(2,2)
    conv.weight.requires_grad_(False)
    x = torch.randn(1,2,8,8,requires_grad=True)
    conv(x)[0,0,4,4].backward()
    assert conv.weight.grad is None and conv.bias.grad is not None and (x.grad[0,0]!=0).sum()==9
    conv = LocalConv2d(2,2)
    conv(torch.randn(1,2,8,8))[0,0,4,4].backward()
    assert conv.weight.grad.abs().sum()>0

def test_steps_aside():
    conv,x = LocalConv2d(2,2),torch.randn(1,2,8,8)
    with torch.no_grad(): assert conv(x).grad_fn is None
    assert 'Local' in type(conv(x).grad_fn).__name__
    with torch.autocast('cpu', torch.bfloat16): assert conv(x).dtype==torch.bfloat16 and 'Local' not in type(conv(x).grad_fn).__name__

def test_not_a_number_is_not_lost():
    "A gradient of nan is somewhere too"
    conv,x = LocalConv2d(2,2),torch.randn(1,2,8,8,requires_grad=True)
    g = torch.zeros(1,2,8,8); g[0,0,3,3] = float('nan')
    assert torch.autograd.grad(conv(x), conv.weight, g)[0].isnan().any()
