"Runs that are killed, interrupted, damaged or mixed up, and end as if nobody had disturbed them"
import errno, numpy as np, os, pytest, random, signal, subprocess, sys, torch, lungdet.checkpoint
from functools import partial
from hypothesis import example, given, settings, strategies as st
from pathlib import Path
from torch import nn
from fastai.vision.all import (Adam, Callback, CSVLogger, DataLoader, DataLoaders, EarlyStoppingCallback, GradientAccumulation, L, Learner, MSELossFlat, OptimWrapper, SGD,
                               SaveModelCallback, ShowGraphCallback, TerminateOnNaNCallback, mae, params, ranger, set_seed)
from lungdet.checkpoint import *
from lungdet.checkpoint import _with_state

class Averages(Callback):
    "A moving average of the weights, as a callback with a memory has it"
    order = 98
    def before_fit(self): self.avg = {k:p.detach().clone() for k,p in self.learn.model.named_parameters()}
    def after_batch(self):
        if self.training:
            for k,p in self.learn.model.named_parameters(): self.avg[k].lerp_(p.detach(), .1)
    def state_dict(self): return dict(avg=self.avg)
    def load_state_dict(self, d): self.avg = d['avg']

class Dice(Callback):
    "Uses the generators of Python and numpy"
    def before_batch(self):
        if self.training: self.learn.xb = (self.xb[0]*(.9+.1*random.random()+.1*np.random.rand()),)

class Stop(Callback):
    "Breaks off in the middle of epoch `at`, as Ctrl-C does"
    def __init__(self, at, it=2): self.at,self.it = at,it
    def after_backward(self):
        if self.epoch==self.at and self.iter==self.it: raise KeyboardInterrupt

def tiny(seed=0, opt_func=Adam, cbs=None, n=22, bs=4, width=8, **kw):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n+6, 6, generator=g)
    items = [(a, a[:2].prod()[None]) for a in x]
    set_seed(seed)
    noisy = lambda b: (b[0]+torch.randn_like(b[0])*.1, b[1])
    dls = DataLoaders(DataLoader(items[:n], bs=bs, shuffle=True, after_batch=noisy), DataLoader(items[n:], bs=bs))
    model = nn.Sequential(nn.Linear(6,width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(.3), nn.Linear(width,1))
    learn = Learner(dls, model, loss_func=MSELossFlat(), opt_func=opt_func, splitter=lambda m: [params(m[0]), params(m[1:])], cbs=[Dice(), *L(cbs)], **kw)
    learn.recorder.add_time = False
    return learn

def fit(learn, *cbs, n=4, how='fit_one_cycle', lr=slice(1e-3,1e-2)):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(n, lr, cbs=cbs)
    return learn

def outcome(learn):
    "All that a run leaves"
    rec = learn.recorder
    return dict(model=learn.model.state_dict(), opt=learn.opt.state_dict(), values=[list(o) for o in rec.values], losses=torch.stack(rec.losses), lrs=list(map(float,rec.lrs)),
                iters=rec.iters, hps={k:list(map(float,v)) for k,v in getattr(rec,'hps',{}).items()}, callbacks=[kept(o) for o in _with_state(learn)],
                kinds=type(learn.opt.hypers).__name__, train_iter=learn.train_iter, final=list(learn.final_record),
                dice=[random.random(), np.random.rand(), torch.rand(1).item(), learn.dls.train.get_idxs()])

def same(a, b, at=''):
    "Are the nested values bit for bit equal?"
    if isinstance(a, torch.Tensor): assert torch.equal(a, b), at
    elif isinstance(a, dict):
        assert set(a)==set(b), at
        for k in a: same(a[k], b[k], f'{at}.{k}')
    elif isinstance(a, (list,tuple,L)):
        assert len(a)==len(b), at
        for i,(x,y) in enumerate(zip(a,b)): same(x, y, f'{at}.{i}')
    else: assert a==b or a!=a and b!=b, f'{at}: {a} {b}'

def interrupted(make, folder, at=2, **kw):
    with pytest.raises(KeyboardInterrupt): fit(make(), Checkpoint(folder), Stop(at), **kw)

SCRIPT = """
import os, random, signal, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fastai.vision.all import *
from lungdet.augment import Augment
from lungdet.checkpoint import *
from lungdet.data import detection_dls
from lungdet.learner import retinanet_learner
from test_checkpoint import Averages, Dice, outcome
from test_data import toy
import lungdet.checkpoint

root,name,how = Path(sys.argv[1]),sys.argv[3],sys.argv[4]
def die(): os.kill(os.getpid(), signal.SIGKILL)
class Killer(Callback):
    def after_backward(self):
        if self.epoch==2 and self.iter==1: die()
def half(tensors, p, metadata):
    if 'epoch_003' not in str(p): return save(tensors, p, metadata=metadata)
    save(tensors, p, metadata=metadata)
    p.write_bytes(p.read_bytes()[:50000]); die()
if how=='writing': save,lungdet.checkpoint.save_file = lungdet.checkpoint.save_file,half

set_seed(3)
dls = detection_dls(toy(root, 15), size=64, bs=4, positives=None, aug=Augment(mixup=.3, noise=.05))
learn = retinanet_learner(dls, 'resnet18', pretrained=False, width=16, depth=1, loss=dict(normalise='running'), path=root/name, cbs=[GradientClip(1.), Dice(), Averages()])
learn.model.backbone.register_forward_hook(lambda m,i,o: [F.dropout(x, .2, m.training) for x in o])
learn.recorder.add_time = False
learn.freeze_to(1)
cbs = [Checkpoint(root/name/'run', resume=True), CSVLogger()] + ([Killer()] if how=='epoch' else [])
if how=='plain': cbs = cbs[1:]
with learn.no_bar(): learn.fit_one_cycle(5, slice(1e-4,1e-2), cbs=cbs)
save_state(outcome(learn), root/f'{name}.safetensors')
"""

def test_killed_twice_and_the_same_numbers(tmp_path):
    "SIGKILL in the middle of an epoch, then while a checkpoint is written; against a run that knows of no checkpoints"
    (tmp_path/'run.py').write_text(SCRIPT)
    def run(name, how):
        cmd = [sys.executable, '-W', 'ignore', str(tmp_path/'run.py'), str(tmp_path), str(Path(__file__).parent), name, how]
        return subprocess.run(cmd, capture_output=True, text=True, env=os.environ|dict(OMP_NUM_THREADS='1'))
    for name in 'ab': (tmp_path/name).mkdir()
    assert (a:=run('a','plain')).returncode==0, a.stderr
    assert (b:=run('b','epoch')).returncode==-signal.SIGKILL, b.stderr
    assert [p.name for p in checkpoints(tmp_path/'b'/'run')]==['epoch_000.safetensors','epoch_001.safetensors']
    assert (b:=run('b','writing')).returncode==-signal.SIGKILL and 'epoch_001.safetensors: 2 of 5 epochs are done' in b.stdout, b.stderr
    assert len(list((tmp_path/'b'/'run').glob('.*.tmp')))==1
    assert (b:=run('b','end')).returncode==0 and '3 of 5' in b.stdout, b.stderr
    assert not list((tmp_path/'b'/'run').glob('.*'))
    same(*(load_state(tmp_path/f'{o}.safetensors') for o in 'ab'))
    assert len({(tmp_path/o/'history.csv').read_text() for o in 'ab'})==1
    assert a.stdout in b.stdout

OPTS = dict(adam=Adam, sgd=partial(SGD, mom=.9), plain=SGD, ranger=ranger, torch=partial(OptimWrapper, opt=torch.optim.AdamW))
@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('how', ['fit','fit_one_cycle','fit_flat_cos'])
def test_every_fit_and_every_optimiser(tmp_path, how, opt):
    make = partial(tiny, opt_func=OPTS[opt])
    lr = slice(1e-3,1e-2)
    whole = outcome(fit(make(), how=how, lr=lr))
    interrupted(make, tmp_path/'c', how=how, lr=lr)
    same(outcome(fit(make(seed=9), Checkpoint(tmp_path/'c', resume=True), how=how, lr=lr)), whole)
    again = outcome(fit(make(seed=9), Checkpoint(tmp_path/'c', resume=True), how=how, lr=lr)) # all is done
    same(again, whole)

def test_the_same_learner_goes_on_after_ctrl_c(tmp_path):
    whole,learn = outcome(fit(tiny())),tiny()
    with pytest.raises(KeyboardInterrupt): fit(learn, Checkpoint(tmp_path/'c'), Stop(2))
    same(outcome(fit(learn, Checkpoint(tmp_path/'c', resume=True))), whole)
    assert all(cb.run for cb in learn.cbs)

@pytest.mark.parametrize('at', [0,1,3])
def test_wherever_it_stops(tmp_path, at):
    whole = outcome(fit(tiny()))
    interrupted(tiny, tmp_path/'c', at)
    same(outcome(fit(tiny(seed=9 if at else 0), Checkpoint(tmp_path/'c', resume=True))), whole) # before the first checkpoint there is only the seed

@pytest.mark.parametrize('frozen', [-1,0])
def test_sums_of_gradients_cross_the_end_of_an_epoch(tmp_path, frozen):
    "22 items in batches of 4, a step every 8: half a sum waits when the epoch ends; and a frozen group whose gradients are zero is not one without"
    def make(seed=0):
        learn = tiny(seed, cbs=GradientAccumulation(8))
        fit(learn, n=1); learn.freeze_to(frozen)
        return learn
    whole = outcome(fit(make()))
    interrupted(make, tmp_path/'c')
    state = load_state(checkpoints(tmp_path/'c')[-1])
    assert any(isinstance(g, torch.Tensor) for g in state['grads'].values())
    same(outcome(fit(make(9), Checkpoint(tmp_path/'c', resume=True))), whole)

def test_no_gradient_is_not_one_of_zero(tmp_path):
    "Weights that the loss does not reach stay as they are, also after a resume; with a gradient of zero they would decay"
    def make(seed=0):
        learn = tiny(seed, wd=.1)
        learn.model[4].unused = nn.Parameter(torch.ones(3))
        return learn
    whole = fit(make())
    want = outcome(whole)
    interrupted(make, tmp_path/'c')
    back = fit(make(9), Checkpoint(tmp_path/'c', resume=True))
    same(outcome(back), want)
    assert (whole.model[4].unused==1).all() and back.model[4].unused.grad is None

def test_callbacks_that_sit_this_fit_out_go_on_to(tmp_path):
    class Idle(Callback):
        n = 0
        def before_fit(self): self.run = False
        def after_epoch(self): self.n += 1
    interrupted(tiny, tmp_path/'c')
    idle = Idle()
    fit(tiny(9), Checkpoint(tmp_path/'c', resume=True), idle)
    assert idle.n==0

@pytest.mark.parametrize('at', [1,None])
def test_early_stopping_and_the_best_model(tmp_path, at):
    "It counts on after a resume, and a run that it stopped is done"
    def cbs(): return EarlyStoppingCallback(patience=3, min_delta=10.), SaveModelCallback()
    def make(name, seed=0): return tiny(seed, path=tmp_path/name)
    whole = fit(make('a'), *cbs(), n=8)
    assert len(whole.recorder.values)==4
    want = outcome(whole)
    run = lambda *more, seed=0: fit(make('b', seed), Checkpoint(tmp_path/'c', resume=True), *cbs(), *more, n=8)
    if at:
        with pytest.raises(KeyboardInterrupt): run(Stop(at))
    same(outcome(run(seed=9 if at else 0)), want)
    state = load_state(checkpoints(tmp_path/'c')[-1])
    assert state['stopped'] and state['epoch']==3
    steps = []
    same(outcome(run(Callback(before_batch=lambda self: steps.append(1)), seed=9)), want)
    assert not steps

def test_a_run_of_nans_is_not_a_checkpoint(tmp_path):
    class Bad(Callback):
        def after_pred(self):
            if self.epoch==2: self.learn.pred = self.pred*float('nan')
    fit(tiny(), Checkpoint(tmp_path/'c'), Bad(), TerminateOnNaNCallback())
    assert [p.stem for p in checkpoints(tmp_path/'c')]==['epoch_000','epoch_001']

def test_bars_tables_graphs_and_history(tmp_path, capsys):
    "The table is that of the whole run, in every place that shows it"
    def go(name, seed, *cbs):
        learn = tiny(seed, path=tmp_path)
        learn.fit_one_cycle(4, 1e-2, cbs=[CSVLogger(f'{name}.csv'), ShowGraphCallback(), *cbs])
        return learn
    go('a', 0)
    rows = [l for l in capsys.readouterr().out.splitlines() if l[:1].isdigit()]
    with pytest.raises(KeyboardInterrupt): go('b', 0, Checkpoint(tmp_path/'c'), Stop(2))
    capsys.readouterr()
    learn = go('b', 9, Checkpoint(tmp_path/'c', resume=True))
    assert [l for l in capsys.readouterr().out.splitlines() if l[:1].isdigit()]==rows and len(rows)==4
    assert (tmp_path/'a.csv').read_text()==(tmp_path/'b.csv').read_text()
    learn.recorder.plot_loss(); learn.recorder.plot_sched()
    go('b', 9, Checkpoint(tmp_path/'c', resume=True))
    assert (tmp_path/'a.csv').read_text()==(tmp_path/'b.csv').read_text()

def test_what_is_no_training_is_left_alone(tmp_path):
    learn = tiny(cbs=Checkpoint(tmp_path/'c'), path=tmp_path)
    with learn.no_bar():
        learn.lr_find(num_it=8, show_plot=False, suggest_funcs=None); learn.validate()
        assert not (tmp_path/'c').exists()
        with learn.no_logging(): learn.fit(1)
        learn.get_preds(); learn.validate(); learn.lr_find(num_it=8, show_plot=False, suggest_funcs=None)
        assert [p.name for p in (tmp_path/'c').iterdir()]==['epoch_000.safetensors']

@pytest.mark.parametrize('keep', [1,2,3])
def test_as_many_files_as_asked_for(tmp_path, keep):
    fit(tiny(), Checkpoint(tmp_path/'c', keep=keep))
    assert [p.name for p in checkpoints(tmp_path/'c')]==[f'epoch_{i:03}.safetensors' for i in range(4)][-keep:]==[p.name for p in sorted((tmp_path/'c').iterdir())]

def test_the_file_before_stays_when_one_is_missing(tmp_path, monkeypatch, capsys):
    "Epoch 2 finds the disk full, epoch 3 does not: 1 and 3 are the newest two"
    save = lungdet.checkpoint.save_state
    def full(state, path):
        if state['epoch']==2: raise OSError(errno.ENOSPC, 'No space left on device')
        return save(state, path)
    monkeypatch.setattr(lungdet.checkpoint, 'save_state', full)
    fit(tiny(), Checkpoint(tmp_path/'c'))
    assert [p.stem for p in checkpoints(tmp_path/'c')]==['epoch_001','epoch_003'] and 'No space left' in capsys.readouterr().out

def test_order_of_the_files(tmp_path):
    for n in ('epoch_1000','epoch_999','epoch_best','epoch_'): (tmp_path/f'{n}.safetensors').touch()
    assert [p.stem for p in checkpoints(tmp_path)]==['epoch_999','epoch_1000'] and checkpoints(tmp_path/'none')==[]

def test_an_empty_folder_is_a_beginning(tmp_path):
    (tmp_path/'c').mkdir()
    same(outcome(fit(tiny(), Checkpoint(tmp_path/'c', resume=True))), outcome(fit(tiny())))

@pytest.mark.parametrize('how', ['flip','cut','empty'])
def test_back_to_the_one_before(tmp_path, capsys, how):
    whole = outcome(fit(tiny(), Checkpoint(tmp_path/'c')))
    last = checkpoints(tmp_path/'c')[-1]
    raw = bytearray(last.read_bytes())
    if how=='flip': raw[-9] ^= 4
    last.write_bytes(dict(flip=raw, cut=raw[:-50], empty=b'')[how])
    same(outcome(fit(tiny(9), Checkpoint(tmp_path/'c', resume=True))), whole)
    out = capsys.readouterr().out
    assert 'epoch_003.safetensors' in out and 'going back to epoch_002.safetensors' in out
    assert load_state(last)['epoch']==3 # written anew

def test_nothing_can_be_read(tmp_path):
    fit(tiny(), Checkpoint(tmp_path/'c'))
    for p in checkpoints(tmp_path/'c'): p.write_bytes(b'\x80\x04pickle')
    with pytest.raises(ValueError, match='(?s)epoch_003.*epoch_002.*To begin anew, delete the folder'): fit(tiny(), Checkpoint(tmp_path/'c', resume=True))
    assert len(checkpoints(tmp_path/'c'))==2

CHANGES = dict(epochs=(dict(n=5), {}), batches=({}, dict(bs=5)), images=({}, dict(n=21)), weights=({}, dict(width=9)), optimiser=({}, dict(opt_func=SGD)),
               rates=(dict(lr=1e-2), {}), schedule=(dict(how='fit_flat_cos'), {}), metrics=({}, dict(metrics=mae)), callbacks=({}, dict(cbs=Averages())))
@pytest.mark.parametrize('what', CHANGES)
def test_another_run_is_refused(tmp_path, what):
    fit(tiny(), Checkpoint(tmp_path/'c'))
    files,(args,make) = {p:p.read_bytes() for p in checkpoints(tmp_path/'c')},CHANGES[what]
    words = dict(epochs='epochs: 4 then, 5 now', batches='training batches: 6 then, 5 now', images='training images: 22 then, 21 now', weights=r'weight 0.weight: \[8, 6\] then, \[9, 6\] now',
                 optimiser='optimiser', rates='lr at 0 %', schedule='lr at 0 %', metrics='columns.*mae', callbacks=r"callbacks: .*'ParamScheduler'\] then, \['Averages', 'ParamScheduler'\] now")
    with pytest.raises(ValueError, match=words[what]): fit(tiny(**make), Checkpoint(tmp_path/'c', resume=True), **args)
    assert files=={p:p.read_bytes() for p in checkpoints(tmp_path/'c')}

def test_frozen_groups_and_settings_belong_to_the_run(tmp_path):
    fit(tiny(), Checkpoint(tmp_path/'c', settings=dict(split='a', sizes=(1,2))))
    go = lambda learn, **kw: fit(learn, Checkpoint(tmp_path/'c', resume=True, settings=kw))
    learn = tiny(); learn.freeze()
    with pytest.raises(ValueError, match='frozen groups: 0 then, 1 now'): go(learn, split='a', sizes=(1,2))
    with pytest.raises(ValueError, match='split: a then, b now'): go(tiny(), split='b', sizes=(1,2))
    go(tiny(), split='a', sizes=(1,2))

def test_a_folder_in_use_is_not_written_to(tmp_path):
    fit(tiny(), Checkpoint(tmp_path/'c'))
    with pytest.raises(ValueError, match='epoch_003.safetensors is there already'): fit(tiny(), Checkpoint(tmp_path/'c'))

def test_full_disk(tmp_path, capsys):
    "The kernel refuses to write past a limit: training goes on, and says so; the file from before stays"
    import resource
    whole = outcome(fit(tiny(), Checkpoint(tmp_path/'a')))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    class Full(Callback):
        def before_epoch(self):
            if self.epoch==2: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try: learn = fit(tiny(), Checkpoint(tmp_path/'c'), Full())
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    same(outcome(learn), whole)
    out = capsys.readouterr().out
    assert all(f'epoch {i} has no checkpoint' in out for i in (2,3)) and 'epoch 1 ' not in out
    assert [p.name for p in sorted((tmp_path/'c').iterdir())]==['epoch_000.safetensors','epoch_001.safetensors']
    same(outcome(fit(tiny(9), Checkpoint(tmp_path/'c', resume=True))), whole)

@pytest.mark.parametrize('error', [OSError(errno.EROFS,'Read-only file system'), PermissionError(errno.EACCES,'Permission denied')])
def test_unwritable_folder_is_an_error_before_training(tmp_path, monkeypatch, error):
    def fail(*args, **kw): raise error
    monkeypatch.setattr(lungdet.checkpoint.tempfile, 'TemporaryFile', fail)
    with pytest.raises(ValueError, match=f'no checkpoint can be written to .*{error.strerror}'): fit(tiny(), Checkpoint(tmp_path/'c'))

def test_state_that_no_file_can_hold(tmp_path):
    class Odd(Callback):
        def state_dict(self): return dict(where=Path('x'))
        def load_state_dict(self, d): pass
    with pytest.raises(ValueError, match=r'callbacks\.\d\.where is a'): fit(tiny(), Checkpoint(tmp_path/'c'), Odd())

def test_scale_of_mixed_precision(tmp_path):
    class Scaled(Callback):
        def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=8., growth_interval=7)
        def before_backward(self): self.learn.loss_grad = self.learn.scaler.scale(self.loss_grad)
        def before_step(self): self.learn.scaler.unscale_(self); self.learn.scaler.update()
        def after_step(self): self.seen = [*vars(self).get('seen',[]), self.learn.scaler.get_scale()]
        @property
        def param_groups(self): return self.opt.param_groups
    scales = []
    def go(seed, *cbs):
        s = Scaled()
        try: return fit(tiny(seed), s, *cbs, n=4)
        finally: scales.append(s.seen)
    whole = outcome(go(0))
    with pytest.raises(KeyboardInterrupt): go(0, Checkpoint(tmp_path/'c'), Stop(2))
    same(outcome(go(9, Checkpoint(tmp_path/'c', resume=True))), whole)
    assert scales[2]==scales[0][12:] and len(set(scales[0]))>2

leaf = st.none()|st.booleans()|st.integers(-2**62,2**62)|st.floats()|st.text(max_size=5)|st.lists(st.integers(-2**62,2**62),min_size=15,max_size=20)|st.lists(st.floats(),min_size=15,max_size=20)
tensor = st.sampled_from([torch.float32,torch.float16,torch.bfloat16,torch.float64,torch.int64,torch.uint8,torch.bool]).flatmap(
    lambda d: st.sampled_from([(),(0,),(3,),(2,0),(2,3)]).map(lambda s: (torch.arange(6)[:int(np.prod(s))].reshape(s)*3).to(d)))
nested = st.recursive(leaf|tensor, lambda c: st.lists(c, max_size=3)|st.dictionaries(st.text(max_size=3)|st.integers(0,9), c, max_size=3)|st.dictionaries(st.sampled_from(['$tensor','$items','$list','a.b','a','b']), c), max_leaves=8)
@settings(deadline=None, max_examples=150)
@example({'a':{'a':torch.ones(2)}, 'a.a':torch.zeros(2), '__metadata__':torch.ones(1)})
@given(st.dictionaries(st.sampled_from(['a','b','a.a','__metadata__']), nested, max_size=3))
def test_what_is_saved_comes_back(tmp_path_factory, state):
    file = tmp_path_factory.getbasetemp()/'x.safetensors'
    same(load_state(save_state(state, file)), state)

def test_tied_and_strange_tensors(tmp_path):
    t = torch.randn(4,6)
    class Sub(torch.Tensor): pass
    state = dict(a=t, b=t, c=t[:, ::2], d=t.t(), e=t[1:], f=nn.Parameter(t), g=t.as_subclass(Sub), h=t.to(memory_format=torch.contiguous_format)[None,None].to(memory_format=torch.channels_last))
    back = load_state(save_state(state, tmp_path/'x.safetensors'))
    for k,v in state.items(): assert torch.equal(back[k], v.detach().as_subclass(torch.Tensor)) and type(back[k]) is torch.Tensor

def test_no_damage_goes_unseen(tmp_path):
    "Each byte of a small file changed, and each length: an error, or the state as it was"
    state = dict(a=torch.arange(3.), b=dict(c=[1,'x',None]), n=7)
    raw,file = save_state(state, tmp_path/'x.safetensors').read_bytes(),tmp_path/'y.safetensors'
    for i in range(len(raw)):
        for bad in (raw[:i], raw[:i]+bytes([raw[i]^1])+raw[i+1:], raw[:i]+bytes([raw[i]^32])+raw[i+1:]):
            file.write_bytes(bad)
            try: back = load_state(file)
            except ValueError as e: assert 'y.safetensors' in str(e)
            else: same(back, state)

def test_weights_are_no_checkpoint(tmp_path):
    from safetensors.torch import save_file
    save_file(dict(a=torch.zeros(2)), tmp_path/'a.safetensors')
    with pytest.raises(ValueError, match='is no checkpoint'): load_state(tmp_path/'a.safetensors')
    with pytest.raises(ValueError, match='cannot be read'): load_state(tmp_path/'none.safetensors')
    (tmp_path/'c').mkdir(); save_state(dict(epoch=1), tmp_path/'c'/'epoch_001.safetensors')
    with pytest.raises(ValueError, match='is of another run'): fit(tiny(), Checkpoint(tmp_path/'c', resume=True))

def test_a_callback_is_not_asked_for_the_weights_of_the_model():
    learn = tiny()
    assert learn.recorder.state_dict().keys()==learn.model.state_dict().keys() and kept(learn.recorder) is None and _with_state(learn)==[]

DISTRIBUTED = """
import faulthandler, os, sys, torch
faulthandler.dump_traceback_later(200, exit=True) # not to wait for each other forever
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch.distributed as dist
dist.init_process_group('gloo')
import fastai.distributed as fd
from fastai.vision.all import *
from test_checkpoint import *
def broadcast(self, t, rank):
    t = LongTensor(t); dist.broadcast(t, rank); return t.tolist()
fd.DistributedDL._broadcast = broadcast
root,rank = Path(sys.argv[1]),dist.get_rank()
def go(seed, *cbs):
    learn = tiny(seed+10*rank) # each process with its own dice
    with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, *cbs)
    return learn
whole = outcome(go(0))
try: go(0, Checkpoint(root/'c'), Stop(2, 1))
except KeyboardInterrupt: pass
assert [p.name for p in sorted((root/'c').iterdir())]==['epoch_000.safetensors','epoch_001.safetensors']
state = load_state(root/'c'/'epoch_001.safetensors')
assert len(state['rng'])==2 and not torch.equal(state['rng'][0]['torch'], state['rng'][1]['torch'])
dist.barrier()
back = outcome(go(5, Checkpoint(root/'c', resume=True)))
same(back, whole)
(root/f'ok{rank}').touch()
"""

def test_two_processes(tmp_path):
    (tmp_path/'d.py').write_text(DISTRIBUTED)
    cmd = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(tmp_path/'d.py'), str(tmp_path), str(Path(__file__).parent)]
    res = subprocess.run(cmd, capture_output=True, text=True, env=os.environ|dict(OMP_NUM_THREADS='1'), timeout=300)
    assert res.returncode==0, res.stderr[-3000:]
    assert sorted(p.name for p in tmp_path.glob('ok*'))==['ok0','ok1']
    fit_alone = lambda: fit(tiny(), Checkpoint(tmp_path/'c', resume=True))
    with pytest.raises(ValueError, match='processes: 2 then, 1 now'): fit_alone()

def test_items_that_workers_make_at_random(tmp_path):
    "Their dice are thrown by torch's generator in the main process"
    def make(seed=0):
        learn = tiny(seed)
        train = learn.dls.train
        learn.dls.loaders[0] = DataLoader(train.dataset, bs=4, shuffle=True, num_workers=1, after_item=lambda o: (o[0]+torch.randn(6)*random.random()*np.random.rand(), o[1]))
        return learn
    whole = outcome(fit(make()))
    interrupted(make, tmp_path/'c')
    same(outcome(fit(make(9), Checkpoint(tmp_path/'c', resume=True))), whole)
