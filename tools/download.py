"""How much `make env` downloads: what pip would fetch with the versions of constraints.txt, asked of the index and added up.

    .venv/bin/python tools/download.py"""
import json, re, subprocess, sys, tempfile, urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def size(url:str)->int:
    "Bytes behind `url`"
    if url.startswith('file:'): return Path(url.removeprefix('file://')).stat().st_size
    with urllib.request.urlopen(urllib.request.Request(url, method='HEAD'), timeout=60) as o: return int(o.headers['Content-Length'])

def main():
    what = '.[dev,'+re.search(r'^EXTRAS := (.+)$', (ROOT/'Makefile').read_text(), re.M)[1]+']'
    with tempfile.TemporaryDirectory() as d:
        cmd = [sys.executable,'-m','pip','install','-q','--dry-run','--ignore-installed','--report',f'{d}/report.json','-c','constraints.txt',what]
        subprocess.run(cmd, cwd=ROOT, check=True)
        found = json.loads(Path(d,'report.json').read_text())['install']
    sizes = {o['metadata']['name']:size(o['download_info']['url']) for o in found if o['metadata']['name']!='lungdet'}
    gpu = {k:v for k,v in sizes.items() if k.startswith(('nvidia-','cuda-','triton'))}
    print(f'{len(sizes)} packages, {sum(sizes.values())/1e9:.1f} GB; {sum(gpu.values())/1e9:.1f} GB of it for GPUs: {", ".join(sorted(gpu)[:3])} ... ({len(gpu)} packages)')
    print('The largest: '+', '.join(f'{k} {v/1e6:.0f} MB' for k,v in sorted(sizes.items(), key=lambda o: -o[1])[:5]))

if __name__=='__main__': main()
