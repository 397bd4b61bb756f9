"Are the notebooks clean, are the modules and the README what they say, and do types and names fit? Exits with 1 and what is wrong if not."
import subprocess, sys
from pathlib import Path

ROOT,BIN = Path(__file__).resolve().parent.parent,Path(sys.executable).parent

def state()->dict:
    "All that git sees of the working tree: changed and new files, with their content"
    new = subprocess.run(['git','ls-files','--others','--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\n')
    return {o:(ROOT/o).read_bytes() for o in new if o} | {'diff':subprocess.run(['git','diff'], cwd=ROOT, capture_output=True, check=True).stdout}

def run(*cmd):
    res = subprocess.run([BIN/cmd[0], *cmd[1:]], cwd=ROOT, capture_output=True, text=True)
    if res.returncode or 'Failed' in res.stdout+res.stderr: sys.exit(f"{' '.join(map(str,cmd))} failed:\n{res.stdout}{res.stderr}") # nbdev_clean exits with 0 when it fails

before = state()
run('nbdev_clean')
run('nbdev_export')
run('python', 'tools/readme.py')
if state()!=before:
    status = subprocess.run(['git','status','--porcelain'], cwd=ROOT, capture_output=True, text=True).stdout
    sys.exit(f'The notebooks, lungdet/ and README.md did not agree. They do now; look at the changes and commit them together:\n{status}')
print('Notebooks are clean; modules and README are what they say.')
run('ruff','check','-q','lungdet','tests','bench','tools')
run('mypy')
print('Types fit, and nothing is imported in vain.')
