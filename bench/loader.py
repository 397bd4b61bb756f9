"""Our DataLoaders beside fastai's stock pipeline for boxes: same PNGs, same size, the same kinds of augmentation, no workers.

    .venv/bin/python bench/loader.py FOLDER --n 400 --size 512
    .venv/bin/python bench/loader.py FOLDER --memory 26684

FOLDER is a folder of the RSNA challenge; without one, synthetic studies are made. Its DICOMs are converted to PNGs first. The stock pipeline is
`DataBlock((ImageBlock, BBoxBlock, BBoxLblBlock))` with `aug_transforms` (flip, turn, zoom, light) and `Normalize`. Each candidate runs one
epoch `--repeat` times in turn, and its best counts; ours once from the cache and once without. With `--memory N` instead: build the cache of
N pictures (the files of FOLDER under N names), run an epoch from it, and print what that takes on disk and in memory."""
import argparse, shutil, tempfile, time, warnings
from pathlib import Path
from _ratio import add_csv, note

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('folder', nargs='?'); p.add_argument('--n', type=int, default=400); p.add_argument('--size', type=int, default=512); p.add_argument('--bs', type=int, default=8)
p.add_argument('--repeat', type=int, default=3); p.add_argument('--memory', type=int, metavar='N')
add_csv(p); args = p.parse_args()
warnings.filterwarnings('ignore')

import pandas as pd, torch
from fastai.vision.all import (BBoxBlock, BBoxLblBlock, DataBlock, ImageBlock, IndexSplitter, Normalize, aug_transforms, imagenet_stats)
from lungdet.augment import Augment
from lungdet.convert import convert_folder
from lungdet.core import make_studies
from lungdet.data import detection_dls
from lungdet.formats import Annotations, read_rsna

tmp = Path(tempfile.mkdtemp())
ann = read_rsna(args.folder or make_studies(tmp/'studies', args.n))
ann = ann.sample(min(args.n, len(ann)))
ann = ann.use_pngs(convert_folder([Path(o) for o in ann.images.path], tmp/'png', args.size, progress=False))
if args.memory: # as many names for the same files
    k = range(args.memory)
    ims = ann.images.iloc[[i%len(ann) for i in k]].assign(image_id=[f'i{i}' for i in k]).reset_index(drop=True)
    (tmp/'links').mkdir()
    for i,o in enumerate(ims.path): (tmp/'links'/f'{i}.png').hardlink_to(o)
    ann = Annotations(ims.assign(path=[str(tmp/'links'/f'{i}.png') for i in k]), ann.boxes.head(0), ann.classes)
ann = Annotations(ann.images.assign(split=['valid']+['train']*(len(ann)-1)), ann.boxes, ann.classes)

def stock():
    rows,scale = ann.images.to_dict('records'),args.size/ann.images.width.iloc[0]
    by = {k:((v[['x1','y1','x2','y2']]*scale).to_numpy().tolist(),[*v.label]) for k,v in ann.boxes.groupby('image_id')}
    block = DataBlock((ImageBlock, BBoxBlock, BBoxLblBlock(vocab=ann.classes)), n_inp=1, splitter=IndexSplitter([0]),
                      getters=[lambda r: r['path'], lambda r: by.get(r['image_id'],([],[]))[0], lambda r: by.get(r['image_id'],([],[]))[1]],
                      batch_tfms=[*aug_transforms(do_flip=True, max_rotate=8., min_zoom=.9, max_zoom=1.15, max_warp=0., max_lighting=.2), Normalize.from_stats(*imagenet_stats)])
    return block.dataloaders(rows, bs=args.bs, num_workers=0)
def ours(cache): return detection_dls(ann, args.size, args.bs, aug=Augment(), cache=cache)

def epoch(dls):
    "Pictures per second of one epoch"
    begin,n = time.perf_counter(),0
    for b in dls.train: n += len(b[0])
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return n/(time.perf_counter()-begin)

if args.memory:
    begin = time.perf_counter(); dls = ours(tmp/'cache'); made = time.perf_counter()-begin
    rate = epoch(dls)
    own = {k:int(v.split()[0])/2**20 for k,v in (o.split(':') for o in Path('/proc/self/status').read_text().splitlines()) if k in ('RssAnon','RssFile')}
    disk = sum(o.stat().st_size for o in (tmp/'cache').iterdir())/1e9
    print(f"{len(ann)} pictures of {args.size} px: cache made in {made:.0f} s, {disk:.1f} GB on disk; an epoch at {rate:.0f} pictures/s;\n"
          f"memory after it: {own['RssAnon']:.1f} GiB of its own, {own['RssFile']:.1f} GiB of mapped files, which the system takes back when it needs to")
else:
    cands = {"fastai's blocks":stock(), 'lungdet, no cache':ours(None), 'lungdet':ours(tmp/'cache')}
    best = dict.fromkeys(cands, 0)
    for _ in range(args.repeat):
        for k,dls in cands.items(): best[k] = max(best[k], epoch(dls))
    df = pd.DataFrame(dict(per_second=pd.Series(best)))
    df['ratio'] = df.per_second/df.per_second.iloc[0]
    print(f'{len(ann)} PNGs of {args.size} px, batches of {args.bs}, no workers, {torch.get_num_threads()} threads, best of {args.repeat}\n\n{df.round(1)}')
    for k,name,target in (('lungdet, no cache','batches of pictures and boxes, decoded anew',2.5), ('lungdet','batches of pictures and boxes, from the cache',4)):
        note(args.csv, name, "fastai's blocks", df.ratio[k], target, f'{len(ann)} PNGs of {args.size} px, batches of {args.bs}')
shutil.rmtree(tmp)
