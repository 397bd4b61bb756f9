"""Every race of this folder, one after the other, and one table: how many times as fast as what it replaces each is, and what was promised.

    make bench
    .venv/bin/python bench/all.py --only metrics fusion
    .venv/bin/python bench/all.py --quick

Takes about ten minutes on two cores, and the table goes to bench/results/speed.csv, from which the README has it. Nothing else should run meanwhile.
--quick goes through all scripts with the smallest settings, to see that they run: its ratios mean nothing and are kept nowhere.
A script that fails does not stop the others; its row says `failed` and the exit code is 1. A ratio below its target is `short`, and that is no error.
bench/quality.py (which trains) and bench/burned_in.py (which counts) are no races and not part of it."""
import argparse, os, resource, shutil, subprocess, sys, tempfile, time
from csv import DictWriter
from pathlib import Path
from _ratio import COLUMNS

HERE = Path(__file__).resolve().parent
RESULTS = HERE/'results'/'speed.csv'
# script: its settings, those of --quick, and how many threads, None for all cores
RUNS = {'convert':('--n 100 --repeat 3', '--n 4 --size 256 --repeat 1', None),
        'loader':('--n 160 --repeat 3', '--n 16 --size 128 --repeat 1', None),
        'metrics':('--times 3', '--boxes 12000 --times 1 --coco 100', 1),
        'bootstrap':('--images 2000 --n 1000 --anew 5', '--images 100 --n 20 --anew 1', 1),
        'fusion':('26684 --repeat 3', '400 --repeat 1', 1),
        'monitor':('--epochs 2 --pictures', '--epochs 1 --pictures --images 24 --size 64 --width 16 --depth 1', 1),
        'detect':('--n 48 --repeat 3', '--n 4 --size 128 --repeat 1', None),
        'engines':('--backbones resnet18 --sizes 512 --batches 1 8 --repeat 3', '--backbones resnet18 --sizes 128 --batches 1 --repeat 1', None),
        'retinanet':('--backbones resnet34 --sizes 256 512 --batches 1 8 --repeat 4 --brief', '--backbones resnet18 --sizes 64 --batches 1 --repeat 1 --brief', None)}

def run(script, options, threads, csv):
    "Run `script`, which appends its ratios to `csv`; '' or why it failed"
    env = dict(os.environ)|({} if threads is None else {'OMP_NUM_THREADS':str(threads)})
    res = subprocess.run([sys.executable, str(script), *options.split(), '--csv', str(csv)], env=env, capture_output=True, text=True)
    lines = [o for o in (res.stderr or res.stdout).strip().splitlines() if o.strip()]
    return '' if res.returncode==0 else '\n'.join(lines[-12:]) or f'exit code {res.returncode}'

def run_all(runs, csv, here=HERE):
    "Run `runs`, {name: (options, threads)}, one after the other; the names of those that failed"
    failed = []
    for name,(options,threads) in runs.items():
        print(f'  {name:<10}', end='', flush=True)
        start,cpu = time.time(),resource.getrusage(resource.RUSAGE_CHILDREN)
        why = run(here/f'{name}.py', options, threads, csv)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{'failed' if why else 'done'} {time.time()-start:6.0f} s, {now.ru_utime+now.ru_stime-cpu.ru_utime-cpu.ru_stime:.0f} s of CPU", flush=True)
        if why: failed.append(name); print(why, flush=True)
    return failed

def add_failed(csv, failed):
    "A row without a ratio for each script that failed"
    with open(csv, 'a', newline='') as f:
        w = DictWriter(f, COLUMNS)
        if not f.tell(): w.writeheader()
        w.writerows(dict(comparison=f'bench/{o}.py') for o in failed)

def table(folder):
    "The ratios of the files in `folder`, with the verdict on each, as text"
    from lungdet.study import read_speed
    df = read_speed(folder, every=True)
    return '\n'.join([*dict.fromkeys(o for o in df.machine if o), df.drop(columns='machine').to_string(index=False)])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='+', choices=RUNS, metavar='NAME', help=f"some of {', '.join(RUNS)}")
    p.add_argument('--quick', action='store_true', help='smallest settings, nothing kept')
    p.add_argument('--out', type=Path, help=f'write the table here (default: {RESULTS.relative_to(HERE.parent)}, if all run with their full settings)')
    args = p.parse_args()
    out = args.out or (None if args.quick or args.only else RESULTS)
    runs = {k:(o[args.quick],o[2]) for k,o in RUNS.items() if not args.only or k in args.only}
    begin = time.time()
    with tempfile.TemporaryDirectory() as d:
        csv = Path(d)/'speed.csv'
        failed = run_all(runs, csv)
        add_failed(csv, failed)
        print(f'{len(runs)-len(failed)} of {len(runs)} scripts in {(time.time()-begin)/60:.1f} minutes\n')
        print(table(d))
        if out: out.parent.mkdir(parents=True, exist_ok=True); shutil.copy(csv, out)
    sys.exit(1 if failed else 0)

if __name__=='__main__': main()
