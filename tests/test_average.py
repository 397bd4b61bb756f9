"Averages of the weights: by hand, over interruptions, resumed, beside frozen parts, in a group of processes"
import pytest, torch
from fastai.vision.all import Callback, CancelEpochException, CancelFitException, CancelValidException, SGD, get_model, set_seed
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from lungdet.average import *
from lungdet.data import detection_dls
from lungdet.learner import detect, retinanet_learner
from test_data import toy

@pytest.fixture(autouse=True, scope='module')
def flushed():
    "Black pictures make numbers so small that a CPU takes five times as long for them"
    torch.set_flush_denormal(True); yield; torch.set_flush_denormal(False)

def small(folder, n=14, bs=4, size=64, **kwargs):
    "A learner that is the same each time, and reads its pictures in order"
    set_seed(0)
    dls = detection_dls(toy(folder, n), size=size, bs=bs, aug=None)
    dls.train.shuffle = False
    return retinanet_learner(dls, 'mobilenetv3_small_050', pretrained=False, width=16, depth=1, **kwargs)
def fit(learn, n=1, lr=1e-3, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kwargs)
    return learn
def state(learn): return {k:v.clone() for k,v in get_model(learn.model).state_dict().items()}
def same(a, b, but=()): return all(torch.equal(a[k],b[k]) for k in a if not k.endswith(but))
def close(a, b):
    for k in a: torch.testing.assert_close(a[k].float(), b[k].float(), rtol=1e-4, atol=1e-5, msg=lambda m: f'{k}: {m}')

class Trace(Callback):
    "The raw state after each step"
    def __init__(self): self.seen = []
    def after_step(self): self.seen.append(state(self.learn))
class Stop(Callback):
    "Raise something at an event"
    def __init__(self, what, event='after_pred', epoch=0, training=False):
        self.what,self.at,self.when = what,epoch,training
        setattr(self, event, self.go)
    def go(self):
        if self.learn.training==self.when and self.learn.epoch==self.at: raise self.what

def test_ema_is_the_recursion(tmp_path):
    trace,learn = Trace(),small(tmp_path)
    fit(learn, 4, cbs=[EMA(.5),trace])
    avg = trace.seen[0]
    for t,s in enumerate(trace.seen[1:],1):
        d = min(.5, (1+t)/(10+t))
        avg = {k:d*avg[k]+(1-d)*s[k] if s[k].is_floating_point() else s[k] for k in s}
    assert len(trace.seen)==12 and min(.5,(1+11)/(10+11))==.5
    close(avg, state(learn))

def test_validation_and_only_validation_sees_the_average(tmp_path):
    seen = {}
    class Look(Callback):
        def before_batch(self): seen[self.learn.training,self.epoch] = self.model.fpn.state_dict().popitem()[1].clone()
        def after_epoch(self):
            seen['raw',self.epoch] = state(self.learn)
            with averaged(self.learn):
                seen['avg',self.epoch] = state(self.learn)
                with averaged(self.learn): assert same(seen['avg',self.epoch], state(self.learn)) # a block in a block
                assert len(detect(self.learn, score_thr=0.))
            assert same(seen['raw',self.epoch], state(self.learn))
    learn = fit(small(tmp_path), 2, cbs=[EMA(.9),Look()])
    key = 'fpn.'+list(learn.model.fpn.state_dict())[-1]
    for e in (0,1):
        assert torch.equal(seen[False,e], seen['avg',e][key]) and not torch.equal(seen['avg',e][key], seen['raw',e][key])
    assert same(seen['avg',1], state(learn))

@pytest.mark.parametrize('what', [KeyboardInterrupt, RuntimeError('disk full')], ids=repr)
@pytest.mark.parametrize('event,training', [('after_pred',False),('after_validate',False),('after_epoch',False),('after_pred',True)])
def test_interrupted_fit_leaves_raw_weights(tmp_path, what, event, training):
    trace,learn,ema = Trace(),small(tmp_path),EMA(.9)
    with pytest.raises((KeyboardInterrupt,RuntimeError)): fit(learn, 2, cbs=[trace,ema,Stop(what,event,1,training)])
    but = ('running_mean','running_var','num_batches_tracked') if training else () # the batch that was interrupted has been seen
    assert same(trace.seen[-1], state(learn), but)
    assert '_do_epoch_validate' not in vars(learn) and ema.learn is None
    with learn.no_bar(): learn.validate()
    assert same(trace.seen[-1], state(learn), but)
    fit(learn, 1, cbs=ema) # and the next fit begins anew

def test_interrupted_with_the_callback_on_the_learner(tmp_path):
    trace,ema = Trace(),EMA(.9)
    learn = small(tmp_path, cbs=[ema,trace])
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Stop(KeyboardInterrupt))
    raw = state(learn)
    assert same(trace.seen[-1], raw)
    with learn.no_bar(): loss = learn.validate()[0]; learn.get_preds()
    assert same(raw, state(learn)) and ema.avg is None # validation of what the learner holds
    learn.remove_cb(ema)
    with learn.no_bar(): assert learn.validate()[0]==loss

@pytest.mark.parametrize('what,event', [(CancelFitException,'after_pred'),(CancelValidException,'after_pred'),(CancelFitException,'after_epoch'),(CancelEpochException,'after_validate')])
def test_cancelled_fit_ends_with_the_average(tmp_path, what, event):
    trace,learn = Trace(),small(tmp_path)
    fit(learn, 1, cbs=[trace,EMA(.9),Stop(what,event)])
    avg = {k:v.clone() for k,v in trace.seen[0].items()}
    for t,s in enumerate(trace.seen[1:],1):
        for k,v in s.items(): EMA(.9).move([avg[k]], [v], t)
    close(avg, state(learn))

def test_frozen_parts_two_fits_and_the_rate_finder(tmp_path):
    learn = small(tmp_path)
    learn.freeze()
    convs = {k:v.clone() for k,v in learn.model.named_parameters() if not v.requires_grad}
    assert convs
    ema = EMA(.9)
    learn.add_cb(ema)
    fit(learn, 1)
    assert all(torch.equal(dict(learn.model.named_parameters())[k],v) for k,v in convs.items())
    held,first = state(learn),[]
    class First(Callback):
        def before_train(self): first.append(state(self.learn))
    learn.unfreeze()
    fit(learn, 1, cbs=First())
    assert same(held, first[0]) and not same(held, state(learn))
    held = state(learn)
    with learn.no_bar(): learn.lr_find(1e-6, 1e-3, num_it=4, stop_div=False, show_plot=False, suggest_funcs=None)
    assert same(held, state(learn))

def test_memory_format_and_optimiser_stay(tmp_path):
    learn = small(tmp_path)
    fit(learn, 1, cbs=EMA(.9))
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in learn.model.parameters() if p.ndim==4)
    assert {id(p) for g in learn.opt.param_lists for p in g}=={id(p) for p in learn.model.parameters()}

@pytest.mark.parametrize('make', [lambda: EMA(.9), lambda: SWA(2)], ids=['EMA','SWA'])
@pytest.mark.parametrize('when', ['before','within'])
def test_killed_and_resumed_is_not_killed(tmp_path, make, when):
    whole = fit(small(tmp_path, opt_func=SGD), 3, cbs=make())
    learn,cb,file = small(tmp_path, opt_func=SGD),make(),tmp_path/'s.safetensors'
    with pytest.raises(KeyboardInterrupt): fit(learn, 3, cbs=[cb,Stop(KeyboardInterrupt,'after_epoch',1)])
    save_file({k:v.contiguous() for k,v in cb.state_dict().items()}, file)
    again,cb2 = small(tmp_path, opt_func=SGD),make()
    again.model.load_state_dict(learn.model.state_dict())
    class Load(Callback):
        order = 99
        def before_fit(self): cb2.load_state_dict(load_file(file))
    if when=='before': cb2.load_state_dict(load_file(file))
    fit(again, 3, start_epoch=2, cbs=[cb2]+([Load()] if when=='within' else []))
    close(state(whole), state(again))

def test_a_finished_run_that_is_resumed_holds_the_average(tmp_path):
    learn,cb = small(tmp_path),EMA(.9)
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=[cb,Stop(KeyboardInterrupt,'after_epoch')])
    kept = {k:v.clone() for k,v in cb.state_dict().items()}
    cb2 = EMA(.9); cb2.load_state_dict(kept)
    fit(learn, 1, start_epoch=1, cbs=cb2)
    assert same({k.removeprefix('module.'):v for k,v in kept.items() if k!='n_averaged'}, state(learn))

def test_swa_is_the_mean_with_measured_norms(tmp_path):
    ends = []
    class Ends(Callback):
        def after_train(self): ends.append(state(self.learn))
    learn = fit(small(tmp_path), 3, cbs=[SWA(2),Ends()])
    s = state(learn)
    for k,_ in learn.model.named_parameters(): torch.testing.assert_close(s[k], (ends[1][k]+ends[2][k])/2, rtol=1e-5, atol=1e-7)
    with torch.no_grad(): f = [learn.model.backbone.net.conv_stem(b[0].as_subclass(torch.Tensor)) for b in learn.dls.train]
    torch.testing.assert_close(s['backbone.net.bn1.running_mean'], torch.stack([o.mean((0,2,3)) for o in f]).mean(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(s['backbone.net.bn1.running_var'], torch.stack([o.var((0,2,3)) for o in f]).mean(0), rtol=1e-3, atol=1e-5)

def test_swa_stopped_before_it_begins_or_while_it_measures(tmp_path, monkeypatch):
    trace,learn = Trace(),small(tmp_path)
    fit(learn, 4, cbs=[SWA(1),trace,Stop(CancelFitException,'after_epoch',1)])
    assert same(trace.seen[-1], state(learn))
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr('lungdet.average.update_bn', interrupted)
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=[SWA(1),trace])
    assert same(trace.seen[-1], state(learn))
    with pytest.raises(ValueError, match='mean of no epochs'): SWA(0)

@pytest.mark.parametrize('norm', ['frozen','group'])
def test_models_without_batch_norm(tmp_path, norm):
    for cb in (EMA(.9),SWA(1)):
        learn = fit(small(tmp_path, model=dict(norm=norm)), 1, cbs=cb)
        assert all(torch.isfinite(v).all() for v in learn.model.state_dict().values())

@pytest.fixture
def group():
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
class Wrap(Callback):
    "What fastai's `DistributedTrainer` does with the model"
    order = 11
    def before_fit(self): self.learn.model = DistributedDataParallel(self.learn.model)
    def after_fit(self): self.learn.model = self.learn.model.module

@pytest.mark.parametrize('make', [lambda: EMA(.9), lambda: SWA(1)], ids=['EMA','SWA'])
def test_shared_by_processes(tmp_path, group, monkeypatch, make):
    alone = fit(small(tmp_path), 2, cbs=make())
    sent = []
    monkeypatch.setattr('lungdet.average.num_distrib', lambda: 2)
    monkeypatch.setattr('torch.distributed.broadcast', lambda t,rank: sent.append(rank))
    learn = small(tmp_path)
    fit(learn, 2, cbs=[make(),Wrap()])
    close(state(alone), state(learn))
    assert set(sent)==({0} if isinstance(make(), SWA) else set())

def test_bad_decays():
    for d in (-.1,1.,1.5):
        with pytest.raises(ValueError, match='must be at least 0 and below 1'): EMA(d)
