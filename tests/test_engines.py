"The same answers from every engine"
import subprocess, sys
import pytest, torch
from torch import nn
import lungdet.metadata # noqa: F401, brings the models that are told age, sex and view
from lungdet.data import PAD
from lungdet.anchors import Anchors
from lungdet.decode import postprocess
from lungdet.engines import *
from lungdet.retinanet import RetinaNet
from lungdet.single import Backbone
for o in ('onnx','onnxruntime','openvino'): pytest.importorskip(o)

fields = [dict(name='age', mean=50., sd=15.),dict(name='sex', values=['F','M']),dict(name='view', values=['AP','PA'])]

def awake(**kw):
    "A model whose norms have statistics of their own and whose scores differ"
    torch.manual_seed(0)
    m = RetinaNet(Backbone(kw.pop('backbone','test_efficientnet'), False, kw.pop('channels',3)), **dict(width=32, depth=2)|kw)
    for b in m.modules():
        if getattr(b, 'running_mean', None) is not None: b.running_mean.normal_(0,.1); b.running_var.uniform_(.5,2); b.weight.data.uniform_(.5,1.5); b.bias.data.normal_(0,.1)
        if isinstance(b, nn.Conv2d) and b.weight.std()<.02: b.weight.data *= 4
    if m.condition is not None and hasattr(m.condition, 'table'): m.condition.table.data.normal_(0,.3)
    return m

kinds = [dict(),dict(backbone='resnet18'),dict(backbone='resnet50'),dict(backbone='tf_efficientnet_lite0', levels=(4,5,6)),dict(backbone='timm/convnext_atto'),dict(backbone='densenet121'),
         dict(norm='group', backbone='resnet18'),dict(norm='frozen', backbone='resnet18'),dict(head_norm='group'),dict(neck='bifpn'),dict(neck='bifpn', levels=(3,4,5)),dict(neck_args=dict(p6='c5')),
         dict(levels=(5,), n_anchors=3),dict(levels=(4,5,6,7)),dict(n_categories=3),dict(n_categories=1, n_classes=4),dict(channels=1),dict(metadata='pad', fields=fields),
         dict(metadata='concat', fields=fields, neck='bifpn'),dict(metadata='film', fields=fields, n_categories=2)]
def told(m, n): return (torch.tensor([[70.,1,0],[float('nan'),0,float('nan')],[20.,float('nan'),1]])[:n],) if m.condition is not None else ()

@pytest.mark.parametrize('kw', kinds, ids=str)
def test_every_model_at_every_shape(kw, tmp_path):
    m,c = awake(**kw).eval(),kw.get('channels',3)
    raw = export_onnx(m, tmp_path/'m.onnx').read_bytes()
    for name in ('onnxruntime','openvino'):
        e = OnnxEngine(raw, name)
        for n,h,w in ((1,64,64),(3,96,128),(2,100,131),(1,33,224)):
            args = torch.rand(n,c,h,w),*told(m,n)
            with torch.no_grad(): want = m(*args)
            got = e(*args)
            assert len(got)==len(want) and all(o.dtype==torch.float32 for o in got)
            for a,b in zip(got,want): assert a.shape==b.shape and (a-b).abs().max()<1e-4*max(1,b.abs().max())
        if m.condition is not None:
            assert e.condition==fields
            for a,b in zip(e(args[0]), m(args[0])): assert (a-b).abs().max()<1e-4*max(1,b.abs().max()) # nothing known
            assert (e(args[0])[0]-e(*args)[0]).abs().max()>1e-3 # it listens

def test_detections_are_the_same_set():
    m,x = awake(backbone='resnet18').eval(),torch.rand(4,3,96,96)
    with torch.no_grad(): z = m(x)[0].flatten()
    m.cls_head.out.bias.data += torch.logit(torch.tensor(.05))-z.topk(200).values[-1]
    def found(o): return postprocess(o(x), Anchors(), 96)
    want = found(make_engine(m))
    assert (want[...,5]!=PAD).sum()>10
    for name in ('onnxruntime','openvino'):
        d = detection_diff(want, found(make_engine(m, name)))
        assert d['shift']<.01 and d.score<1e-3 and d['highest alone']<.051
    d = detection_diff(want, found(make_engine(m, 'torch', 'float32')))
    assert d['shift']<.01 and d['highest alone']<.051

@pytest.mark.parametrize('name,dtype', [('torch',torch.bfloat16),('openvino','bfloat16'),('onnxruntime','int8'),('openvino',torch.int8)], ids=str)
def test_fewer_bits_stay_close(name, dtype):
    m,x = awake(backbone='resnet18', n_categories=2, metadata='film', fields=fields).eval(),torch.rand(12,3,64,64)
    meta = told(m,3)[0].repeat(4,1)
    e = make_engine(m, name, dtype, x, meta)
    with torch.no_grad(): want = m(x, meta)
    for a,b in zip(e(x, meta), want):
        assert a.dtype==torch.float32 and not torch.equal(a,b)
        assert (a-b).abs().mean()<.1*b.std()

def test_int8_without_metadata_in_calibration():
    m = awake().eval()
    e = make_engine(m, 'onnxruntime', 'int8', torch.rand(4,3,64,64))
    assert e(torch.rand(5,3,96,64))[0].shape==m(torch.rand(5,3,96,64))[0].shape

def test_the_model_is_left_alone():
    m = awake().train()
    before = {k:v.clone() for k,v in m.state_dict().items()}
    for name in engines:
        e = make_engine(m, name)
        assert not e.training and not any(p.requires_grad for p in e.parameters())
    assert m.training and all(p.requires_grad for p in m.parameters()) and all(torch.equal(v,before[k]) for k,v in m.state_dict().items())
    e = make_engine(m)
    x = torch.rand(1,3,64,64)
    a = e(x)[0]
    for p in m.parameters(): p.data.zero_()
    assert torch.equal(a, e(x)[0]) and not a.requires_grad

def test_the_kept_file_is_that_of_this_model(tmp_path):
    m,f,x = awake().eval(),tmp_path/'m.onnx',torch.rand(1,3,64,64)
    make_engine(m, 'onnxruntime', path=f)
    was = f.stat().st_mtime_ns
    make_engine(m, 'openvino', path=f)
    assert f.stat().st_mtime_ns==was
    m.cls_head.out.bias.data += 1
    e = make_engine(m, 'onnxruntime', path=f)
    assert f.stat().st_mtime_ns>was and (e(x)[0]-m(x)[0]).abs().max()<1e-4
    make_engine(m, 'onnxruntime', 'int8', x, path=f)
    make_engine(m, 'onnxruntime', 'int8', path=f) # calibrated already
    with pytest.raises(ValueError, match='some dozens'): make_engine(awake(depth=1), 'onnxruntime', 'int8', path=f)
    e = make_engine(m, 'onnxruntime', path=f) # asked for float32, so the file of 8 bits will not do
    assert (e(x)[0]-m(x)[0]).abs().max()<1e-4
    for bad in (b'', b'PK\x03\x04'+b'\0'*99, f.read_bytes()[:1000]):
        (tmp_path/'b.onnx').write_bytes(bad)
        if bad:
            with pytest.raises(ValueError, match='is no ONNX file'): make_engine(m, 'onnxruntime', path=tmp_path/'b.onnx')
            assert (tmp_path/'b.onnx').read_bytes()==bad

def test_what_cannot_be_read_is_refused():
    e = make_engine(awake(metadata='film', fields=fields), 'onnxruntime')
    for bad in (torch.rand(3,64,64),torch.rand(2,1,64,64)):
        with pytest.raises(ValueError, match='reads \\(N,3,h,w\\)'): e(bad)
    with pytest.raises(ValueError, match='age, sex, view'): e(torch.rand(2,3,64,64), torch.rand(1,3))
    for name,dtype in (('tensorrt',None),('onnxruntime','bfloat16'),('torch','int8'),('openvino',torch.float64)):
        with pytest.raises(ValueError): make_engine(awake(), name, dtype)

def test_float16_and_strided_pictures_are_taken():
    m = awake().eval()
    x = torch.rand(2,3,128,128)[:,:,::2,::2]
    for name in ('onnxruntime','openvino'):
        e = make_engine(m, name)
        assert torch.allclose(e(x)[0], m(x)[0], atol=1e-4) and e(x.half())[0].dtype==torch.float32

def test_openvino_in_several_threads():
    from concurrent.futures import ThreadPoolExecutor
    m = awake().eval()
    e,xs = make_engine(m, 'openvino', threads=1),[torch.rand(1,3,64,64) for _ in range(12)]
    with ThreadPoolExecutor(4) as ex: got = list(ex.map(lambda o: e(o)[0], xs))
    for x,g in zip(xs, got): assert torch.allclose(g, m(x)[0], atol=1e-4)

CRASH = """import faulthandler, gc, signal, sys
from pathlib import Path
from lungdet.engines import OnnxEngine
faulthandler.enable() # as pytest and the workers of a DataLoader do
raw = Path(sys.argv[1]).read_bytes()
a = OnnxEngine(raw, 'openvino'); b = OnnxEngine(raw, 'openvino')
del a; gc.collect(); del b; gc.collect()
signal.signal(signal.SIGINT, lambda *_: print('handled', flush=True))
signal.raise_signal(signal.SIGINT)
"""

def test_a_signal_after_two_engines_of_openvino(tmp_path):
    "Each Core of OpenVINO gives signals a stack of its own; of two that went in the wrong order, a stack was left that was gone, and Ctrl-C ended Python with a crash"
    res = subprocess.run([sys.executable,'-c',CRASH,str(export_onnx(awake(), tmp_path/'m.onnx'))], capture_output=True, text=True)
    assert res.returncode==0 and res.stdout=='handled\n', (res.returncode, res.stderr[-2000:])

def test_differences_are_counted():
    a = torch.tensor([[[10.,10,20,20,.9,0],[10,10,20,20,.8,1],[0,0,0,0,0,PAD]]])
    b = a[:,[1,0,2]]
    d = detection_diff(a, b)
    assert d.pairs==2 and d.alone==0 and d['shift']==d.score==0 # another order, each with its own class
    d = detection_diff(a, b[:,:1])
    assert d.pairs==1 and d.alone==1 and d['highest alone']==pytest.approx(.9)
    twice = torch.cat([a[:,:1]]*2, 1)
    assert detection_diff(twice, a[:,:1]).pairs==1
    none = torch.full((1,3,6), PAD, dtype=torch.float32)
    assert detection_diff(none, none).tolist()==[0,0,0,0,0] and detection_diff(a, none).alone==2
    assert detection_diff(a, a+torch.tensor([3.,3,3,3,0,0])).pairs==0

def test_nothing_of_the_extra_is_imported_before_it_is_needed():
    code = "import sys, lungdet.engines; assert not {'onnx','onnxruntime','openvino'}&set(sys.modules)"
    subprocess.run([sys.executable,'-c',code], check=True)

def test_a_missing_extra_is_named(monkeypatch):
    for o in ('onnx','onnxruntime','openvino'):
        with monkeypatch.context() as c:
            c.setitem(sys.modules, o, None)
            with pytest.raises(ImportError, match=r"pip install 'lungdet\[export\]'"): make_engine(awake(), 'openvino' if o=='openvino' else 'onnxruntime')
