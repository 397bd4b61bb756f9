"Numbers that leave the run: read back from each tool's own files"
import pytest, time
from lungdet.data import detection_dls
from lungdet.learner import retinanet_learner
from lungdet.monitor import DetectionScores, history
from lungdet.track import *
from test_data import toy

def run(tmp_path, kind):
    folder = tmp_path/'a run'
    folder.mkdir()
    learn = retinanet_learner(detection_dls(toy(tmp_path, 10), size=64, bs=2), 'resnet18', pretrained=False, width=16, depth=1, cbs=DetectionScores())
    learn.recorder.add_time = False
    track = Track(kind, folder, dict(train=dict(lr=.1, note=None)), every=1)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4, cbs=track); h = [history(learn).valid_loss[0]]
        learn.fit(1, 1e-4, cbs=track); h.append(history(learn).valid_loss[0]) # a second phase goes on counting
        learn.get_preds()
    track.close(True)
    return folder,h,len(learn.dls.train)*2

def test_tensorboard(tmp_path):
    acc = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator', reason='needs lungdet[track]')
    folder,h,n = run(tmp_path, 'tensorboard')
    events = acc.EventAccumulator(str(folder/'tensorboard')).Reload().Scalars('valid_loss')
    assert [o.value for o in events]==pytest.approx(h) and [o.step for o in events]==[n//2,n]

def test_mlflow(tmp_path, monkeypatch):
    ml = pytest.importorskip('mlflow', reason='needs lungdet[track]')
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    folder,h,n = run(tmp_path, 'mlflow')
    client = ml.MlflowClient(f"sqlite:///{tmp_path/'mlflow.db'}")
    exp = client.get_experiment_by_name('lungdet')
    one, = client.search_runs([exp.experiment_id])
    assert one.info.run_name=='a run' and one.info.status=='FINISHED' and one.data.params['train.lr']=='0.1'
    assert [o.value for o in client.get_metric_history(one.info.run_id, 'valid_loss')]==pytest.approx(h)

def test_wandb_stays_offline(tmp_path, monkeypatch):
    pytest.importorskip('wandb', reason='needs lungdet[track]')
    monkeypatch.delenv('WANDB_MODE', raising=False)
    monkeypatch.setenv('WANDB_SILENT', 'true')
    folder,h,n = run(tmp_path, 'wandb')
    def files(): return list(folder.glob('wandb/offline-run-*/*.wandb'))
    for _ in range(100): # a process of its own writes them
        if any(b'valid_loss' in o.read_bytes() for o in files()): break
        time.sleep(.2)
    assert len(files())==1 and b'valid_loss' in files()[0].read_bytes()

def test_no_such_tracker_and_no_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='is not one of'): Track('excel', tmp_path)
    monkeypatch.setitem(__import__('sys').modules, 'wandb', None)
    with pytest.raises(ImportError, match=r"pip install 'lungdet\[track\]'"): Track('wandb', tmp_path)

def test_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    ml = pytest.importorskip('mlflow', reason='needs lungdet[track]')
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    (folder := tmp_path/'r').mkdir()
    one = Track('mlflow', folder); one.log(dict(x=1.), 1); one.close(False)
    two = Track('mlflow', folder); two.load_state_dict(one.state_dict()); two.log(dict(x=2.), 2); two.close(True)
    client = ml.MlflowClient(f"sqlite:///{tmp_path/'mlflow.db'}")
    run, = client.search_runs([client.get_experiment_by_name('lungdet').experiment_id])
    assert run.info.status=='FINISHED' and [o.value for o in client.get_metric_history(run.info.run_id,'x')]==[1.,2.]
