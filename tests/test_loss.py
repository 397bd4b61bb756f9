"Focal loss against float64, RetinaLoss against torchvision's RetinaNet, on awkward boxes, in every precision, on empty batches"
import copy, numpy as np, pickle, pytest, torch
import torch.nn.functional as F
from fastai.vision.all import TensorBase, TensorCategory
from hypothesis import given, settings, strategies as st
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import sigmoid_focal_loss
from lungdet.anchors import Anchors, encode
from lungdet.boxes import iou
from lungdet.data import PAD
from lungdet.loss import *
from lungdet.loss import batch_targets, box_losses, image_loss
from lungdet.matching import ATSS, IoUMatcher, IGNORE
from test_boxes import random_boxes
from test_matching import awkward_boxes

S,ANCHORS = 128,Anchors()
SIZE,A = (S,S),ANCHORS(S,S)
COUNTS = [r*c*ANCHORS.per_cell for r,c in ANCHORS.grid(S,S)]
seeds = st.integers(0,2**31)

def padded(targets):
    "Lists of boxes and labels as a batch"
    n = max([1,*(len(l) for _,l in targets)])
    boxes,labels = torch.zeros(len(targets),n,4),torch.full((len(targets),n),PAD)
    for i,(b,l) in enumerate(targets): boxes[i,:len(l)],labels[i,:len(l)] = b,l
    return boxes,labels

def raw(n, k=1, seed=0, dtype=torch.float32):
    "Answers of a network for `n` pictures that ask for a gradient"
    g = torch.Generator().manual_seed(seed)
    return tuple(o.to(dtype).requires_grad_() for o in (torch.randn(n,len(A),k,generator=g)-3, torch.randn(n,len(A),4,generator=g)*.2))

# Focal loss

def exact(z, t, alpha, gamma):
    "The definition in float64, for logits within what float64 can hold"
    z,t = z.detach().double().requires_grad_(),torch.as_tensor(t, dtype=torch.float64)
    p,q = z.sigmoid(),(-z).sigmoid()
    ce = -t*F.logsigmoid(z)-(1-t)*F.logsigmoid(-z)
    loss = (alpha*t+(1-alpha)*(1-t))*((1-t)*p+t*q)**gamma*ce
    return loss.detach(),torch.autograd.grad(loss.sum(), z)[0]

LOGITS = torch.cat([torch.linspace(-100,100,2001),torch.linspace(-1,1,201)])

@pytest.mark.parametrize('gamma', [0.,1e-3,.3,.5,1.,1.5,2.,5.])
@pytest.mark.parametrize('t', [0.,1.,.03125,.5,1-2**-10])
def test_focal_loss_and_gradient_are_those_of_float64(t, gamma):
    for target in (t,torch.full_like(LOGITS,t)):
        z = LOGITS.clone().requires_grad_()
        loss = focal_loss(z, target, .25, gamma)
        grad = torch.autograd.grad(loss.sum(), z)[0]
        want,slope = exact(z, torch.tensor(t) if isinstance(target,float) else target, .25, gamma)
        assert loss.dtype==grad.dtype==torch.float32
        torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=1e-30)
        torch.testing.assert_close(grad.double(), slope, rtol=2e-5, atol=3e-8 if 0<t<1 else 1e-30) # a soft target has a logit where its gradient vanishes

@pytest.mark.parametrize('gamma', [0.,.5,2.])
def test_focal_loss_in_half_precision_is_that_of_the_same_logits_in_float32(gamma):
    for dtype in (torch.bfloat16,torch.float16):
        half = LOGITS.to(dtype).requires_grad_()
        full = half.detach().float().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            a,b = focal_loss(half,0.,gamma=gamma),focal_loss(full,0.,gamma=gamma)
            ga,gb = torch.autograd.grad(a.sum(),half)[0],torch.autograd.grad(b.sum(),full)[0]
        assert a.dtype==b.dtype==gb.dtype==torch.float32 and ga.dtype==dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(ga, gb.to(dtype), rtol=0, atol=0)
        torch.testing.assert_close(b.double(), exact(full,torch.tensor(0.),.25,gamma)[0], rtol=2e-5, atol=1e-30)

@given(seeds, st.sampled_from([0.,.5,1.,1.5,2.,4.]), st.floats(0,1))
@settings(max_examples=50, deadline=None)
def test_focal_loss_is_torchvisions_with_soft_targets_too(seed, gamma, alpha):
    g = torch.Generator().manual_seed(seed)
    z,t = (torch.randn(200,generator=g)*3).double().requires_grad_(),torch.rand(200,generator=g).double()
    t = torch.where(torch.rand(200,generator=g)<.5, t.round(), t)
    ours,theirs = focal_loss(z,t,alpha,gamma),sigmoid_focal_loss(z,t,alpha,gamma)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(o.sum(),z)[0] for o in (ours,theirs)))

def test_focal_gradient_is_that_of_its_loss():
    z = torch.linspace(-8,8,33,dtype=torch.float64).requires_grad_()
    for t in (0.,.1,.7,1.): assert torch.autograd.gradcheck(lambda z: focal_loss(z,t,.25,1.7), z)

def test_published_values_of_focal_loss():
    z = torch.tensor([0.,1,-1,-4.59511985])
    torch.testing.assert_close(focal_loss(z,1.), torch.tensor([.0433217,.00566451,.1754671,1.1283818]), rtol=2e-6, atol=0)
    torch.testing.assert_close(focal_loss(z,0.), torch.tensor([.1299651,.5264012,.0169935,7.5377e-7]), rtol=1e-5, atol=0) # five digits

# Box losses

@pytest.mark.parametrize('kind', box_losses)
@given(b=awkward_boxes(), seed=seeds, scale=st.sampled_from([.1,1,10,100]))
@settings(max_examples=40, deadline=None)
def test_box_losses_are_finite_for_any_answer(kind, b, seed, scale):
    g = torch.Generator().manual_seed(seed)
    a = A[torch.randint(0,len(A),(len(b),),generator=g)]
    for d in (torch.randn(len(b),4,generator=g)*scale, torch.full((len(b),4),-float(scale)), torch.full((len(b),4),float(scale))):
        d.requires_grad_()
        loss = box_losses[kind](d,b,a)
        grad = torch.autograd.grad(loss.sum(), d)[0]
        assert loss.shape==(len(b),) and loss.isfinite().all() and grad.isfinite().all() and (loss>-1e-5).all()
    assert (box_losses[kind](encode(b,a),b,a)<2e-3).all() # the right answer costs nothing, but for the digits that float32 leaves a pixel

# The loss of a batch beside torchvision's

def theirs(preds, targets, matches, giou=False):
    head = RetinaNetHead(8, ANCHORS.per_cell, preds[0].shape[2])
    if giou: head.regression_head._loss_type = 'giou'
    return head.compute_loss([dict(boxes=b,labels=l) for b,l in targets], dict(cls_logits=preds[0],bbox_regression=preds[1]), [A]*len(targets), matches)

def matched(b): return Matcher(.5,.4,allow_low_quality_matches=True)(iou(b,A)) if len(b) else torch.full((len(A),),-1)

def close(got, want): torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)

def compare(targets, k, seed, box_loss):
    preds = raw(len(targets),k,seed)
    loss = RetinaLoss(ANCHORS, SIZE, box_loss=box_loss, matcher=IoUMatcher(zero_ties=True))
    got,want = loss.terms(preds, *padded(targets)),theirs(preds, targets, [matched(b) for b,_ in targets], box_loss=='giou')
    close(got['cls'], want['classification'])
    close(got['box'], want['bbox_regression'])
    ours = torch.autograd.grad(loss(preds, *padded(targets)), preds)
    for a,b in zip(ours, torch.autograd.grad(sum(want.values()), preds)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)

@pytest.mark.parametrize('box_loss', ['l1','giou'])
@given(counts=st.lists(st.integers(0,6), min_size=1, max_size=4), seed=seeds, k=st.integers(1,3))
@settings(max_examples=30, deadline=None)
def test_loss_is_torchvisions_on_random_boxes(box_loss, counts, seed, k):
    targets = [(random_boxes(n,seed+i).clamp(max=S),torch.randint(0,k,(n,),generator=torch.Generator().manual_seed(seed+i))) for i,n in enumerate(counts)]
    compare(targets, k, seed, box_loss)

@pytest.mark.parametrize('box_loss', ['l1','giou'])
@given(boxes=st.lists(awkward_boxes(), min_size=1, max_size=3), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_loss_is_torchvisions_on_awkward_boxes(box_loss, boxes, seed):
    "On the border, of one pixel, the whole picture, the same twice; zero_ties covers boxes that meet no anchor"
    compare([(b,torch.arange(len(b))%2) for b in boxes], 2, seed, box_loss)

def test_a_box_that_meets_no_anchor():
    b = torch.tensor([[5000.,5000,5040,5040],[30,30,80,90]])
    assert (iou(b,A)[0]==0).all()
    compare([(b,torch.tensor([0,0]))], 1, 0, 'l1')
    preds,loss = raw(1),RetinaLoss(ANCHORS,SIZE)
    close(loss(preds,b[None],torch.tensor([[0,0]])), loss(preds,b[None,1:],torch.tensor([[0]]))) # by default it changes nothing

def test_padding_may_stand_anywhere():
    b,l = random_boxes(3,0),torch.tensor([0,1,1])
    preds,loss = raw(1,2),RetinaLoss(ANCHORS,SIZE)
    pad = torch.full((1,4),-7.)
    close(loss(preds, torch.cat([pad,b[:1],pad,b[1:]])[None], torch.tensor([[PAD,0,PAD,1,1]])), loss(preds, b[None], l[None]))

# Options

def slow_terms(preds, targets, box_loss='l1', normalise='image', smoothing=0., matcher=IoUMatcher()):
    "What `terms` should be, picture by picture, with a table of targets"
    cls,box,n = [],[],[]
    for z,d,(b,l) in zip(*preds, targets):
        m = matcher(b,A,COUNTS)
        t = torch.zeros_like(z)
        t[m>=0,l[m[m>=0]]] = 1
        t = t*(1-smoothing)+smoothing/2
        cls.append((sigmoid_focal_loss(z,t)*(m!=IGNORE)[:,None]).sum()); box.append(box_losses[box_loss](d[m>=0],b[m[m>=0]],A[m>=0]).sum()); n.append((m>=0).sum().item())
    if normalise=='image': return [sum(o/max(1,k) for o,k in zip(os,n))/len(n) for os in (cls,box)]
    by = max(1,sum(n))
    if normalise=='running': by = .9*100+.1*by
    return [sum(os)/by for os in (cls,box)]

@pytest.mark.parametrize('box_loss', box_losses)
@pytest.mark.parametrize('normalise', ['image','batch','running'])
@pytest.mark.parametrize('matcher', [IoUMatcher(),ATSS(3)])
def test_options_are_their_definition(box_loss, normalise, matcher):
    targets = [(random_boxes(n,n),torch.arange(n)%2) for n in (2,0,5)]
    preds = raw(3,2)
    for smoothing in (0.,.1):
        loss = RetinaLoss(ANCHORS, SIZE, box_loss=box_loss, box_weight=.5, normalise=normalise, smoothing=smoothing, matcher=matcher)
        cls,box = slow_terms(preds, targets, box_loss, normalise, smoothing, matcher)
        torch.testing.assert_close(loss(preds,*padded(targets)), cls+.5*box, rtol=2e-6, atol=0)

def test_running_mean_moves_only_where_gradients_are():
    loss,preds = RetinaLoss(ANCHORS,SIZE,normalise='running'),raw(1)
    y = padded([(torch.tensor([[30.,30,80,90]]),torch.tensor([0]))])
    n = (IoUMatcher()(y[0][0],A)>=0).sum().item()
    with torch.no_grad(): loss(preds,*y)
    assert loss.positives==100
    loss(preds,*y)
    assert loss.positives==pytest.approx(90+.1*n)
    for _ in range(200): loss(preds,*y)
    assert loss.positives==pytest.approx(n, rel=1e-4)
    loss(preds,*padded([(torch.empty(0,4),torch.empty(0,dtype=torch.int64))]))
    assert loss.positives==pytest.approx(.9*n+.1, rel=1e-4)

@pytest.mark.parametrize('normalise', ['image','batch','running'])
@pytest.mark.parametrize('box_loss', box_losses)
@pytest.mark.parametrize('matcher', [IoUMatcher(),ATSS()])
def test_all_empty_batch(normalise, box_loss, matcher):
    preds,loss = (*raw(2),torch.zeros(2,1,requires_grad=True)),RetinaLoss(ANCHORS,SIZE,box_loss=box_loss,normalise=normalise,matcher=matcher)
    for boxes,labels in ((torch.zeros(2,1,4),torch.full((2,1),PAD)), (torch.zeros(2,0,4),torch.zeros(2,0,dtype=torch.int64))):
        t = loss.terms(preds,boxes,labels)
        assert t['box']==0 and t['cls'].isfinite() and t['cls']>0
        grads = torch.autograd.grad(sum(t.values()), preds)
        assert (grads[0]>0).all() and (grads[1]==0).all() and (grads[2]>0).all()

def test_one_box_and_an_empty_picture_are_the_mean_of_both():
    preds,loss = raw(2),RetinaLoss(ANCHORS,SIZE)
    boxes,labels = padded([(torch.tensor([[30.,40,80,100]]),torch.tensor([0])),(torch.empty(0,4),torch.empty(0,dtype=torch.int64))])
    one,empty = (loss([o[k:k+1] for o in preds],boxes[k:k+1],labels[k:k+1]) for k in (0,1))
    torch.testing.assert_close(loss(preds,boxes,labels), (one+empty)/2)

def test_image_term():
    z1,z3 = torch.randn(4,1,requires_grad=True),torch.randn(4,3,requires_grad=True)
    boxes,labels = padded([(random_boxes(n,n),torch.zeros(n,dtype=torch.int64)) for n in (1,0,2,0)])
    category,loss = torch.tensor([2,PAD,0,1]),RetinaLoss(ANCHORS,SIZE,image_weight=.3)
    preds = raw(4)
    t = loss.terms((*preds,z1),boxes,labels,category)
    torch.testing.assert_close(t['image'], F.binary_cross_entropy_with_logits(z1[:,0],torch.tensor([1.,0,1,0])))
    t = loss.terms((*preds,z3),boxes,labels,category)
    torch.testing.assert_close(t['image'], F.cross_entropy(z3[[0,2,3]],category[[0,2,3]]))
    torch.testing.assert_close(loss((*preds,z3),boxes,labels,category), t['cls']+t['box']+.3*t['image'])
    none = image_loss(z3,labels,torch.full((4,),PAD))
    assert none==0 and (torch.autograd.grad(none,z3)[0]==0).all()
    torch.testing.assert_close(loss(preds,boxes,labels,category), loss(preds,boxes,labels)) # a model without that answer is not asked
    with pytest.raises(ValueError, match='the batch brings none'): loss((*preds,z3),boxes,labels)
    with pytest.raises(ValueError, match='counted from 0'): loss((*preds,z3),boxes,labels,category+1)

# Precision, types, errors

@pytest.mark.parametrize('box_loss', box_losses)
def test_extreme_answers_stay_finite(box_loss):
    loss = RetinaLoss(ANCHORS,SIZE,box_loss=box_loss)
    for v in (-1e4,-100.,0.,100.,1e4):
        for gamma in (0.,.5,2.):
            loss.gamma = gamma
            preds = torch.full((1,len(A),1),v,requires_grad=True),torch.full((1,len(A),4),v/100,requires_grad=True)
            out = loss(preds, torch.tensor([[[20.,20,90,90]]]), torch.tensor([[0]]))
            assert out.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(out,preds))

@pytest.mark.parametrize('box_loss', box_losses)
@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16])
def test_half_precision_loss_is_float32(box_loss, dtype):
    preds = (*raw(2,dtype=dtype),torch.randn(2,3).to(dtype))
    y = *padded([(random_boxes(2,0),torch.tensor([0,0])),(random_boxes(1,1),torch.tensor([0]))]),torch.tensor([0,1])
    loss = RetinaLoss(ANCHORS,SIZE,box_loss=box_loss)
    want = loss([o.float() for o in preds],*y)
    with torch.autocast('cpu', torch.bfloat16): inside = loss(preds,*y),loss([o.float() for o in preds],*y)
    for got in (loss(preds,*y),*inside):
        assert got.dtype==torch.float32
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    for g in torch.autograd.grad(want,preds[:2]): assert g.dtype==dtype and g.isfinite().all()

def test_fastais_types_and_float_labels():
    "Batches of negatives turn labels to floats, and what a model gives has the type of its picture"
    preds,(boxes,labels) = raw(2),padded([(random_boxes(2,0),torch.tensor([0,0])),(random_boxes(1,1),torch.tensor([0]))])
    loss = RetinaLoss(ANCHORS,SIZE)
    got = loss([TensorBase(o) for o in preds], TensorBase(boxes), TensorBase(labels.float()), TensorCategory(torch.tensor([0,1])))
    assert type(got) is torch.Tensor
    close(got, loss(preds,boxes,labels))

def test_loss_survives_pickling():
    preds,y = raw(1),padded([(random_boxes(2,0),torch.tensor([0,0]))])
    loss = RetinaLoss(ANCHORS,SIZE,box_loss='ciou',matcher=ATSS(),normalise='running')
    for other in (pickle.loads(pickle.dumps(loss)),copy.deepcopy(loss)): close(other(preds,*y), RetinaLoss(ANCHORS,SIZE,box_loss='ciou',matcher=ATSS(),normalise='running')(preds,*y))

def test_what_is_wrong_is_said():
    loss,preds,y = RetinaLoss(ANCHORS,SIZE),raw(1),(torch.tensor([[[30.,40,80,100]]]),torch.tensor([[1]]))
    with pytest.raises(ValueError, match='label 1 of 1 classes'): loss(preds,*y)
    with pytest.raises(ValueError, match='another size'): RetinaLoss(ANCHORS,(256,256))(preds,*y)
    for kw,words in ((dict(box_loss='l2'),'must be one of'),(dict(normalise='mean'),'must be'),(dict(smoothing=1.),'would be the same')):
        with pytest.raises(ValueError, match=words): RetinaLoss(ANCHORS,SIZE,**kw)
    with pytest.raises(ValueError, match='is a dimension missing'): focal_loss(torch.zeros(2,3),torch.zeros(2))
    for kw in (dict(gamma=-.1),dict(alpha=1.1)):
        with pytest.raises(ValueError, match='alpha is a share'): focal_loss(torch.zeros(2),0.,**kw)

# It teaches

@pytest.mark.parametrize('matcher', [IoUMatcher(),ATSS()])
@pytest.mark.parametrize('kind', box_losses)
def test_loss_pulls_boxes_to_the_truth(kind, matcher):
    truth = torch.tensor([[[30.,40,80,100]]])
    logits,deltas = torch.full((1,len(A),1),-3.,requires_grad=True),torch.zeros(1,len(A),4,requires_grad=True)
    loss,opt = RetinaLoss(ANCHORS,SIZE,box_loss=kind,matcher=matcher),torch.optim.Adam([logits,deltas],lr=.05)
    for _ in range(500): opt.zero_grad(); loss((logits,deltas),truth,torch.tensor([[0]])).backward(); opt.step()
    best = loss.decodes((logits,deltas))[0,0]
    assert best[4]>.8 and iou(best[None,:4],truth[0]).item()>.9

# An alpha for each class

@given(seeds, st.lists(st.floats(0,1), min_size=1, max_size=4), st.sampled_from([0.,.5,2.]))
@settings(max_examples=40, deadline=None)
def test_alpha_of_each_class_is_the_plain_formula(seed, alpha, gamma):
    "Class by class what a float does, and the gradient with it"
    g = torch.Generator().manual_seed(seed)
    z,t = (torch.randn(5,7,len(alpha),generator=g)*4).double().requires_grad_(),torch.rand(5,7,len(alpha),generator=g).double().round()
    a = torch.tensor(alpha, dtype=torch.float64)
    p = z.sigmoid()
    pt = torch.where(t==1, p, 1-p)
    plain = -torch.where(t==1, a, 1-a)*(1-pt)**gamma*pt.log()
    ours = focal_loss(z,t,a,gamma)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(o.sum(),z,retain_graph=True)[0] for o in (ours,plain)))
    for k,o in enumerate(alpha): torch.testing.assert_close(ours[...,k], focal_loss(z[...,k],t[...,k],o,gamma), rtol=1e-12, atol=0)

@pytest.mark.parametrize('smoothing', [0.,.1])
@pytest.mark.parametrize('normalise', ['image','batch','running'])
def test_equal_alphas_are_the_float_and_others_sum_over_the_classes(normalise, smoothing):
    targets = [(random_boxes(n,n),torch.arange(n)%3) for n in (2,0,5)]
    preds,y = raw(3,3),padded(targets)
    def terms(alpha): return RetinaLoss(ANCHORS, SIZE, alpha=alpha, normalise=normalise, smoothing=smoothing).terms(preds, *y)
    one,same = terms(.25),terms([.25]*3)
    torch.testing.assert_close(one, same, rtol=0 if smoothing==0 else 1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(o["cls"], preds[0])[0] for o in (one,same)), rtol=0 if smoothing==0 else 1e-5, atol=0)
    asked,i,j,_,l = batch_targets(*y, A, COUNTS, IoUMatcher())
    t = torch.zeros_like(preds[0]); t[i,j,l] = 1
    share = RetinaLoss(ANCHORS, SIZE, normalise=normalise).share(i.bincount(minlength=3))
    alpha = [.1,.5,.9]
    want = sum((focal_loss(preds[0][...,k], t[...,k]*(1-smoothing)+smoothing/2, a)*asked).sum(1)@share.float() for k,a in enumerate(alpha))
    torch.testing.assert_close(terms(alpha)['cls'], want, rtol=1e-5, atol=0)

def test_alphas_of_another_number_of_classes():
    loss,y = RetinaLoss(ANCHORS,SIZE,alpha=[.25,.5]),padded([(torch.tensor([[30.,40,80,100]]),torch.tensor([0]))])
    for k in (1,3):
        with pytest.raises(ValueError, match=f'alpha has 2 numbers, and there are {k} classes'): loss.terms(raw(1,k), *y)
    assert loss(raw(1,2), *y).isfinite() and loss(raw(1,2), torch.zeros(1,1,4), torch.tensor([[PAD]])).isfinite() # no positive at all
    for bad in ([],[.5,-.1],[[.5],[.5]],[float('nan')]):
        with pytest.raises(ValueError, match='alpha'): RetinaLoss(ANCHORS,SIZE,alpha=bad)
    for bad in (None,{'a':.2},['a',.2],'.25',[None,.2]):
        for f in (lambda: RetinaLoss(ANCHORS,SIZE,alpha=bad), lambda: focal_loss(torch.zeros(2),0.,bad)):
            with pytest.raises(ValueError, match='one number, or a list with one for each class'): f()
    for one in (np.float32(.5),np.float64(.5),torch.tensor(.5)): assert RetinaLoss(ANCHORS,SIZE,alpha=one).alpha==.5 and RetinaLoss(ANCHORS,SIZE,alpha=one).n_alpha==0
    assert RetinaLoss(ANCHORS,SIZE,alpha=np.array([.25,.5])).n_alpha==2
    with torch.autocast('cpu', torch.bfloat16): assert loss(raw(1,2,dtype=torch.bfloat16), *y).dtype==torch.float32
    assert pickle.loads(pickle.dumps(loss)).alpha.tolist()==[.25,.5]
