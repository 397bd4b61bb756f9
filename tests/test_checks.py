"Planted faults, each found by the check it is for; sound learners of every kind; nothing changed by looking"
import copy, numpy as np, pytest, random, torch
from torch import nn
from fastai.vision.all import ItemTransform, set_seed
from lungdet.anchors import Anchors
from lungdet.boxes import xyxy2xywh
from lungdet.checks import *
from lungdet.data import PAD, detection_dls
from lungdet.formats import Annotations
from lungdet.learner import retinanet_learner, retina_splitter
from lungdet.loss import RetinaLoss
from test_data import toy

SMALL = Anchors(((14,18),(32,40),(64,80)), (1.,1.5), (3,4,5))

def data(folder, n=12, classes=('a',), boxes=True, category=False, **kw):
    "`toy` with every third image left empty, on which the rectangle means nothing, and classes in turn"
    ann = toy(folder, n, boxes=boxes)
    b = ann.boxes[[int(i[1:])%3!=0 for i in ann.boxes.image_id]] if boxes else ann.boxes
    b = b.assign(label=[classes[i%len(classes)] for i in range(len(b))])
    ims = ann.images.assign(category=['Lesion' if i in set(b.image_id) else 'Normal' for i in ann.images.image_id])
    return detection_dls(Annotations(ims, b, list(classes)), size=64, bs=4, **kw)

def learner(dls, backbone='resnet18', anchors=SMALL, **kw):
    set_seed(0)
    return retinanet_learner(dls, backbone, pretrained=False, width=16, depth=1, anchors=anchors, **kw)

class Change(ItemTransform):
    "A fault in the loader"
    order = 100
    def __init__(self, f): self.f = f
    def encodes(self, b): return self.f(*(o.as_subclass(torch.Tensor) for o in b))

def changed(folder, f, **kw):
    dls = data(folder, **kw)
    for dl in dls.loaders: dl.after_batch.add(Change(f))
    return dls

def why(res, check): return res.table.set_index('check').reason[check]

SOUND = [dict(), dict(model=dict(norm='group',head_norm='group')), dict(model=dict(neck='bifpn',prior=.05)), dict(loss=dict(matcher='atss',box_loss='giou')),
         dict(loss=dict(normalise='running',smoothing=.1,gamma=1.5)), dict(backbone='mobilenetv3_small_050')]
@pytest.mark.parametrize('options', SOUND, ids=str)
def test_a_sound_learner_passes(tmp_path, options):
    res = check_learner(learner(data(tmp_path), **options), lr=2e-3)
    assert res.ok, res
    assert len(res.table)==10 and res.table.ok.all() and 'Nothing is wrong' in repr(res) and '<table' in res._repr_html_()

@pytest.mark.parametrize('kw', [dict(mode='gray',stats=([.3],[.2])), dict(category=True,categories=['Normal','Lesion']), dict(aug=None,num_workers=1)], ids=str)
def test_every_kind_of_batch(tmp_path, kw):
    res = check_learner(learner(data(tmp_path, **kw)), lr=2e-3)
    assert res.ok, res

def classes_in_turn(*b): return b[0],b[1],torch.where(b[2]!=PAD, (b[2]+1)%2, b[2])
LOADER = {'labels from 1': (lambda x,b,l: (x,b,torch.where(l!=PAD,l+1,l)), 'labels', 'counted from 1'),
          'xywh': (lambda x,b,l: (x,xyxy2xywh(b),l), 'boxes', 'xywh'),
          'of the original': (lambda x,b,l: (x,8*b,l), 'boxes', 'leave the picture'),
          'fractions': (lambda x,b,l: (x,b/64,l), 'boxes', 'fractions'),
          'not a number': (lambda x,b,l: (x,b+torch.nan,l), 'boxes', 'not finite'),
          'half as large': (lambda x,b,l: (x,b/2,l), 'tables', 'px away'),
          'lost': (lambda x,b,l: (x,b,torch.full_like(l,PAD) if l.shape[0]==4 and (l!=PAD).all(1).all() else l), 'tables', 'lost by a transform'),
          'normalised twice': (lambda x,b,l: ((x-.45)/.225,b,l), 'pictures', 'twice'),
          'not normalised': (lambda x,b,l: ((x*.226+.45).clamp(0,1),b,l), 'pictures', 'not normalised'),
          'not divided': (lambda x,b,l: (x*255+254*torch.tensor([2.118,2.036,1.804])[:,None,None],b,l), 'pictures', '255'),
          'black': (lambda x,b,l: (x.amin((2,3),keepdim=True).expand_as(x),b,l), 'pictures', 'no contrast'),
          'NaN': (lambda x,b,l: (x*torch.nan,b,l), 'pictures', 'not finite')}
@pytest.mark.parametrize('name', LOADER)
def test_faults_of_the_loader(tmp_path, name):
    f,check,reason = LOADER[name]
    res = check_learner(learner(changed(tmp_path, f, aug=None)), steps=2)
    assert not res.ok and res.failed[0]==check and reason in why(res, check)

def test_classes_in_another_order(tmp_path):
    res = check_learner(learner(changed(tmp_path, classes_in_turn, classes=('a','b'))), steps=2)
    assert "'a' in the tables and 'b' in the batch" in why(res,'tables') or "'b' in the tables and 'a' in the batch" in why(res,'tables')

def test_a_model_for_other_classes(tmp_path):
    learn = learner(data(tmp_path, classes=('a','b','c')))
    learn.model = learner(data(tmp_path)).model
    assert 'model for other classes' in why(check_learner(learn), 'labels')

def test_nothing_to_learn(tmp_path):
    dls = data(tmp_path, boxes=False)
    res = check_learner(learner(dls))
    assert res.failed==['positives'] and res.table.check.tolist()[-1]=='model' and res.table.ok.iloc[-1] is None

def test_a_single_positive_image(tmp_path):
    dls = data(tmp_path)
    keep = dls.ann.boxes[dls.ann.boxes.image_id=='i4']
    res = check_learner(learner(detection_dls(Annotations(dls.ann.images, keep, ['a']), size=64, bs=4)), steps=2)
    assert set(res.failed)<={'one batch by heart'} and not res.table.ok.isna().any()

def test_tables_of_another_scale(tmp_path):
    dls = data(tmp_path)
    b = dls.ann.boxes.assign(x2=dls.ann.boxes.x1+30, y2=dls.ann.boxes.y1+30)
    res = check_learner(learner(detection_dls(Annotations(dls.ann.images, b, ['a']), size=64, bs=4)), steps=2)
    assert 'anchors' in res.failed and 'the median box is 4 px' in why(res,'anchors')

class Deaf(nn.Module):
    def __init__(self, head): super().__init__(); self.head,self.out = head,head.out
    def forward(self, levels): return self.head([o.detach() for o in levels]).detach()

def test_gradients_that_do_not_arrive(tmp_path):
    for part in ('cls_head','box_head'):
        learn = learner(data(tmp_path))
        setattr(learn.model, part, Deaf(getattr(learn.model, part)))
        res = check_learner(learn)
        assert res.failed==['gradients'] and f'the last of them {part}' in why(res,'gradients') and 'detach()' in why(res,'gradients')
    learn = learner(data(tmp_path))
    learn.freeze()
    assert check_learner(learn, lr=2e-3).ok and 'frozen for now' in check_learner(learn, lr=2e-3).table.set_index('check').found['gradients']
    for p in learn.model.cls_head.parameters(): p.requires_grad_(False)
    res = check_learner(learn)
    assert res.failed==['gradients'] and '4 tensors, the last of them cls_head' in why(res,'gradients') and 'frozen by hand' in why(res,'gradients')
    assert not any(p.requires_grad for p in learn.model.cls_head.parameters())

def test_a_splitter_for_another_model(tmp_path):
    learn = learner(data(tmp_path))
    learn.splitter = lambda m: retina_splitter(m)[:2]
    assert 'are in no group' in why(check_learner(learn, steps=2), 'groups')
    learn.splitter = lambda m: [*retina_splitter(m),list(m.fpn.parameters())]
    assert 'are in two groups' in why(check_learner(learn, steps=2), 'groups')

def test_the_prior(tmp_path):
    for z in (0.,-1.25): # the second costs about the same as the right one
        learn = learner(data(tmp_path))
        nn.init.constant_(learn.model.cls_head.out.bias, z)
        res = check_learner(learn, steps=2)
        assert 'first class loss' in res.failed and 'overwritten' in why(res,'first class loss')
    learn = learner(data(tmp_path))
    learn.model.fpn.register_forward_hook(lambda m,i,o: [300*p for p in o])
    assert 'an untrained head should hardly differ' in why(check_learner(learn, steps=2), 'first class loss')

def test_a_trained_learner_is_not_judged_by_its_prior(tmp_path):
    learn = learner(data(tmp_path))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    res = check_learner(learn, lr=2e-3)
    assert res.ok and why(res,'first class loss')=='already trained?' and res.table.set_index('check').ok['first class loss'] is None

def test_rates(tmp_path):
    for lr,what in ((1e-7,'lr=1e-07 too small'),(1e4,'too large?')):
        res = check_learner(learner(data(tmp_path)), lr=lr, steps=20)
        assert res.failed==['one batch by heart'] and what in why(res,'one batch by heart')
    res = check_learner(learner(data(tmp_path), lr=slice(1e-9,1e-7)), steps=20)
    assert 'lr=1e-07' in why(res,'one batch by heart') # the learner's own

@pytest.mark.parametrize('options', [dict(), dict(normalise='batch'), dict(normalise='running',smoothing=.2), dict(alpha=.4,gamma=1.,matcher='atss')], ids=str)
@pytest.mark.parametrize('K', [1,3])
def test_expected_loss_is_the_loss_of_equal_answers(options, K):
    g,loss = torch.Generator().manual_seed(0),RetinaLoss(SMALL, (64,64), **options)
    boxes = torch.rand(5,3,4,generator=g)*30
    boxes[...,2:] += boxes[...,:2]+4
    labels = torch.randint(0,K,(5,3),generator=g)
    labels[1],labels[2,1:] = PAD,PAD
    for p in (.001,.01,.3):
        z = torch.full((5,len(loss.anchors(64,64)),K), p).logit()
        np.testing.assert_allclose(expected_cls_loss(loss, boxes, labels, K, p), loss.terms((z,torch.zeros(*z.shape[:2],4)), boxes, labels)['cls'].item(), rtol=1e-4)

def everything(learn):
    "What must not change: weights, buffers, modes, what asks for a gradient, the optimiser, the loss, random numbers, the loaders' own"
    m = learn.model
    return dict(state={k:v.clone() for k,v in m.state_dict().items()}, modes=[o.training for o in m.modules()], asks=[p.requires_grad for p in m.parameters()],
                grads=[p.grad is None for p in m.parameters()], opt=None if learn.opt is None else copy.deepcopy(learn.opt.state_dict()), positives=learn.loss_func.positives,
                frozen=getattr(learn.opt,'frozen_idx',None), rng=(random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),
                dls=[dl.rng.getstate() for dl in learn.dls.loaders], after=[[*map(id,dl.after_batch.fs)] for dl in learn.dls.loaders], workers=[dl.fake_l.num_workers for dl in learn.dls.loaders])

def same(a, b):
    if isinstance(a, dict): return set(a)==set(b) and all(same(a[k],b[k]) for k in a)
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, (list,tuple)) or type(a).__name__=='L': return len(a)==len(b) and all(map(same, a, b))
    return a==b

@pytest.mark.parametrize('trained', [False,True])
def test_a_learner_is_as_it_was(tmp_path, trained):
    def make():
        set_seed(1)
        learn = learner(data(tmp_path, positives=.5), loss=dict(normalise='running'))
        if trained:
            learn.freeze()
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return learn
    a,b = make(),make()
    before = everything(a)
    assert trained==(a.opt is not None)
    check_learner(a, steps=5, draw=True)
    assert same(before, everything(a)) and not same(before, everything(b)|{'positives':-1})
    for o in (a,b):
        set_seed(2)
        with o.no_bar(), o.no_logging(): o.fit(1, 1e-3)
    assert same(a.model.state_dict(), b.model.state_dict()) # and trains as it would have

def test_draws_what_it_looked_at(tmp_path):
    res = check_learner(learner(data(tmp_path)), steps=2)
    assert len(res.show(max_n=3))==3

def test_the_prediction_knows_an_alpha_for_each_class(tmp_path):
    dls = data(tmp_path, classes=('a','b','c'))
    _,boxes,labels = dls.one_batch()
    loss = RetinaLoss(SMALL, (64,64), alpha=[.1,.4,.8])
    a = SMALL(64,64)
    z = torch.full((len(boxes),len(a),3), .02).logit()
    np.testing.assert_allclose(expected_cls_loss(loss, boxes, labels, 3, .02), loss.terms((z,torch.zeros(*z.shape[:2],4)), boxes, labels)['cls'].item(), rtol=1e-4)
    res = check_learner(learner(dls, loss=dict(alpha=[.1,.4,.8])), lr=2e-3).table.set_index('check')
    assert res.ok['first class loss'] # whether the loss falls is no question here: the three classes look alike
    with pytest.raises(ValueError, match='alpha has 2 numbers, and there are 3 classes'): learner(dls, loss=dict(alpha=[.1,.4]))
