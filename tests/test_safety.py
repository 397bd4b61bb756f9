"Chapter 16b: hostile files end in one error and cost little memory; the look for text, and what it misses"
import pickle
import cv2, numpy as np, pydicom, pytest
from hypothesis import given, settings, strategies as st

from dicoms import chest, stored
from real import REAL, needs_real
from lungdet.convert import convert_folder, sources
from lungdet.core import XYXY
from lungdet.dicom import DicomError, read_dicom, to_gray
from lungdet.learner import load_detector
from lungdet.safety import burned_in_text, hostile_files, says_burned_in, withstand
from lungdet.single import load_weights

def pictures(path, most=2**20): return [to_gray(read_dicom(str(s), s.read(most), most)) for s in sources(path).values()]

@pytest.fixture(scope='module')
def files(tmp_path_factory): return hostile_files(tmp_path_factory.mktemp('hostile'))

def write(gray, text, at, height=22, value=255): return cv2.putText(gray.copy(), text, at, cv2.FONT_HERSHEY_SIMPLEX, height/22, value, max(1,height//10), cv2.LINE_AA)

def test_every_hostile_picture_is_refused_at_little_cost(files):
    res = withstand(pictures, {k:v for k,v in files.items() if v.suffix!='.safetensors'}, errors=DicomError)
    assert (res.outcome=='refused').all() and res.peak.max()<8 and (res.why.str.len()>10).all()

def test_the_bombs_are_bombs(files):
    "With room to unpack, they take what they claim"
    res = withstand(lambda p: pictures(p, 2**28), {k:files[k] for k in ('deflate bomb','zip bomb')})
    assert (res.peak>=32).all()
    assert all(files[k].stat().st_size<2**16 for k in files)

def test_defaults_refuse_what_no_machine_can_hold(files):
    res = withstand(lambda p: to_gray(read_dicom(p)), {k:files[k] for k in ('claims 65,535 x 65,535','claims 10,000,000 frames')})
    assert (res.outcome=='refused').all() and res.peak.max()<8

def test_a_pickle_is_not_unpickled(tmp_path):
    files = hostile_files(tmp_path)
    for load in (load_detector,load_weights): assert withstand(load, {'p':files['pickle']}).outcome['p']=='refused'
    assert not (tmp_path/'harm').exists()
    pickle.loads(files['pickle'].read_bytes()).close()
    assert (tmp_path/'harm').exists() # it does what it says, to those who let it

def test_nothing_is_written_outside_of_the_folder(files, tmp_path):
    (tmp_path/'a'/'b').mkdir(parents=True)
    convert_folder(files['leads out'], tmp_path/'a'/'b', size=16, progress=False)
    assert {p.name for p in tmp_path.rglob('*') if p.is_file()}<={'manifest.csv'}

def test_withstand_tells_outcomes_apart(tmp_path):
    (tmp_path/'x').write_bytes(b'x')
    def key(p): raise KeyError('k')
    def value(p): raise ValueError(f'{p} is bad')
    assert withstand(key, {'x':tmp_path/'x'}).outcome['x']=='KeyError'
    assert withstand(value, {'x':tmp_path/'x'}).loc['x',['outcome','why']].tolist()==['refused','x is bad']
    assert withstand(lambda p: np.zeros(2**24, np.uint8), {'x':tmp_path/'x'}).loc['x',['outcome','peak']].tolist()==['read',16]

def test_label_files_that_are_xml_bombs_do_not_unfold(tmp_path):
    from lungdet.readers import read_voc
    lol = '<!DOCTYPE a [<!ENTITY l0 "lol">'+''.join(f'<!ENTITY l{i} "{f"&l{i-1};"*10}">' for i in range(1,10))+']><annotation><filename>&l9;</filename></annotation>'
    (tmp_path/'a.xml').write_text(lol)
    out = withstand(lambda p: read_voc(tmp_path), {'bomb':tmp_path/'a.xml'})
    assert out.outcome['bomb']!='read' and out.peak['bomb']<100

def test_header_says():
    for v,want in (('YES',True), ('NO',False), ('yes ',True), ('',None), ('PERHAPS',None)):
        ds = stored(chest(8)); ds.add_new('BurnedInAnnotation', 'CS', v) if v.isupper() or not v else ds.add(pydicom.DataElement('BurnedInAnnotation', 'CS', v, validation_mode=0))
        assert says_burned_in(ds) is want
    assert says_burned_in(stored(chest(8))) is None

@pytest.mark.parametrize('size', [512, 1024, 3000])
@pytest.mark.parametrize('text', ['DOE JANE', '1970-03-12', 'PORTABLE'])
def test_text_is_found_where_it_is(size, text):
    im = np.full((size,size), 60, np.uint8)
    h = max(12, size//45)
    im = write(im, text, (size//5,size//3), h)
    got = burned_in_text(im)
    y,x = np.where(im>200)
    want = np.array([x.min(), y.min(), x.max()+1, y.max()+1])
    both = [*got[['x1','y1']].min(), *got[['x2','y2']].max()]
    assert len(got)>0 and np.abs(both-want).max()<=h

def test_what_is_no_text():
    noise = np.random.default_rng(0).normal(128, 40, (512,512)).clip(0,255).astype(np.uint8)
    assert len(burned_in_text(np.zeros((512,512), np.uint8)))==0 and len(burned_in_text(noise))==0 and len(burned_in_text(chest(512)))==0
    assert len(burned_in_text(write(np.zeros((512,512), np.uint8), 'L', (50,60), 30)))==0 # a marker is one letter
    assert len(burned_in_text(write(np.zeros((512,512), np.uint8), 'L', (50,60), 30), letters=1))==1

def test_known_misses():
    "What the page says that it misses is missed; if one of these is found, say so there"
    g = np.full((512,512), 60, np.uint8)
    assert len(burned_in_text(write(np.full((512,512), 200, np.uint8), 'JANE DOE', (50,200), value=0)))==0
    assert len(burned_in_text(write(g, 'JANE', (10,300), 120)))==0
    assert len(burned_in_text(write(g, 'JANE DOE', (50,200), value=100)))==0
    assert len(burned_in_text(cv2.rotate(write(g, 'JANE DOE', (50,200)), cv2.ROTATE_90_CLOCKWISE)))==0

def test_bad_pictures():
    for bad in (np.zeros((8,8,3), np.uint8), np.zeros((8,8)), np.zeros((8,8), np.uint16)):
        with pytest.raises(ValueError, match='uint8'): burned_in_text(bad)
    for shape in ((1,1), (1,2000), (2000,3), (8,8)): assert len(burned_in_text(np.zeros(shape, np.uint8)))==0

@settings(max_examples=25, deadline=None)
@given(st.integers(1,90), st.integers(1,90), st.integers(0,2**31))
def test_any_picture(h, w, seed):
    got = burned_in_text(np.random.default_rng(seed).integers(0, 256, (h,w)).astype(np.uint8), letters=1, contrast=20)
    assert list(got.columns)==[*XYXY,'letters','score'] and (got.x2<=w+1).all() and (got.y2<=h+1).all() and got.score.between(.5,1).all()

@needs_real
def test_real_radiographs():
    files = sorted((REAL/'rsna'/'stage_2_train_images').glob('*.dcm'))[:40]
    fired = [len(burned_in_text(to_gray(read_dicom(f))))>0 for f in files]
    assert 2<=sum(fired)<=20 # about a quarter have PORTABLE or the like on them
