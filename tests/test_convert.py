"Chapter 02c: sources, resuming after a kill, executors, full disks, privacy, and the command"
import concurrent.futures, errno, os, random, shutil, signal, subprocess, sys, time, warnings, zipfile
from pathlib import Path

import cv2, numpy as np, pandas as pd, pytest
from pydicom.pixels import pixel_array

from dicoms import chest, save, stored
from real import REAL, needs_real
from lungdet import convert
from lungdet.convert import *
from lungdet.core import data_path
from lungdet.data import detection_dls
from lungdet.dicom import DicomError, read_dicom, to_gray
from lungdet.prepare import Enhance, enhance, resize
from lungdet.formats import read_rsna

SAMPLE = sorted((data_path().resolve()/'stage_2_train_images').glob('*.dcm'))

@pytest.fixture
def folder(tmp_path):
    "Six studies, in two sub-folders, one of them without a suffix"
    for i in range(6):
        f = tmp_path/'src'/('ab'[i%2]); f.mkdir(parents=True, exist_ok=True)
        ds = stored(np.roll(chest(64), i*5, 1), PatientID=f'P{i//2}', PatientSex='FMO'[i%3], ViewPosition=('AP','PA','LL')[i%3],
                    PixelSpacing=[.2,.2])
        save(ds, f/('1.2.840.5' if i==5 else f'study{i}.dcm'))
    (tmp_path/'src'/'notes.txt').write_text('not this one')
    (tmp_path/'src'/'README').write_text('nor this one')
    return tmp_path/'src'

def mtimes(dst): return {p.name:p.stat().st_mtime_ns for p in dst.glob('*.png')}
def tree(dst): return {p.name:p.read_bytes() for p in sorted(dst.iterdir())}

# --- headers

def test_table(folder, recwarn):
    (folder/'old.dcm').write_bytes(b'')
    t = dicom_table(folder).set_index('image_id')
    assert sorted(t.index)==['1.2.840.5','old',*[f'study{i}' for i in range(5)]]
    r = t.loc['study0']
    assert (r.patient_id,r.height,r.width,r.sex,r['view'],r.spacing,r.status)==('P0',64,64,'F','AP',.2,'ok')
    assert pd.isna(t.loc['study2','sex']) and pd.isna(t.loc['study2','view'])
    assert t.loc['old','status']=='failed' and 'old.dcm' in t.loc['old','reason']
    assert not recwarn.list

def test_rsna_age_makes_no_warning(tmp_path, recwarn):
    ds = stored(chest(16))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds.PatientAge = '58'
        save(ds, tmp_path/'a.dcm')
    assert dicom_table(tmp_path).age.tolist()==[58.] and not recwarn.list

# --- converting and resuming

def test_convert_and_resume(folder, tmp_path, capsys):
    dst = tmp_path/'png'
    conv = lambda **kw: convert_folder(folder, dst, **dict(dict(size=32, progress=False), **kw))
    m = conv()
    assert m.columns.tolist()==COLUMNS and len(m)==6 and (m.status=='ok').all() and all(Path(p).is_file() for p in m.path)
    for r in m.itertuples(): np.testing.assert_array_equal(cv2.imread(r.path, -1), resize(to_gray(read_dicom(r.source)), 32))
    first = mtimes(dst)
    pd.testing.assert_frame_equal(conv(), m)
    assert mtimes(dst)==first
    changed = lambda: sorted(k for k,v in mtimes(dst).items() if first.get(k)!=v)
    (dst/'study1.png').unlink(); conv(); assert changed()==['study1.png']                    # lost
    first = mtimes(dst); os.utime(folder/'a'/'study2.dcm'); conv(); assert changed()==['study2.png'] # source touched
    first = mtimes(dst); conv(mode='stack'); assert len(changed())==6                         # other mode
    want = enhance(resize(to_gray(read_dicom(folder/'a'/'study0.dcm')), 32), 'stack')
    np.testing.assert_array_equal(cv2.imread(str(dst/'study0.png'), -1)[...,::-1], want)
    own = Enhance(('clahe',), clip=3.)
    first = mtimes(dst); conv(mode=own); assert len(changed())==6                             # a mode of one's own
    first = mtimes(dst); conv(mode=own); assert changed()==[]
    first = mtimes(dst); conv(size=16); assert len(changed())==6                              # other size
    first = mtimes(dst); conv(size=16, fit='letterbox'); assert len(changed())==6             # other fit
    assert not [p for p in dst.iterdir() if p.suffix not in ('.png','.csv')] and capsys.readouterr().out==''
    pd.testing.assert_frame_equal(read_manifest(dst), conv(size=16, fit='letterbox').sort_values('image_id', ignore_index=True))

def test_a_foreign_manifest_is_left_alone(folder, tmp_path):
    (tmp_path/'png').mkdir()
    for text in ('ship,cargo\nAda,tea\n', 'image_id,label\na,b\n', 'garbage\n"'):
        (tmp_path/'png'/'manifest.csv').write_text(text)
        with pytest.raises(ValueError, match='choose another folder'): convert_folder(folder, tmp_path/'png', progress=False)
        assert (tmp_path/'png'/'manifest.csv').read_text()==text
    (tmp_path/'png'/'manifest.csv').write_text('') # what a power cut may leave
    m = convert_folder(folder, tmp_path/'png', size=16, progress=False)
    assert (m.status=='ok').all()
    df = pd.read_csv(tmp_path/'png'/'manifest.csv'); df.assign(mine=1).to_csv(tmp_path/'png'/'manifest.csv', index=False)
    assert len(read_manifest(tmp_path/'png'))==6

def test_a_power_cut_costs_only_what_it_cut(folder, tmp_path):
    dst = tmp_path/'png'
    convert_folder(folder, dst, size=16, progress=False)
    want,first = tree(dst),mtimes(dst)
    (dst/'study1.png').write_bytes(b'')                                                           # never reached the disk
    (dst/'.manifest.999999999.journal').write_bytes(b'\0'*50+b'\n{"image_id": "st')              # nor did this
    convert_folder(folder, dst, size=16, progress=False)
    assert tree(dst)==want and [k for k,v in mtimes(dst).items() if v!=first[k]]==['study1.png']

def test_an_id_is_never_taken_over(tmp_path):
    for k,o in enumerate('ab'):
        (tmp_path/o).mkdir(); save(stored(np.roll(chest(32),k*9,0)), tmp_path/o/'IM0001.dcm'); os.utime(tmp_path/o/'IM0001.dcm', (1,1))
    convert_folder(tmp_path/'a', tmp_path/'png', size=16, progress=False)
    with pytest.raises(ValueError, match='a/IM0001.dcm, converted earlier, and .*b/IM0001.dcm'): convert_folder(tmp_path/'b', tmp_path/'png', size=16, progress=False)
    first = mtimes(tmp_path/'png')
    os.rename(tmp_path/'a', tmp_path/'moved'); convert_folder(tmp_path/'moved', tmp_path/'png', size=16, progress=False) # the same file elsewhere
    assert mtimes(tmp_path/'png')==first

def test_odd_names(tmp_path):
    (tmp_path/'src').mkdir()
    save(stored(chest(16)), tmp_path/'src'/'a.dcm').rename(os.fsdecode(os.fsencode(tmp_path/'src')+b'/M\xfcller.dcm'))
    save(stored(chest(16)), tmp_path/'src'/'a, "b"\nc.dcm'); save(stored(chest(16)), tmp_path/'src'/'x.IMA')
    for kw in ({}, dict(pseudonymise='s')):
        dst = tmp_path/f'png{len(kw)}'
        for _ in range(2): assert (convert_folder(tmp_path/'src', dst, size=8, progress=False, **kw).status=='ok').all()
        assert len(list(dst.glob('*.png')))==3
    deep = tmp_path/'src'/('1.2.'*30)/('3.4.'*30)/('5.6.'*10); deep.mkdir(parents=True); save(stored(chest(16)), deep/'a.dcm')
    m = convert_folder(tmp_path/'src', tmp_path/'deep', size=8, ids='path', progress=False)
    assert m.status.value_counts().to_dict()==dict(ok=3, failed=1) and m.reason.str.contains('too long').sum()==1

def test_failures_are_rows(folder, tmp_path, capsys):
    dst = tmp_path/'png'
    convert_folder(folder, dst, size=32, progress=False)
    (folder/'a'/'study0.dcm').write_bytes((folder/'a'/'study0.dcm').read_bytes()[:-500])
    m = convert_folder(folder, dst, size=32, progress=False).set_index('image_id')
    assert m.status.value_counts().to_dict()==dict(ok=5, failed=1) and 'bytes of pixel data' in m.loc['study0','reason']
    assert not (dst/'study0.png').exists() # what it showed is no longer the source
    assert '1 of 6 files failed' in capsys.readouterr().out
    m = convert_folder([folder/'a'/'study2.dcm', folder/'gone.dcm'], dst, size=32, progress=False)
    assert m.status.tolist()==['ok','failed'] and m.reason[1]=='no such file'
    assert set(read_manifest(dst).image_id)>={'study1','study2','gone'} # rows of other sources are kept
    before = tree(dst); convert_folder([folder/'a'/'study2.dcm'], dst, size=32, progress=False); assert tree(dst)==before

def test_wrong_calls(folder, tmp_path):
    dst = tmp_path/'png'
    for src,why in [(folder/'none','no such folder'), ([], 'no DICOM')]:
        with pytest.raises(DicomError, match=why): convert_folder(src, dst, progress=False)
    (tmp_path/'study0.dcm').write_bytes(b'')
    with pytest.raises(ValueError, match=r"two sources have the id 'study0': .*src/a/study0\.dcm and .*study0\.dcm"): convert_folder(tmp_path, dst, progress=False)
    for kw,why in ((dict(mode='rgb'),'mode'), (dict(size=0),'size'), (dict(fit='crop'),'fit'), (dict(ids='uid'),'ids')):
        with pytest.raises(ValueError, match=why): convert_folder(folder, dst, progress=False, **kw)
    assert not dst.exists()

def test_ids_from_paths(folder, tmp_path):
    shutil.copy(folder/'a'/'study0.dcm', folder/'b'/'study0.dcm')
    m = convert_folder(folder, tmp_path/'png', size=16, ids='path', progress=False)
    assert {'a__study0','b__study0','b__1.2.840.5'}<=set(m.image_id) and len(m)==7 and all(Path(p).is_file() for p in m.path)

def test_one_frame_of_several(tmp_path):
    film = np.stack([chest(64), 255-chest(64)])
    path = save(stored(film), tmp_path/'film.dcm')
    assert '2 frames' in convert_folder(path, tmp_path/'png', size=32, progress=False).reason[0]
    save(stored(chest(64)), tmp_path/'single.dcm')
    m = convert_folder(tmp_path, tmp_path/'png', size=32, frame=1, progress=False)
    assert (m.status=='ok').all() # of the single one there is only one
    np.testing.assert_array_equal(cv2.imread(m.path[0], -1), resize(film[1], 32))

# --- zip

def test_zip_is_read_without_unpacking(tmp_path):
    with zipfile.ZipFile(tmp_path/'c.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for f in SAMPLE[:5]: z.write(f, f'stage_2_train_images/{f.name}')
        z.writestr('stage_2_train_labels.csv', 'patientId\n'); z.writestr('__MACOSX/x.dcm', b'')
        z.write(SAMPLE[5], 'plain/without_suffix'); z.writestr('plain/README', 'no')
    a = convert_folder(tmp_path/'c.zip', tmp_path/'zip', size=64, progress=False)
    b = convert_folder(SAMPLE[:5], tmp_path/'files', size=64, progress=False)
    assert (a.status=='ok').all() and set(a.image_id)=={*b.image_id,'without_suffix'}
    for i in b.image_id: assert (tmp_path/'zip'/f'{i}.png').read_bytes()==(tmp_path/'files'/f'{i}.png').read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir())==['c.zip','files','zip']
    first = mtimes(tmp_path/'zip'); convert_folder(tmp_path/'c.zip', tmp_path/'zip', size=64, progress=False); assert mtimes(tmp_path/'zip')==first
    assert dicom_table(tmp_path/'c.zip').age.notna().any()

@pytest.mark.parametrize('name', ['../escape.dcm', '/etc/escape.dcm', 'a/../../escape.dcm', 'C:/escape.dcm', '..\\escape.dcm'])
def test_unsafe_members_are_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path/'c.zip', 'w') as z: z.write(SAMPLE[0], 'good.dcm'); z.writestr(zipfile.ZipInfo(name), SAMPLE[1].read_bytes())
    m = convert_folder(tmp_path/'c.zip', tmp_path/'png', size=32, progress=False).set_index('status')
    assert m.loc['ok','image_id']=='good' and 'leads out' in m.loc['failed','reason']
    assert [p for p in tmp_path.rglob('*escape*')]==[]

def test_damaged_zips(tmp_path):
    with zipfile.ZipFile(tmp_path/'c.zip', 'w') as z:
        for k,f in enumerate(SAMPLE[:3]): z.write(f, f'{k}.dcm')
    whole = (tmp_path/'c.zip').read_bytes()
    (tmp_path/'cut.zip').write_bytes(whole[:len(whole)//2])
    with pytest.raises(DicomError, match='cannot be opened as a zip'): convert_folder(tmp_path/'cut.zip', tmp_path/'png', progress=False)
    at = whole.index(b'DICM')+30000
    (tmp_path/'hurt.zip').write_bytes(whole[:at]+bytes(50)+whole[at+50:])
    m = convert_folder(tmp_path/'hurt.zip', tmp_path/'png', size=32, progress=False)
    assert m.status.tolist()==['failed','ok','ok'] and 'zip' in m.reason[0]

def test_a_member_may_lie_about_its_size(tmp_path):
    with zipfile.ZipFile(tmp_path/'c.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('a.dcm', SAMPLE[0].read_bytes()[:132]+bytes(50_000_000))
    b = bytearray((tmp_path/'c.zip').read_bytes()); at = b.rindex(b'PK\x01\x02'); b[at+24:at+28] = (1000).to_bytes(4,'little'); (tmp_path/'c.zip').write_bytes(b)
    import tracemalloc
    tracemalloc.start()
    with pytest.raises(DicomError, match='zip|max_bytes'): Source(str(tmp_path/'c.zip'), 'a.dcm').read(10**6)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak<10**7 # of 50 million bytes

# --- who does the work

@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    dst = tmp_path_factory.mktemp('ref')/'png'
    convert_folder(SAMPLE, dst, size=128, mode='stack', n_workers=1, progress=False)
    return tree(dst)

def test_threads_processes_and_dask_agree(tmp_path, reference):
    def run(executor, name, **kw):
        convert_folder(SAMPLE, tmp_path/name, size=128, mode='stack', executor=executor, progress=False, **kw)
        assert tree(tmp_path/name)==reference, name
    run(None, 'threads', n_workers=4)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=__import__('multiprocessing').get_context('spawn')) as ex: run(ex, 'processes')
    distributed = pytest.importorskip('distributed')
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        run(client.get_executor(), 'dask')

def test_forked_processes_read_one_zip(tmp_path):
    with zipfile.ZipFile(tmp_path/'c.zip', 'w') as z:
        for k in range(120): z.write(SAMPLE[k%20], f's{k}.dcm')
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=__import__('multiprocessing').get_context('fork')) as ex:
        assert (convert_folder(tmp_path/'c.zip', tmp_path/'png', size=32, executor=ex, progress=False).status=='ok').all()

def die(*_): os._exit(1)

def test_a_dying_worker_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, '_convert_some', die)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=__import__('multiprocessing').get_context('fork')) as ex:
        with pytest.raises(RuntimeError, match='a worker died'): convert_folder(SAMPLE[:3], tmp_path/'png', size=16, executor=ex, progress=False)
    monkeypatch.undo()
    assert (convert_folder(SAMPLE[:3], tmp_path/'png', size=16, progress=False).status=='ok').all()

# --- interrupted

SLOW = """import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler) # a job in the background is born deaf to Ctrl-C
from lungdet import convert as c
real = c._convert
def slowly(*a): time.sleep(.01); return real(*a) # so that there is time to interrupt it, on any machine
c._convert = slowly
"""
CHILD = SLOW+"print('go', flush=True); c.convert_folder(sys.argv[1], sys.argv[2], size=200, n_workers=2, progress=False)"
COMMAND = SLOW+"sys.exit(c.main(sys.argv[1:]))"

@pytest.fixture(scope='module')
def many(tmp_path_factory):
    "200 studies: the sample under many names"
    src = tmp_path_factory.mktemp('many')
    for k in range(200): shutil.copy2(SAMPLE[k%len(SAMPLE)], src/f's{k:03d}.dcm')
    return src

def start(src, dst):
    p = subprocess.Popen([sys.executable,'-c',CHILD,str(src),str(dst)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline()=='go\n'
    return p

def test_kill_at_random_moments(many, tmp_path):
    "kill -9 five times; the manifest has a row for every source each time, and in the end nothing shows that it happened"
    convert_folder(many, tmp_path/'calm', size=200, progress=False)
    r,dst,seen = random.Random(0),tmp_path/'png',[]
    for k in range(5):
        p = start(many, dst)
        while not (dst/'manifest.csv').exists(): time.sleep(.001)
        time.sleep(r.uniform(.02,.25)); p.send_signal(signal.SIGKILL); p.wait()
        m = read_manifest(dst)
        assert len(m)==200 and set(m.status)<={'ok','todo'}
        for q in m[m.status=='ok'].path: assert cv2.imread(q, -1).shape==(200,200)
        seen.append(int((m.status=='ok').sum()))
        kept = mtimes(dst)
    print('on record after each kill:', seen)
    assert seen==sorted(seen) and seen[0]<200
    done = {Path(q).name for q in m[m.status=='ok'].path}
    convert_folder(many, dst, size=200, progress=False)
    assert all(kept[k]==v for k,v in mtimes(dst).items() if k in done) # nothing was done twice
    assert tree(dst)==tree(tmp_path/'calm')

def test_ctrl_c(many, tmp_path):
    p = start(many, tmp_path/'png')
    while len(mtimes(tmp_path/'png') if (tmp_path/'png').exists() else [])<10: time.sleep(.002)
    p.send_signal(signal.SIGINT); err = p.communicate(timeout=30)[1]
    assert p.returncode!=0 and 'KeyboardInterrupt' in err
    m = pd.read_csv(tmp_path/'png'/'manifest.csv') # the manifest itself, without a journal
    assert len(m)==200 and 10<=(m.status=='ok').sum()==len(mtimes(tmp_path/'png'))
    assert all(o.suffix in ('.png','.csv') for o in (tmp_path/'png').iterdir())

def test_full_disk(tmp_path, monkeypatch):
    dst,write,n = tmp_path/'png',Path.write_bytes,[0]
    def full(self, data):
        if self.suffix!='.tmp' or '.png.' not in self.name: return write(self, data)
        n[0] += 1
        if n[0]<=7: return write(self, data)
        write(self, data[:len(data)//2]); raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space left on device. What is finished is kept'): convert_folder(SAMPLE, dst, size=64, n_workers=1, progress=False)
    monkeypatch.undo()
    m = read_manifest(dst)
    assert (m.status=='ok').sum()==7==len(list(dst.glob('*.png'))) and len(m)==len(SAMPLE)
    assert all(o.suffix in ('.png','.csv') for o in dst.iterdir())
    first = mtimes(dst); convert_folder(SAMPLE, dst, size=64, progress=False)
    assert len(mtimes(dst))==len(SAMPLE) and all(mtimes(dst)[k]==v for k,v in first.items())

def test_two_runs_at_once(many, tmp_path):
    "Each does its own half; both end well and leave nothing behind but pictures"
    (tmp_path/'a').mkdir(); (tmp_path/'b').mkdir()
    for k,f in enumerate(sorted(many.iterdir())): shutil.copy2(f, tmp_path/'ab'[k%2]/f.name)
    runs = [start(tmp_path/o, tmp_path/'png') for o in 'ab']
    assert all(p.wait(60)==0 for p in runs), [p.stderr.read() for p in runs]
    assert len(mtimes(tmp_path/'png'))==200
    m = read_manifest(tmp_path/'png')
    assert len(m)==200 and (m.status=='ok').all()

# --- private

def test_nothing_leaks(tmp_path):
    "Names, birth dates and numbers planted in headers, in names of files and in damaged values: in no byte that is written"
    secret = dict(PatientName='DOE^JANE', PatientBirthDate='19610203', AccessionNumber='ACC4711', InstitutionName='St Elsewhere', PatientID='MRN-90210',
                  StudyDate='20181231', ReferringPhysicianName='HOUSE^G', OtherPatientIDs='OLD-555', PatientComments='likes tea')
    src = tmp_path/'src'; src.mkdir()
    for k in range(3): save(stored(chest(64), **secret, PatientAge='057Y', PatientSex='F', ViewPosition='PA'), src/f'MRN-90210_{k}.dcm')
    b = (src/'MRN-90210_0.dcm').read_bytes(); (src/'MRN-90210_cut.dcm').write_bytes(b[:-99])
    bad = stored(chest(64), **secret); bad.PhotometricInterpretation = 'DOE^JANE'; save(bad, src/'MRN-90210_odd.dcm')
    m = convert_folder(src, tmp_path/'png', size=32, pseudonymise='salt and pepper', progress=False)
    assert (m.status=='ok').sum()==3 and set(m.image_id)=={pseudonym(f'MRN-90210_{k}','salt and pepper') for k in (0,1,2,'cut','odd')}
    for f in (tmp_path/'png').iterdir():
        for v in [*secret.values(),'JANE','MRN','90210','salt','src']: assert v.encode() not in f.read_bytes() and v not in f.name, (f.name, v)
    assert m.age.dropna().tolist()==[57]*3 and m.patient_id.dropna().nunique()==1
    plain = convert_folder(src, tmp_path/'plain', size=32, progress=False) # without it: only the listed columns
    assert [*plain]==COLUMNS
    for f in (tmp_path/'plain').iterdir():
        for k,v in secret.items(): assert k=='PatientID' or v.encode() not in f.read_bytes() or (k=='PatientName' and f.name=='manifest.csv')
    for f in (tmp_path/'plain').glob('*.png'): assert {c for c in chunks(f)}<={b'IHDR',b'IDAT',b'IEND'}

def test_pseudonyms_are_not_mixed_with_ids(folder, tmp_path):
    for empty in ('',):
        with pytest.raises(ValueError, match='secret is empty'): convert_folder(folder, tmp_path/'png', pseudonymise=empty, progress=False)
    convert_folder(folder, tmp_path/'png', size=16, progress=False)
    with pytest.raises(ValueError, match='under their own ids'): convert_folder(folder, tmp_path/'png', size=16, pseudonymise='s', progress=False)
    m = convert_folder(folder, tmp_path/'hidden', size=16, pseudonymise='s', progress=False)
    assert m.stamp.str.fullmatch('[0-9a-f]{20}').all() # sizes and dates would lead back
    first = mtimes(tmp_path/'hidden'); convert_folder(folder, tmp_path/'hidden', size=16, pseudonymise='s', progress=False); assert mtimes(tmp_path/'hidden')==first

def chunks(png):
    b,i = png.read_bytes(),8
    while i<len(b):
        yield b[i+4:i+8]
        i += 12+int.from_bytes(b[i:i+4],'big')

def test_labels_follow_pseudonyms(tmp_path):
    ann = read_rsna(data_path()).sample(8)
    m = convert_folder([Path(p) for p in ann.images.path], tmp_path/'png', size=64, pseudonymise='s', progress=False)
    hidden = ann.pseudonymise('s').use_pngs(m)
    assert len(hidden)==len(ann) and len(hidden.boxes)==len(ann.boxes) and set(hidden.images.image_id)==set(m.image_id)
    assert hidden.images.patient_id.nunique()==ann.images.patient_id.nunique() and not set(hidden.images.patient_id)&set(ann.images.patient_id)

# --- on to the next chapters

def test_letterboxed_pictures_train_with_boxes_in_place(tmp_path):
    "A bright rectangle on a picture that is not square: the boxes of a batch lie on it"
    from lungdet.formats import Annotations
    boxes = [(20,10,80,40),(120,30,180,70)]
    for k,b in enumerate(boxes):
        a = np.full((80,200), 20, np.uint8); a[b[1]:b[3],b[0]:b[2]] = 250
        save(stored(a, WindowWidth=0), tmp_path/f'{k}.dcm')
    ims = pd.DataFrame(dict(image_id=['0','1'], path=[str(tmp_path/f'{k}.dcm') for k in (0,1)], patient_id=['p','q'], height=80, width=200, split=['train','valid']))
    ann = Annotations(ims, pd.DataFrame([dict(image_id=str(k), x1=b[0], y1=b[1], x2=b[2], y2=b[3], label='x') for k,b in enumerate(boxes)]), ['x'])
    ann = ann.use_pngs(convert_folder(tmp_path, tmp_path/'png', size=100, fit='letterbox', progress=False))
    dls = detection_dls(ann, size=100, bs=1, aug=None, mode='gray', stats=([0.],[1.]), device='cpu')
    for dl in (dls.train,dls.valid):
        x,b,_ = dl.one_batch()
        x1,y1,x2,y2 = b[0,0].round().int().tolist()
        bright = np.argwhere(x[0,0].numpy()>.5)
        assert (bright.min(0)==[y1,x1]).all() and (bright.max(0)+1==[y2,x2]).all()
        assert y2-y1<50 and abs((x2-x1)-30)<=1

def test_stats_are_numpys(tmp_path):
    m = convert_folder(SAMPLE[:6], tmp_path/'png', size=50, mode='stack', progress=False)
    ims = np.stack([cv2.imread(p)[...,::-1] for p in m.path]); ims[:,:9] = 0
    for p,im in zip(m.path,ims): cv2.imwrite(p, im[...,::-1])
    mean,std = foreground_stats(m.path)
    fg = ims[ims.any(-1)]/255
    np.testing.assert_allclose(mean, fg.mean(0)); np.testing.assert_allclose(std, fg.std(0))
    with pytest.raises(ValueError, match='no pixel'): foreground_stats([])
    with pytest.raises(ValueError, match='cannot be read'): foreground_stats([tmp_path/'none.png'])
    with pytest.raises(ValueError, match='leave out the rows'): foreground_stats([m.path[0], None])

# --- the command

def cli(*args): return subprocess.run([Path(sys.executable).parent/'lungdet-convert', *map(str,args)], capture_output=True, text=True)

def test_command(folder, tmp_path):
    ok = cli(folder, tmp_path/'png', '--size', 32, '--mode', 'stack')
    assert ok.returncode==0 and '6 of 6 converted' in ok.stdout and ok.stderr=='' and cv2.imread(str(tmp_path/'png'/'study0.png'), -1).shape==(32,32,3)
    (folder/'bad.dcm').write_bytes(b'x'*500)
    some = cli(folder, tmp_path/'png', '--size', 32, '--mode', 'stack', '--quiet')
    assert some.returncode==1 and '6 of 7 converted' in some.stdout and 'bad.dcm: not a DICOM' in some.stderr and len(some.stderr.splitlines())==1
    for args in ([tmp_path/'none',tmp_path/'png2'], [folder], [folder,tmp_path/'png2','--mode','rgb'], [folder,tmp_path/'png2','--size','0'],
                 [folder,tmp_path/'png2','--workers','0'], [folder,tmp_path/'png2','--pseudonymise',tmp_path/'none']):
        bad = cli(*args)
        assert bad.returncode==2 and bad.stderr and 'Traceback' not in bad.stderr, args
    assert cli('--version').stdout.startswith('lungdet ')
    text = cli('--help').stdout
    for o in ('--size','--mode','--fit','--frame','--ids','--pseudonymise','--workers','--max-gb','Exit code'): assert o in text

def test_command_interrupted(many, tmp_path):
    p = subprocess.Popen([sys.executable, '-c', COMMAND, many, tmp_path/'png', '--size', '200'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path/'png').glob('*.png')): time.sleep(.01)
    p.send_signal(signal.SIGINT); out,err = p.communicate(timeout=30)
    assert p.returncode==130 and 'goes on from there' in err and 'Traceback' not in err
    assert cli(many, tmp_path/'png', '--size', '200', '--quiet').returncode==0 and len(mtimes(tmp_path/'png'))==200

# --- real data

@needs_real
def test_real_headers():
    t = dicom_table(REAL/'rsna'/'stage_2_train_images')
    assert (t.status=='ok').all() and (t.patient_id==t.image_id).all() and set(t['view'])=={'AP','PA'} and set(t.sex)=={'M','F'}
    assert t.height.eq(1024).all() and t.age.dropna().between(1,100).all() and t.spacing.between(.1,.25).all()

@needs_real
def test_real_conversion(tmp_path):
    files = sorted((REAL/'rsna'/'stage_2_train_images').glob('*.dcm'))[::20]
    m = convert_folder(files, tmp_path, size=256, progress=False)
    assert len(m)==len(files)>=30 and (m.status=='ok').all() and m[['path','height','sex','view','spacing','scale_x']].notna().all().all()
    for f in files[:10]:
        ds = read_dicom(f)
        np.testing.assert_array_equal(to_gray(ds), pixel_array(ds))
    assert {cv2.imread(p, -1).shape for p in m.path}=={(256,256)}
