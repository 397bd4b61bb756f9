"Detectors in files: the same findings as in training, whatever the way in; and files that mean harm"
import io, json, struct, time, zipfile, zlib
import cv2, numpy as np, pandas as pd, pydicom, pytest, torch
from fastai.vision.all import set_seed
from pathlib import Path
from safetensors.torch import save_file
from lungdet.convert import convert_folder, dicom_table, encode_png
from lungdet.data import detection_dls
from lungdet.detector import *
from lungdet.dicom import read_dicom, to_gray
from lungdet.evaluate import box_level
from lungdet.formats import Annotations, box_cols
from lungdet.learner import detect, load_detector, read_detector, retinanet_learner, save_detector
from lungdet.operate import OperatingPoint
from lungdet.single import load_weights, save_weights, weights_header
from dicoms import chest, jpeg, save, stored

N = 6
NUMS = ['x1','y1','x2','y2','score']
def same(a, b):
    "The same boxes on the same images: batches of another make-up may move a float32 by some 1e-6 of its size, so 1e-3 px and 1e-5 of a score, and what ties may change places"
    assert a.image_id.drop_duplicates().tolist()==b.image_id.drop_duplicates().tolist() and len(a)
    for i,x in a.groupby('image_id'):
        y = b[b.image_id==i]
        assert len(x)==len(y) and sorted(x.label)==sorted(y.label), i
        d = np.abs(x[NUMS].to_numpy()[:,None]-y[NUMS].to_numpy()[None])/[1e-3]*[1,1,1,1,100] # (n,m,5)
        d = d.max(-1)+1e9*(x.label.to_numpy()[:,None]!=y.label.to_numpy()[None])
        assert d.min(0).max()<1 and d.min(1).max()<1, (i,d.min(0).max())

@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    "Six DICOMs of all sorts, and their annotations"
    d = tmp_path_factory.mktemp('scans')
    for i in range(N):
        im = np.roll(chest(150), 11*i, 1)[:100+10*i]
        if i==0: ds = jpeg(im)
        elif i==1: ds = stored(255-im, kind='MONOCHROME1')
        elif i==2: ds = stored(im.astype(np.uint16)*16, 12)
        else: ds = stored(im)
        ds.PatientID,ds.PatientAge,ds.PatientSex,ds.ViewPosition,ds.PixelSpacing = f'p{i}',f'{30+i:03}Y','FM'[i%2],['AP','PA'][i//3],[.2,.1]
        save(ds, d/f's{i}.dcm')
    t = dicom_table(d).drop(columns=['status','reason']).assign(split=['train','valid']*3)
    boxes = pd.DataFrame([[f's{i}',20,20,60,70,'b' if i%3 else 'a'] for i in range(N)], columns=box_cols)
    return d,Annotations(t, boxes, ['a','b'])

def learner(ann, mode='repeat', metadata=None, how=None, categories=None):
    set_seed(0)
    dls = detection_dls(ann, size=64, bs=4, aug=None, mode=mode, metadata=metadata, categories=categories)
    learn = retinanet_learner(dls, 'resnet18', pretrained=False, width=16, depth=1, metadata=how, model=dict(prior=.2))
    with torch.no_grad(): learn.model.cls_head.out.weight.mul_(30) # scores that differ
    return learn

@pytest.fixture(scope='module')
def trained(scans): return learner(scans[1])
@pytest.fixture(scope='module')
def file(trained, tmp_path_factory):
    point = OperatingPoint(.15, nms=.4, shrink=.9)
    return Detector.from_learner(trained, point, detect(trained, score_thr=.1)).save(tmp_path_factory.mktemp('f')/'d.safetensors')

@pytest.mark.parametrize('fit,mode,net', [('stretch','gray','repeat'),('letterbox','gray','repeat'),('letterbox','stack','repeat'),('stretch','gray','stack'),('stretch','gray','gray'),(None,None,'repeat')])
def test_findings_are_those_of_the_learner(scans, tmp_path, fit, mode, net):
    "From DICOMs, however the pictures of the training were made"
    d,ann = scans
    if fit: ann = ann.use_pngs(convert_folder(d, tmp_path/'png', size=80, fit=fit, mode=mode, progress=False))
    learn = learner(ann, net)
    det = Detector.load(Detector.from_learner(learn).save(tmp_path/'d.safetensors'))
    assert det.pictures==(dict(png_size=80, fit=fit, mode=mode) if fit else dict(png_size=None, fit='stretch', mode='gray'))
    f = det(d)
    same(f.boxes, detect(learn, ann))
    same(det(d, bs=1).boxes, f.boxes)
    assert det(d, n_workers=1).boxes.equals(det(d, n_workers=7).boxes)
    if fit=='stretch' and mode=='gray': # PNGs in which the originals no longer show their size
        g,im = det(tmp_path/'png').boxes,f.images.set_index('image_id')
        same(g.assign(**{k:g[k]*g.image_id.map(im[s]).to_numpy()/80 for k,s in dict(x1='width', x2='width', y1='height', y2='height').items()}), f.boxes)
    if fit=='letterbox': return # pixels alone do not say that they are taller than wide
    pixels = [to_gray(read_dicom(d/f's{i}.dcm')) for i in range(1,N)] # the originals as PNGs and as arrays; a JPEG may have been decoded smaller
    for i,im in enumerate(pixels, 1): (tmp_path/f's{i}.png').write_bytes(encode_png(im))
    rest = f.boxes[f.boxes.image_id!='s0'].reset_index(drop=True)
    same(det([tmp_path/f's{i}.png' for i in range(1,N)]).boxes, rest)
    g = det(pixels).boxes
    same(g.assign(image_id='s'+(g.image_id.str[4:].astype(int)+1).astype(str)), rest)

def test_operating_point_and_thresholds(scans, trained, file):
    d,ann = scans
    det = Detector.load(file)
    same(det(d).boxes, detect(trained, ann, point=det.point))
    assert det(d, score_thr=.25).boxes.score.min()>=.25 and (det(d, score_thr=.1).boxes.score<.15).any()
    by = OperatingPoint(.5, by_class=dict(a=.1,b=.3))
    two = Detector.load(file, point=by)
    same(two(d).boxes, detect(trained, ann, point=by))
    f = two(d)
    assert ((f.images.probability>=.5)==(f.images.n_boxes>0)).all() # the image's probability is on the scale of its boxes
    assert two.expected is None and Detector.load(file, point=OperatingPoint(.7, nms=.4, shrink=.9)).expected is not None
    for bad in (OperatingPoint(.5, by_class=dict(a=.1)), 'nothing.json', .5):
        with pytest.raises((ValueError,TypeError)): Detector.load(file, point=bad)
    with pytest.raises(ValueError, match='in percent'): det(d, score_thr=50)

def test_tables(scans, file):
    f = Detector.load(file)(scans[0])
    s = f.boxes
    np.testing.assert_allclose(s.width_mm, (s.x2-s.x1)*.1); np.testing.assert_allclose(s.height_mm, (s.y2-s.y1)*.2)
    im = f.images
    assert im.image_id.tolist()==[f's{i}' for i in range(N)] and im.age.tolist()==[30+i for i in range(N)] and im.height.tolist()==[100+10*i for i in range(N)]
    assert im.n_boxes.sum()==len(s) and im.probability.between(0,1).all()
    best = Detector.load(file, point=OperatingPoint(0.))(scans[0])
    np.testing.assert_allclose(best.boxes.groupby('image_id').score.max().to_numpy(), best.images.probability, atol=1e-5)
    assert len(f.annotations())==N and not len(f.annotations().boxes)

def test_every_way_in(scans, file, tmp_path):
    d,_ = scans
    det,one = Detector.load(file),d/'s3.dcm'
    want = det(one).boxes[NUMS]
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z:
        z.write(one, 'a/s3.dcm'); z.writestr('a/notes.txt', 'x'); z.writestr('b.png', encode_png(chest(40)))
    for x in (str(one), [one], one.read_bytes(), read_dicom(one), [pydicom.dcmread(one)], tuple([one])): assert det(x).boxes[NUMS].equals(want)
    z = det(tmp_path/'z.zip')
    assert sorted(z.images.image_id)==['b','s3'] and z.images.source.str.contains('z.zip/').all()
    pd.testing.assert_frame_equal(z.boxes[z.boxes.image_id=='s3'][NUMS].reset_index(drop=True), want, atol=1e-4)
    ok,code = cv2.imencode('.jpg', chest(90))
    assert len(det(code.tobytes()).images)==1
    rgb = np.random.default_rng(0).integers(0,255,(50,60,3),np.uint8)
    assert len(det(rgb).images)==1
    for bad in (3, None, dict(a=1), [3], []):
        with pytest.raises(ValueError): det(bad)
    with pytest.raises(ValueError, match='no such folder'): det(tmp_path/'none')

def test_damaged_files_are_refused_and_the_others_go_on(scans, file, tmp_path):
    d,_ = scans
    det,whole,png = Detector.load(file),(d/'s3.dcm').read_bytes(),encode_png(chest(90))
    huge = png[:16]+struct.pack('>2I', 2**20, 2**20)+png[24:]
    frames = stored(np.zeros((3,40,40),np.uint8)+np.arange(40,dtype=np.uint8)); frames.NumberOfFrames = 3
    bad = [b'', b'no', whole[:200], whole[:-9000], png[:60], png[:-200], huge, b'\xff\xd8\xff', encode_png(chest(40)).replace(b'IHDR', b'JHDR'), pydicom.Dataset(), np.zeros((5,5)), np.zeros((0,5),np.uint8)]
    x = [d/'s1.dcm', *bad, d/'s2.dcm']
    f = det(x, bs=2)
    assert f.images.image_id.tolist()==['s1','s2'] and len(f.refused)==len(bad) and f.refused.reason.str.len().min()>10
    assert len(det(b'no').images)==0 and list(det(b'no').boxes.columns)==list(f.boxes.columns)
    save(frames, tmp_path/'m.dcm')
    assert 'frame=0' in det(tmp_path/'m.dcm').refused.reason[0] and len(det(tmp_path/'m.dcm', frame=2).images)==1
    assert 'no frame 3' in det(tmp_path/'m.dcm', frame=3).refused.reason[0]
    assert len(det([tmp_path/'m.dcm',d/'s1.dcm'], frame=1).images)==2

def test_errors_of_the_model_are_not_refusals(scans, file):
    det = Detector.load(file)
    det.run = lambda *o: 1/0
    with pytest.raises(ZeroDivisionError): det(scans[0])

def test_stopping_early_leaves_no_threads_behind(scans, file):
    det = Detector.load(file)
    run = det.stream(items_of(scans[0]), bs=1)
    next(run); run.close()

@pytest.mark.parametrize('how', ['pad','concat','film'])
def test_metadata_of_the_header(scans, tmp_path, how):
    d,ann = scans
    learn = learner(ann, metadata=['age','sex','view'], how=how)
    with torch.no_grad(): # so that they matter
        for p in learn.model.condition.parameters(): p.add_(torch.randn_like(p)*.3)
    det = Detector.load(Detector.from_learner(learn).save(tmp_path/'d.safetensors'))
    same(det(d).boxes, detect(learn, ann))
    with pytest.warns(UserWarning, match='none is known'): g = det([to_gray(read_dicom(d/'s1.dcm'))])
    assert len(g.images)==1 and abs(g.images.probability[0]-det(d/'s1.dcm').images.probability[0])>1e-6

def test_image_head_gives_the_probability(scans, tmp_path):
    d,ann = scans
    ann = Annotations(ann.images.assign(category=['lesion']*5+['none']), ann.boxes[ann.boxes.image_id!='s5'], ann.classes)
    learn = learner(Annotations(ann.images.assign(split='valid'), ann.boxes, ann.classes), categories=['none','lesion'])
    det = Detector.from_learner(learn)
    x = torch.cat([b[0] for b in learn.dls.test_dl(ann.images.to_dict('records'))])
    with torch.no_grad(): want = learn.model.eval()(x)[2].softmax(1)[:,1]
    np.testing.assert_allclose(det(d).images.probability, want.numpy(), atol=1e-5)

def test_expectation_is_what_chapter_11_says():
    rng = np.random.default_rng(0)
    ann = Annotations(pd.DataFrame(dict(image_id=[f'{i}' for i in range(20)], height=100, width=100)),
                      pd.DataFrame([[f'{i}',10,10,60,60,'x'] for i in range(12)], columns=box_cols))
    xy = rng.uniform(0,20,(150,2))
    p = pd.DataFrame(dict(image_id=rng.integers(0,20,150).astype(str), x1=xy[:,0], y1=xy[:,1], x2=xy[:,0]+50, y2=xy[:,1]+50, label='x', score=rng.uniform(.1,1,150).round(2)))
    point = OperatingPoint(.437, nms=.3, shrink=.95)
    t = expectation(ann, p, point)
    q = OperatingPoint(0., nms=.3, shrink=.95).apply(p)
    for r in t.itertuples():
        b = box_level(ann, q, r.threshold)
        assert (r.sensitivity,r.fp_per_image)==(b.recall,b.fp/20)
    assert .437 in t.threshold.tolist() and t.threshold.is_monotonic_increasing and 90<len(t)<=101

def test_old_files_and_folders_of_runs(trained, file, tmp_path):
    save_weights(trained.model, trained.detector, tmp_path/'detector.safetensors') # before files had a format
    assert Detector.load(tmp_path).point is None
    OperatingPoint(.3).save(tmp_path/'point.json')
    assert Detector.load(tmp_path).point.threshold==.3 and Detector.load(tmp_path/'detector.safetensors').point is None
    save_detector(trained, tmp_path/'detector.safetensors')
    assert Detector.load(tmp_path).digest!=Detector.load(file).digest
    cfg = read_detector(file)[1]
    assert cfg==load_detector(tmp_path/'detector.safetensors')[1] and set(cfg)==set(trained.detector)
    (tmp_path/'copy.safetensors').write_bytes(file.read_bytes())
    assert Detector.load(tmp_path/'copy.safetensors').digest==Detector.load(file).digest
    assert Detector.load(file).save(tmp_path/'again.safetensors').read_bytes()==file.read_bytes()

# What a stranger may put into a file: each is refused in words, and before the weights are read

def changed(**kw): return lambda cfg: cfg.update(kw)
def model(**kw): return lambda cfg: cfg['model'].update(kw)
HOSTILE = dict(
    wide=changed(width=10**6), deep=changed(depth=10**6), vast=changed(size=10**6), tiny=changed(size=0), levels=changed(levels=list(range(3,1003)), sizes=[[32]]*1000),
    sizes=changed(sizes=[[1e9]]*5), many=changed(sizes=[[32.]*10**5]*5), negative=changed(width=-3), text=changed(width='16'), boolean=changed(depth=True), unknown=changed(hook='os.system'),
    hub=changed(backbone='hf-hub:timm/resnet18'), hub2=changed(backbone='timm/hf-hub:x/y'), folder=changed(backbone='local-dir:/tmp/x'), path=changed(backbone='../../x'), tag=changed(backbone='resnet18.../x'),
    other=changed(backbone='resnet34'), nonet=changed(backbone='resnetty'), list_net=changed(backbone=['resnet18']), transformer=changed(backbone='vit_tiny_patch16_224'), large=changed(backbone='regnet_y_128gf'),
    channels=changed(in_channels=10**9), stats=changed(stats=[[.5],[0.]]), stats_n=changed(stats=[[.5]*2,[1.]*2]), mode=changed(mode='evil'), classes=changed(classes=[]), same=changed(classes=['a','a']),
    huge=changed(classes=[f'c{i}' for i in range(5000)]), long=changed(classes=['x'*10**5,'b']), future=changed(format=2), format_text=changed(format='1'), format_list=changed(format=[1]),
    neck=model(neck='evil'), neck_list=model(neck=['fpn']), rounds=model(neck='bifpn', neck_args=dict(rounds=10**9)), neck_arg=model(neck_args=dict(nothing=1)), model_key=model(evil=1), prior=model(prior=2.), eps=model(norm_eps='x'),
    metadata=model(metadata='evil', fields=[dict(name='age', mean=1., sd=1.)]), no_fields=model(metadata='film', fields=None), fields=model(metadata='film', fields=[dict(name='age', mean=1., sd=0.)]),
    cats=model(n_categories=10**9), cats2=model(n_categories=2), missing=lambda cfg: cfg.pop('width'), no_model=lambda cfg: cfg.update(model=3), shape=changed(classes=['a']), width=changed(width=32))

@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_configurations(file, tmp_path, monkeypatch, case):
    state,cfg = load_weights(file)
    HOSTILE[case](cfg)
    save_file(state, tmp_path/'x.safetensors', metadata=dict(lungdet=json.dumps(cfg)))
    monkeypatch.setattr('lungdet.learner.load_weights', lambda *o: pytest.fail('the weights were read'))
    for host in ('socket.socket.connect','urllib.request.urlopen'): monkeypatch.setattr(host, lambda *o, **k: pytest.fail('something was fetched'))
    with pytest.raises(ValueError) as e: Detector.load(tmp_path/'x.safetensors')
    assert 'x.safetensors' in str(e.value) and len(str(e.value))<600

USE = dict(point_list=dict(point=[1]), point_key=dict(point=dict(threshold=.5, evil=1)), point_nan=dict(point=dict(threshold=None)), point_percent=dict(point=dict(threshold=50)), point_classes=dict(point=dict(threshold=.5, by_class=dict(z=.5))),
           pictures=dict(pictures=7), pictures_size=dict(pictures=dict(png_size=10**7, fit='stretch', mode='gray')), pictures_fit=dict(pictures=dict(png_size=64, fit='evil', mode='gray')), pictures_list=dict(pictures=dict(png_size=64, fit='stretch', mode=['gray'])),
           expected=dict(expected=7), expected_text=dict(expected=dict(threshold=['x'])), expected_long=dict(expected={k:[.5]*5000 for k in ('threshold','sensitivity','fp_per_image','images','lesions')}),
           expected_above=dict(expected=dict(threshold=[.5], sensitivity=[1.5], fp_per_image=[0], images=[1], lesions=[1])))

@pytest.mark.parametrize('case', USE)
def test_hostile_uses(trained, tmp_path, case):
    save_weights(trained.model, trained.detector|USE[case], tmp_path/'x.safetensors')
    with pytest.raises(ValueError): Detector.load(tmp_path/'x.safetensors')

def test_hostile_files(file, trained, tmp_path):
    whole,x = file.read_bytes(),tmp_path/'x.safetensors'
    n = int.from_bytes(whole[:8], 'little')
    state,cfg = load_weights(file)
    k = next(iter(state))
    def header(**kw): h = json.dumps(json.loads(whole[8:8+n])|kw).encode(); return len(h).to_bytes(8,'little')+h+whole[8+n:]
    bad = dict(empty=b'', cut=whole[:-1], cut_header=whole[:n//2], more=whole+b'\0'*9, long_header=(2**40).to_bytes(8,'little')+whole[8:], text=b'a'*1000,
               deep=header(__metadata__=dict(lungdet='['*10**5+']'*10**5)), nan=header(__metadata__=dict(lungdet='{"backbone": NaN}')), number=header(__metadata__=dict(lungdet='7')), none=header(__metadata__=dict(a='b')),
               overlap=header(**{k:dict(dtype='F32', shape=[1], data_offsets=[0,4])}), beyond=header(**{k:dict(dtype='F32', shape=[2**40], data_offsets=[0,2**42])}))
    for name,data in bad.items():
        x.write_bytes(data)
        with pytest.raises(ValueError) as e: Detector.load(x)
        assert 'x.safetensors' in str(e.value), name
    ran = tmp_path/'ran'
    class Evil:
        def __reduce__(self): return (Path.touch, (ran,))
    torch.save(dict(a=Evil()), x)
    with pytest.raises(ValueError, match='looks like a pickle'): Detector.load(x)
    import pickle
    x.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match='pickle'): Detector.load(x)
    assert not ran.exists()
    for change,why in ((lambda s: s.pop(k), 'lacks'), (lambda s: s.update(more=torch.zeros(1)), "has the weights 'more'"), (lambda s: s.update({k:s[k].half()}), 'F16'), (lambda s: s.update({k:s[k][None]}), 'describes has'),
                       (lambda s: s.update({k:s[k]*np.nan}), 'not finite'), (lambda s: s.update({k:s[k]+np.inf}), 'not finite')):
        s = dict(state); change(s)
        save_file(s, x, metadata=dict(lungdet=json.dumps(cfg)))
        with pytest.raises(ValueError, match=why): Detector.load(x)

def test_random_damage(file, tmp_path):
    "Flipped bytes in the header: refused in words, or the same kind of thing"
    whole,x,rng = file.read_bytes(),tmp_path/'x.safetensors',np.random.default_rng(0)
    n = int.from_bytes(whole[:8], 'little')
    for _ in range(60):
        b = bytearray(whole)
        for at in rng.integers(0, n+8, 3): b[at] = rng.integers(256)
        x.write_bytes(b)
        try: weights_header(x)
        except ValueError as e: assert 'x.safetensors' in str(e)

@pytest.mark.parametrize('engine', ['onnxruntime','openvino'])
def test_other_engines_find_the_same(scans, file, engine):
    pytest.importorskip(engine, reason='needs lungdet[export]')
    a,b = Detector.load(file)(scans[0]).boxes,Detector.load(file, engine=engine)(scans[0]).boxes
    m = a.merge(b, on=['image_id','label'], suffixes=('','_b')) # near the threshold a box may come or go
    close = m[(m[NUMS].to_numpy()-m[[f'{o}_b' for o in NUMS]].to_numpy()).__abs__().max(1)<.05]
    assert len(close)>=.98*len(a)>0 and abs(len(a)-len(b))<=.02*len(a)+1

@pytest.mark.parametrize('engine', ['onnxruntime','openvino'])
def test_eight_bits_are_calibrated_or_refused(scans, file, engine):
    pytest.importorskip(engine, reason='needs lungdet[export]')
    with pytest.raises(ValueError, match='calibrate='): Detector.load(file, engine=engine, dtype='int8')
    det,more = (Detector.load(file, engine=engine, dtype='int8', calibrate=o) for o in (scans[0], sorted(scans[0].glob('*.dcm'))[:2]))
    a,b = Detector.load(file)(scans[0]),det(scans[0])
    assert np.abs(a.images.probability-b.images.probability).max()<.1 and len(b.refused)==0
    assert det.calibration!=more.calibration and len(det.calibration)==16 and Detector.load(file).calibration is None

def test_what_is_no_calibration(scans, file, tmp_path):
    with pytest.raises(ValueError, match="dtype='int8'"): Detector.load(file, calibrate=scans[0])
    with pytest.raises(ValueError, match='torch does not compute in int8'): Detector.load(file, dtype='int8', calibrate=scans[0])
    (tmp_path/'bad.dcm').write_bytes(b'no')
    with pytest.raises(ValueError, match='bad.dcm'): Detector.load(file, engine='onnxruntime', dtype='int8', calibrate=tmp_path)

def test_calibration_is_told_metadata(scans, tmp_path):
    pytest.importorskip('onnxruntime', reason='needs lungdet[export]')
    f = Detector.from_learner(learner(scans[1], metadata=['age','sex'], how='film')).save(tmp_path/'d.safetensors')
    assert len(Detector.load(f, engine='onnxruntime', dtype='int8', calibrate=scans[0])(scans[0]).images)==N

def content(ds):
    "`ds` as the bytes of a file"
    buf = io.BytesIO()
    ds.SOPClassUID,ds.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage,'1.2.3'
    ds.save_as(buf, enforce_file_format=True)
    return buf.getvalue()

def endless(how):
    "A DICOM that is a picture, and more elements than anybody has time to read"
    ds,n = stored(chest(40)),MOST_ELEMENTS+8
    if how=='deflated': ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    whole = content(ds)
    if how=='zeros': return whole+bytes(8*n)
    if how=='items': return whole+b'\x09\x90\x10\x10SQ\0\0\xff\xff\xff\xff'+b'\xfe\xff\0\xe0\0\0\0\0'*n+b'\xfe\xff\xdd\xe0\0\0\0\0'
    if how=='lookup': # a sequence that is looked at only when the picture is made
        item = b'\xfe\xff\0\xe0'+struct.pack('<I', 16*n)+bytes(16*n)
        ds.add_new('VOILUTSequence', 'SQ', [])
        tag = b'\x28\0\x10\x30SQ\0\0'
        return content(ds).replace(tag+bytes(4), tag+struct.pack('<I', len(item))+item)
    file = io.BytesIO(whole)
    pydicom.filereader.read_preamble(file, True); pydicom.filereader._read_file_meta_info(file)
    at,z = file.tell(),zlib.compressobj(wbits=-15)
    return whole[:at]+z.compress(zlib.decompress(whole[at:], -15)+bytes(8*n))+z.flush()

@pytest.mark.parametrize('how', ['zeros','items','lookup','deflated'])
def test_a_file_of_too_many_elements_is_refused_in_time(file, how):
    data,det = endless(how),Detector.load(file)
    begin = time.process_time()
    got = det([data, chest(40)])
    assert len(got.images)==1 and 'elements' in got.refused.reason[0] and time.process_time()-begin<20

def test_many_frames_are_not_too_many_elements(file):
    "A sequence of a thousand frames, as scanners write it"
    ds = stored(np.zeros((3,900,900),np.uint8)+np.arange(900).astype(np.uint8)); ds.NumberOfFrames = 3
    ds.PerFrameFunctionalGroupsSequence = [pydicom.Dataset() for _ in range(1000)]
    for o in ds.PerFrameFunctionalGroupsSequence: o.PatientComments,o.PixelSpacing,o.is_undefined_length_sequence_item = 'x',[1,1],True
    ds['PerFrameFunctionalGroupsSequence'].is_undefined_length = True
    data = content(ds)
    assert len(data)>8*MOST_ELEMENTS # so it is counted
    assert len(Detector.load(file)([data], frame=0).images)==1
