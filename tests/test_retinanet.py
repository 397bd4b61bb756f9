"The whole network against both of torchvision's RetinaNets, with the same weights"
import copy, pytest, torch
from functools import partial
from torch import nn
from torchvision.models.detection import RetinaNet as TVRetinaNet, retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FrozenBatchNorm2d as TVFrozen
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from lungdet.anchors import *
from lungdet.boxes import iou
from lungdet.data import PAD
from lungdet.decode import *
from lungdet.interop import *
from lungdet.loss import *
from lungdet.matching import *
from lungdet.retinanet import *
from lungdet.single import Backbone
from test_boxes import random_boxes

SIZE = 256
plain = dict(min_size=SIZE, max_size=SIZE, image_mean=[0.]*3, image_std=[1.]*3, detections_per_img=300) # no hidden resize or normalisation
VERSIONS = dict(v1={}, v2=dict(head_norm='group', neck_args=dict(p6='c5')))
BOX_LOSS = dict(v1='l1', v2='giou')

def resnet18_version(v):
    "torchvision's two designs on a smaller backbone"
    extra = LastLevelP6P7(256 if v=='v1' else 512, 256)
    body = resnet_fpn_backbone(backbone_name='resnet18', weights=None, trainable_layers=5, returned_layers=[2,3,4], extra_blocks=extra, norm_layer=nn.BatchNorm2d)
    head = RetinaNetHead(256, 9, 2, norm_layer=partial(nn.GroupNorm,32) if v=='v2' else None)
    head.regression_head._loss_type = BOX_LOSS[v]
    return TVRetinaNet(body, num_classes=2, head=head, **plain)

def awake(tv):
    "Weights far enough from their start that there is something to detect, and boxes that stay in the picture"
    for p in tv.head.classification_head.parameters():
        if p.ndim>1: nn.init.normal_(p, std=.02)
    nn.init.constant_(tv.head.classification_head.cls_logits.bias, -3.5)
    norms = [m for m in tv.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms: m.momentum = 1. # statistics of features, so that they do not grow from block to block
    with torch.no_grad(): tv.train().backbone(torch.rand(2,3,SIZE,SIZE))
    for m in norms: m.momentum = .1
    return tv

@pytest.fixture(scope='module', params=['resnet18-v1','resnet18-v2','resnet50-v1','resnet50-v2'])
def pair(request):
    "torchvision's model and ours with the same weights, in evaluation mode; the version"
    torch.manual_seed(0)
    net,v = request.param.split('-')
    if net=='resnet18': tv = resnet18_version(v)
    else: tv = dict(v1=retinanet_resnet50_fpn, v2=retinanet_resnet50_fpn_v2)[v](weights=None, weights_backbone=None, num_classes=2, **plain)
    awake(tv)
    return tv.eval(),load_torchvision(RetinaNet(Backbone(net), n_classes=2, **VERSIONS[v]), tv.state_dict()).eval(),v

def target(seed, n):
    return random_boxes(n, seed, SIZE*.6).clamp(max=SIZE),torch.randint(0,2,(n,),generator=torch.Generator().manual_seed(seed))

def padded(targets):
    n = max(1,max(len(l) for _,l in targets))
    boxes,labels = torch.zeros(len(targets),n,4),torch.full((len(targets),n),PAD)
    for i,(b,l) in enumerate(targets): boxes[i,:len(l)],labels[i,:len(l)] = b,l
    return boxes,labels

EMPTY = torch.empty(0,4),torch.empty(0,dtype=torch.int64)
def as_dicts(targets): return [dict(boxes=b,labels=l) for b,l in targets]

def test_anchors_matches_and_losses_are_equal(pair):
    "Two pictures, one of them empty: the same raw answers, anchors, matches, and losses to a millionth"
    tv,ours,v = pair
    torch.manual_seed(1)
    x,targets = torch.rand(2,3,SIZE,SIZE),[target(3,3),EMPTY]
    with torch.no_grad():
        feats = list(tv.backbone(x).values())
        theirs,got = tv.head(feats),ours(x)
        torch.testing.assert_close(got[0], theirs['cls_logits'], atol=5e-4, rtol=1e-4)
        torch.testing.assert_close(got[1], theirs['bbox_regression'], atol=5e-4, rtol=1e-4)
        images,_ = tv.transform(list(x))
        anchors = tv.anchor_generator(images, feats)
        assert all(torch.equal(Anchors()(SIZE,SIZE), a) for a in anchors)
        assert torch.equal(match(iou(targets[0][0],anchors[0])), tv.proposal_matcher(iou(targets[0][0],anchors[0])))
        want = tv.compute_loss(as_dicts(targets), theirs, anchors)
        loss = RetinaLoss(Anchors(), (SIZE,SIZE), box_loss=BOX_LOSS[v])
        terms = loss.terms((theirs['cls_logits'],theirs['bbox_regression']), *padded(targets))
        torch.testing.assert_close(terms['cls'], want['classification'], rtol=1e-6, atol=0)
        torch.testing.assert_close(terms['box'], want['bbox_regression'], rtol=1e-6, atol=0)

def test_detections_are_equal(pair):
    "From picture to boxes"
    tv,ours,_ = pair
    x = torch.rand(2,3,SIZE,SIZE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(): theirs,got = tv(list(x)),postprocess(ours(x), Anchors(), (SIZE,SIZE), max_det=300)
    for t,o in zip(theirs,got):
        o = o[o[:,5]!=PAD]
        assert min(len(o),len(t['scores']))>10
        # two scores that differ in the seventh digit may change places, and a pair may overlap by .5 in the seventh digit: each box looks for its like
        d = (o[:,None,:4]-t['boxes'][None]).abs().amax(-1)+(o[:,None,5]!=t['labels'][None]).float()*1e3+(o[:,None,4]-t['scores'][None]).abs()*1e3
        alone = (d.amin(1)>.2).sum()+(d.amin(0)>.2).sum()
        assert alone<=.05*len(o), alone

def test_weights_go_there_and_back(pair):
    tv,ours,v = pair
    state = to_torchvision(ours)
    assert state.keys()==tv.state_dict().keys() and all(torch.equal(state[k],t) for k,t in tv.state_dict().items())
    back = load_torchvision(RetinaNet(Backbone(ours.backbone.name), n_classes=2, n_categories=3, **VERSIONS[v]), state)
    assert all(torch.equal(t,back.state_dict()[k]) for k,t in ours.state_dict().items())

def test_names_of_older_files():
    "The files that torchvision offers were written before it renamed its tensors"
    tv = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    old = {}
    for k,t in tv.state_dict().items():
        k = k.replace('inner_blocks.0.0.','inner_blocks.0.').replace('inner_blocks.1.0.','inner_blocks.1.').replace('inner_blocks.2.0.','inner_blocks.2.')
        k = k.replace('layer_blocks.0.0.','layer_blocks.0.').replace('layer_blocks.1.0.','layer_blocks.1.').replace('layer_blocks.2.0.','layer_blocks.2.')
        for i in range(4): k = k.replace(f'_head.conv.{i}.0.', f'_head.conv.{2*i}.')
        if not k.endswith('num_batches_tracked'): old[k] = t # frozen norms have none
    assert 'head.regression_head.conv.6.weight' in old and 'head.regression_head.conv.3.0.weight' not in old
    assert copy.deepcopy(tv).load_state_dict(old, strict=False).unexpected_keys==[] # torchvision itself reads them
    ours = load_torchvision(RetinaNet(Backbone('resnet50'), 2), old)
    assert torch.equal(ours.box_head.tower[3][0].weight, tv.head.regression_head.conv[3][0].weight)
    assert torch.equal(ours.fpn.smooth[2].weight, tv.backbone.fpn.layer_blocks[2][0].weight)

def test_phantom_class():
    tv = awake(resnet18_version('v1'))
    one = load_torchvision(RetinaNet(Backbone('resnet18'), 1), tv.state_dict(), background=True).eval()
    both = load_torchvision(RetinaNet(Backbone('resnet18'), 2), tv.state_dict()).eval()
    x = torch.rand(1,3,SIZE,SIZE)
    with torch.no_grad(): torch.testing.assert_close(one(x)[0], both(x)[0][...,1:])
    tv.load_state_dict(to_torchvision(one, background=True))
    with torch.no_grad(): theirs = tv.eval()(list(x))[0]
    assert set(theirs['labels'].tolist())=={1}

def test_frozen_norms_and_eps_zero():
    "The COCO weights of v1 were trained with frozen norms whose eps is 0"
    tv = TVRetinaNet(resnet_fpn_backbone(backbone_name='resnet18', weights=None, trainable_layers=5, returned_layers=[2,3,4], extra_blocks=LastLevelP6P7(256,256)), num_classes=2, **plain)
    for m in tv.modules():
        if isinstance(m, TVFrozen):
            m.eps = 0.
            m.running_mean.normal_(); m.running_var.uniform_(.1,2); m.weight.uniform_(.5,1.5); m.bias.normal_()
    ours = RetinaNet(Backbone('resnet18'), 2)
    set_norm(ours.backbone, 'frozen', eps=0)
    load_torchvision(ours, tv.state_dict()).train()
    assert all(k in dict(ours.named_buffers()) for k in ours.state_dict() if '.bn1.' in k) # nothing to train
    x = torch.rand(1,3,SIZE,SIZE)
    with torch.no_grad(): got,want = ours(x),tv.head(list(tv.backbone(x).values()))
    torch.testing.assert_close(got[0], want['cls_logits'], atol=1e-4, rtol=1e-4)

def test_how_many_numbers():
    "The published counts, with 91 classes"
    assert sum(p.numel() for p in RetinaNet(Backbone('resnet50'), 91, norm='frozen').parameters())==34_014_999
    assert sum(p.numel() for p in RetinaNet(Backbone('resnet50'), 91, **VERSIONS['v2']).parameters())==38_198_935

@pytest.mark.parametrize('v', ['v1','v2'])
def test_training_is_that_of_torchvision(v):
    "Same weights, same batches, Adam: after six steps both have had the same losses, and give the same answers"
    torch.manual_seed(0)
    tv = resnet18_version(v)
    tv.transform.min_size,tv.transform.max_size = (128,),128
    ours = load_torchvision(RetinaNet(Backbone('resnet18'), n_classes=2, **VERSIONS[v]), tv.state_dict())
    tv.train(); ours.train()
    loss,opts,seen = RetinaLoss(Anchors(), (128,128), box_loss=BOX_LOSS[v]),[torch.optim.Adam(m.parameters(), lr=1e-4) for m in (tv,ours)],[]
    for step in range(6):
        x = torch.rand(3,3,128,128)
        targets = [(target(9*step+k,n)[0]/2,target(9*step+k,n)[1]) for k,n in enumerate((2,0,1))]
        both = sum(tv(list(x), as_dicts(targets)).values()),loss(ours(x), *padded(targets))
        for opt,l in zip(opts,both): opt.zero_grad(); l.backward(); opt.step()
        seen.append([l.item() for l in both])
    seen = torch.tensor(seen)
    torch.testing.assert_close(seen[:,0], seen[:,1], rtol=2e-3, atol=0)
    assert (seen[0]-seen[-1]).abs().min()>1e-3 # they did learn

def test_all_empty_batch_trains_every_part():
    ours = RetinaNet(Backbone('resnet18'))
    l = RetinaLoss(Anchors(), (128,128))(ours(torch.rand(2,3,128,128)), *padded([EMPTY,EMPTY]))
    l.backward()
    assert l.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    assert all(p.grad.abs().sum()==0 for p in ours.box_head.parameters()) and ours.cls_head.out.bias.grad.abs().sum()>0

# options

@pytest.mark.parametrize('backbone', ['resnet18','resnet50','tf_efficientnet_lite0','timm/resnet18','convnext_atto'])
@pytest.mark.parametrize('neck,levels', [('fpn',(3,4,5,6,7)),('bifpn',(4,5,6))])
def test_any_backbone_neck_and_levels(backbone, neck, levels):
    net = RetinaNet(Backbone(backbone, in_channels=1), 2, 3, width=32, depth=1, levels=levels, neck=neck, n_categories=3).train()
    cls,box,image = net(torch.randn(2,1,160,224))
    A = len(Anchors([(32,)]*len(levels), levels=levels)(160,224))
    assert cls.shape==(2,A,2) and box.shape==(2,A,4) and image.shape==(2,3)
    (cls.sum()+box.sum()+image.sum()).backward()
    used = [p.grad is not None for k,p in net.named_parameters() if not k.startswith('backbone.')]
    assert all(used)

@pytest.mark.parametrize('kind', ['batch','frozen','group'])
@pytest.mark.parametrize('backbone', ['resnet18','tf_efficientnet_lite0'])
def test_norms_of_the_backbone(kind, backbone):
    net = RetinaNet(Backbone(backbone), width=32, depth=1, norm=kind).train()
    before = {k:b.clone() for k,b in net.backbone.named_buffers()}
    out = net(torch.randn(2,3,64,64))
    moved = any(not torch.equal(b,before[k]) for k,b in net.backbone.named_buffers())
    kinds = {type(m).__name__ for m in net.backbone.modules() if 'Norm' in type(m).__name__}
    assert moved==(kind=='batch') and out[0].isfinite().all()
    assert {'batch':all('Batch' in k for k in kinds), 'frozen':kinds=={'FrozenBatchNorm2d'}, 'group':kinds=={'GroupNorm'}}[kind]

def test_frozen_norms_stay_frozen_under_fastai():
    "freeze and unfreeze of fastai set requires_grad of every parameter; the affine part of a frozen norm is none"
    net = RetinaNet(Backbone('resnet18'), width=32, depth=1, norm='frozen')
    assert not any('bn' in k for k,_ in net.named_parameters())

def test_image_head_reads_c5_only():
    net = RetinaNet(Backbone('resnet18'), width=32, depth=1, n_categories=3).eval()
    x = torch.randn(1,3,64,64)
    before = net(x)[2]
    for p in (*net.fpn.parameters(),*net.cls_head.parameters()): p.data.zero_()
    assert torch.equal(net(x)[2], before)

@pytest.mark.parametrize('shape', [(2,8,33,40),(1,4,256,256)]) # odd sides; places that need more than 15 bits
@pytest.mark.parametrize('layout', [torch.contiguous_format,torch.channels_last])
def test_light_stem_is_the_same(shape, layout):
    "`PoolReLU` beside ReLU and max pooling, bit for bit: what comes out, and the gradient, with ties and a NaN"
    x = torch.randn(shape).round(decimals=1).contiguous(memory_format=layout).requires_grad_()
    w = torch.randn(shape[0], shape[1], (shape[2]+1)//2, (shape[3]+1)//2)
    res = [(y := f(x), torch.autograd.grad((y*w).sum(), x)[0]) for f in (nn.Sequential(nn.ReLU(), nn.MaxPool2d(3,2,1)), PoolReLU())]
    for a,b in zip(*res): assert torch.equal(a, b)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(PoolReLU()(x), res[0][0])
    bad = x.detach().clone(); bad[0,0,5,5] = float('nan')
    assert torch.equal(PoolReLU()(bad.requires_grad_()).isnan(), nn.MaxPool2d(3,2,1)(bad.relu()).isnan())
