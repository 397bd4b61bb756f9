"Chapter 02: every branch of `to_gray` against pydicom, damaged files, and conversion that resumes"
import os, warnings
from concurrent.futures import wait
from pathlib import Path

import cv2, numpy as np, pandas as pd, pydicom, pytest
from hypothesis import given, settings, strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing
from pydicom.uid import JPEGBaseline8Bit

from real import REAL, needs_real
from lungdet import dicom
from lungdet.dicom import (DicomError, convert_folder, dicom_table, enhance, parse_age, read_dicom, resize, to_gray)

rng = np.random.default_rng(0)

def stored(a, bits=None, kind='MONOCHROME2', **header):
    ds = Dataset()
    ds.set_pixel_data(a, kind, bits or 8*a.itemsize, generate_instance_uid=False)
    for k,v in header.items(): setattr(ds, k, v)
    return ds

def jpeg(a, quality=90, photometric='MONOCHROME2', **header):
    "A DICOM with `a` as baseline JPEG"
    ds = stored(a, kind='RGB' if a.ndim==3 else photometric, **header)
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    if a.ndim==3: ds.PhotometricInterpretation = 'YBR_FULL_422'
    code = cv2.imencode('.jpg', a[...,::-1] if a.ndim==3 else a, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    ds.PixelData = encapsulate([code.tobytes()])
    ds['PixelData'].VR = 'OB'
    return ds

def save(ds, path):
    ds.SOPClassUID, ds.SOPInstanceUID = '1.2.840.10008.5.1.4.1.1.7', '1.2.3'
    ds.save_as(path, enforce_file_format=True)
    return path

def chest(n=256):
    "Something smooth with a little texture, uint8 (n,n)"
    y,x = np.mgrid[-1:1:n*1j,-1:1:n*1j]
    return np.clip(130+80*np.cos(3*x)*np.sin(2*y)+np.random.default_rng(1).normal(0,6,(n,n)), 0, 255).astype(np.uint8)

# --- to_gray against pydicom

def test_8bit_passes_untouched():
    a = chest()
    np.testing.assert_array_equal(to_gray(stored(a)), a)
    for kw in (dict(RescaleSlope=1, RescaleIntercept=0), dict(WindowWidth=0, WindowCenter=0), dict(PixelPaddingValue=0),
               dict(WindowCenter='', WindowWidth='')):
        np.testing.assert_array_equal(to_gray(stored(a, **kw)), a)
    np.testing.assert_array_equal(to_gray(stored(a, WindowCenter=128, WindowWidth=256)), a) # the identity window

def test_monochrome1_is_inverted():
    a = chest()
    np.testing.assert_array_equal(to_gray(stored(a, kind='MONOCHROME1')), 255-a)
    deep = a.astype(np.uint16)*16
    kw = dict(bits=12, WindowCenter=2000, WindowWidth=3000)
    np.testing.assert_allclose(to_gray(stored(deep, kind='MONOCHROME1', **kw)).astype(int)+to_gray(stored(deep, **kw)), 255, atol=1)

def test_result_belongs_to_the_caller():
    ds = stored(chest())
    g = to_gray(ds)
    g[:] = 0
    assert to_gray(ds).any() and g.flags.writeable and g.flags.c_contiguous

def test_jpeg_is_identical_to_pydicom():
    for q in (30, 75, 95):
        ds = jpeg(chest(), q)
        np.testing.assert_array_equal(to_gray(ds), ds.pixel_array)

@pytest.mark.parametrize('bits', [9, 10, 12, 16])
@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('function', ['LINEAR', 'LINEAR_EXACT', 'SIGMOID', None])
def test_window_is_pydicoms(bits, signed, function):
    lo,hi = (-2**(bits-1), 2**(bits-1)) if signed else (0, 2**bits)
    a = rng.integers(lo, hi, (32,40)).astype(np.int16 if signed else np.uint16)
    slope,off = 2., -1024.
    c,w = slope*(lo+hi)/2+off, slope*(hi-lo)/3
    ds = stored(a, bits, WindowCenter=c, WindowWidth=w, RescaleSlope=slope, RescaleIntercept=off)
    if function: ds.VOILUTFunction = function
    y = apply_windowing(apply_modality_lut(ds.pixel_array, ds), ds)
    y0,y1 = slope*lo+off, slope*(hi-1)+off
    np.testing.assert_allclose(to_gray(ds), (y-y0)/(y1-y0)*255, atol=.51)

def test_first_of_several_windows():
    a = rng.integers(0, 4096, (16,16)).astype(np.uint16)
    two,one = stored(a, 12, WindowCenter=[1000,3000], WindowWidth=[500,900]), stored(a, 12, WindowCenter=1000, WindowWidth=500)
    np.testing.assert_array_equal(to_gray(two), to_gray(one))

def test_negative_slope_keeps_order():
    a = np.arange(4096, dtype=np.uint16).reshape(64,64)
    g = to_gray(stored(a, 12, RescaleSlope=-1, RescaleIntercept=4095, WindowCenter=2048, WindowWidth=4096))
    assert g[0,0]==255 and g[-1,-1]==0 and (np.diff(g.ravel().astype(int))<=0).all()

def test_voi_table():
    a = rng.integers(0, 256, (16,16)).astype(np.uint16)
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [256,0,16], [int(65535*(i/255)**2) for i in range(256)]
    item['LUTDescriptor'].VR = item['LUTData'].VR = 'US'
    ds = stored(a, 12, VOILUTSequence=[item])
    np.testing.assert_allclose(to_gray(ds), apply_voi(a, ds)/65535*255, atol=.51)

@pytest.mark.parametrize('kw', [{}, dict(WindowCenter=100, WindowWidth=0), dict(WindowCenter=30000, WindowWidth=2)])
def test_percentiles_without_a_usable_window(kw):
    a = rng.normal(1000, 100, (64,64)).clip(500,1500).astype(np.uint16)
    a[:4] = 0; a[4:6] = 4095
    g = to_gray(stored(a, 12, **kw))
    inner = a[(a>0)&(a<4095)]
    lo,hi = np.percentile(inner, (.5,99.5))
    np.testing.assert_allclose(g, np.clip((a.astype(float)-lo)/(hi-lo),0,1)*255, atol=.51)

def test_constant_pictures():
    for v in (0, 7, 4095): assert to_gray(stored(np.full((8,8), v, np.uint16), 12)).std()==0
    two = np.where(np.eye(8)>0, 3000, 10).astype(np.uint16)
    assert set(np.unique(to_gray(stored(two, 12))))=={0,255}

def test_padding_is_black_and_not_counted():
    a = rng.normal(1000, 100, (64,64)).astype(np.int16)
    ref = to_gray(stored(a.copy()))
    a[:, :20] = -2000
    g = to_gray(stored(a, PixelPaddingValue=-2000))
    assert (g[:,:20]==0).all()
    np.testing.assert_allclose(g[:,20:].astype(int), ref[:,20:], atol=16)
    inv = to_gray(stored(a, kind='MONOCHROME1', PixelPaddingValue=-2000))
    assert (inv[:,:20]==0).all() and inv[:,20:].mean()>90
    assert (to_gray(stored(a, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1500))[:,:20]==0).all()

def test_colour_to_gray():
    rgb = rng.integers(0, 256, (24,32,3)).astype(np.uint8)
    np.testing.assert_array_equal(to_gray(stored(rgb, kind='RGB')), cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))
    smooth = np.stack([chest(64)]*3, -1)
    np.testing.assert_allclose(to_gray(jpeg(smooth)).astype(int), smooth[...,0], atol=16)

def test_what_is_no_single_gray_picture():
    for ds,why in [(stored(np.zeros((3,8,8),np.uint8)), '3 frames'), (stored(chest(8), Rows=9), 'pixel'),
                   (stored(chest(8), PhotometricInterpretation='HSV'), 'HSV')]:
        with pytest.raises(DicomError, match=why): to_gray(ds)

# --- damage

def test_damaged_jpeg_is_an_error(tmp_path):
    good = jpeg(chest(), SOPClassUID='1.2.840.10008.5.1.4.1.1.7')
    frame = pydicom.encaps.get_frame(good.PixelData, 0, number_of_frames=1)
    n = len(frame)
    for bad in (frame[:n//2], frame[:n-200], frame[:n//2]+bytes(400)+frame[n//2+400:], frame[:20], b'', bytes(n)):
        ds = jpeg(chest())
        ds.PixelData = encapsulate([bad]) if bad else b''
        with pytest.raises(DicomError): to_gray(ds)
    with pytest.raises(DicomError, match='256x256'):
        ds = jpeg(chest(128)); ds.Rows = ds.Columns = 256; to_gray(ds)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('encoded', [True, False])
def test_cut_anywhere_is_an_error_or_the_same_picture(tmp_path, encoded):
    path = save(jpeg(chest(64)) if encoded else stored(chest(64)), tmp_path/'a.dcm')
    whole, want = path.read_bytes(), to_gray(read_dicom(path))
    opened = 0
    for n in [*range(0, 900, 5), *range(900, len(whole), 97), *range(len(whole)-12, len(whole))]:
        path.write_bytes(whole[:n])
        try: got = to_gray(read_dicom(path))
        except DicomError as e: assert str(path) in str(e)
        else:
            opened += 1
            np.testing.assert_array_equal(got, want)
    assert opened<=8 # only the trailing delimiter may be missing

@pytest.mark.filterwarnings('ignore')
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 700), st.binary(min_size=1, max_size=8))
def test_overwritten_header_never_raises_anything_else(tmp_path_factory, at, junk):
    path = tmp_path_factory.mktemp('fuzz')/'a.dcm'
    b = bytearray(save(jpeg(chest(16)), path).read_bytes())
    b[at:at+len(junk)] = junk
    path.write_bytes(bytes(b))
    try: g = to_gray(read_dicom(path))
    except DicomError: return
    assert g.dtype==np.uint8 and g.ndim==2

@pytest.mark.filterwarnings('ignore')
def test_pydicoms_own_files():
    "188 odd files of pydicom's wheel: a picture or a DicomError, nothing else"
    base = Path(pydicom.__file__).parent/'data'/'test_files'
    ok,bad = 0,0
    for f in base.rglob('*'):
        if not f.is_file(): continue
        try: g = to_gray(read_dicom(f))
        except DicomError: bad += 1
        else:
            assert g.dtype==np.uint8 and g.ndim==2
            ok += 1
    assert ok>=70 and bad>=20

def test_without_preamble(tmp_path):
    ds = stored(chest(32)); del ds.file_meta
    p = tmp_path/'bare.dcm'
    ds.save_as(p, implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(to_gray(read_dicom(p)), chest(32))

# --- small functions

def test_enhance_and_resize():
    g = chest(200)
    for n in (50, 100): np.testing.assert_allclose(resize(g, n), g.reshape(n,200//n,n,200//n).mean((1,3)), atol=.51)
    assert resize(g, 200) is g and resize(g, 333).shape==(333,333)
    stripes = np.tile(np.array([[0,255]], np.uint8), (40,100))                      # (40,200): shrinks along x, grows along y
    assert resize(stripes, 100).std()<2
    s = enhance(g, 'stack')
    np.testing.assert_array_equal(s[...,1], np.round(255*(g/255)**.6))
    np.testing.assert_array_equal(s[...,2], cv2.createCLAHE(2,(8,8)).apply(g))
    for bad in (lambda: enhance(g,'x'), lambda: enhance(s), lambda: enhance(g/255.), lambda: resize(g,0)):
        with pytest.raises(ValueError): bad()

@given(st.integers(0, 400), st.sampled_from(['','Y','M','W','D']), st.booleans())
def test_parse_age(n, unit, pad):
    got = parse_age(f'{n:03d}{unit}' if pad else f'{n}{unit}')
    years = n/dict(Y=1,M=12,W=365.25/7,D=365.25)[unit or 'Y']
    assert pd.isna(got) if years>120 else abs(got-years)<1e-9

def test_parse_age_of_nothing():
    assert all(pd.isna(parse_age(s)) for s in (None, '', ' ', 'Y', '-5', '4.5Y', 'unknown', pd.NA, np.nan, '²'))
    assert parse_age(' 058y ')==58 and parse_age(58)==58

# --- folders

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

def test_table(folder, recwarn):
    (folder/'old.dcm').write_bytes(b'')
    t = dicom_table(folder).set_index('image_id')
    assert sorted(t.index)==['1.2.840.5','old',*[f'study{i}' for i in range(5)]]
    r = t.loc['study0']
    assert (r.patient_id,r.height,r.width,r.sex,r.view,r.spacing,r.status)==('P0',64,64,'F','AP',.2,'ok')
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

def mtimes(dst): return {p.name:p.stat().st_mtime_ns for p in dst.glob('*.png')}

def test_convert_and_resume(folder, tmp_path, capsys):
    dst = tmp_path/'png'
    conv = lambda **kw: convert_folder(folder, dst, **dict(dict(size=32, progress=False), **kw))
    m = conv()
    assert m.columns.tolist()[:14]=='image_id source path patient_id height width size mode age sex view spacing status reason'.split()
    assert len(m)==6 and (m.status=='ok').all() and all(Path(p).is_file() for p in m.path)
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
    first = mtimes(dst); conv(size=16); assert len(changed())==6                              # other size
    first = mtimes(dst); (dst/'manifest.csv').write_text('garbage\n"'); conv(size=16); assert len(changed())==6
    assert not [p for p in dst.iterdir() if p.suffix not in ('.png','.csv')] and capsys.readouterr().out==''
    cols = ['image_id','size','status']
    pd.testing.assert_frame_equal(pd.read_csv(dst/'manifest.csv')[cols], conv(size=16).sort_values('image_id', ignore_index=True)[cols])

def test_failures_are_rows(folder, tmp_path, capsys):
    dst = tmp_path/'png'
    convert_folder(folder, dst, size=32, progress=False)
    (folder/'a'/'study0.dcm').write_bytes((folder/'a'/'study0.dcm').read_bytes()[:-500])
    m = convert_folder(folder, dst, size=32, progress=False).set_index('image_id')
    assert m.status.value_counts().to_dict()==dict(ok=5, failed=1) and 'study0.dcm' in m.loc['study0','reason']
    assert not (dst/'study0.png').exists() # what it showed is no longer the source
    assert '1 of 6 files failed' in capsys.readouterr().out
    m = convert_folder([folder/'a'/'study2.dcm', folder/'gone.dcm'], dst, size=32, progress=False)
    assert m.status.tolist()==['ok','failed']
    assert set(pd.read_csv(dst/'manifest.csv').image_id)>={'study1','study2','gone'} # rows of other sources are kept

def test_wrong_calls(folder, tmp_path):
    dst = tmp_path/'png'
    for src,why in [(folder/'none','no such folder'), ([], 'no DICOM'), (tmp_path, None)]:
        if why is None: (tmp_path/'study0.dcm').write_bytes(b''); why = 'study0.*study0'
        with pytest.raises(DicomError, match=why): convert_folder(src, dst, progress=False)
    with pytest.raises(ValueError, match='mode'): convert_folder(folder, dst, mode='rgb')
    with pytest.raises(ValueError, match='size'): convert_folder(folder, dst, size=0)

def test_interrupt_keeps_finished_work(folder, tmp_path, monkeypatch):
    dst, real, seen = tmp_path/'png', dicom._convert, []
    convert_folder(folder, dst, size=16, progress=False)
    def slow(i, *a):
        seen.append(i)
        if len(seen)==4: raise KeyboardInterrupt
        return real(i, *a)
    monkeypatch.setattr(dicom, '_convert', slow)
    with pytest.raises(KeyboardInterrupt): convert_folder(folder, dst, size=32, n_workers=1, progress=False)
    monkeypatch.undo()
    done = pd.read_csv(dst/'manifest.csv')
    assert len(done)>=3 and (done['size']==32).all() # no row of the 16 px pictures that were about to be redone
    assert all(cv2.imread(p, -1).shape==(32,32) for p in done.path)
    first = mtimes(dst)
    assert (convert_folder(folder, dst, size=32, progress=False).status=='ok').all()
    assert sum(first[k]==v for k,v in mtimes(dst).items())==len(done)

def test_interrupt_records_what_ran_meanwhile(folder, tmp_path, monkeypatch):
    "Jobs that finish after the last row was collected are on record too"
    def one_then_ctrl_c(jobs):
        yield jobs[0]
        wait(jobs)
        raise KeyboardInterrupt
    monkeypatch.setattr(dicom, 'as_completed', one_then_ctrl_c)
    with pytest.raises(KeyboardInterrupt): convert_folder(folder, tmp_path/'png', size=32, progress=False)
    assert len(pd.read_csv(tmp_path/'png'/'manifest.csv'))==6

# --- real data

@needs_real
def test_real_headers():
    t = dicom_table(REAL/'rsna'/'stage_2_train_images')
    assert (t.status=='ok').all() and (t.patient_id==t.image_id).all() and set(t.view)=={'AP','PA'} and set(t.sex)=={'M','F'}
    assert t.height.eq(1024).all() and t.age.dropna().between(1,100).all() and t.spacing.between(.1,.25).all()

@needs_real
def test_real_conversion(tmp_path):
    files = sorted((REAL/'rsna'/'stage_2_train_images').glob('*.dcm'))[::20]
    m = convert_folder(files, tmp_path, size=256, progress=False)
    assert len(m)==len(files)>=30 and (m.status=='ok').all() and m.drop(columns=['age','reason']).notna().all().all()
    for f in files[:10]:
        ds = read_dicom(f)
        np.testing.assert_array_equal(to_gray(ds), ds.pixel_array)
    assert {cv2.imread(p, -1).shape for p in m.path}=={(256,256)}
