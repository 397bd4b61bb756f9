"Model, loss and detections against torchvision's RetinaNet with the same weights"
import math, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torchvision.models.detection import RetinaNet as TVRetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import sigmoid_focal_loss
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from lungdet.anchors import *
from lungdet.boxes import iou
from lungdet.data import PAD
from lungdet.loss import *
from lungdet.retinanet import *
from lungdet.single import Backbone
from test_boxes import random_boxes

SIZE = 256

@pytest.fixture(scope='module', params=['resnet18','resnet50'])
def pair(request):
    "torchvision's model and ours with the same weights, in evaluation mode"
    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name=request.param, weights=None, trainable_layers=5, returned_layers=[2,3,4],
                               extra_blocks=LastLevelP6P7(256,256), norm_layer=nn.BatchNorm2d)
    tv = TVRetinaNet(body, num_classes=2, min_size=SIZE, max_size=SIZE, image_mean=[0.]*3, image_std=[1.]*3, detections_per_img=300)
    for p in tv.head.parameters(): # far enough from the start that there is something to detect
        if p.ndim>1: nn.init.normal_(p, std=.03)
    tv.head.classification_head.cls_logits.bias.data.fill_(-2.)
    ours = load_torchvision(RetinaNet(Backbone(request.param), n_classes=2), tv.state_dict())
    return tv.eval(),ours.eval()

def target(seed, n): 
    b = random_boxes(n, seed, SIZE*.6)
    return b.clamp(max=SIZE),torch.randint(0,2,(n,),generator=torch.Generator().manual_seed(seed))

def padded(targets):
    n = max(1,max(len(l) for _,l in targets))
    boxes,labels = torch.zeros(len(targets),n,4),torch.full((len(targets),n),PAD)
    for i,(b,l) in enumerate(targets): boxes[i,:len(l)],labels[i,:len(l)] = b,l
    return boxes,labels

def test_raw_answers_and_loss_are_equal(pair):
    tv,ours = pair
    torch.manual_seed(1)
    x,targets = torch.rand(2,3,SIZE,SIZE),[target(3,3),(torch.empty(0,4),torch.empty(0,dtype=torch.int64))]
    with torch.no_grad():
        feats = list(tv.backbone(x).values())
        theirs = tv.head(feats)
        got = ours(x)
        torch.testing.assert_close(got[0], theirs['cls_logits'], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got[1], theirs['bbox_regression'], atol=1e-4, rtol=1e-4)
        anchors = Anchors()(SIZE,SIZE)
        want = tv.compute_loss([dict(boxes=b,labels=l) for b,l in targets], theirs, [anchors]*2)
        cls,box = RetinaLoss(Anchors(),(SIZE,SIZE)).terms((theirs['cls_logits'],theirs['bbox_regression']), *padded(targets))
    torch.testing.assert_close(cls, want['classification'], rtol=1e-6, atol=0)
    torch.testing.assert_close(box, want['bbox_regression'], rtol=1e-6, atol=0)

def test_detections_are_equal(pair):
    tv,ours = pair
    x = torch.rand(2,3,SIZE,SIZE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs = tv(list(x))
        got = postprocess(*ours(x), Anchors(), (SIZE,SIZE), max_det=300)
    for t,o in zip(theirs,got):
        o = o[o[:,5]!=PAD]
        assert len(o)==len(t['scores'])>10
        i,j = o[:,4].argsort(stable=True),t['scores'].argsort(stable=True)
        torch.testing.assert_close(o[i,4], t['scores'][j], atol=1e-4, rtol=1e-4)
        d = (o[:,None,:4]-t['boxes'][None]).abs().amax(-1)+(o[:,None,5]!=t['labels'][None]).float()*1e3+(o[:,None,4]-t['scores'][None]).abs()*1e3
        assert d.amin(1).max()<.5 and d.amin(0).max()<.5

@given(st.integers(0,2**31), st.lists(st.integers(0,4), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_loss_equals_torchvision_on_random_boxes(seed, counts):
    g,anchors = torch.Generator().manual_seed(seed),Anchors()
    a = anchors(128,128)
    targets = [target(seed+i,n) for i,n in enumerate(counts)]
    targets = [(b.clamp(max=127.),l) for b,l in targets]
    targets = [(b[o],l[o]) for b,l in targets for o in [((b[:,2:]-b[:,:2])>1).all(1)&(iou(b,a).max(1).values>0 if len(b) else torch.zeros(0,dtype=bool))]]
    logits,deltas = torch.randn(len(counts),len(a),2,generator=g)-3,torch.randn(len(counts),len(a),4,generator=g)*.2
    head = _tv_head()
    want = head.compute_loss([dict(boxes=b,labels=l) for b,l in targets], dict(cls_logits=logits,bbox_regression=deltas), [a]*len(counts),
                             [_matcher(iou(b,a)) for b,_ in targets])
    cls,box = RetinaLoss(anchors,(128,128)).terms((logits,deltas), *padded(targets))
    torch.testing.assert_close(cls, want['classification'], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(box, want['bbox_regression'], rtol=1e-5, atol=1e-7)

def _tv_head():
    from torchvision.models.detection.retinanet import RetinaNetHead
    return RetinaNetHead(8, 9, 2)

def _matcher(o):
    from torchvision.models.detection._utils import Matcher
    if not len(o): return torch.full((o.shape[1],), -1, dtype=torch.int64)
    return Matcher(.5,.4,allow_low_quality_matches=True)(o)

def test_focal_loss_equals_torchvision():
    z,t = torch.randn(1000),(torch.rand(1000)>.7).float()
    for alpha,gamma in ((.25,2.),(.5,0.),(.75,1.5)):
        torch.testing.assert_close(focal_loss(z,t,alpha,gamma), sigmoid_focal_loss(z,t,alpha,gamma))

def test_extreme_answers_stay_finite():
    loss = RetinaLoss(Anchors(),(128,128))
    n = len(Anchors()(128,128))
    for v in (-1e4,1e4):
        preds = torch.full((1,n,1),v,requires_grad=True),torch.full((1,n,4),v/100,requires_grad=True)
        out = loss(preds, torch.tensor([[[20.,20,90,90]]]), torch.tensor([[0]]))
        out.backward()
        assert out.isfinite() and all(p.grad.isfinite().all() for p in preds)

@pytest.mark.parametrize('kind', ['l1','smooth_l1','giou'])
def test_loss_pulls_boxes_to_the_truth(kind):
    anchors,truth = Anchors(),torch.tensor([[[30.,40,80,100]]])
    n = len(anchors(128,128))
    logits,deltas = torch.full((1,n,1),-3.,requires_grad=True),torch.zeros(1,n,4,requires_grad=True)
    loss,opt = RetinaLoss(anchors,(128,128),box_loss=kind),torch.optim.Adam([logits,deltas],lr=.05)
    for _ in range(500): opt.zero_grad(); loss((logits,deltas),truth,torch.tensor([[0]])).backward(); opt.step()
    best = postprocess(logits,deltas,anchors,(128,128))[0,0]
    assert best[4]>.8 and iou(best[None,:4],truth[0]).item()>.9

def test_half_precision_loss_is_float32():
    anchors = Anchors()
    n = len(anchors(128,128))
    p = torch.randn(1,n,1).bfloat16()-3,torch.randn(1,n,4).bfloat16()
    y = torch.tensor([[[30.,40,80,100]]]),torch.tensor([[0]])
    loss = RetinaLoss(anchors,(128,128))
    assert loss(p,*y).dtype==torch.float32
    torch.testing.assert_close(loss(p,*y), loss([o.float() for o in p],*y))

def test_training_is_that_of_torchvision():
    "Same weights, same batches, Adam: after six steps both have had the same losses, and give the same answers"
    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name='resnet18', weights=None, trainable_layers=5, returned_layers=[2,3,4],
                               extra_blocks=LastLevelP6P7(256,256), norm_layer=nn.BatchNorm2d)
    tv = TVRetinaNet(body, num_classes=2, min_size=128, max_size=128, image_mean=[0.]*3, image_std=[1.]*3)
    ours = load_torchvision(RetinaNet(Backbone('resnet18'), n_classes=2), tv.state_dict())
    tv.train(); ours.train()
    loss,opts,seen = RetinaLoss(Anchors(), (128,128)),[torch.optim.Adam(m.parameters(), lr=1e-4) for m in (tv,ours)],[]
    for step in range(6):
        x = torch.rand(3,3,128,128)
        targets = [(target(9*step+k,n)[0]/2,target(9*step+k,n)[1]) for k,n in enumerate((2,0,1))]
        both = sum(tv(list(x), [dict(boxes=b,labels=l) for b,l in targets]).values()),loss(ours(x), *padded(targets))
        for opt,l in zip(opts,both): opt.zero_grad(); l.backward(); opt.step()
        seen.append([l.item() for l in both])
    seen = torch.tensor(seen)
    torch.testing.assert_close(seen[:,0], seen[:,1], rtol=2e-3, atol=0)
    assert (seen[0]-seen[-1]).abs().min()>1e-3 # they did learn
