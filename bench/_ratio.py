"""What the scripts of this folder share: `--csv FILE` appends one row for each ratio, with its target and the machine that it was measured on.

A ratio says how many times as fast as `against` the `comparison` is, so larger is better. A target is what the chapter that quotes the script claims, or what its
docstring promises, rounded down."""
import csv
from pathlib import Path

COLUMNS = ['comparison','against','ratio','target','setting','machine']

def add_csv(p): p.add_argument('--csv', type=Path, metavar='FILE', help='append each ratio, with its target, to this file')

def machine(device='cpu'):
    "Processor, cores and version of PyTorch, or the GPU"
    import torch
    from lungdet.train import hardware
    return f"{hardware(device!='cpu')}, torch {torch.__version__.split('+')[0]}"

def note(file, comparison, against, ratio, target, setting='', device='cpu'):
    "Append a row to `file`, if there is one"
    if file is None: return
    new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, 'a', newline='') as f:
        w = csv.writer(f)
        if new: w.writerow(COLUMNS)
        w.writerow([comparison, against, f'{ratio:.3g}', target, setting, machine(device)])
