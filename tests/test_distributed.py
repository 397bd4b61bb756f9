"Parts of an epoch, and two processes against one"
import os, subprocess, sys
import pytest
from hypothesis import given, settings, strategies as st
from pathlib import Path
from lungdet.data import detection_dls
from lungdet.distributed import *
from test_data import toy

@given(st.integers(1,200), st.integers(1,9), st.integers(1,9))
@settings(max_examples=300, deadline=None)
def test_all_parts_have_as_many_batches(n, world, bs):
    if n<world:
        with pytest.raises(ValueError, match='take fewer processes'): even_batch(n, world, bs)
        return
    sizes = [(r+1)*n//world-r*n//world for r in range(world)]
    b = even_batch(n, world, bs)
    assert b>=bs and sum(sizes)==n and len({-(-s//b) for s in sizes})==1

@pytest.mark.parametrize('n,world,bs,workers', [(13,2,4,0),(16,3,2,0),(21,2,5,2)])
def test_every_image_once(tmp_path, n, world, bs, workers):
    dls = detection_dls(toy(tmp_path, n), size=32, bs=bs, aug=None, num_workers=workers)
    for dl in (dls.train,dls.valid)[:1 if len(dls.valid_ds)<world else 2]:
        order = list(dl.get_idxs())
        parts = [SharedDL(dl, r, world, 'cpu') for r in range(world)]
        for p in parts: p._broadcast = lambda t, r: order
        assert len({len(p) for p in parts})==1
        seen = [sum(len(b[0]) for b in p) for p in parts]
        assert sum(seen)==len(order) and sorted(sum([p.get_idxs() for p in parts], []))==sorted(order)
        assert [sum(1 for _ in p) for p in parts]==[len(parts[0])]*world

def test_alone_nothing_changes(tmp_path):
    assert n_processes()==1 and first_alone(lambda: 7)==7
    start_processes()
    with shared('learner') as learn: assert learn=='learner'

def test_two_processes_train_from_a_file(tmp_path):
    "torchrun on the command line: one run folder, whole, with the scores of the detector that is in it"
    (tmp_path/'e.toml').write_text('[data]\nimages = 30\npng_size = 64\n[dls]\nsize = 64\nbs = 4\n[model]\nbackbone = "resnet18"\npretrained = false\nwidth = 16\ndepth = 1\n[train]\nfrozen = 0\nepochs = 2\nema = 0.9\n')
    env = os.environ|dict(OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parent.parent), PYTHONWARNINGS='ignore')
    res = subprocess.run([sys.executable,'-m','torch.distributed.run','--standalone','--nproc_per_node=2','-m','lungdet.train',str(tmp_path/'e.toml'),'--out',str(tmp_path),'--name','r'],
                         capture_output=True, text=True, env=env)
    assert res.returncode==0, res.stderr[-3000:]
    assert res.stdout.count('epochs 2')==1
    import json, pandas as pd
    from lungdet.formats import Annotations
    from lungdet.learner import detect, detector_learner
    from lungdet.train import headline_scores
    run = tmp_path/'r'
    ann,scores = Annotations.load(run/'annotations'),json.loads((run/'scores.json').read_text())
    assert headline_scores(ann.part('valid'), detect(detector_learner(run/'detector.safetensors', ann)))['AUC']==pytest.approx(scores['AUC'], abs=1e-6)
    last = pd.read_csv(run/'metrics.csv').iloc[-1]
    assert last.AUC==pytest.approx(scores['AUC'], abs=1e-4) and last.AP50==pytest.approx(scores['AP50'], abs=1e-3) # the table's scores were gathered
    assert len(pd.read_csv(run/'metrics.csv'))==2
