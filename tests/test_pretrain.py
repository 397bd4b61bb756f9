"Classify first: targets, shared weights, what is frozen, areas under the curve"
import cv2, numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import GradientClip, set_seed
from sklearn.metrics import roc_auc_score
from lungdet.average import EMA
from lungdet.callbacks import Accumulate, Precision, StopOnNonFinite
from lungdet.data import PAD, detection_dls
from lungdet.formats import Annotations
from lungdet.learner import retinanet_learner
from lungdet.loss import image_loss
from lungdet.pretrain import *
from test_average import Stop, flushed # noqa: F401 - a fixture
from test_callbacks import numbered
from test_data import toy

def small(ann, model=None, **kwargs):
    set_seed(0)
    return retinanet_learner(detection_dls(ann, size=64, bs=4, aug=None, **kwargs), 'mobilenetv3_small_050', pretrained=False, width=16, depth=1, model=model)

def three(folder, n=14):
    "Images with boxes of class a, of b, of both, or of none; half of them to validate on"
    ann = numbered(folder, n)
    ims = ann.images.assign(split=['train','train','valid','valid','train','train','valid','valid']*(n//8)+['train']*(n%8))
    ids = ims.image_id
    boxes = ann.boxes.merge(ids.to_frame()).assign(label=['a','b','a','b']*(n//4)+['a']*(n%4))
    both = boxes[boxes.image_id.isin(['i2','i4'])].assign(label='b')
    none = boxes.image_id.isin(['i7','i0'])
    return Annotations(ims, pd.concat([boxes[~none],both], ignore_index=True), ['a','b'])

def test_areas_are_those_of_sklearn(tmp_path):
    ann = three(tmp_path)
    learn = small(ann)
    clf = classifier_learner(learn)
    got = class_aucs(clf)
    v = ann.part('valid')
    with learn.no_bar(): scores = clf.get_preds()[0]
    for i,c in enumerate('ab'):
        y = v.images.image_id.isin(v.boxes.image_id[v.boxes.label==c])
        assert got.images[c]==y.sum() and 0<y.mean()<1
        np.testing.assert_allclose(got.auc[c], roc_auc_score(y, scores[:,i]))

def test_categories_with_unknown_ones(tmp_path):
    ann = three(tmp_path)
    boxed = ann.images.image_id.isin(ann.boxes.image_id)
    cats = ['lesion' if b else 'normal' for b in boxed]
    cats[3] = None # unknown, in validation
    ann = Annotations(ann.images.assign(category=cats), ann.boxes, ann.classes)
    learn = small(ann, categories=['normal','lesion'])
    clf = classifier_learner(learn)
    assert clf.model.head is learn.model.image_head
    got = class_aucs(clf)
    assert list(got.index)==['normal','lesion'] and got.images.sum()==len(ann.part('valid'))-1 and np.isfinite(got.auc).all()
    np.testing.assert_allclose(*got.auc) # of two, one's area is the other's
    before = learn.model.image_head.out.weight.clone()
    with learn.no_bar(), learn.no_logging(): classify_first(learn, 1)
    assert not torch.equal(before, learn.model.image_head.out.weight)

def test_one_answer_for_any_class(tmp_path):
    learn = small(three(tmp_path), model=dict(n_categories=1))
    clf = classifier_learner(learn)
    got = class_aucs(clf)
    assert list(got.index)==['any'] and got.images.item()==len(set(learn.dls.ann.part('valid').boxes.image_id))

def test_a_class_that_all_or_none_have(tmp_path):
    ann = numbered(tmp_path)
    assert np.isnan(class_aucs(classifier_learner(small(ann))).auc.item())

@pytest.mark.parametrize('frozen', [True,False])
def test_what_is_frozen_stays_so_and_heads_are_untouched(tmp_path, frozen):
    learn = small(three(tmp_path))
    (learn.freeze if frozen else learn.unfreeze)()
    asks = [p.requires_grad for p in learn.model.parameters()]
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): classify_first(learn, 1, cbs=[EMA(.5),Precision(),Accumulate(8),GradientClip(),StopOnNonFinite()])
    after = learn.model.state_dict()
    changed = {k.split('.')[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed=={'backbone'} and [p.requires_grad for p in learn.model.parameters()]==asks
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): classify_first(learn, 1, cbs=Stop(KeyboardInterrupt,training=True))
    assert [p.requires_grad for p in learn.model.parameters()]==asks

def test_it_learns(tmp_path):
    "A white rectangle or nothing is easy to tell"
    ann = toy(tmp_path, 40)
    cv2.imwrite(str(tmp_path/'black.png'), np.zeros((128,128), np.uint8))
    ims = ann.images.assign(split=['valid' if i%4<2 else 'train' for i in range(40)], path=[str(tmp_path/('black.png' if i%2 else 'box.png')) for i in range(40)])
    ann = Annotations(ims, ann.boxes[ann.boxes.image_id.isin(ims.image_id[::2])], ann.classes)
    learn = small(ann)
    with learn.no_bar(), learn.no_logging(): table = classify_first(learn, 5, 5e-3)
    assert table.auc.item()==1 and table.images.item()==10

def test_loss_is_that_of_the_image_head():
    z,l = torch.randn(5,3),torch.tensor([[0,1],[PAD,PAD],[2,PAD],[1,1],[0,PAD]])
    c = torch.tensor([0,1,2,PAD,1])
    assert classify_loss(z,None,l,c)==image_loss(z,l,c) and classify_loss(z[:,:1],None,l)==image_loss(z[:,:1],l)
    t = torch.tensor([[1,1,0],[0,0,0],[0,0,1],[0,1,0],[1,0,0]]).float()
    torch.testing.assert_close(classify_loss(z.half(),None,l), torch.nn.functional.binary_cross_entropy_with_logits(z,t), rtol=1e-3, atol=1e-3)
    assert classify_loss(z.bfloat16(),None,l).dtype==torch.float32
