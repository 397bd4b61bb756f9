"Chapter 02: every branch of `to_gray` against pydicom or arithmetic, every transfer syntax, damaged files"
import importlib.util, signal, struct, time, zlib
from pathlib import Path

import cv2, numpy as np, pandas as pd, pydicom, pytest
from hypothesis import given, settings, strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing, convert_color_space
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, HTJ2KLossless, ImplicitVRLittleEndian,
                         JPEG2000Lossless, JPEGExtended12Bit, JPEGLosslessSV1, JPEGLSLossless, RLELossless)

from dicoms import chest, jpeg, save, stored
from real import REAL
from lungdet import dicom
from lungdet.dicom import DicomError, header_fields, parse_age, read_dicom, to_gray

rng = np.random.default_rng(0)
needs_codecs = pytest.mark.skipif(importlib.util.find_spec('imagecodecs') is None, reason='needs the extra [codecs]')

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
    with pytest.raises(DicomError, match='256 x 256'):
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

@given(st.integers(0, 400), st.sampled_from(['','Y','M','W','D']), st.booleans())
def test_parse_age(n, unit, pad):
    got = parse_age(f'{n:03d}{unit}' if pad else f'{n}{unit}')
    years = n/dict(Y=1,M=12,W=365.25/7,D=365.25)[unit or 'Y']
    assert pd.isna(got) if years>120 else abs(got-years)<1e-9

def test_parse_age_of_nothing():
    assert all(pd.isna(parse_age(s)) for s in (None, '', ' ', 'Y', '-5', '4.5Y', 'unknown', pd.NA, np.nan, '²'))
    assert pd.isna(parse_age('9'*5000))
    assert parse_age(' 058y ')==58 and parse_age(58)==58

# --- a smaller picture out of the decoder

def test_smaller_decoding_is_close_to_area_average():
    for q in (60,90):
        ds = jpeg(chest(512), q)
        for n,f in ((256,2),(128,4),(200,2)):
            got = to_gray(ds, at_least=(n,n))
            assert got.shape==(512//f,512//f)
            want = ds.pixel_array.reshape(512//f,f,512//f,f).mean((1,3))
            assert np.abs(got-want).mean()<1 and np.abs(got-want).max()<=12
    assert to_gray(jpeg(chest(512)), at_least=(257,100)).shape==(512,512)
    for kw in (dict(WindowCenter=100, WindowWidth=50), dict(PixelPaddingValue=0), dict(RescaleSlope=2)): # what follows is not linear
        assert to_gray(jpeg(chest(512), **kw), at_least=(256,256)).shape==(512,512)
    inv = jpeg(chest(512), photometric='MONOCHROME1')
    np.testing.assert_array_equal(to_gray(inv, at_least=(256,256)), 255-to_gray(jpeg(chest(512)), at_least=(256,256)))

# --- more branches

def test_overlay_in_the_unused_bits_is_ignored():
    a = rng.integers(0, 4096, (16,16)).astype(np.uint16)
    ds = stored(a, 12, WindowCenter=2048, WindowWidth=4096)
    want = to_gray(ds)
    ds.PixelData = (a|0x8000*rng.integers(0,2,a.shape).astype(np.uint16)).tobytes()
    np.testing.assert_array_equal(to_gray(ds), want)

def test_modality_table():
    a = rng.integers(0, 256, (16,16)).astype(np.uint16)
    item = Dataset(); item.LUTDescriptor,item.LUTData = [256,0,16],[min(65535,i*i) for i in range(256)]
    item['LUTDescriptor'].VR = item['LUTData'].VR = 'US'
    ds = stored(a, 12, ModalityLUTSequence=[item], WindowCenter=20000, WindowWidth=30001)
    np.testing.assert_allclose(to_gray(ds), np.clip((a.astype(float)**2-19999.5)/30000+.5, 0, 1)*255, atol=.51)

def test_native_ybr_is_converted():
    ybr = rng.integers(0, 256, (8,12,3)).astype(np.uint8)
    ds = stored(ybr, kind='RGB'); ds.PhotometricInterpretation = 'YBR_FULL'
    np.testing.assert_array_equal(to_gray(ds), cv2.cvtColor(convert_color_space(ybr,'YBR_FULL','RGB'), cv2.COLOR_RGB2GRAY))

def test_planes_of_colour():
    rgb = rng.integers(0, 256, (8,12,3)).astype(np.uint8)
    ds = stored(rgb, kind='RGB')
    ds.PlanarConfiguration,ds.PixelData = 1,np.moveaxis(rgb,-1,0).tobytes()
    np.testing.assert_array_equal(to_gray(ds), cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))

def test_deep_colour():
    rgb = rng.integers(0, 65536, (8,12,3)).astype(np.uint16)
    np.testing.assert_array_equal(to_gray(stored(rgb, kind='RGB')), cv2.cvtColor((rgb>>8).astype(np.uint8), cv2.COLOR_RGB2GRAY))

def palette(a, bits):
    ds = stored(a)
    ds.PhotometricInterpretation = 'PALETTE COLOR'
    for k,c in enumerate(('Red','Green','Blue')):
        table = ((np.arange(256)*(k+1)%256)*(1 if bits==8 else 257)).astype(np.uint8 if bits==8 else np.uint16)
        setattr(ds, f'{c}PaletteColorLookupTableDescriptor', [256,0,bits]); setattr(ds, f'{c}PaletteColorLookupTableData', table.tobytes())
    return ds

@pytest.mark.parametrize('bits', [8,16])
def test_palette(bits):
    a = rng.integers(0, 256, (8,12)).astype(np.uint8)
    rgb = np.stack([a.astype(int)*(k+1)%256 for k in range(3)], -1).astype(np.uint8)
    np.testing.assert_array_equal(to_gray(palette(a,bits)), cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))

def test_frames():
    film = np.stack([chest(32), 255-chest(32)])
    ds = stored(film)
    with pytest.raises(DicomError, match='2 frames and no word which'): to_gray(ds)
    for k in (0,1): np.testing.assert_array_equal(to_gray(ds, frame=k), film[k])
    for k in (2,-1):
        with pytest.raises(DicomError, match='there is no frame'): to_gray(ds, frame=k)
    two = jpeg(chest(32)); two.NumberOfFrames = 2
    codes = [get_frame(jpeg(o).PixelData, 0, number_of_frames=1) for o in film]
    two.PixelData = encapsulate(codes)
    np.testing.assert_array_equal(to_gray(two, frame=1), to_gray(jpeg(film[1])))
    np.testing.assert_array_equal(to_gray(stored(chest(16)), frame=0), chest(16))

def test_8_bits_in_16_pass_untouched():
    a = chest(32)
    np.testing.assert_array_equal(to_gray(stored(a.astype(np.uint16), 8)), a)

def test_a_useless_window_is_judged_without_the_padding():
    a = rng.normal(1000, 100, (64,64)).astype(np.int16); a[:,:20] = -2000
    g = to_gray(stored(a, PixelPaddingValue=-2000, WindowCenter=-1500, WindowWidth=10)) # all of the patient is white in it
    assert g[:,20:].std()>30 and (g[:,:20]==0).all()

def test_voi_table_that_holds_more_than_it_says():
    item = Dataset(); item.LUTDescriptor,item.LUTData = [4,0,10],[0,500,1023,4000]
    item['LUTDescriptor'].VR = item['LUTData'].VR = 'US'
    assert to_gray(stored(np.array([[0,1,2,3]],np.uint16), 12, VOILUTSequence=[item])).tolist()==[[0,125,255,255]]

def test_slope_of_zero():
    with pytest.raises(DicomError, match='RescaleSlope is 0'): to_gray(stored(DEEP, 12, RescaleSlope=0, RescaleIntercept=5))

def test_deep_floats():
    a = rng.normal(0, 1, (32,32)).astype(np.float32)
    ds = stored(DEEP[:32,:32].copy(), 12)
    del ds.PixelData; ds.FloatPixelData,ds.BitsAllocated = a.tobytes(),32
    inner = np.sort(a.ravel())[1:-1]; lo,hi = np.percentile(inner, (.5,99.5))
    np.testing.assert_allclose(to_gray(ds), np.clip((a-lo)/(hi-lo),0,1)*255, atol=.51)

# --- every transfer syntax

def as_syntax(a, uid, signed=False, **kw):
    "`a` (h,w) written with the transfer syntax `uid`"
    ds = stored(a, kw.pop('bits', None), **kw)
    if uid in (RLELossless,JPEGLSLossless,JPEG2000Lossless): ds.compress(uid, generate_instance_uid=False)
    elif uid in (JPEGLosslessSV1,JPEGExtended12Bit,HTJ2KLossless):
        import imagecodecs
        if uid==HTJ2KLossless and not hasattr(imagecodecs,'htj2k_encode'): pytest.skip('this imagecodecs does not write HTJ2K')
        u = a.view(np.uint16)&(2**ds.BitsStored-1) if a.itemsize==2 else a
        code = (imagecodecs.htj2k_encode(a) if uid==HTJ2KLossless else imagecodecs.jpeg8_encode(u, lossless=True, bitspersample=ds.BitsStored)
                if uid==JPEGLosslessSV1 else imagecodecs.jpeg8_encode(u, level=95, bitspersample=12))
        ds.PixelData = encapsulate([bytes(code)]); ds['PixelData'].VR = 'OB'
    ds.file_meta.TransferSyntaxUID = uid
    return ds

DEEP = (np.kron(rng.integers(0,4096,(24,20)), np.ones((3,4)))+rng.integers(-9,9,(72,80))).clip(0,4095).astype(np.uint16)
NATIVE = ImplicitVRLittleEndian,ExplicitVRLittleEndian,ExplicitVRBigEndian,DeflatedExplicitVRLittleEndian

@pytest.mark.parametrize('uid', [*NATIVE,RLELossless,JPEGLSLossless,JPEG2000Lossless, *(pytest.param(u, marks=needs_codecs) for u in (JPEGLosslessSV1,HTJ2KLossless))],
                         ids=lambda u: u.name.split(',')[0])
def test_lossless_syntaxes_are_the_same_picture(uid, tmp_path):
    for a,kw in ((DEEP, dict(bits=12, WindowCenter=2048, WindowWidth=4096)), (chest(64), {})):
        ds = as_syntax(a, uid, **kw)
        if uid==ExplicitVRBigEndian and a.itemsize==2: ds.PixelData = a.astype('>u2').tobytes()
        path = tmp_path/'a.dcm'
        ds.SOPClassUID,ds.SOPInstanceUID = '1.2.840.10008.5.1.4.1.1.7','1.2.3'
        ds.save_as(path, implicit_vr=uid==ImplicitVRLittleEndian, little_endian=uid!=ExplicitVRBigEndian)
        got = read_dicom(path)
        assert got.file_meta.TransferSyntaxUID==uid
        np.testing.assert_array_equal(to_gray(got), to_gray(stored(a, **kw)))

@needs_codecs
def test_jpeg_of_12_bits():
    kw = dict(bits=12, WindowCenter=2048, WindowWidth=4096)
    a = cv2.GaussianBlur(DEEP, (0,0), 3)
    np.testing.assert_allclose(to_gray(as_syntax(a, JPEGExtended12Bit, **kw)).astype(int), to_gray(stored(a, **kw)), atol=2)

@needs_codecs
@pytest.mark.parametrize('bits', [12,16])
def test_signed_lossless_jpeg(bits):
    a = rng.integers(-2**(bits-1), 2**(bits-1), (24,32)).astype(np.int16)
    kw = dict(bits=bits, WindowCenter=0, WindowWidth=2**(bits-1))
    np.testing.assert_array_equal(to_gray(as_syntax(a, JPEGLosslessSV1, **kw)), to_gray(stored(a, **kw)))

@needs_codecs
def test_without_codecs_the_error_names_the_extra(monkeypatch):
    ds = as_syntax(DEEP, JPEGLosslessSV1, bits=12)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: None if n=='imagecodecs' else find(n, *a))
    with pytest.raises(DicomError, match=r'\[codecs\]'): to_gray(ds)

@pytest.mark.filterwarnings('ignore')
def test_colour_is_that_of_pydicom():
    "Every colour file of pydicom's wheel that it can decode itself"
    n = 0
    for f in sorted(Path(pydicom.__file__).parent.joinpath('data').rglob('*.dcm')):
        try: ds = pydicom.dcmread(f, force=True); a = pydicom.pixels.pixel_array(ds, index=0)
        except Exception: continue
        if a.ndim!=3 or a.dtype!=np.uint8: continue
        np.testing.assert_array_equal(to_gray(read_dicom(f), frame=0), cv2.cvtColor(np.ascontiguousarray(a), cv2.COLOR_RGB2GRAY), err_msg=f.name)
        n += 1
    assert n>=20

# --- claims that cost memory

@pytest.mark.parametrize('claim', [dict(Rows=60000, Columns=60000), dict(NumberOfFrames=10**7), dict(BitsAllocated=64, Rows=40000, Columns=40000)])
def test_too_large_is_refused_before_decoding(claim, tmp_path, monkeypatch):
    ds = jpeg(chest(64))
    for k,v in claim.items(): setattr(ds, k, v)
    path = save(ds, tmp_path/'a.dcm')
    with pytest.raises(DicomError, match='max_bytes'): read_dicom(path)
    with pytest.raises(DicomError, match='max_bytes'): read_dicom(save(jpeg(chest(64)), path), max_bytes=1000)

def test_stream_larger_than_its_header_is_never_decoded(monkeypatch):
    "A JPEG that says 65,500 x 65,500 in a DICOM that says 64 x 64"
    ds = jpeg(chest(64))
    code = bytearray(get_frame(ds.PixelData, 0, number_of_frames=1))
    at = code.index(b'\xff\xc0')
    code[at+5:at+9] = struct.pack('>HH', 65500, 65500)
    ds.PixelData = encapsulate([bytes(code)])
    monkeypatch.setattr(dicom.simplejpeg, 'decode_jpeg', lambda *a, **k: pytest.fail('decoded'))
    with pytest.raises(DicomError, match='65500'): to_gray(ds)

def test_deflated_bomb(tmp_path):
    path = save(as_syntax(chest(64), DeflatedExplicitVRLittleEndian), tmp_path/'a.dcm')
    b = path.read_bytes()
    start = 144+int.from_bytes(b[140:144],'little')
    z = zlib.compressobj(9, zlib.DEFLATED, -15)
    path.write_bytes(b[:start]+z.compress(bytes(50_000_000))+z.flush())
    assert path.stat().st_size<10**5
    with pytest.raises(DicomError, match='unpacks to more than'): read_dicom(path, max_bytes=10**7)

@pytest.mark.parametrize('trick', ['long uid','no group length'])
def test_deflated_bomb_in_disguise(tmp_path, trick):
    ds = as_syntax(chest(64), DeflatedExplicitVRLittleEndian)
    path = save(ds, tmp_path/'a.dcm'); b = path.read_bytes(); n = int.from_bytes(b[140:144],'little')
    meta = b[144:144+n]
    if trick=='long uid': meta = struct.pack('<HH2sH', 2, 1, b'OB', 0)[:6]+bytes(2)+struct.pack('<I',1200)+bytes(1200)+meta
    head = b[:132]+(b[132:140]+struct.pack('<I',len(meta)) if trick=='long uid' else b'')+meta
    z = zlib.compressobj(9, zlib.DEFLATED, -15)
    path.write_bytes(head+z.compress(bytes(50_000_000))+z.flush())
    with pytest.raises(DicomError, match='unpacks to more than'): read_dicom(path, max_bytes=10**7)

def test_progressive_jpeg_is_refused():
    ds = jpeg(chest(64))
    ds.PixelData = encapsulate([cv2.imencode('.jpg', chest(64), [cv2.IMWRITE_JPEG_PROGRESSIVE,1])[1].tobytes()])
    with pytest.raises(DicomError, match='progressive'): to_gray(ds)

def test_memory_of_a_deep_picture_is_what_was_priced(tmp_path):
    import tracemalloc
    a = np.kron(DEEP, np.ones((15,15),np.uint16)) # 1080 x 1200
    ds = read_dicom(save(stored(a, 12), tmp_path/'a.dcm'))
    tracemalloc.start(); to_gray(ds); peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak<=dicom._price(ds, 'a')*1.25

def test_jpeg_ls_without_an_end_does_not_hang():
    ds = as_syntax(DEEP, JPEGLSLossless, bits=12)
    code = get_frame(ds.PixelData, 0, number_of_frames=1)
    ds.PixelData = encapsulate([code[:len(code)//2]])
    with pytest.raises(DicomError, match='end mark'): to_gray(ds)

# --- 2,000 ways to be damaged

class Hang(BaseException): pass
def ring(*_): raise Hang

@pytest.mark.filterwarnings('ignore')
def test_fuzz(tmp_path):
    "Cut, flipped and zeroed, synthetic and real, seven transfer syntaxes: a picture or one DicomError, and soon"
    seeds = {u.name.split(',')[0]: save(as_syntax(DEEP, u, bits=12), tmp_path/f'{i}.dcm').read_bytes()
             for i,u in enumerate((ExplicitVRLittleEndian,DeflatedExplicitVRLittleEndian,RLELossless,JPEGLSLossless,JPEG2000Lossless))}
    seeds['baseline'] = save(jpeg(chest(128)), tmp_path/'b.dcm').read_bytes()
    if importlib.util.find_spec('imagecodecs'): seeds['lossless'] = save(as_syntax(DEEP, JPEGLosslessSV1, bits=12), tmp_path/'l.dcm').read_bytes()
    if (REAL/'rsna').is_dir(): seeds['real'] = sorted((REAL/'rsna'/'stage_2_train_images').glob('*.dcm'))[0].read_bytes()
    r,counts,slowest = np.random.default_rng(7),{},0
    old = signal.signal(signal.SIGALRM, ring)
    try:
        for n in range(2000):
            name = list(seeds)[n%len(seeds)]
            b,kind = bytearray(seeds[name]),('cut','flip','zero')[n//len(seeds)%3]
            if kind=='cut': b = b[:r.integers(0,len(b))]
            elif kind=='flip':
                for k in r.integers(0, len(b), r.integers(1,20)): b[k] ^= 1<<int(r.integers(8))
            else:
                k = int(r.integers(0,len(b))); m = min(len(b)-k, int(r.integers(1,400))); b[k:k+m] = bytes(m)
            begin = time.perf_counter(); signal.alarm(20)
            try: g = to_gray(read_dicom('fuzz', bytes(b), max_bytes=2**26), frame=0)
            except DicomError as e: assert str(e).startswith('fuzz: '); what = 'error'
            else: assert g.dtype==np.uint8 and g.ndim==2; what = 'picture'
            finally: signal.alarm(0)
            slowest = max(slowest, time.perf_counter()-begin)
            counts[name,kind,what] = counts.get((name,kind,what),0)+1
    finally: signal.signal(signal.SIGALRM, old)
    print(pd.Series(counts).unstack(fill_value=0)); print(f'slowest {slowest:.2f} s')
    for name in ('baseline',*(['real'] if 'real' in seeds else [])): # of a JPEG that lost its end, or a stretch of it, hardly anything passes
        assert counts.get((name,'cut','picture'),0)<=3

def test_names_in_any_alphabet(tmp_path):
    ds = stored(chest(8)); ds.SpecificCharacterSet,ds.PatientID = 'ISO_IR 192','Müller1'
    assert header_fields(read_dicom(save(ds, tmp_path/'a.dcm')))['patient_id']=='Müller1'
