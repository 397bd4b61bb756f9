"""Our default recipe beside torchvision's RetinaNet with a plain one: same radiographs, split, ImageNet weights, size and number of epochs; three seeds.

    .venv/bin/python bench/quality.py FOLDER --seeds 0 1 2

FOLDER is laid out as the RSNA challenge ships. Ours is `lungdet-train rsna_small`: what chapter 10 does. torchvision's has its own pyramid, heads, matching,
loss and post-processing, and is trained as its users would: AdamW at one rate, one cycle, mirror images and brightness, all layers from the start.
Its rate is the best of --tv-lrs on the first seed, by AP50 on the very patients that both are judged on: to its favour.

Prints AP50, the RSNA score at the threshold that is best on the *training* patients, and the AUC of the images, all on the patients held back, with
95 % intervals from resampled patients, and the CPU minutes of both. Finished runs are kept in --out; a second call goes on after the last one."""
import argparse, json, os, resource, warnings
from pathlib import Path

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('folder'); p.add_argument('changes', nargs='*', help='key=value, as for lungdet-train'); p.add_argument('--base', default='rsna_small')
p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2]); p.add_argument('--tv-lrs', type=float, nargs='+', default=[1e-4,5e-4,1e-3]); p.add_argument('--out', default='runs/quality')
p.add_argument('--keep', help='write the results to this CSV')
args = p.parse_args()
os.environ['LUNGDET_DATA'] = args.folder
warnings.filterwarnings('ignore', message='`torch.jit.script`')

import numpy as np, pandas as pd, torch
from fastai.vision.all import set_seed
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

def tv_model(cfg):
    m,size = cfg['model'],cfg['dls']['size']
    anchors = AnchorGenerator(cfg['anchors']['sizes'], (cfg['anchors']['ratios'],)*5)
    return TVRetinaNet(TVBackbone(Backbone(m['backbone'], m['pretrained']), m['width']), num_classes=1, anchor_generator=anchors, min_size=size, max_size=size,
                       image_mean=[0.]*3, image_std=[1.]*3, score_thresh=.05, nms_thresh=.5, detections_per_img=100, topk_candidates=1000, # the loaders normalise
                       head=RetinaNetHead(m['width'], anchors.num_anchors_per_location()[0], 1))

def tv_train(cfg, ann, seed, lr):
    set_seed(seed, reproducible=True)
    aug = Augment(flip=.5, rotate=0, zoom=(1.,1.), shift=0, brightness=.1, contrast=0, gamma=0)
    dls,model = detection_dls(ann, aug=aug, cache=work_path('pictures'), **cfg['dls']),tv_model(cfg)
    n = cfg['train']['frozen']+cfg['train']['epochs']
    opt = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, n*len(dls.train))
    for _ in range(n):
        model.train()
        for x,b,l in dls.train:
            x,b,l = (o.as_subclass(torch.Tensor) for o in (x,b,l))
            opt.zero_grad()
            sum(model(list(x), [dict(boxes=bi[li>=0], labels=li[li>=0]) for bi,li in zip(b,l)]).values()).backward()
            opt.step(); schedule.step()
    return dls,model.eval()

def tv_detect(dls, model, ann):
    rows = []
    items = ann.images.to_dict('records')
    with torch.inference_mode(): out = [o for x, in dls.test_dl(items) for o in model(list(x.as_subclass(torch.Tensor)))]
    for it,o in zip(items,out):
        xy = scale_boxes(o['boxes'], (dls.size,)*2, (it['height'],it['width']))
        rows += [dict(image_id=it['image_id'], **dict(zip(('x1','y1','x2','y2'),b)), label=ann.classes[0], score=s) for b,s in zip(xy.tolist(),o['scores'].tolist())]
    return pd.DataFrame(rows, columns=['image_id','x1','y1','x2','y2','label','score'])

cfg = read_config(experiments/f'{args.base}.toml' if not Path(args.base).exists() else args.base, schema, [f'data.path={args.folder}', *args.changes])
out = Path(args.out); out.mkdir(parents=True, exist_ok=True)
ann = load_images(**cfg['data'])
train_part,valid = ann.part('train'),ann.part('valid')
print(ann, f'; {len(valid)} images of {patients(valid.images).nunique()} patients held back, {len(valid.boxes)} boxes', flush=True)

def cpu(): return sum(o.ru_utime+o.ru_stime for o in (resource.getrusage(resource.RUSAGE_SELF),resource.getrusage(resource.RUSAGE_CHILDREN)))/60
def run(name, f):
    "Detections on all images, the threshold that is best on those of training, and CPU minutes; looked up if they were computed before"
    info,csv = out/f'{name}.json',out/f'{name}.csv'
    if not info.exists():
        start = cpu()
        preds = f()
        minutes = cpu()-start
        preds.to_csv(csv, index=False)
        info.write_text(json.dumps(dict(minutes=minutes, threshold=best_threshold(train_part, preds[preds.image_id.isin(train_part.images.image_id)])[0])))
        print(name, f'{minutes:.1f} CPU minutes', flush=True)
    preds = pd.read_csv(csv, dtype={'image_id':'string'})
    return preds[preds.image_id.isin(valid.images.image_id)],json.loads(info.read_text())

def ours(seed):
    set_seed(seed, reproducible=True)
    learn = build_learner(ann, cfg)
    with learn.no_bar(), learn.no_logging(): fit_phases(learn, out/f'ours-{seed}', **cfg['train']|dict(seed=seed))
    return detect(learn, ann)
def theirs(seed, lr): return tv_detect(*tv_train(cfg, ann, seed, lr), ann)
def ap50(preds): return coco_map(valid, preds).AP50

rates = {lr:ap50(run(f'torchvision-{args.seeds[0]}-{lr:g}', lambda: theirs(args.seeds[0], lr))[0]) for lr in args.tv_lrs}
lr = max(rates, key=rates.get)
print('torchvision, AP50 of the first seed by rate:', {k:round(float(v),3) for k,v in rates.items()}, flush=True)
runs = {'lungdet':[run(f'lungdet-{s}', lambda: ours(s)) for s in args.seeds], 'torchvision':[run(f'torchvision-{s}-{lr:g}', lambda: theirs(s, lr)) for s in args.seeds]}

names = ['AP50','RSNA','AUC']
models = {k:[(p,o['threshold']) for p,o in v] for k,v in runs.items()}
spread = {}
for name,os_ in runs.items():
    each = pd.concat([Figures(valid, p, t, names)() for p,t in models[name]])
    spread[name] = {**{k:f'{each[k].mean():.3f} ({each[k].std() if len(each)>1 else 0:.3f})' for k in names}, 'threshold':', '.join(f"{o['threshold']:.2f}" for _,o in os_),
                    'CPU minutes':f"{np.mean([o['minutes'] for _,o in os_]):.1f}"}
res = over_patients(valid, {k:models[k] for k in ('torchvision','lungdet')}, names)
print('\nMean over the seeds (standard deviation)'); print(pd.DataFrame(spread).T.to_string())
print('\n95 % interval of that mean, over patients, and of the difference to the first'); print(res.round(3).to_string())
if args.keep: keep_results(res, args.keep, f'RSNA, {len(ann)} radiographs', ann, len(args.seeds))
