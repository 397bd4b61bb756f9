"""Our RetinaNet beside torchvision's: same radiographs, split, augmentation, backbone, ImageNet weights, epochs and rates; three seeds.

    .venv/bin/python bench/torchvision_retinanet.py FOLDER --size 256 --epochs 8 --seeds 0 1 2

FOLDER is laid out as the RSNA challenge ships. Only the part of the model behind the backbone, the matching, the loss and the
post-processing differ. Each finished run is appended to --out, and a second call goes on after the last one. Prints AP50, the RSNA score
at the best threshold (chosen on the same images, for both in the same way) and the image-level AUC on the validation patients."""
import argparse, json, os, time, warnings
from pathlib import Path

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('folder'); p.add_argument('--size', type=int, default=256); p.add_argument('--bs', type=int, default=8)
p.add_argument('--backbone', default='tf_efficientnet_lite0'); p.add_argument('--width', type=int, default=128)
p.add_argument('--frozen', type=int, default=1); p.add_argument('--epochs', type=int, default=8); p.add_argument('--lr', type=float, default=5e-4)
p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2]); p.add_argument('--models', nargs='+', default=['lungdet','torchvision'])
p.add_argument('--valid', type=float, default=.2); p.add_argument('--split-seed', type=int, default=42)
p.add_argument('--out', default='torchvision_retinanet.jsonl')
args = p.parse_args()
os.environ['LUNGDET_DATA'] = args.folder
warnings.filterwarnings('ignore', message='`torch.jit.script`')

import pandas as pd, torch
from fastai.vision.all import GradientClip, L, Learner, params, set_seed
from torch import nn
from torchvision.models.detection import RetinaNet as TVRetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from lungdet.all import *

class TVBackbone(nn.Module):
    "A `Backbone` with torchvision's own pyramid, as its RetinaNet wants it"
    def __init__(self, backbone, width):
        super().__init__()
        self.body,self.out_channels = backbone,width
        self.fpn = FeaturePyramidNetwork(backbone.channels, width, extra_blocks=LastLevelP6P7(width, width))
    def forward(self, x): return self.fpn({str(i):f for i,f in enumerate(self.body(x))})

class TVModel(nn.Module):
    "torchvision's RetinaNet with the interface of fastai: raw answers out, loss and detections apart; no second resize or normalisation"
    def __init__(self, size):
        super().__init__()
        anchors = AnchorGenerator(Anchors().sizes, ((.5,1.,2.),)*5)
        self.net = TVRetinaNet(TVBackbone(Backbone(args.backbone, True), args.width), num_classes=1, anchor_generator=anchors, min_size=size, max_size=size,
            image_mean=[0.]*3, image_std=[1.]*3, score_thresh=.05, nms_thresh=.5, detections_per_img=100, topk_candidates=1000,
            head=RetinaNetHead(args.width, anchors.num_anchors_per_location()[0], 1))
    def forward(self, x):
        feats = list(self.net.backbone(x).values())
        out = self.net.head(feats)
        self.level_sizes = [f.shape[-2]*f.shape[-1]*9 for f in feats]
        return out['cls_logits'],out['bbox_regression']

class TVLoss:
    def __init__(self, model, size): self.model,self.a = model,Anchors()(size,size)
    def __call__(self, preds, boxes, labels):
        boxes,labels = boxes.as_subclass(torch.Tensor),labels.as_subclass(torch.Tensor)
        targets = [dict(boxes=b[l>=0], labels=l[l>=0]) for b,l in zip(boxes,labels)]
        out = self.model.net.compute_loss(targets, dict(cls_logits=preds[0].as_subclass(torch.Tensor), bbox_regression=preds[1].as_subclass(torch.Tensor)), [self.a]*len(boxes))
        return out['classification']+out['bbox_regression']

def tv_learner(dls):
    model = TVModel(dls.size)
    return Learner(dls, model, loss_func=TVLoss(model, dls.size), cbs=GradientClip(1.),
                   splitter=lambda m: L(*m.net.backbone.body.parts(), params(m.net.backbone.fpn)+params(m.net.head)))

def tv_detect(learn, ann):
    items,out,size = ann.images.to_dict('records'),[],(learn.dls.size,)*2
    model,a = learn.model.eval(),learn.loss_func.a
    with torch.inference_mode():
        for x, in learn.dls.test_dl(items):
            cls,box = (o.as_subclass(torch.Tensor) for o in model(x))
            out += model.net.postprocess_detections(dict(cls_logits=list(cls.split(model.level_sizes,1)), bbox_regression=list(box.split(model.level_sizes,1))),
                                                    [list(a.split(model.level_sizes))]*len(x), [size]*len(x))
    rows = [dict(image_id=i['image_id'], **dict(zip(('x1','y1','x2','y2'), b)), label='Lung Opacity', score=s) for i,o in zip(items,out)
            for b,s in zip(scale_boxes(o['boxes'],size,(i['height'],i['width'])).tolist(), o['scores'].tolist())]
    return pd.DataFrame(rows, columns=['image_id','x1','y1','x2','y2','label','score'])

ann = split_patients(read_rsna(args.folder), args.valid, args.split_seed)
ann = ann.use_pngs(convert_folder([Path(o) for o in ann.images.path], work_path('png_512'), progress=False))
valid,out = ann.part('valid'),Path(args.out)
done = [json.loads(o) for o in out.read_text().splitlines()] if out.exists() else []
print(ann, f'; {len(valid)} images for validation', flush=True)
for seed in args.seeds:
    for name in args.models:
        knobs = dict(model=name, seed=seed, size=args.size, width=args.width, epochs=args.epochs, frozen=args.frozen, lr=args.lr, backbone=args.backbone, split_seed=args.split_seed)
        if any(all(d.get(k)==v for k,v in knobs.items()) for d in done): continue
        set_seed(seed)
        dls = detection_dls(ann, size=args.size, bs=args.bs)
        learn = retinanet_learner(dls, args.backbone, width=args.width, cbs=GradientClip(1.)) if name=='lungdet' else tv_learner(dls)
        start = time.time()
        with learn.no_bar(), learn.no_logging():
            learn.freeze(); learn.fit_one_cycle(args.frozen, args.lr)
            learn.unfreeze(); learn.fit_one_cycle(args.epochs, slice(args.lr/20, args.lr))
        preds = detect(learn) if name=='lungdet' else tv_detect(learn, valid)
        threshold,score = best_threshold(valid, preds)
        res = knobs|dict(AP50=float(coco_map(valid,preds).AP50), RSNA=float(score), threshold=float(threshold), AUC=float(image_level(valid,preds)['AUC']), minutes=(time.time()-start)/60)
        with out.open('a') as f: f.write(json.dumps(res)+'\n')
        done.append(res)
        print({k:res[k] for k in ('model','seed','AP50','RSNA','AUC','minutes')}, flush=True)
df = pd.DataFrame(done)
print(df.pivot(index='seed', columns='model', values=['AP50','RSNA','AUC']).round(3))
print(df.groupby('model')[['AP50','RSNA','AUC','minutes']].agg(['mean','std']).round(3))
