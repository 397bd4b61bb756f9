"What was measured: one table of ratios, one of qualities, and a README that says the same"
import csv, importlib, subprocess, sys
from pathlib import Path
import pandas as pd, pytest
from lungdet.study import as_markdown, headlines, read_results, read_speed

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT/'bench'
SCRIPTS = sorted(o for o in BENCH.glob('*.py') if not o.stem.startswith('_'))
sys.path.insert(0, str(BENCH))
bench,ratio,results = (importlib.import_module(o) for o in ('all','_ratio','results'))
sys.path.remove(str(BENCH))

@pytest.mark.parametrize('script', SCRIPTS, ids=lambda o: o.stem)
def test_every_script_answers_help(script):
    res = subprocess.run([sys.executable, script, '--help'], capture_output=True, text=True)
    assert res.returncode==0 and 'usage' in res.stdout, res.stderr
    assert ('--csv' in res.stdout)==(script.stem in bench.RUNS)

def test_every_race_exists():
    assert {*bench.RUNS}=={o.stem for o in SCRIPTS}-{'all','results','quality','burned_in','estimate'}

def fake(folder, name, code): (folder/f'{name}.py').write_text(f"import sys; sys.path.insert(0, {str(BENCH)!r})\nfrom _ratio import *\nfile = Path(sys.argv[-1])\n{code}\n")

def test_one_table_with_what_passed_what_is_short_and_what_failed(tmp_path, capsys):
    fake(tmp_path, 'good', "note(file, 'counting', 'fingers', 12.3456, 10, '100 things'); note(file, 'counting', 'fingers', 9, 10, '1,000 things')")
    fake(tmp_path, 'bad', "note(file, 'adding', 'an abacus', 3, 2)\nraise ValueError('the abacus is lost')")
    fake(tmp_path, 'last', "assert sys.argv[1:3]==['--n','3']; note(file, 'taking away', 'an abacus', 2, 2)")
    table = tmp_path/'out'/'speed.csv'
    table.parent.mkdir()
    failed = bench.run_all({'good':('',None), 'bad':('',1), 'last':('--n 3',None)}, table, tmp_path)
    assert failed==['bad'] and 'the abacus is lost' in capsys.readouterr().out
    bench.add_failed(table, failed)
    df = read_speed(table.parent, every=True)
    assert list(df.result)==['pass','short','pass','pass','failed'] and df.comparison.iloc[-1]=='bench/bad.py' and list(df.ratio)==['12.3','9','3','2','']
    worst = read_speed(table.parent)
    assert list(worst.comparison)==['counting','adding','taking away','bench/bad.py'] and worst.setting.iloc[0]=='1,000 things'
    assert 'short' in bench.table(table.parent) and worst.machine.iloc[0] in bench.table(table.parent)

def test_nothing_measured_is_an_empty_table(tmp_path):
    assert not len(read_speed(tmp_path)) and 'Nothing' in as_markdown(read_speed(tmp_path))
    bench.add_failed(tmp_path/'speed.csv', []) # nothing ran
    assert next(csv.reader(open(tmp_path/'speed.csv')))==ratio.COLUMNS and not len(read_speed(tmp_path))

@pytest.mark.parametrize('failed', [[],['fusion']])
def test_exit_code_and_file(failed, tmp_path, monkeypatch, capsys):
    def run_all(runs, csv): ratio.note(csv, 'a', 'b', 1, 2); return failed
    monkeypatch.setattr(bench, 'run_all', run_all)
    monkeypatch.setattr(sys, 'argv', ['all.py','--only','fusion','--out',str(tmp_path/'new'/'speed.csv')])
    with pytest.raises(SystemExit) as e: bench.main()
    assert e.value.code==bool(failed) and len(pd.read_csv(tmp_path/'new'/'speed.csv'))==1+len(failed) and 'short' in capsys.readouterr().out

def rows(model, data='Here', value=.5, figure='AP50', **more): return dict(data=data, model=model, figure=figure, value=value, lo=value-.1, hi=value+.1, seeds=3, images=9, boxes=4, split='abc')|more

def test_headlines_and_what_is_missing(tmp_path):
    df = pd.DataFrame([rows('lungdet, big', value=.7), rows('lungdet, small', value=.3), rows('lungdet'), rows('torchvision', value=.2), rows('lungdet, first', 'There', .1), rows('lungdet, second', 'There', .2)])
    df.to_csv(tmp_path/'a.csv', index=False)
    assert [*headlines(tmp_path).index]==[('Here','torchvision'),('Here','lungdet'),('Here','lungdet, big'),('There','lungdet, first'),('There','lungdet, second')]
    speed = read_speed(tmp_path/'none')
    assert [o for o,_ in results.missing(read_results(tmp_path), speed)]==['The whole challenge, 26,684 images, on a GPU','One box per image (chapter 06) beside the detectors','Speed on a CPU','Speed on a GPU']
    pd.DataFrame([rows('single box', hardware='a GPU'), rows('lungdet', 'RSNA, 26,684 radiographs', hardware='a GPU')]).to_csv(tmp_path/'b.csv', index=False)
    assert ('Here','single box') in headlines(tmp_path).index
    measured = pd.DataFrame(dict(machine=['x, 2 cores','','a GPU']))
    assert results.missing(read_results(tmp_path), measured)==[]
    assert set(read_results(tmp_path).hardware)=={'a GPU','not recorded'}
    page = results.page(tmp_path, tmp_path/'none')
    assert '| Here | single box | 0.500 (0.400 to 0.600) |' in page and '`make bench`' in page

def test_the_page_of_results_needs_no_training():
    res = subprocess.run([sys.executable, BENCH/'results.py'], capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    assert all(f'| {d} | {m} |' in res.stdout for d,m in read_results(ROOT/'nbs'/'exp'/'results').index)

def test_the_readme_has_the_tables_of_today():
    "If not: run nbs/index.ipynb in place, then `make readme`"
    text = (ROOT/'README.md').read_text()
    assert as_markdown(headlines(ROOT/'nbs'/'exp'/'results')) in text
    assert as_markdown(read_speed(BENCH/'results').drop(columns='machine')) in text
