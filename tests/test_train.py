"One experiment, one file: runs, their folders, what is refused"
import json, os, signal, subprocess, sys
import pandas as pd, pytest
from pathlib import Path
from safetensors.torch import load_file
from lungdet.config import read_config
from lungdet.detector import Detector
from lungdet.formats import Annotations
from lungdet.train import *
from lungdet.train import main, main_evaluate

TINY = ['images=30','png_size=64','dls.size=64','dls.bs=8','backbone=resnet18','pretrained=false','width=16','depth=1','frozen=0','epochs=3','lr=1e-3']
def cfg(*more): return read_config(None, schema, [*TINY,*more])

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')/'a'
    return folder,train(cfg(), folder)

def test_what_a_run_leaves(run):
    folder,scores = run
    left = {p.name for p in folder.iterdir()}
    assert ('point.json' in left)==(len(pd.read_csv(folder/'predictions.csv'))>0) # nothing to choose one by otherwise
    assert left-{'point.json'}=={'config.toml','split.json','metrics.csv','curves.png','detector.safetensors','predictions.csv','annotations','provenance.json','scores.json'}
    det = Detector.load(folder) # ready to use
    assert (det.point and det.point.to_dict())==(json.loads((folder/'point.json').read_text()) if 'point.json' in left else None)
    if det.expected is not None: assert det.expected.images[0]==len(Annotations.load(folder/'annotations').part('valid'))
    h = pd.read_csv(folder/'metrics.csv')
    assert list(h.phase)==['all']*3 and {'train_loss','valid_loss','cls','box','rsna','AP50','AUC'}<=set(h)
    assert read_config(folder/'config.toml', schema)==cfg()
    p = json.loads((folder/'provenance.json').read_text())
    assert p['torch'] and p['images']['valid']+p['images']['train']==len(Annotations.load(folder/'annotations')) and len(p['split'])==16
    assert scores['AUC']==pytest.approx(h.AUC.iloc[-1], abs=1e-3)

def test_same_seed_same_numbers_other_seed_others(run, tmp_path):
    folder,_ = run
    train(cfg(), tmp_path/'b'); train(cfg('train.seed=1'), tmp_path/'c')
    a,b,c = (load_file(o/'detector.safetensors') for o in (folder,tmp_path/'b',tmp_path/'c'))
    assert all((a[k]==b[k]).all() for k in a) and any((a[k]!=c[k]).any() for k in a)
    assert (folder/'metrics.csv').read_bytes()==(tmp_path/'b'/'metrics.csv').read_bytes()

def test_another_experiment_is_left_alone(run):
    with pytest.raises(ValueError, match=r'holds another experiment: train.epochs was 3 and is 4'): train(cfg('epochs=4'), run[0])

def test_killed_and_resumed(run, tmp_path):
    "kill -9 in the middle of the last epoch; the second start gives the file of an undisturbed run"
    (tmp_path/'e.toml').write_text('')
    code = "import os,signal,sys\nfrom fastai.vision.all import Callback\nfrom lungdet.train import *\nfrom lungdet.config import read_config\n" \
           "class Die(Callback):\n    def after_batch(self):\n        if self.training and self.epoch==1 and self.iter==1: os.kill(os.getpid(), signal.SIGKILL)\n" \
           f"train(read_config(None, schema, {TINY!r}), sys.argv[1], cbs=[Die()])"
    env = os.environ|dict(PYTHONPATH=str(Path(__file__).parent.parent), PYTHONWARNINGS='ignore')
    res = subprocess.run([sys.executable,'-c',code,str(tmp_path/'k')], env=env, capture_output=True, text=True)
    assert res.returncode==-signal.SIGKILL, res.stderr[-2000:]
    assert not (tmp_path/'k'/'scores.json').exists() and list((tmp_path/'k'/'checkpoints'/'all').glob('epoch_000*'))
    train(cfg(), tmp_path/'k')
    a,b = (load_file(o/'detector.safetensors') for o in (run[0],tmp_path/'k'))
    assert all((a[k]-b[k]).abs().max()<=1e-6 for k in a if a[k].is_floating_point())
    pd.testing.assert_frame_equal(pd.read_csv(run[0]/'metrics.csv'), pd.read_csv(tmp_path/'k'/'metrics.csv'), atol=1e-6, rtol=1e-6)

def test_every_knob_turned(tmp_path):
    "Classification first, EMA, 16 bits, accumulation, ATSS, GIoU, BiFPN, group norm, other levels, mosaic, best epoch, early stopping"
    scores = train(cfg('classify=1','frozen=1','ema=.9','precision=bf16','accumulate=16','matcher=atss','box_loss=giou','neck=bifpn','norm=group','head_norm=group','levels=[4,5,6]',
        'sizes=[[32.0,40.0],[64.0,80.0],[128.0,160.0]]','mosaic=.5','mixup=.2','best=true','patience=1','monitor=AUC','dls.mode=stack','spread=1','dls.size=96'), tmp_path/'x')
    assert 0<=scores['AUC']<=1 and (tmp_path/'x'/'best.safetensors').exists()

@pytest.mark.parametrize('more,match', [(['format=rsnaa'],'is not one of'), (['share=0'],'must be above 0'), (['data.path=nowhere'],'nowhere'), (['box_loss=l3'],'box_loss is'), (['matcher=iou2'],'matcher is'), (['backbone=resnetty'],'no network is called'), (['monitor=auc'],'is no column'), (['frozen=1'],'has learnt nothing'), (['track=excel'],'is not one of'), (['format=coco'],'needs a path')])
def test_settings_that_cannot_be(tmp_path, more, match):
    with pytest.raises(ValueError, match=match): train(cfg(*more), tmp_path/'x')
    assert not (tmp_path/'x'/'scores.json').exists()

def test_commands(run, tmp_path, capsys):
    assert main(['walkthrough','widht=3'])==2 and "did you mean 'width'" in capsys.readouterr().err
    assert main(['walkthrough','--keys'])==0 and '[train]' in capsys.readouterr().out
    (tmp_path/'e.toml').write_text('\n'.join(['[data]','images = 30','png_size = 64','[dls]','size = 64','[model]','backbone = "resnet18"','pretrained = false','width = 16','depth = 1','[train]','frozen = 0']))
    assert main([str(tmp_path/'e.toml'),'epochs=1','--out',str(tmp_path),'--name','n'])==0
    assert 'AP50' in capsys.readouterr().out
    assert main([str(tmp_path/'e.toml'),'--check']) in (0,1)
    assert 'one batch by heart' in capsys.readouterr().out
    assert main([str(tmp_path/'e.toml'),'--check','anchors.sizes=[[320.0],[640.0],[1280.0],[2000.0],[4000.0]]'])==1 and 'NO  anchors' in capsys.readouterr().out
    assert main_evaluate([str(tmp_path/'n')])==0 and (tmp_path/'n'/'report.html').stat().st_size>10_000
    Annotations.load(run[0]/'annotations').save(tmp_path/'other')
    assert main_evaluate([str(tmp_path/'n'),'format=saved',f'path={tmp_path/"other"}','--out',str(tmp_path/'r')])==0
    assert 'were trained on' in capsys.readouterr().out and (tmp_path/'r'/'report.html').exists()
    assert main_evaluate([str(tmp_path/'gone')])==2 and 'holds no finished run' in capsys.readouterr().err

@pytest.mark.parametrize('name', sorted(p.stem for p in experiments.glob('*.toml')))
def test_experiments_of_lungdet_are_valid(name):
    cfg = read_config(experiments/f'{name}.toml', schema)
    a = cfg['anchors']
    assert len(a['sizes'])==len(a['levels'])
