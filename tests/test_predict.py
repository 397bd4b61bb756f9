"lungdet-predict: what it leaves, also when it is killed; who may not share a folder; names that mean harm"
import json, os, shutil, signal, subprocess, sys, zipfile
import cv2, numpy as np, pandas as pd, pytest, torch
from html.parser import HTMLParser
from pathlib import Path
from lungdet.convert import dicom_table
from lungdet.data import detection_dls
from lungdet.detector import Detector, Findings, Result, items_of
from lungdet.evaluate import read_submission
from lungdet.formats import Annotations, box_cols
from lungdet.learner import retinanet_learner
from lungdet.operate import OperatingPoint
from lungdet.predict import *
from lungdet.predict import main
from dicoms import chest, jpeg, save, stored

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    d = tmp_path_factory.mktemp('m')
    save(stored(chest(64)), d/'a.dcm')
    t = dicom_table(d).drop(columns=['status','reason']).assign(split='valid')
    torch.manual_seed(0)
    dls = detection_dls(Annotations(t, pd.DataFrame(columns=box_cols), ['Lung Opacity']), size=32, bs=2, aug=None)
    learn = retinanet_learner(dls, 'resnet18', pretrained=False, width=16, depth=1, model=dict(prior=.2))
    return Detector.from_learner(learn, OperatingPoint(.15, nms=.1)).save(d/'detector.safetensors')

@pytest.fixture
def scans(tmp_path):
    d = tmp_path/'scans'; d.mkdir()
    for i in range(7): save(jpeg(np.roll(chest(96), 9*i, 1)), d/f's{i}.dcm')
    (d/'bad.dcm').write_bytes(b'nothing')
    return d

def files(out): return {str(p.relative_to(out)):p.read_bytes() for p in sorted(Path(out).rglob('*')) if p.is_file() and p.name!='settings.json'}

def test_exit_codes_and_files(model, scans, tmp_path, capsys):
    out = tmp_path/'out'
    assert main([str(model), str(scans), '--out', str(out), '--overlay', '--gallery', '--format', 'rsna'])==1
    said = capsys.readouterr()
    assert 'on 7 of 7 images, 1 files refused' in said.out and 'bad.dcm' in said.err
    assert set(files(out))=={'predictions.csv','images.csv','refused.csv','results.jsonl','submission.csv','gallery.html','burned_in.csv',*(f'overlays/s{i}.png' for i in range(7))}
    p = pd.read_csv(out/'predictions.csv')
    f = Detector.load(model)(scans)
    pd.testing.assert_frame_equal(p, f.boxes, check_dtype=False)
    assert cv2.imread(str(out/'overlays'/'s0.png')).shape==(96,96,3)
    assert len(read_submission(out/'submission.csv', f.annotations()))==len(p)
    first = files(out)
    assert main([str(model), str(scans), '--out', str(out), '--overlay', '--gallery', '--format', 'rsna'])==1 and files(out)==first
    (scans/'bad.dcm').unlink()
    assert main([str(model), str(scans), '--out', str(tmp_path/'clean')])==0

@pytest.mark.parametrize('args', [['{model}','{scans}/none'], ['{scans}','{scans}'], ['none','{scans}'], ['{scans}/bad.dcm','{scans}'], ['{model}','{scans}','--threshold','50'], ['{model}','{scans}','--bs','0'],
                                  ['{model}','{scans}','--engine','abacus'], ['{model}','{scans}','--sample','x.csv'], ['{model}','{scans}','--format','rsna','--sample','none.csv']])
def test_what_cannot_start(model, scans, tmp_path, capsys, args):
    assert main([a.format(model=model, scans=scans) for a in args]+['--out',str(tmp_path/'o')])==2
    assert capsys.readouterr().err.startswith('lungdet-predict: ')

def test_another_model_or_other_settings(model, scans, tmp_path, capsys):
    out = tmp_path/'out'
    assert main([str(model), str(scans), '--out', str(out)])==1
    det = Detector.load(model)
    other = Detector(det.model, det.cfg, det.pictures, OperatingPoint(.2)).save(tmp_path/'other.safetensors')
    shutil.copy(model, tmp_path/'copy.safetensors')
    for args,what in (([str(other)], 'model was'), ([str(model),'--threshold','.3'], 'score_thr was None and is 0.3'), ([str(model),'--bs','2'], 'bs was 8'), ([str(model),'--frame','0'], 'frame was None')):
        capsys.readouterr()
        assert main([args[0], str(scans), *args[1:], '--out', str(out)])==2 and what in capsys.readouterr().err
    assert main([str(tmp_path/'copy.safetensors'), str(scans), '--out', str(out)])==1 # the same model under another name
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'thesis.txt').write_text('x')
    assert main([str(model), str(scans), '--out', str(tmp_path/'full')])==2
    (out/'settings.json').write_text('{')
    assert main([str(model), str(scans), '--out', str(out)])==2

def test_changed_and_new_files_are_looked_at_again(model, scans, tmp_path):
    det,out = Detector.load(model),tmp_path/'out'
    predict(det, scans, out); write_overlays(Findings.of([], []), {}, out)
    save(stored(255-chest(96)), scans/'s3.dcm')
    save(stored(chest(80)), scans/'s9.dcm')
    f = predict(det, scans, out)
    assert f.boxes.equals(predict(det, scans, tmp_path/'fresh').boxes) and files(out)==files(tmp_path/'fresh')
    (scans/'s9.dcm').unlink()
    assert 's9' not in set(predict(det, scans, out).images.image_id)

SCRIPT = """
import signal, sys, time, lungdet.predict as p
signal.signal(signal.SIGINT, signal.default_int_handler) # which a shell may have switched off
p.PORTION = 2
p.portions.__defaults__ = (2,)
add = p.Journal.add
def slow(self, *a): add(self, *a); print('portion', flush=True); time.sleep(.3)
p.Journal.add = slow
sys.exit(p.main(sys.argv[1:]))
"""

@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGINT])
def test_killed_and_restarted_it_ends_with_the_same_files(model, scans, tmp_path, sig):
    env = os.environ|dict(PYTHONPATH=str(Path(__file__).resolve().parent.parent), OMP_NUM_THREADS='1')
    def start(out): return subprocess.Popen([sys.executable, '-c', SCRIPT, str(model), str(scans), '--out', str(out), '--bs', '2', '--device', 'cpu'], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    whole = start(tmp_path/'whole')
    assert whole.wait(300)==1
    p = start(tmp_path/'cut')
    assert p.stdout.readline()=='portion\n' and p.stdout.readline()=='portion\n'
    p.send_signal(sig)
    assert p.wait(60)==(130 if sig==signal.SIGINT else -9)
    assert not (tmp_path/'cut'/'predictions.csv').exists()
    with open(tmp_path/'cut'/'results.jsonl', 'ab') as f: f.write(b'{"key": "half a li') # what a power cut leaves
    q = start(tmp_path/'cut')
    said = q.stdout.read()
    assert q.wait(300)==1 and said.count('portion')==2 # of four
    assert files(tmp_path/'cut')==files(tmp_path/'whole')

def test_two_at_once(model, scans, tmp_path):
    out = tmp_path/'out'; out.mkdir()
    code = f"import sys, pathlib, lungdet.predict as p\nwith p._alone(pathlib.Path({str(out)!r})): print('in', flush=True); sys.stdin.read()"
    env = os.environ|dict(PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    other = subprocess.Popen([sys.executable, '-c', code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline()=='in\n'
    with pytest.raises(ValueError, match='another program is writing'): predict(Detector.load(model), scans, out)
    other.communicate()
    predict(Detector.load(model), scans, out)

class Tags(HTMLParser):
    def __init__(self): super().__init__(); self.tags,self.attrs,self.text = set(),[],''
    def handle_starttag(self, tag, attrs): self.tags.add(tag); self.attrs += attrs
    def handle_data(self, d): self.text += d

NAMES = ['<img src=x onerror=alert(1)>', '"><script>alert(1)<_script>', "' onload='x", '&lt;b&gt;', '=cmd|x!A1', 'ümlaut 漢字', 'a,b;c', '{figures}', '%s%d', 'x'*200, 'new\nline', b'\xff\xfe'.decode('utf-8','surrogateescape')]

def test_names_that_mean_harm(model, tmp_path):
    d = tmp_path/'d'; d.mkdir()
    for i,n in enumerate(NAMES): save(stored(chest(64)), d/f'{n}.dcm')
    (d/'<b>bad<_b>.dcm').write_bytes(b'no')
    out = tmp_path/'out'
    assert main([str(model), str(d), '--out', str(out), '--overlay', '--gallery', '--format', 'coco'])==1
    page = Tags(); page.feed((out/'gallery.html').read_text())
    assert page.tags=={'html','head','meta','title','style','body','p','h1','main','figure','img','figcaption','b','h2','ul','li'}
    assert not [k for k,v in page.attrs if k.startswith('on')] and all(v.startswith('data:image/jpeg;base64,') for k,v in page.attrs if k=='src')
    for n in NAMES[:8]: assert n in page.text, n
    assert len(list((out/'overlays').iterdir()))==len(NAMES) and {p.parent for p in out.rglob('*.png')}=={out/'overlays'}
    ids = pd.read_csv(out/'images.csv', dtype=str, encoding_errors='surrogateescape', keep_default_na=False).image_id
    assert set(ids)==set(NAMES)

def test_zip_with_names_that_lead_out(model, tmp_path):
    save(stored(chest(64)), tmp_path/'a.dcm')
    with zipfile.ZipFile(tmp_path/'z.zip','w') as z:
        for n in ('ok.dcm','../../evil.dcm','/abs.dcm'): z.writestr(n, (tmp_path/'a.dcm').read_bytes())
    assert main([str(model), str(tmp_path/'z.zip'), '--out', str(tmp_path/'out'), '--overlay'])==1
    assert [p.name for p in (tmp_path/'out'/'overlays').iterdir()]==['ok.png'] and len(pd.read_csv(tmp_path/'out'/'refused.csv'))==2

def test_gallery_shows_the_most_suspicious_first(model, scans, tmp_path):
    f = Detector.load(model)(scans)
    f.images['probability'] = np.linspace(.1,.7,7).round(1)
    page = write_gallery(f, items_of(scans), tmp_path/'g.html', 3).read_text()
    shown = [o.split('</b>')[0] for o in page.split('<figcaption><b>')[1:]]
    assert shown==['0.700','0.600','0.500'] and '3 of 7 images' in page and 'Research use only' in page

def test_submission_answers_for_every_id_once(model, scans, tmp_path):
    f = Detector.load(model)(scans)
    ids = list(f.images.image_id)
    def sample(ids): pd.DataFrame(dict(patientId=ids, PredictionString='')).to_csv(tmp_path/'s.csv', index=False); return tmp_path/'s.csv'
    got = pd.read_csv(submission(f, sample(ids[::-1]), tmp_path/'o.csv'), dtype=str)
    assert got.patientId.tolist()==ids[::-1]
    a = read_submission(tmp_path/'o.csv', f.annotations())
    assert len(a)==len(f.boxes) and np.isclose(a.score.sum(), f.boxes.score.sum(), atol=1e-2)
    for wrong,why in ((ids+['bad'], "not looked at, for example \\['bad'\\]"), (ids[1:], 'not in the sample'), (ids+ids[:1], 'more than once')):
        with pytest.raises(ValueError, match=why): submission(f, sample(wrong), tmp_path/'o.csv')

def test_nothing_found_is_written_too(model, scans, tmp_path):
    for fmt in ('rsna','coco'):
        assert main([str(model), str(scans), '--out', str(tmp_path/fmt), '--threshold', '1', '--format', fmt, '--gallery'])==1
    assert not len(pd.read_csv(tmp_path/'rsna'/'predictions.csv')) and len(pd.read_csv(tmp_path/'rsna'/'submission.csv'))==7
    assert json.loads((tmp_path/'coco'/'coco.json').read_text())['annotations']==[]

def test_coco_reads_back(model, scans, tmp_path):
    from pycocotools.coco import COCO
    f = Detector.load(model)(scans)
    c = COCO(str(write_coco_scores(f, tmp_path/'c.json')))
    assert len(c.getImgIds())==7 and len(c.loadRes(c.dataset['annotations']).anns)==len(f.boxes)

def test_json_keeps_results_to_the_last_digit(tmp_path):
    j = Journal(tmp_path/'j')
    r = Result('ü','x', dict(image_id='ü', age=np.nan, probability=1/3, patient_id=pd.NA), [dict(score=np.float64(.1)+.2)], told=[np.nan])
    j.add('k', [r])
    back = Journal(tmp_path/'j').done['k'][0]
    assert back.image['probability']==1/3 and back.image['age'] is None and back.boxes[0]['score']==np.float64(.1)+.2

def test_reports(model, scans, tmp_path):
    pytest.importorskip('highdicom', reason='needs lungdet[dicom-out]')
    from lungdet.dicom_out import read_sr
    (scans/'p.png').write_bytes(cv2.imencode('.png', chest(64))[1].tobytes())
    for i in range(7): # reports refer to who was examined
        import pydicom
        ds = pydicom.dcmread(scans/f's{i}.dcm')
        ds.StudyInstanceUID,ds.SeriesInstanceUID,ds.SOPInstanceUID,ds.file_meta.MediaStorageSOPInstanceUID,ds.PatientID = '1.2.3','1.2.3.4',f'1.2.3.4.{i}',f'1.2.3.4.{i}','p'
        ds.save_as(scans/f's{i}.dcm')
    assert main([str(model), str(scans), '--out', str(tmp_path/'o'), '--format', 'sr'])==1
    assert sorted(p.name for p in (tmp_path/'o'/'sr').iterdir())==[f's{i}.dcm' for i in range(7)] # a PNG has no report
    b = pd.read_csv(tmp_path/'o'/'predictions.csv')
    assert read_sr(tmp_path/'o'/'sr'/'s0.dcm').algorithm.threshold==Detector.load(model).point.threshold and len(b)
    assert main([str(model), str(scans), '--out', str(tmp_path/'low'), '--format', 'sr', '--threshold', '.125'])==1
    assert read_sr(tmp_path/'low'/'sr'/'s0.dcm').algorithm.threshold==.125 # what was asked for, not the model's own

def test_each_picture_is_decoded_once(model, scans, tmp_path, monkeypatch):
    import lungdet.predict as p
    seen,once = [],p.picture_of
    monkeypatch.setattr(p, 'picture_of', lambda src, frame=None: seen.append(str(src)) or once(src, frame))
    run = lambda name,*args: (seen.clear(), main([str(model), str(scans), '--out', str(tmp_path/name), *args]))
    run('a', '--overlay', '--gallery', '2')
    assert len(seen)==7 and len(set(seen))==7
    run('b', '--gallery', '2')
    assert len(seen)==2 # what nobody sees is not looked at for text either
    run('c')
    assert not seen
    f = Detector.load(model)(scans)
    assert (tmp_path/'a'/'gallery.html').read_bytes()==(tmp_path/'b'/'gallery.html').read_bytes()==write_gallery(f, items_of(scans), tmp_path/'g.html', 2).read_bytes()
    write_overlays(f, items_of(scans), tmp_path)
    assert {o.name:o.read_bytes() for o in (tmp_path/'overlays').iterdir()}=={o.name:o.read_bytes() for o in (tmp_path/'a'/'overlays').iterdir()}

def test_ids_that_a_spreadsheet_would_run(model, tmp_path, capsys):
    "They are kept, since an id has to be found again; but somebody is told"
    d = tmp_path/'d'; d.mkdir()
    for n in ('=cmd|x!A1','+1','@x','fine'): save(stored(chest(64)), d/f'{n}.dcm')
    assert main([str(model), str(d), '--out', str(tmp_path/'o')])==0
    said = capsys.readouterr().err
    assert 'run 3 of the ids' in said and "import the tables as text" in said and "'+1'" in said
    assert set(pd.read_csv(tmp_path/'o'/'images.csv', dtype=str).image_id)=={'=cmd|x!A1','+1','@x','fine'}
    shutil.rmtree(d); d.mkdir()
    ds = stored(chest(64)); ds.PatientID = '=1+1'
    save(ds, d/'a.dcm')
    assert main([str(model), str(d), '--out', str(tmp_path/'p')])==0 and 'run 1 of the ids' in capsys.readouterr().err
    shutil.rmtree(d); d.mkdir(); save(stored(chest(64)), d/'a.dcm')
    assert main([str(model), str(d), '--out', str(tmp_path/'q')])==0 and capsys.readouterr().err==''

def test_eight_bits_on_the_command_line(model, scans, tmp_path, capsys):
    pytest.importorskip('onnxruntime', reason='needs lungdet[export]')
    (scans/'bad.dcm').unlink()
    args = [str(model), str(scans), '--engine', 'onnxruntime', '--dtype', 'int8']
    assert main([*args, '--out', str(tmp_path/'o')])==2 and '--calibrate' in capsys.readouterr().err
    assert main([*args, '--out', str(tmp_path/'o'), '--calibrate', str(scans)])==0
    capsys.readouterr()
    assert main([*args, '--out', str(tmp_path/'o'), '--calibrate', str(scans/'s0.dcm')])==2 and 'calibration was' in capsys.readouterr().err
