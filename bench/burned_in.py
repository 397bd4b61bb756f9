"""How often `burned_in_text` of chapter 16b fires on real radiographs as they are, and with a name written into them.

    .venv/bin/python bench/burned_in.py FOLDER 600"""
import argparse, time
from pathlib import Path

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('folder', help='DICOMs'); p.add_argument('n', type=int, nargs='?', default=600, help='how many of them')
args = p.parse_args()

import cv2, numpy as np, pandas as pd
from lungdet.dicom import read_dicom, to_gray
from lungdet.safety import burned_in_text

def write_name(gray, rng, height, value):
    h,w = gray.shape
    at = int(rng.uniform(.03,.6)*w),int(rng.uniform(.05,.95)*h)
    return cv2.putText(gray.copy(), 'DOE JANE 1970', at, cv2.FONT_HERSHEY_SIMPLEX, height*h/22, value, max(1,round(h/512)), cv2.LINE_AA)

cv2.setNumThreads(1)
rng,rows,seconds = np.random.default_rng(0),[],0
for f in sorted(Path(args.folder).rglob('*.dcm'))[:args.n]:
    gray = to_gray(read_dicom(f))
    t = time.perf_counter()
    row = {'as it is':len(burned_in_text(gray))>0}
    seconds += time.perf_counter()-t
    for name,height,value in (('white, 2.2 % high',.022,255), ('white, 1.2 % high',.012,255), ('white, 6 % high',.06,255), ('gray 190, 2.2 %',.022,190), ('black, 2.2 %',.022,0)):
        row[name] = len(burned_in_text(write_name(gray, rng, height, value)))>0
    rows.append(row)
df = pd.DataFrame(rows)
fired = df['as it is']
print(f"{len(df)} images, {seconds/len(df)*1000:.0f} ms each; fires on {fired.sum()} as they are")
print("With a name written into one of the others, it fires on:")
print(df[~fired].drop(columns='as it is').mean().round(3).to_string())
