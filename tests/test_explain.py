"Where detections come from"
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
import lungdet.metadata # noqa: F401, brings the models that are told age, sex and view
from lungdet.anchors import Anchors, decode
from lungdet.boxes import clip_boxes
from lungdet.data import PAD
from lungdet.decode import postprocess
from lungdet.explain import *
from lungdet.retinanet import RetinaNet
from lungdet.single import Backbone

def answers(size, K=2, per_cell=9, seed=0, levels=(3,4,5,6,7), n_categories=0):
    g,A = torch.Generator().manual_seed(seed),Anchors(levels=levels, sizes=Anchors().sizes[:len(levels)])
    n = sum(A.counts(*size))
    out = torch.randn(1,n,K,generator=g)*2-4,torch.randn(1,n,4,generator=g)*.3
    return A,out+((torch.randn(1,n_categories,generator=g),) if n_categories else ())

@given(h=st.integers(33,150), w=st.integers(33,150), seed=st.integers(0,99), n=st.sampled_from([0,1,3]), levels=st.sampled_from([(3,4,5,6,7),(4,5,6),(5,)]))
@settings(max_examples=25, deadline=None)
def test_every_detection_goes_back_to_the_anchor_that_made_it(h, w, seed, n, levels):
    A,preds = answers((h,w), seed=seed, n_categories=n, levels=levels)
    det = postprocess(preds, A, (h,w))[0]
    who,a = found_by(det, preds, A, (h,w)),A(h,w)
    det = det[det[:,5]!=PAD]
    assert len(who)==len(det)
    maps = {k:score_maps(preds, A, (h,w), k) for k in (0,1)}
    for d,o in zip(det, who.itertuples(index=False)):
        assert o.off<1e-3 and o.agree>=1
        assert torch.allclose(clip_boxes(decode(preds[1][0,o.anchor], a[o.anchor])[None], (h,w))[0], d[:4], atol=1e-3)
        l = A.levels.index(o.level)
        assert sum(A.counts(h,w)[:l])+(o.row*A.grid(h,w)[l][1]+o.col)*9+o.shape==o.anchor
        centre = A.cells[l][o.shape]
        assert [o.ax1,o.ay1,o.ax2,o.ay2]==pytest.approx((centre+torch.tensor([o.col,o.row]*2)*2**o.level).tolist())
        assert maps[int(d[5])][o.level][o.row,o.col]>=d[4].item()-1e-5

def test_two_anchors_with_one_box_are_told_apart_by_score():
    A,preds = answers((64,64), K=1)
    a,cls,box = A(64,64),torch.full_like(preds[0], -9.),torch.zeros_like(preds[1])
    cls[0,[0,1],0] = torch.tensor([1.,2.])
    ca,cb = ((o[:2]+o[2:])/2 for o in a[:2]); wh = [(o[2:]-o[:2]) for o in a[:2]]
    box[0,0] = torch.cat([(cb-ca)/wh[0],(wh[1]/wh[0]).log()])
    det = postprocess((cls,box), A, 64)[0]
    assert (det[:,5]!=PAD).sum()==1 and found_by(det, (cls,box), A, 64).anchor.tolist()==[1] and found_by(det, (cls,box), A, 64).agree.tolist()==[2]

def test_averaged_boxes_have_a_nearest_anchor():
    A,preds = answers((96,96), seed=3)
    who = found_by(postprocess(preds, A, 96, merge='fuse')[0], preds, A, 96)
    assert len(who) and who.off.max()>1e-3

def test_no_detection_is_an_empty_table():
    A,preds = answers((64,64))
    det = postprocess((preds[0]-50,preds[1]), A, 64)[0]
    who = found_by(det, preds, A, 64)
    assert len(who)==0 and 'anchor' in who
    with pytest.raises(ValueError, match='one are explained'): found_by(det, tuple(torch.cat([o,o]) for o in preds), A, 64)

def net(**kw):
    torch.manual_seed(0)
    m = RetinaNet(Backbone('test_efficientnet'), width=32, depth=1, n_anchors=9, **kw).eval()
    for h in (m.cls_head,): h.out.weight.data *= 20
    return m

@pytest.mark.parametrize('kw', [dict(),dict(n_categories=1),dict(n_categories=3),dict(neck='bifpn'),dict(levels=(3,4,5)),dict(n_classes=3)], ids=str)
def test_the_figure_is_made_for_every_model(kw):
    m,x = net(**kw),torch.rand(1,3,96,80)
    A = Anchors(levels=kw.get('levels',(3,4,5,6,7)), sizes=Anchors().sizes[:len(kw.get('levels',range(5)))])
    e = explain(m, x, A, score_thr=1e-5)
    assert e.cam.shape==tuple(-(-s//2**e.stage) for s in (96,80)) and e.cam.min()>=0 and np.isfinite(e.cam).all()
    assert (e.image is None)==('n_categories' not in kw)
    assert len(show_explanation(x[0].permute(1,2,0).numpy(), e))==3+(e.image is not None)
    plt.close('all')

def test_weights_and_modes_are_left_as_they_were():
    m,x = net(n_categories=2).requires_grad_(False),torch.rand(1,3,64,64)
    before = {k:v.clone() for k,v in m.state_dict().items()}
    grad_cam(m, x, image_logit); explain(m, x, Anchors(), score_thr=1e-6)
    assert not m.backbone._forward_hooks and all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and all(p.grad is None for p in m.parameters())
    with torch.inference_mode(False): assert not m(x)[0].requires_grad
    with pytest.raises(ZeroDivisionError): grad_cam(m, x, lambda o: 1/0)
    assert not m.backbone._forward_hooks # also when it fails
    with pytest.raises(ValueError, match='model.eval'): grad_cam(m.train(), x, image_logit)

def test_cam_of_the_image_head_adds_up_to_its_logit():
    "Mean over places of features times weights, plus bias: what CAM was first"
    m,x = net(n_categories=1),torch.rand(1,3,96,96)
    with torch.no_grad():
        c5 = m.backbone(x)[-1]
        w = m.image_head.out.weight[0]
        want = (c5*w[:,None,None]).sum(1)[0].relu()/c5[0,0].numel()
    assert np.allclose(grad_cam(m, x, lambda o: o[2][0,0]), want.numpy(), atol=1e-6)
    assert np.allclose(grad_cam(m, x, image_logit), want.numpy(), atol=1e-5)

def test_metadata_are_passed_on():
    fields = [dict(name='view', values=['AP','PA'])]
    m,x = net(metadata='film', fields=fields),torch.rand(1,3,64,64)
    m.condition.table.data.normal_()
    maps = [grad_cam(m, x, anchor_logit(100), torch.tensor([[v]]), 3) for v in (0.,1.)]
    assert not np.allclose(*maps)
    explain(m, x, Anchors(), meta=torch.tensor([[1.]]), score_thr=0.)

def test_gradient_reaches_only_what_the_anchor_can_see():
    m,x = net(),torch.rand(1,3,256,256)
    first = grad_cam(m, x, anchor_logit(0), stage=3)
    assert first[:8,:8].max()>0 and first.shape==(32,32)

def test_a_cover_changes_only_its_place():
    seen = []
    class Eye(nn.Module):
        def forward(self, x): seen.append(x); return (x.mean()[None],)
    x = torch.arange(2*36.).reshape(1,2,6,6)
    scores = score_without(Eye(), x, torch.tensor([[1.,1,3,3],[-5.,-5,2,2],[9.,9,12,12]]), lambda o: o[0][0])
    assert len(scores)==4 and torch.equal(seen[0], x) and torch.equal(seen[3], x)
    hole = torch.zeros(6,6,dtype=torch.bool); hole[1:3,1:3] = True
    assert torch.equal(seen[1][:,:,~hole], x[:,:,~hole]) and torch.allclose(seen[1][0,0,hole], x[0,0,~hole].mean())
    assert (seen[2]!=x)[0,0].sum()<=4
