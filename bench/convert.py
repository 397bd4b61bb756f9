"""Our converter beside the loop of every tutorial: same DICOMs, same disk, one process.

    .venv/bin/python bench/convert.py FOLDER --n 200 --repeat 3

FOLDER holds DICOMs; without one, synthetic studies are made. The tutorial's loop is `dcmread(f).pixel_array` -> Pillow resize -> `save`; for the stack it makes the same three
channels with NumPy and OpenCV. Each candidate runs `--repeat` times in turn, and its best time counts. Prints pictures per second, the
ratio to the tutorial, where the milliseconds of one picture go, how far decoding at half size is from area averaging, and how a table
of headers compares with reading as fastai's `from_dicoms` does (pixels and their statistics)."""
import argparse, shutil, tempfile, time, warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from _ratio import add_csv, note

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('folder', nargs='?'); p.add_argument('--n', type=int, default=200); p.add_argument('--size', type=int, default=512); p.add_argument('--repeat', type=int, default=3)
add_csv(p); args = p.parse_args()
warnings.filterwarnings('ignore', module='pydicom')

import cv2, numpy as np, pandas as pd, pydicom, torch
from PIL import Image
from lungdet.convert import convert_folder, dicom_table, encode_png
from lungdet.core import IMAGES, atomic_path, make_studies
from lungdet.dicom import header_fields, read_dicom, to_gray
from lungdet.prepare import enhance, resize

cv2.setNumThreads(1); torch.set_num_threads(1) # one core each, so that workers can be compared
size,tmp = args.size,Path(tempfile.mkdtemp())
files = sorted(Path(args.folder or make_studies(tmp/'studies', args.n)/IMAGES).rglob('*.dcm'))[:args.n]

def tutorial(dst):
    for f in files: Image.fromarray(pydicom.dcmread(f).pixel_array).resize((size,size)).save(dst/f'{f.stem}.png')
def tutorial_stack(dst):
    for f in files:
        g = np.array(Image.fromarray(pydicom.dcmread(f).pixel_array).resize((size,size)))
        gamma = (255*(g/255)**.6).astype(np.uint8)
        Image.fromarray(np.stack([g, gamma, cv2.createCLAHE(2.,(8,8)).apply(g)], -1)).save(dst/f'{f.stem}.png')
def ours(mode, workers): return lambda dst: convert_folder(files, dst, size, mode, n_workers=workers, progress=False)
def processes(dst): convert_folder(files, dst, size, executor=pool, progress=False)
def headers(dst): dicom_table(files, n_workers=1)
def from_dicoms(dst): # what fastai.medical.imaging does for its table: every element, four statistics of the pixels, and the share of them in a window
    rows = []
    for f in files:
        ds = pydicom.dcmread(f); px = ds.pixel_array
        scaled = torch.tensor(px.astype(np.float32))
        rows.append({o.keyword:str(o.value) for o in ds if o.keyword!='PixelData'}|dict(img_min=px.min(), img_max=px.max(), img_mean=px.mean(), img_std=px.std(),
                    img_pct_window=((scaled>0)&(scaled<80)).float().mean().item()))
    pd.DataFrame(rows)

def run(candidates):
    "Best seconds of each, run in turn"
    best = dict.fromkeys(candidates, np.inf)
    for _ in range(args.repeat):
        for k,f in candidates.items():
            dst = Path(tempfile.mkdtemp(dir=tmp)) # deleting the last one first would slow the next: ext4 steps over inodes freed a moment ago
            begin = time.perf_counter(); f(dst); best[k] = min(best[k], time.perf_counter()-begin)
    return best
def table(best, base):
    df = pd.DataFrame(dict(per_second=len(files)/pd.Series(best)))
    df['ratio'] = df.per_second/df.per_second[base]
    return df.round(1)

for f in files: f.read_bytes() # all from memory, for everybody
pool = ProcessPoolExecutor(2) # it starts in the first run, and the best run counts
print(f'{len(files)} DICOMs, {size} px, best of {args.repeat}\n')
gray = run({'tutorial':tutorial, 'lungdet':ours('gray',1), 'lungdet, 2 threads':ours('gray',2), 'lungdet, 2 processes':processes})
print(table(gray,'tutorial'), '\n', *(f"\ntwo {o}: {gray['lungdet']/gray[f'lungdet, 2 {o}']:.2f} x one" for o in ('threads','processes')), '\n')
stack = run({'tutorial, stack':tutorial_stack, 'lungdet, stack':ours('stack',1), 'lungdet, stack, 2 threads':ours('stack',2)})
print(table(stack, 'tutorial, stack'), '\n')
tables = run({'from_dicoms':from_dicoms, 'dicom_table':headers})
print(table(tables, 'from_dicoms'), '\n')
setting = f"{len(files)} {'DICOMs' if args.folder else 'synthetic DICOMs'} to {size} px"
note(args.csv, 'DICOM to PNG, one thread', "a tutorial's loop", gray['tutorial']/gray['lungdet'], 12, setting)
note(args.csv, 'DICOM to PNG of three channels, one thread', "a tutorial's loop", stack['tutorial, stack']/stack['lungdet, stack'], 12, setting)
for o,target in (('threads',1.6),('processes',1.7)): note(args.csv, f'DICOM to PNG, two {o}', 'one', gray['lungdet']/gray[f'lungdet, 2 {o}'], target, setting)
note(args.csv, 'table of headers', "fastai's from_dicoms", tables['from_dicoms']/tables['dicom_table'], 20, setting)

def clock(f, xs):
    "Mean over `xs` of the best of a few times, ms"
    best = np.full(len(xs), np.inf)
    for _ in range(args.repeat+2):
        for i,x in enumerate(xs):
            begin = time.perf_counter(); f(x); best[i] = min(best[i], time.perf_counter()-begin)
    return best.mean()*1e3
some = files[::max(1,len(files)//40)]
data = [f.read_bytes() for f in some]
dss = [read_dicom('x', d) for d in data]
full = [to_gray(d) for d in dss]
half = [to_gray(d, at_least=(size,size)) for d in dss]
small = [resize(g, size) for g in half]
packed = [encode_png(g) for g in small]
def write(b):
    with atomic_path(Path(tempfile.mkdtemp(dir=tmp))/'x.png') as q: q.write_bytes(b)
stages = {'read the file':clock(lambda f: f.read_bytes(), some), 'parse the header':clock(lambda d: header_fields(read_dicom('x',d)), data),
          'decode at full size':clock(to_gray, dss), f'decode, at least {size} px':clock(lambda d: to_gray(d, at_least=(size,size)), dss), 'fit':clock(lambda g: resize(g,size), half),
          'fit from full size':clock(lambda g: resize(g,size), full), 'enhance (stack)':clock(lambda g: enhance(g,'stack'), small), 'pack as PNG':clock(encode_png, small), "pack, OpenCV's encoder":clock(lambda g: cv2.imencode('.png', g), small),
          'write':clock(write, packed)}
ms = pd.Series(stages, name='ms')
print(pd.DataFrame(dict(ms=ms.round(2), share_of_tutorial=(ms/(gray['tutorial']/len(files)*1e3)).map('{:.1%}'.format))), '\n')
d = np.abs(np.stack(small).astype(int)-np.stack([resize(g,size) for g in full]))
print(f'decoded at half size against area averages: {(d==0).mean():.1%} of the pixels equal, {(d<=1).mean():.2%} within 1, mean {d.mean():.3f}, largest {d.max()} of 255')
shutil.rmtree(tmp)
