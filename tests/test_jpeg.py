"Chapter 02a: no false alarm on any sound stream, damage found, nothing raised but ValueError"
from pathlib import Path
import cv2, numpy as np, pydicom, pytest, simplejpeg
from pydicom.encaps import get_frame
from dicoms import chest
from lungdet.jpeg import check_jpeg

rng = np.random.default_rng(0)
def textured(h, w, bits, channels=1):
    "A smooth picture with noise, of `bits`"
    y,x = np.mgrid[0:h,0:w]
    a = (np.sin(x/17)+np.cos(y/11)+2)/4*(2**bits-1)+rng.normal(0, 2**bits/200, (h,w))
    a = a.clip(0,2**bits-1).astype(np.uint8 if bits<=8 else np.uint16)
    return a if channels==1 else np.stack([a,a[::-1],a[:,::-1]], -1)

SIZES = [(1,1),(7,13),(8,8),(17,64),(101,67)]

@pytest.mark.parametrize('h,w', SIZES)
def test_sound_8_bit_streams_pass(h, w):
    for n in (1,3):
        a = textured(h,w,8,n)
        for kw in ([],[cv2.IMWRITE_JPEG_OPTIMIZE,1],[cv2.IMWRITE_JPEG_RST_INTERVAL,1],[cv2.IMWRITE_JPEG_RST_INTERVAL,5],[cv2.IMWRITE_JPEG_PROGRESSIVE,1],[cv2.IMWRITE_JPEG_QUALITY,20]):
            check_jpeg(cv2.imencode('.jpg', a, kw)[1].tobytes())
    for sub in ('444','422','420','440','411'): check_jpeg(simplejpeg.encode_jpeg(np.ascontiguousarray(textured(h,w,8,3)), colorsubsampling=sub))

@pytest.mark.parametrize('h,w', SIZES)
def test_sound_deep_and_lossless_streams_pass(h, w):
    ic = pytest.importorskip('imagecodecs')
    for bits in (2,8,10,12,16):
        for n in (1,3): check_jpeg(ic.jpeg8_encode(textured(h,w,bits,n), lossless=True, bitspersample=bits))
    for level in (40,90,100): check_jpeg(ic.jpeg8_encode(textured(h,w,12), bitspersample=12, level=level))

@pytest.mark.filterwarnings('ignore')
def test_sound_files_of_pydicom_pass():
    n = 0
    for f in sorted(Path(pydicom.__file__).parent.joinpath('data').rglob('*.dcm')):
        try: ds = pydicom.dcmread(f)
        except Exception: continue
        if 'PixelData' not in ds or not getattr(ds.file_meta.get('TransferSyntaxUID'), 'name', '').startswith(('JPEG Baseline','JPEG Extended','JPEG Lossless')): continue
        check_jpeg(get_frame(ds.PixelData, 0, number_of_frames=int(ds.get('NumberOfFrames') or 1)))
        n += 1
    assert n>=15

def streams():
    yield 'baseline',cv2.imencode('.jpg', chest(256))[1].tobytes()
    try: import imagecodecs as ic
    except ImportError: return
    yield '12 bit',ic.jpeg8_encode(textured(128,128,12), bitspersample=12, level=90)
    yield 'lossless',ic.jpeg8_encode(textured(128,128,12), lossless=True, bitspersample=12)

@pytest.mark.parametrize('name,code', streams(), ids=lambda o: o if isinstance(o,str) else '')
def test_damage_is_found(name, code):
    begin,found = code.index(b'\xff\xda')+16,dict(cut=0, ended=0, zeroed=0, lost=0)
    for k in map(int, rng.integers(begin, len(code)-300, 100)):
        for what,bad in dict(cut=code[:k], ended=code[:k]+b'\xff\xd9', zeroed=code[:k]+bytes(200)+code[k+200:], lost=code[:k]+code[k+200:]).items():
            try: check_jpeg(bad)
            except ValueError: found[what] += 1
    assert found['cut']==found['ended']==100 and found['zeroed']>=95 and found['lost']>=98, found

@pytest.mark.parametrize('name,code', streams(), ids=lambda o: o if isinstance(o,str) else '')
def test_never_anything_but_a_value_error(name, code):
    for n in range(700):
        b = bytearray(code)
        top = len(b) if n%2 else min(700,len(b)) # half of it in the header
        for k in rng.integers(0, top, rng.integers(1,12)): b[k] = int(rng.choice([0,255,int(rng.integers(256))]))
        try: check_jpeg(bytes(b[:rng.integers(0,len(b))] if n%7==0 else b))
        except ValueError as e: assert str(e)
    for b in (b'', b'\xff', b'\xff\xd8', b'\xff'*10000, b'\xff\xd8\xff\xd9'):
        with pytest.raises(ValueError): check_jpeg(b)
