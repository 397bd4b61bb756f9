"""What was measured, as Markdown, from files alone: quality (nbs/exp/results), speed (bench/results), and what nobody has measured yet.

    .venv/bin/python bench/results.py > results.md

The README shows the headlines of the first table and the second one, read by the same functions (chapter 17b)."""
import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUALITY,SPEED = ROOT/'nbs'/'exp'/'results',ROOT/'bench'/'results'

def missing(quality, speed):
    "What the two tables do not have, each with the command that would measure it"
    machines = [o for o in speed.machine if o]
    todo = [(not any('26,684' in d or '26684' in d for d,_ in quality.index), 'The whole challenge, 26,684 images, on a GPU', 'lungdet-train rsna_r34_512 path=data/rsna', 'make course LUNGDET_DATA=data/rsna'),
            (not any(m.startswith('single box') for _,m in quality.index), 'One box per image (chapter 06) beside the detectors', 'LUNGDET_FULL=1 LUNGDET_DATA=data/rsna exec_nb nbs/exp/single.ipynb'),
            (not any('cores' in o for o in machines), 'Speed on a CPU', 'make bench'),
            (not any('cores' not in o for o in machines), 'Speed on a GPU', 'bench/retinanet.py --device cuda --csv bench/results/gpu.csv')]
    return [(what,how) for wanted,what,*how in todo if wanted]

def page(quality=QUALITY, speed=SPEED):
    "All of it as Markdown"
    from lungdet.study import as_markdown, read_results, read_speed
    q,s = read_results(quality),read_speed(speed)
    todo = [f'- {what}: '+', '.join(f'`{o}`' for o in how) for what,how in missing(q, s)]
    return '\n\n'.join(['# All results', """## Quality

Each figure is the mean over the seeds of the training, with a 95 % interval over the patients held back (chapter 17b); `split` is the seal of who they are. FROC is the mean sensitivity at the numbers of false positives of chapter 11.""",
        as_markdown(q), """## Speed

How many times as fast as what it replaces each part is, the worst of the settings that were tried (`make bench` prints them all). A `target` is what the chapters promise.""",
        as_markdown(s), '## Not measured yet', '\n'.join(todo) or 'Nothing is left.'])+'\n'

if __name__=='__main__':
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(page())
