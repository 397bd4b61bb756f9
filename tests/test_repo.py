"Rules of the repository: one place for requirements, notebooks and modules in step, no traces of a machine"
import configparser, json, os, re, subprocess
try: import tomllib
except ImportError: import tomli as tomllib
from importlib.metadata import version
from pathlib import Path
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = configparser.ConfigParser(); SETTINGS.read(ROOT/'settings.ini')
PYPROJECT = tomllib.loads((ROOT/'pyproject.toml').read_text())
NBS = sorted((ROOT/'nbs').glob('*.ipynb'))
CHAPTERS = [o for o in NBS if o.name[:2].isdigit()]
cells = lambda nb: json.loads(nb.read_text())['cells']
source = lambda c: ''.join(c['source'])
chapter = lambda nb: nb.stem.split('_',1)[1]
name = lambda req: re.split(r'[<>=!~ ;\[]', req)[0].lower().replace('_','-')

def test_requirements_are_the_same_in_both_places():
    s,p = SETTINGS['DEFAULT'],PYPROJECT['project']
    assert s['requirements'].split()==p['dependencies']
    assert s['dev_requirements'].split()==p['optional-dependencies']['dev']
    scripts = dict(o.split('=') for o in s['console_scripts'].split())
    assert scripts==p['scripts']
    assert f">={s['min_python']}"==p['requires-python'] and s['description']==p['description']

def test_every_direct_dependency_has_an_exact_version():
    p = PYPROJECT['project']
    pinned = {name(l):l for l in (ROOT/'constraints.txt').read_text().splitlines() if l and not l.startswith('#')}
    assert all('==' in l for l in pinned.values())
    for req in sum(p['optional-dependencies'].values(), p['dependencies']): assert name(req) in pinned, f'{req} has no line in constraints.txt'

def test_this_environment_is_the_pinned_one():
    if os.environ.get('LUNGDET_UNPINNED'): pytest.skip('these tests are run with other versions on purpose')
    pins = [Requirement(l) for l in (ROOT/'constraints.txt').read_text().splitlines() if '==' in l]
    for p in pins:
        if not p.marker or p.marker.evaluate(): assert f"=={version(p.name).split('+')[0]}"==str(p.specifier), p.name

def test_one_module_per_chapter_and_one_chapter_per_module():
    exps = [re.search(r'^#\|\s*default_exp (\w+)', '\n'.join(source(c) for c in cells(nb)), re.M)[1] for nb in CHAPTERS]
    assert [chapter(nb) for nb in CHAPTERS]==exps and len(set(exps))==len(exps)
    mods = {o.stem for o in (ROOT/'lungdet').glob('*.py')}-{'__init__','_modidx','all'}
    assert mods==set(exps)

def test_a_module_imports_only_from_lower_numbers():
    order = [chapter(nb) for nb in CHAPTERS]
    for i,m in enumerate(order):
        for o in re.findall(r'^from \.(\w+) import', (ROOT/'lungdet'/f'{m}.py').read_text(), re.M):
            assert order.index(o)<i, f'{m} imports {o}'

def test_all_exports_every_chapter():
    assert re.findall(r'^from \.(\w+) import \*', (ROOT/'lungdet'/'all.py').read_text(), re.M)==[chapter(nb) for nb in CHAPTERS]

def test_kept_outputs_show_no_paths_warnings_or_tracebacks():
    for nb in NBS:
        text = json.dumps([o for c in cells(nb) for o in c.get('outputs',[])])
        assert not re.search(r'(?<![\w.:/-])/(?:root|home|tmp|usr|opt|mnt|var|work)/', text), nb.name
        assert 'Traceback' not in text and 'Warning:' not in text and '█' not in text, nb.name

def test_every_chapter_keeps_outputs_and_teaches():
    for nb in CHAPTERS:
        code = [c for c in cells(nb) if c['cell_type']=='code']
        words = sum(len(source(c).split()) for c in cells(nb) if c['cell_type']=='markdown')
        lines = sum(1 for c in code if re.search(r'^#\|\s*exporti?\b', source(c), re.M) for l in source(c).splitlines() if l.strip())
        assert sum(bool(c['outputs']) for c in code)>=len(code)*.25, nb.name
        assert words>=lines*.8, nb.name
        assert '**Exercise.**' in ''.join(source(c) for c in cells(nb)) and 'What you have now' in ''.join(source(c) for c in cells(nb)), nb.name

def test_every_chapter_closes_with_what_you_have_an_exercise_and_where_to_read_on():
    for nb in CHAPTERS:
        text = [source(c) for c in cells(nb) if c['cell_type']=='markdown']
        whole = '\n'.join(text)
        assert whole.count('## What you have now')==whole.count('**Exercise.**')==1 and '<details>' in whole, nb.name
        assert text[-1].startswith('**Further reading.**') and 2<=len(re.findall(r'^- ', text[-1], re.M))<=6 and 'http' in text[-1], nb.name

def test_exported_cells_are_short():
    for nb in CHAPTERS:
        for c in cells(nb):
            n = sum(1 for l in source(c).splitlines() if l.strip() and not l.startswith('#|'))
            if c['cell_type']=='code' and re.search(r'^#\|\s*exporti?\b', source(c), re.M): assert n<=48, f'{nb.name}: {n} lines in one cell: {source(c)[:80]}'

def test_sample_is_small():
    assert sum(o.stat().st_size for o in (ROOT/'data'/'sample').rglob('*') if o.is_file())<2e6

def test_readme_is_index():
    pytest.importorskip('nbdev')
    import sys; sys.path.insert(0, str(ROOT/'tools'))
    from readme import readme
    assert (ROOT/'README.md').read_text()==readme()

def test_relative_links_of_the_readme_lead_somewhere():
    for link in re.findall(r'\]\((?!https?:|#)([^)#]+)', (ROOT/'README.md').read_text()): assert (ROOT/link).exists(), link

def test_version_is_stated_once():
    assert SETTINGS['DEFAULT']['version']==re.search(r'"([^"]+)"', (ROOT/'lungdet'/'__init__.py').read_text())[1]

def test_make_gives_notebooks_the_whole_path_of_the_data():
    "They run in nbs/, so a path relative to the checkout must not reach them, wherever make got it from"
    show = ['make','-s','-C',str(ROOT),'--no-print-directory','--eval','show:\n\t@echo "$$LUNGDET_DATA"','show']
    for args,env in ((['LUNGDET_DATA=data/sample'],{}), ([],{'LUNGDET_DATA':'data/sample'})):
        out = subprocess.run(show+args, env=os.environ|env, capture_output=True, text=True)
        assert out.stdout.strip('\n')==str(ROOT/'data'/'sample'), out.stderr

def test_no_name_is_exported_twice():
    "`from lungdet.all import *` gives one thing for each name"
    seen = {}
    for nb in CHAPTERS:
        names = re.search(r'__all__ = (\[.*?\])', (ROOT/'lungdet'/f'{chapter(nb)}.py').read_text(), re.S)
        for o in eval(names[1]) if names else []: assert seen.setdefault(o, chapter(nb))==chapter(nb), f'{o} is in {seen[o]} and {chapter(nb)}'
