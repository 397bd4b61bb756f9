"Chapter 16g: the doctor never faints, names nobody, and says what is broken"
import json, os, socket, subprocess, sys
from pathlib import Path
import pytest
from lungdet import checkup as ch

def run(*args, **env):
    return subprocess.run([sys.executable,'-c','from lungdet.checkup import main; raise SystemExit(main())',*args], capture_output=True, text=True, env=os.environ|env)

def test_command_line(tmp_path):
    r = run('--offline','--json', LUNGDET_WORK=str(tmp_path), LUNGDET_DATA='')
    res = json.loads(r.stdout)
    assert r.returncode==int(bool(res['troubles'])) and [*res]==['versions','extras','decoders','device','room','settings','weights','troubles'], r.stderr
    assert not any('broken' in v for k,v in res.items() if k!='troubles') and res['versions']['torch'][0].isdigit() and res['room']['writable'] is True

def test_names_nobody(tmp_path):
    home = tmp_path/'home'/'jdoe'
    (home/'work').mkdir(parents=True)
    r = run('--offline', HOME=str(home), USER='jdoe', LOGNAME='jdoe', LUNGDET_WORK=str(home/'work'), LUNGDET_KEY='hush', LUNGDET_DATA='')
    assert 'jdoe' not in r.stdout and 'hush' not in r.stdout and '~/work' in r.stdout and 'LUNGDET_KEY' in r.stdout, r.stdout

@pytest.mark.parametrize('s,want', [('https://u:p@h/x','https://***@h/x'), ('/home/bob/x','/home/***/x'), ('/Users/bob/x','/Users/***/x'), ('plain','plain')])
def test_tidy(s, want): assert ch.tidy(s)==want

@pytest.mark.parametrize('error', [ImportError('x'), OSError('libtorch.so'), RuntimeError('operator torchvision::nms does not exist'), AttributeError('a'), MemoryError()])
def test_a_broken_part_is_a_line(error, monkeypatch):
    def broken(*a, **kw): raise error
    for k in ('_versions','_extras','_decoders','_device','_room','_settings','_weights'): monkeypatch.setattr(ch, k, broken)
    res = ch.checkup()
    assert all([*v]==['broken'] and type(error).__name__ in v['broken'] for v in res.values()) and len(ch.troubles(res))==7
    assert ch.main(['--json'])==1

def test_a_broken_package_is_named(tmp_path, monkeypatch):
    (tmp_path/'brokenpkg.py').write_text("raise OSError('libfoo.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    assert ch._package('brokenpkg').startswith('broken: OSError')
    monkeypatch.setattr(ch, '_NEEDED', ['brokenpkg','nowhere_to_be_found'])
    bad = ch.troubles(dict(versions=ch._versions()))
    assert len(bad)==2 and 'absent' in bad[1]

def test_a_bad_data_folder_is_one_trouble(tmp_path):
    r = run('--offline','--json', LUNGDET_DATA=str(tmp_path))
    res = json.loads(r.stdout)
    assert r.returncode==1 and 'LUNGDET_DATA' in res['room']['broken'] and res['versions']['python']

def test_weights_of_a_host_that_is_there_and_of_one_that_is_not(monkeypatch):
    "A real server on this machine, and a port that was its own"
    with socket.create_server(('127.0.0.1',0)) as server:
        here = server.getsockname()
        monkeypatch.setattr(ch, '_HOSTS', dict(here=here))
        assert ch._weights()=={'here':'yes: 127.0.0.1'} and ch.checkup()['weights']['here'].startswith('yes')
        server.settimeout(5)
        with server.accept()[0] as c: c.settimeout(5); assert c.recv(1)==b'' # connected, asked nothing, and hung up
    assert ch._weights()=={'here':'no: 127.0.0.1, ConnectionRefusedError; a proxy would not show here'}
    monkeypatch.setattr(ch, '_HOSTS', dict(nowhere=('no-such-host.invalid',443)))
    assert ch._weights()['nowhere'].startswith('no: no-such-host.invalid, ')

def test_offline_asks_nobody(monkeypatch):
    def never(*a, **kw): raise AssertionError('the network was asked')
    monkeypatch.setattr(socket, 'create_connection', never)
    assert set(ch.checkup(offline=True)['weights'].values())=={'not asked'}

def test_room_of_a_container():
    free = ch._free_gb()
    assert free is None or 0<=free<1e5

def test_extras_are_those_of_the_package():
    try: import tomllib
    except ImportError: import tomli as tomllib
    p = tomllib.loads((Path(__file__).parent.parent/'pyproject.toml').read_text())['project']['optional-dependencies']
    assert set(ch.EXTRAS)==set(p)-{'dev'}
