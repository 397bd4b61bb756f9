"""Run the numbered notebooks in order, one line of progress each.

By default the executed copies go to `_course/`, what the chapters make (studies, PNGs, predictions) to `_course/work/`, and the
report of chapter 11 to `_course/report.html`; nothing in nbs/ is touched. With `--in-place` the notebooks keep their new outputs.
LUNGDET_DATA names a folder laid out as the RSNA challenge; without it the notebooks make synthetic studies."""
import argparse, os, shutil, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS,OUT = ROOT/'nbs',ROOT/'_course'

def execute(src:Path, dst:Path, env:dict)->str:
    "Run notebook `src`, write it to `dst` with its outputs; '' or why it failed"
    cmd = [Path(sys.executable).parent/'exec_nb', src.name, '--dest', dst, '--exc_stop']
    res = subprocess.run(cmd, cwd=NBS, env=env, capture_output=True, text=True)
    lines = [o for o in (res.stderr or res.stdout).strip().splitlines() if o.strip()]
    return '' if res.returncode==0 else '\n'.join(lines[-12:]) or f'exit code {res.returncode}'

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--in-place', action='store_true', help='renew the outputs of nbs/*.ipynb')
    p.add_argument('only', nargs='*', help='chapters to run, by number or name, such as 06 10_learner; all if none')
    args = p.parse_args()
    env = os.environ|{'PYTHONWARNINGS':'ignore'} if args.in_place else os.environ|{'LUNGDET_WORK':str(OUT/'work'),'PYTHONWARNINGS':'ignore'}
    if args.in_place and env.get('LUNGDET_DATA'): sys.exit('The kept outputs show synthetic studies: unset LUNGDET_DATA to renew them.')
    if not args.in_place: OUT.mkdir(exist_ok=True)
    nbs = [o for o in sorted(NBS.glob('[0-9][0-9]*_*.ipynb')) if not args.only or {o.stem,o.name.split('_')[0]}&{*args.only}]
    print(f"{len(nbs)} chapters on {env.get('LUNGDET_DATA') or 'synthetic studies'}", flush=True)
    if not nbs: sys.exit(f'There is no chapter {", ".join(args.only)}.')
    begin,failed = time.time(),[]
    for nb in nbs:
        start = time.time()
        print(f'  {nb.stem:<14}', end='', flush=True)
        why = execute(nb, nb if args.in_place else OUT/nb.name, env)
        print(f'{"failed" if why else "done"} {time.time()-start:6.0f} s', flush=True)
        if why: failed.append(nb.name); print(why, flush=True)
    made = [] if args.in_place else [r for r in (OUT/'work').glob('*/report.html') if r.stat().st_mtime>begin] # by this run, not by an earlier one
    for r in made: shutil.copy(r, OUT/'report.html')
    print(f'{len(nbs)-len(failed)} of {len(nbs)} chapters in {(time.time()-begin)/60:.1f} minutes', flush=True)
    if made: print(f'Report: {OUT.name}/report.html')
    if failed: sys.exit(f'Failed: {", ".join(failed)}')

if __name__=='__main__': main()
