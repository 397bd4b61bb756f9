"One box per image: any backbone, both losses, prediction from any kind of picture, weights in a file, the limit of one box"
import json, cv2, numpy as np, pandas as pd, pytest, timm, torch, torchvision
from pathlib import Path
from types import SimpleNamespace
from fastai.vision.all import set_seed
from lungdet.core import XYXY, describe, write_study
from lungdet.boxes import xywh2xyxy
from lungdet.data import PAD, largest_box, single_box_dls
from lungdet.pictures import load_picture
from lungdet.evaluate import rsna_score
from lungdet.formats import Annotations
from lungdet.learner import load_detector
from lungdet.single import *
from lungdet.single import offline_weights
from test_data import toy

TV = ['resnet18','resnext50_32x4d','densenet121','mobilenet_v2','mobilenet_v3_small','efficientnet_b0','efficientnet_v2_s','convnext_tiny','regnet_x_400mf',
      'vgg11','vgg11_bn','shufflenet_v2_x0_5','mnasnet0_5','googlenet']
TIMM = ['tf_efficientnet_lite0','mobilenetv3_small_050','convnext_atto','regnetx_002','timm/resnet18','timm/vgg11','hardcorenas_a','repvgg_a0']
NONE = ['alexnet','squeezenet1_0','swin_t','swin_v2_t','maxvit_t','vit_b_16','inception_v3','timm/swin_tiny_patch4_window7_224','vit_tiny_patch16_224','mixer_s32_224']

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', TV+TIMM)
def test_stages_and_groups_of_every_family(name):
    set_seed(0)
    b = Backbone(name).eval()
    x = torch.randn(2,3,96,96)
    out = b(x)
    assert [tuple(o.shape[1:]) for o in out]==[(c,s,s) for c,s in zip(b.channels,(12,6,3))]
    early,late = b.parts()
    ids = [id(p) for p in early+late]
    assert len(ids)==len(set(ids)) and set(ids)==set(map(id,b.parameters())) and early and late
    out[0].sum().backward()
    assert all(p.grad is None for p in late) and all(p.grad is not None for p in early) # C3 depends on the early ones alone, and on all
    assert [o.shape[-2:] for o in b(torch.randn(1,3,64,128))]==[(8,16),(4,8),(2,4)] # any size
    b.zero_grad(); sum(o.sum() for o in b.train()(x)).backward()
    assert all(p.grad is not None for p in b.parameters()) # nothing is carried along unused

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', TV)
def test_children_in_order_are_what_torchvision_computes(name):
    "The outputs of the modules at the cuts, seen by hooks in torchvision's own forward"
    set_seed(0)
    b,tv,seen = Backbone(name).eval(),torchvision.models.get_model(name, weights=None).eval(),[]
    own = b.net.state_dict()
    for k,v in own.items(): tv.state_dict()[k].copy_(v) # the names are torchvision's
    for k in b.cuts: tv.get_submodule(k).register_forward_hook(lambda m,i,o: seen.append(o.clone()))
    x = torch.randn(1,3,128,128)
    with torch.no_grad():
        out,_ = b(x),tv(x)
        for o,s in zip(out, seen, strict=True): assert torch.equal(o, s)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', NONE)
def test_networks_without_three_scales_are_refused(name):
    with pytest.raises(ValueError, match='has no features .* at 1/8, 1/16 and 1/32'): Backbone(name)

def test_function_or_name():
    assert Backbone(torchvision.models.resnet18).name=='resnet18' and Backbone(torchvision.models.resnet18).tv
    b = Backbone(timm.models.resnet.resnet18)
    assert b.name=='timm/resnet18' and not b.tv and Backbone(b.name).channels==b.channels # the name alone is enough to build it again
    with pytest.raises(ValueError, match='no network is called'): Backbone(torch.nn.Linear)

@pytest.mark.parametrize('name', ['resnet18','densenet121','convnext_tiny','tf_efficientnet_lite0','mobilenetv3_small_050'])
@pytest.mark.parametrize('n', [1,2])
def test_first_layer_adapts_exactly(name, n):
    "A gray picture gives with `n` channels what it gave with three"
    set_seed(1)
    three = Backbone(name).eval()
    set_seed(1)
    gray = Backbone(name, in_channels=n).eval()
    x = torch.rand(1,1,64,64)
    with torch.no_grad():
        for a,b in zip(three(x.expand(-1,3,-1,-1)), gray(x.expand(-1,n,-1,-1))): torch.testing.assert_close(a, b, atol=1e-4*a.abs().max().item(), rtol=0)

def test_packaged_weights_adapt_too():
    if not offline_weights('tf_efficientnet_lite0'): pytest.skip('needs lungdet[offline-weights]')
    x = torch.rand(1,1,64,64)
    with torch.no_grad():
        three,one = (Backbone('tf_efficientnet_lite0', True, n).eval()(x.expand(-1,n,-1,-1)) for n in (3,1))
        for a,b in zip(three,one): torch.testing.assert_close(a, b, atol=1e-4*a.abs().max().item(), rtol=0)

@pytest.mark.parametrize('arch', [torchvision.models.resnet18,'mobilenet_v3_small','convnext_atto'])
@pytest.mark.parametrize('mode,channels', [('gray',1),('repeat',3)])
def test_learner_of_any_arch(tmp_path, arch, mode, channels):
    learn = single_box_learner(single_box_dls(toy(tmp_path), size=64, bs=2, mode=mode), arch, pretrained=False)
    assert learn.config['in_channels']==channels and json.loads(json.dumps(learn.config))==learn.config
    groups = single_box_splitter(learn.model)
    assert sorted(id(p) for g in groups for p in g)==sorted(map(id,learn.model.parameters()))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)
    assert np.isfinite(learn.recorder.values[0][:2]).all()

def test_pretrained_learner_starts_frozen(tmp_path):
    if not offline_weights('tf_efficientnet_lite0'): pytest.skip('needs lungdet[offline-weights]')
    learn = single_box_learner(single_box_dls(toy(tmp_path), size=64, bs=2), 'tf_efficientnet_lite0')
    assert learn.opt.frozen_idx==2

def test_giou_loss_is_torchvisions():
    from torchvision.ops import generalized_box_iou_loss
    xy = torch.rand(64,2,generator=torch.Generator().manual_seed(0))*100
    b = torch.cat([xy, xy+1+torch.rand(64,2,generator=torch.Generator().manual_seed(1))*60], 1)
    p = b.roll(1,0).clone().requires_grad_()
    labels = torch.zeros(64,1,dtype=torch.int64); labels[::3] = PAD
    ours = single_box_terms(torch.cat([p,torch.zeros(64,2)],1), b[:,None], labels, 'giou')[0]
    ours.backward(); got,p.grad = p.grad,None
    theirs = generalized_box_iou_loss(p[labels[:,0]==0], b[labels[:,0]==0], reduction='mean')
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(got, p.grad)
    assert (got[::3]==0).all()

@pytest.mark.parametrize('kind', ['l1','giou'])
def test_all_negative_batch(kind):
    preds = torch.rand(3,6,requires_grad=True)
    loss = SingleBoxLoss(kind)(preds, torch.zeros(3,1,4), torch.full((3,1),PAD))
    loss.backward()
    assert loss.isfinite() and (preds.grad[:,:4]==0).all() and preds.grad.isfinite().all() and preds.grad[:,4:].any()

def test_loss_of_another_name(): 
    with pytest.raises(ValueError, match="take 'l1' or 'giou'"): SingleBoxLoss('l2')(torch.rand(1,6), torch.rand(1,1,4), torch.zeros(1,1))

def test_giou_learner_learns(tmp_path):
    set_seed(0)
    learn = single_box_learner(single_box_dls(toy(tmp_path, 34), size=64, bs=8, aug=None), 'resnet18', pretrained=False, loss='giou')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(16, 3e-3)
    assert learn.validate()[1]>.6 and trivial_scores(learn.dls)['mean_iou']>.99 # the box is always at the same place

def test_metrics_by_hand():
    pred = torch.tensor([[0.,0,10,10,0,1],[0,0,10,10,0,2],[0,0,10,10,1,0],[5,5,9,9,0,3.]])
    boxes,labels = torch.tensor([[0.,0,10,10],[0,0,10,20.1],[0,0,0,0],[0,0,0,0]])[:,None],torch.tensor([[0],[0],[PAD],[PAD]])
    def value(m):
        m.reset(); m.accumulate(SimpleNamespace(pred=pred, yb=(boxes,labels)))
        return m.value
    assert value(PositiveIoU())==pytest.approx((1+10/20.1)/2) and value(PositiveIoU(.5))==.5
    assert value(ImageAUC())==.5 and box_accuracy(pred, boxes, labels)==.75
    labels = torch.full((4,1), PAD)
    assert np.isnan([value(m) for m in (PositiveIoU(),PositiveIoU(.5),ImageAUC())]).all()

def test_trivial_scores(tmp_path):
    ann = toy(tmp_path, 6)
    ann = Annotations(ann.images, ann.boxes[ann.boxes.image_id!='i5'], ann.classes)
    assert trivial_scores(single_box_dls(ann, size=64, bs=2))==pytest.approx({'mean_iou':1,'iou>.5':1,'accuracy':.5,'auc':.5})

def test_predict_takes_dicom_png_and_array(tmp_path):
    "One picture in four forms: one box"
    write_study(describe(3,42), tmp_path, size=128)
    dcm = next(tmp_path.glob('*.dcm'))
    gray = load_picture(dcm, mode='gray')
    cv2.imwrite(str(tmp_path/'a.png'), gray)
    set_seed(0)
    learn = single_box_learner(single_box_dls(toy(tmp_path, 10), size=64, bs=4), 'resnet18', pretrained=False)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        got = [learn.predict(o) for o in (dcm, str(dcm), tmp_path/'a.png', gray, np.stack([gray]*3,-1), dict(path=str(dcm)))]
    for dets,_,raw in got:
        assert dets.shape==(1,6) and raw.shape==(6,)
        np.testing.assert_allclose(dets, got[0][0], atol=1e-3)
    for bad in (gray.astype(float), gray[None,None], np.zeros((0,4),np.uint8)):
        with pytest.raises(ValueError, match='a picture is uint8'): learn.dls.test_dl([bad]).one_batch()

def test_weights_come_back(tmp_path):
    m,cfg = SingleBoxModel(Backbone('resnet18', in_channels=1)).eval(),dict(arch='resnet18', n=[1,2], name='ä')
    state,back = load_weights(save_weights(m, cfg, tmp_path/'m.safetensors'))
    assert back==cfg
    again = SingleBoxModel(Backbone('resnet18', in_channels=1)).eval(); again.load_state_dict(state)
    x = torch.rand(1,1,64,64)
    assert torch.equal(m(x), again(x)) and [p.name for p in tmp_path.iterdir()]==['m.safetensors']
    with pytest.raises(ValueError, match='is no detector'): load_detector(tmp_path/'m.safetensors')

def test_files_that_hold_no_weights(tmp_path):
    m,file = torch.nn.Linear(4,4),tmp_path/'m.safetensors'
    whole = save_weights(m, {}, file).read_bytes()
    for bad in (b'', whole[:20], whole[:-3], b'\xff'*8+whole[8:]):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match='is not a safetensors file'): load_weights(file)
    ran = tmp_path/'ran'
    class Evil:
        def __reduce__(self): return (Path.touch, (ran,))
    torch.save(dict(a=Evil()), file) # a pickle of another name
    with pytest.raises(ValueError, match='is not a safetensors file'): load_weights(file)
    assert not ran.exists()
    with pytest.raises(ValueError, match='there is no file'): load_weights(tmp_path/'x')

def test_failed_save_leaves_the_old_file(tmp_path):
    file = save_weights(torch.nn.Linear(2,2), dict(a=1), tmp_path/'m.safetensors')
    with pytest.raises(TypeError): save_weights(torch.nn.Linear(2,2), dict(a=object()), file)
    assert load_weights(file)[1]==dict(a=1) and len(list(tmp_path.iterdir()))==1

def test_training_goes_on_where_it_stopped(tmp_path):
    "Two epochs at once, and one and one with a file between them, end in the same weights"
    def learner():
        set_seed(0)
        return single_box_learner(single_box_dls(toy(tmp_path, 10), size=64, bs=8, aug=None), 'resnet18', pretrained=False, path=tmp_path)
    def weights(l): return torch.cat([p.detach().flatten() for p in l.model.parameters()])
    def fit(l, n): 
        with l.no_bar(), l.no_logging():
            for _ in range(n):
                set_seed(1); l.fit(1, 1e-3, reset_opt=False)
    a = learner(); fit(a,2)
    b = learner(); fit(b,1); b.save('half')
    c = learner(); c.load('half'); fit(c,1)
    torch.testing.assert_close(weights(a), weights(c))
    assert not torch.allclose(weights(b), weights(c))

def _oracle(ann): return rsna_score(ann, largest_box(ann).boxes.assign(score=1.))

@pytest.mark.parametrize('seed', range(5))
def test_limit_of_one_box_is_the_rsna_score_of_an_oracle(seed):
    rng = np.random.default_rng(seed)
    ims = pd.DataFrame(dict(image_id=[f'i{i}' for i in range(30)], path='x', height=1000, width=1000))
    rows = [(f'i{i}', 240*k+rng.integers(0,20), 5, 240*k+100+rng.integers(0,99), 5+rng.integers(50,900)) for i in range(30) for k in range(rng.integers(0,5))]
    ann = Annotations(ims, pd.DataFrame(rows, columns=['image_id',*XYXY]).assign(label='a'), ['a'])
    assert _oracle(ann)==pytest.approx(one_box_limit(ann))

def test_limit_of_one_box_on_the_whole_challenge(challenge_labels):
    df = challenge_labels[challenge_labels.Target==1]
    boxes = pd.DataFrame(xywh2xyxy(torch.tensor(df[['x','y','width','height']].to_numpy())).numpy(), columns=XYXY)
    ids = challenge_labels.patientId.unique()
    ann = Annotations(pd.DataFrame(dict(image_id=ids, path='x', height=1024, width=1024)), boxes.assign(image_id=df.patientId.to_numpy(), label='a'), ['a'])
    assert _oracle(ann)==pytest.approx(one_box_limit(ann)) and one_box_limit(ann)==pytest.approx(.7136, abs=1e-4)
