"Scores in fastai's table: the same as `detect` gives, in every way to train, in one process and in two"
import cv2, numpy as np, os, pandas as pd, pytest, torch
from torch import nn
from fastai.vision.all import Callback, CSVLogger, EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, set_seed, trainable_params
from fastai.distributed import DistributedDL
from lungdet.anchors import encode
from lungdet.boxes import iou
from lungdet.core import XYXY
from lungdet.data import PAD, detection_dls
from lungdet.evaluate import best_threshold, coco_map, image_level
from lungdet.formats import Annotations
from lungdet.learner import detect, retinanet_learner
from lungdet.monitor import *

def varied(folder, n=10, classes=('a',), boxes=True, category=False):
    "Black pictures with white boxes: some are lesions, some are not, and some lesions are not to be seen"
    rows,g = [],np.random.default_rng(0)
    for i in range(n):
        im,(x,y,w,h) = np.zeros((64,64), np.uint8),g.integers((4,4,10,12), (30,30,26,28))
        if i%3 or i%2: im[y:y+h,x:x+w] = 255
        if i%3 and boxes:
            rows += [(f'i{i}',x,y,x+w,y+h,classes[i%len(classes)])]+([(f'i{i}',40,40,60,62,classes[0])] if i%5==0 else [])
        cv2.imwrite(str(folder/f'{i}.png'), im)
    ims = pd.DataFrame(dict(image_id=[f'i{i}' for i in range(n)], path=[str(folder/f'{i}.png') for i in range(n)], height=64, width=64,
                            split=['train']*(n//2)+['valid']*(n-n//2)))
    if category: ims['category'] = ['Lesion' if i%3 else 'Normal' for i in range(n)]
    return Annotations(ims, pd.DataFrame(rows, columns=['image_id',*XYXY,'label']), list(classes))

class Seer(nn.Module):
    "A net that sees white boxes, not quite where they are, and some that are not there"
    def __init__(self, anchors, n_classes, head):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.a,self.one,self.image_head = anchors(64,64),nn.Parameter(torch.ones(1)),head or None
        self.z,self.d = torch.randn(len(self.a),n_classes,generator=g),.15*torch.randn(len(self.a),4,generator=g)
    def forward(self, x):
        white = x[:,0]>0                                                                        # (N,64,64)
        lit = torch.arange(64.).tile(len(x),1)
        ends = [torch.where(white.any(1+k), lit, v) for k in (0,1) for v in (99,-1)]             # left, right, above, below
        box = torch.stack([ends[0].amin(1),ends[2].amin(1),ends[1].amax(1)+1,ends[3].amax(1)+1], 1)
        box = torch.where(white.any((1,2))[:,None], box, torch.tensor([0.,0,1,1]))              # (N,4)
        o,some = iou(box, self.a),x.mean((1,2,3))[:,None,None]
        z = 9*o[...,None]-5+self.z*(1.2+.5*(1e3*some).sin())
        res = z*self.one,torch.stack([encode(b.expand_as(self.a), self.a) for b in box])+self.d
        return (*res,torch.stack([-o.amax(1),2*(1e3*some[:,0,0]).sin()], 1)) if self.image_head else res

def learner(ann, bs=3, seer=True, cbs=(), **kw):
    "A learner of `Seer`, which knows all and learns nothing, or of a small net"
    dls = detection_dls(ann, size=64, bs=bs, aug=None, **kw)
    set_seed(0)
    learn = retinanet_learner(dls, 'resnet18', pretrained=False, width=16, depth=1, cbs=[DetectionScores(),*cbs], model=dict(prior=.1))
    if seer: learn.model,learn.splitter = Seer(learn.loss_func.anchors, dls.c, bool(dls.categories)),trainable_params
    learn.recorder.add_time = False
    return learn

def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f()

def validate(learn, **kw):
    return dict(zip(['valid_loss',*(['cls','box','image'] if learn.model.image_head else ['cls','box']),'rsna','AP50','AUC'], quiet(learn, lambda: learn.validate(**kw)), strict=True))

@pytest.mark.parametrize('classes', [('a',),('a','b','c')])
@pytest.mark.parametrize('head', [False,True])
def test_equal_to_detect_and_evaluate(tmp_path, classes, head):
    ann = varied(tmp_path, 24, classes, category=head)
    learn = learner(ann, categories=['Normal','Lesion'] if head else None)
    got,valid,preds = validate(learn),ann.part('valid'),detect(learn)
    assert len(preds)>50 and .1<got['AP50']<1 and .1<got['AUC']<1 and got['rsna']>.02
    want = dict(rsna=best_threshold(valid,preds)[1], AP50=coco_map(valid,preds).AP50, AUC=image_level(valid,preds).AUC)
    for k,v in want.items(): assert abs(got[k]-v)<1e-6, k
    parts = [got[k] for k in ('cls','box','image') if k in got]
    assert len(parts)==2+head and abs(sum(parts)-got['valid_loss'])<1e-4*got['valid_loss']

def test_weighted_parts_add_up_and_batches_do_not_matter(tmp_path):
    ann = varied(tmp_path, 24, category=True)
    res = []
    for bs in (1,5,12):
        learn = learner(ann, bs=bs, categories=['Normal','Lesion'])
        learn.loss_func.box_weight,learn.loss_func.image_weight = 3.,.5
        res.append(validate(learn))
        assert abs(sum(res[-1][k] for k in ('cls','box','image'))-res[-1]['valid_loss'])<1e-4*res[-1]['valid_loss']
    for o in res[1:]:
        for k in o: assert abs(o[k]-res[0][k])<1e-4*abs(res[0][k]), k

def test_thresholds_are_those_of_detect(tmp_path):
    ann = varied(tmp_path, 16)
    learn = learner(ann)
    learn.remove_cb(DetectionScores); learn.add_cb(DetectionScores(score_thr=.3, nms_thr=.2, max_det=5))
    preds = detect(learn, score_thr=.3, nms_thr=.2, max_det=5)
    assert 0<len(preds)<len(detect(learn)) and abs(validate(learn)['AP50']-coco_map(ann.part('valid'),preds).AP50)<1e-6

@pytest.mark.parametrize('boxes', [True,False])
def test_a_part_without_boxes_has_no_score(tmp_path, boxes):
    ann = varied(tmp_path, boxes=boxes)
    ann = Annotations(ann.images, ann.boxes[ann.boxes.image_id.isin(ann.part('train').images.image_id)], ann.classes) # the white is still there
    got = validate(learner(ann))
    assert np.isnan([got[k] for k in ('rsna','AP50','AUC')]).all() and np.isfinite(got['cls']) and got['box']==0

def test_nothing_but_evaluation_is_scored(tmp_path):
    "Also if the recorder asks for metrics of training, after `lr_find`, and when there are no labels"
    learn = learner(varied(tmp_path), seer=False)
    learn.recorder.train_metrics = True
    learn.metrics = accuracy_of_nothing
    quiet(learn, lambda: learn.fit(2, 1e-4))
    h = history(learn)
    assert list(h)==[f'{p}_{k}' for p in ('train','valid') for k in ('loss','accuracy_of_nothing','cls','box','rsna','AP50','AUC')]
    assert h.filter(regex='train_(cls|box|rsna|AP50|AUC)').isna().all(axis=None) and h[['valid_cls','valid_AP50']].notna().all(axis=None)
    assert list(learn.metrics.attrgot('name'))==['accuracy_of_nothing'] # ours leave when the training is over
    with pytest.raises(ValueError, match='right after training'): quiet(learn, lambda: learn.validate()) and history(learn)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(1e-6, 1e-4, num_it=3, show_plot=False, suggest_funcs=None)
        preds = learn.get_preds(dl=learn.dls.test_dl([dict(path=learn.dls.ann.images.path[0])]))[0]
        assert len(learn.get_preds()[0][0])==5 and len(preds[0])==1
        learn.show_results(max_n=2); learn.predict(dict(path=learn.dls.ann.images.path[0]))

def accuracy_of_nothing(preds, boxes, labels): return (labels==PAD).float().mean()

def test_an_error_leaves_no_second_columns(tmp_path):
    class Stop(Callback):
        def before_validate(self): raise KeyboardInterrupt
    learn = learner(varied(tmp_path))
    with pytest.raises(KeyboardInterrupt): quiet(learn, lambda: learn.fit(1, 1e-4, cbs=Stop()))
    quiet(learn, lambda: learn.fit(1, 1e-4))
    assert list(history(learn))==['train_loss','valid_loss','cls','box','rsna','AP50','AUC']

def test_callbacks_of_fastai_watch_the_columns(tmp_path, capsys):
    ann = varied(tmp_path, 16)
    learn = learner(ann, seer=False, cbs=[CSVLogger(tmp_path/'log.csv')])
    learn.path = tmp_path
    quiet(learn, lambda: learn.fit(5, 0., cbs=EarlyStoppingCallback('AP50', patience=2)))
    assert len(history(learn))<5 and 'early stopping' in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'log.csv').set_index('epoch'), history(learn), check_exact=False, rtol=1e-6)
    quiet(learn, lambda: learn.fit(4, 1e-3, cbs=[SaveModelCallback('AP50', fname='best'), ReduceLROnPlateau('cls', comp=np.less, patience=1, min_delta=100)]))
    h = history(learn)
    assert learn.opt.hypers[-1]['lr']<1e-3 and abs(validate(learn)['AP50']-h.AP50.max())<1e-6 # the best is back

def test_half_precision(tmp_path):
    class Half(Callback):
        order = 9
        def after_pred(self): self.learn.pred = tuple(o.to(torch.bfloat16) for o in self.pred)
    learn = learner(varied(tmp_path, 16))
    full = validate(learn)
    half = validate(learn, cbs=Half())
    assert set(half)==set(full) and all(np.isfinite(v) for v in half.values()) and abs(half['cls']-full['cls'])<.02*full['cls']

def test_a_net_that_has_diverged_scores_nothing(tmp_path):
    learn = learner(varied(tmp_path), seer=False)
    learn.model.cls_head.out.bias.data.fill_(float('nan'))
    got = validate(learn)
    assert np.isnan(got['cls']) and got['AP50']==0

def test_two_trainings_and_curves(tmp_path):
    learn = learner(varied(tmp_path, 16), seer=False)
    hs = []
    for _ in range(2): quiet(learn, lambda: learn.fit(1, 1e-4)); hs.append(history(learn))
    both = pd.concat(hs, ignore_index=True)
    axs = plot_curves(both)
    assert len(axs)==2 and len(axs[0].lines)==5 and len(axs[1].lines)==4 and 'AP50' in axs[1].get_title()
    assert 'epoch 1' in plot_curves(both.assign(cls=[2.,1.]), 'cls')[1].get_title()
    assert plot_curves(both.assign(AP50=np.nan))[1].get_title()==''
    assert len(plot_curves(learn))==2
    with pytest.raises(ValueError, match="no column 'mAP'"): plot_curves(learn, 'mAP')

def _one_of_two(rank, folder, out):
    os.environ.update(WORLD_SIZE='2', RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    DistributedDL._broadcast = lambda self, t, rank: t # its own wants a GPU; validation is not shuffled anyway
    for n in SIZES:
        learn = learner(varied(folder, n, ('a','b')), bs=2)
        out.put((rank, n, validate(learn, dl=DistributedDL(learn.dls.valid))))
    torch.distributed.barrier(); torch.distributed.destroy_process_group()

SIZES = 13,2 # 7 pictures to validate on, of which one is repeated; and a single one, which both processes see
def test_two_processes_score_what_one_does(tmp_path):
    want = {n:validate(learner(varied(tmp_path, n, ('a','b')), bs=2)) for n in SIZES}
    ctx = torch.multiprocessing.get_context('spawn')
    out = ctx.Queue()
    ps = [ctx.Process(target=_one_of_two, args=(i,tmp_path,out)) for i in range(2)]
    for p in ps: p.start()
    got = {(rank,n):o for rank,n,o in (out.get(timeout=120) for _ in range(2*len(SIZES)))}
    for p in ps: p.join()
    for n in SIZES:
        for k in want[n]:
            np.testing.assert_allclose(got[0,n][k], got[1,n][k], rtol=1e-7)
            if k!='valid_loss': np.testing.assert_allclose(got[0,n][k], want[n][k], rtol=1e-5)
    assert abs(got[0,13]['valid_loss']/want[13]['valid_loss']-1)>1e-3 # fastai counts the repeated picture twice
