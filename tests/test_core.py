"The data of the course: same seed, same files; tags, labels and boxes that agree; errors that say what to do"
import json
import numpy as np, pandas as pd, pytest, torch
import matplotlib; matplotlib.use('Agg')
from pathlib import Path
from pydicom import dcmread
from pydicom.uid import UID
from lungdet import core
from lungdet.core import *
from lungdet.core import IMAGES, LABELS, CLASSES

SAMPLE = Path(__file__).parent.parent/'data'/'sample'

@pytest.fixture(scope='module')
def made(tmp_path_factory): return make_studies(tmp_path_factory.mktemp('core')/'made', 12, seed=3)

@pytest.fixture(scope='module')
def again(tmp_path_factory): return make_sample(tmp_path_factory.mktemp('core')/'sample')

@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.delenv('LUNGDET_DATA', raising=False)
    monkeypatch.setenv('LUNGDET_WORK', str(tmp_path/'work'))
    yield
    core.plt.close('all')

def files(folder): return {str(f.relative_to(folder)):f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()}
def tables(folder): return pd.read_csv(folder/LABELS), pd.read_csv(folder/CLASSES)

def test_same_seed_same_bytes(made, tmp_path):
    assert files(made)==files(make_studies(tmp_path/'b', 12, seed=3, n_workers=1))

def test_a_study_does_not_depend_on_n(made, tmp_path):
    few = make_studies(tmp_path/'few', 4, seed=3)
    assert all((made/IMAGES/f.name).read_bytes()==f.read_bytes() for f in (few/IMAGES).iterdir())
    for a,b in zip(tables(few), tables(made)): pd.testing.assert_frame_equal(a, b.iloc[:len(a)])

def test_another_seed_is_another_set():
    assert not {describe(i,1).id for i in range(50)} & {describe(i,2).id for i in range(50)}

def test_headers(made):
    uids = set()
    for i in range(12):
        s = describe(i, 3); ds = dcmread(made/IMAGES/f'{s.id}.dcm')
        assert ds.file_meta.TransferSyntaxUID.name=='JPEG Baseline (Process 1)' and ds.file_meta.MediaStorageSOPInstanceUID==ds.SOPInstanceUID
        assert (ds.PatientID, str(ds.PatientAge), ds.PatientSex, ds.ViewPosition)==(s.patient, str(s.age), s.sex, s.view)
        assert (ds.Modality, ds.BodyPartExamined, ds.PhotometricInterpretation)==('CR','CHEST','MONOCHROME2')
        assert (ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation)==(1024,1024,8,8,7,0)
        assert len(ds.PixelSpacing)==2 and ds.pixel_array.shape==(1024,1024)
        u = [ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID]
        assert all(UID(o).is_valid for o in u); uids |= set(u)
    assert len(uids)==36

def test_labels_agree_with_the_files(made):
    lab,cls = tables(made)
    assert list(lab)==['patientId','x','y','width','height','Target'] and list(cls)==['patientId','class']
    assert lab.patientId.tolist()==cls.patientId.tolist() and set(lab.patientId)=={f.stem for f in (made/IMAGES).iterdir()}
    assert ((cls['class']=='Lung Opacity')==(lab.Target==1)).all() and (lab.x.notna()==(lab.Target==1)).all()
    assert lab[lab.Target==0].patientId.is_unique

def test_boxes_lie_inside_and_cover_the_opacity():
    for s in [s for s in (describe(i,9) for i in range(40)) if s.category=='Lung Opacity'][:8]:
        maps,boxes = core.layers(s)
        assert 1<=len(boxes)<=2 and (boxes>=0).all() and (boxes<=core.GRID).all() and (boxes[:,2:]-boxes[:,:2]>10).all()
        inside = np.zeros((core.GRID,)*2, bool)
        for x,y,X,Y in boxes.astype(int): inside[y:Y,x:X] = True
        assert maps['opacities'][inside].sum() > .8*maps['opacities'].sum()

def test_shares_ages_views_and_repeated_people():
    d = pd.DataFrame([vars(describe(i)) for i in range(1000)])
    for k,v in core.SHARES.items(): assert abs((d.category==k).mean()-v)<.01
    assert d.age.between(4,92).all() and 44<d.age.mean()<50 and .5<(d.sex=='M').mean()<.64
    pos = d.category=='Lung Opacity'
    assert (d.view[pos]=='AP').mean()>.7 and (d.view[~pos]=='AP').mean()<.45
    assert d.id.is_unique and .1<1-d.patient.nunique()/1000<.3
    assert (d.groupby('patient')[['age','sex']].nunique()==1).all().all()

def test_phantom_sizes_and_depths():
    s = describe(0); im,b = phantom(s, 256); deep,b12 = phantom(s, 128, 12)
    assert im.shape==(256,256) and im.dtype==np.uint8 and deep.dtype==np.uint16 and 255<deep.max()<4096
    np.testing.assert_allclose(b, 2*b12)
    assert im[128,20:236].std()>20 # lungs, ribs and heart on one line

def test_the_sample_is_what_make_sample_makes(again):
    assert sum(len(b) for b in files(SAMPLE).values())<2e6
    assert set(files(SAMPLE))==set(files(again)) and json.loads((SAMPLE/'made.json').read_text())==json.loads((again/'made.json').read_text())
    for a,b in zip(tables(SAMPLE), tables(again)): pd.testing.assert_frame_equal(a, b, rtol=.02)
    for f in (SAMPLE/IMAGES).iterdir(): # another processor may round another way: pixels, not bytes
        a,b = dcmread(f), dcmread(again/IMAGES/f.name)
        assert np.abs(a.pixel_array.astype(float)-b.pixel_array).mean() < (16 if a.BitsStored==12 else 1)
        assert [e for e in a if e.keyword!='PixelData']==[e for e in b if e.keyword!='PixelData']

def test_the_sample_holds_one_of_everything():
    ds = [dcmread(f) for f in (SAMPLE/IMAGES).iterdir()]; lab,cls = tables(SAMPLE)
    assert len(ds)==24 and [d.PhotometricInterpretation for d in ds].count('MONOCHROME1')==1
    deep, = [d for d in ds if d.BitsStored==12]
    assert deep.pixel_array.shape==(384,384) and not deep.file_meta.TransferSyntaxUID.is_compressed and deep.pixel_array.max()>255
    assert sum(str(d.PatientAge).endswith('Y') for d in ds)==1 and len({d.PatientID for d in ds})<24
    assert lab.patientId.value_counts().max()==2 and set(cls['class'])==set(CATEGORY_COLORS)
    size = {f.stem:dcmread(f, stop_before_pixels=True).Rows for f in (SAMPLE/IMAGES).iterdir()}
    pos = lab.dropna(); assert ((pos.x+pos.width)<=pos.patientId.map(size)).all() and ((pos.y+pos.height)<=pos.patientId.map(size)).all()

def test_reuse_refuse_and_leave_nothing_behind(tmp_path, monkeypatch):
    p = make_studies(tmp_path/'a', 1, size=64); t = (p/LABELS).stat().st_mtime_ns
    assert make_studies(p, 1, size=64)==p and (p/LABELS).stat().st_mtime_ns==t
    with pytest.raises(ValueError, match='not empty'): make_studies(p, 2, size=64)
    (tmp_path/'empty').mkdir(); assert (make_studies(tmp_path/'empty', 1, size=64)/LABELS).exists()
    def broken(*args): raise RuntimeError('disk full')
    monkeypatch.setattr(core, 'write_study', broken)
    with pytest.raises(RuntimeError): make_studies(tmp_path/'b', 2, size=64)
    assert sorted(o.name for o in tmp_path.iterdir() if o.name!='work')==['a','empty']

def test_two_at_once(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(3) as ex: out = list(ex.map(lambda _: make_studies(tmp_path/'x', 3, size=64), range(3)))
    assert out==[tmp_path/'x']*3 and len(list((tmp_path/'x'/IMAGES).iterdir()))==3 and not list(tmp_path.glob('.x-*'))

@pytest.mark.skipif(core._repo() is None, reason='lungdet is installed, and no checkout')
def test_data_path_in_a_checkout(): assert data_path().resolve()==SAMPLE.resolve() and data_path(10).resolve()==SAMPLE.resolve()

def test_data_path(made, monkeypatch, tmp_path):
    monkeypatch.setattr(core, '_repo', lambda: None)
    assert data_path().is_relative_to(tmp_path) and len(list((data_path()/IMAGES).iterdir()))==24 # installed without a checkout
    monkeypatch.setenv('LUNGDET_DATA', str(made)); assert data_path(1000)==made
    monkeypatch.setenv('LUNGDET_DATA', str(tmp_path/'none'))
    with pytest.raises(ValueError, match='LUNGDET_DATA is .*none.*stage_2_train_images'): data_path()
    (tmp_path/'half'/IMAGES).mkdir(parents=True); monkeypatch.setenv('LUNGDET_DATA', str(tmp_path/'half'))
    with pytest.raises(ValueError, match="where .'stage_2_train_labels.csv'"): data_path()

def test_data_path_makes_more(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(core, 'make_studies', lambda folder, n: calls.append((folder,n)) or folder)
    assert data_path(250).is_relative_to(tmp_path/'work'/'synthetic') and calls[0][1]==250

def test_work_path(made, monkeypatch, tmp_path):
    p = work_path('a', 'b.png'); assert p==tmp_path/'work'/'synthetic'/'a'/'b.png' and p.parent.parent.is_dir()
    monkeypatch.setenv('LUNGDET_DATA', str(made)); q = work_path()
    assert q.is_dir() and q.name.startswith('made-') and len(q.name)==len('made-')+8

im = np.zeros((40,60), np.uint8)
@pytest.mark.parametrize('pic', [im, im/255., im.astype(np.float32)*9-4, np.zeros((40,60,3)), torch.zeros(1,40,60), torch.rand(3,40,60), torch.rand(40,60)])
@pytest.mark.parametrize('boxes', [None, [], np.zeros((0,4)), [[1,2,30,30]], torch.tensor([[1.,2,30,30]]), pd.DataFrame([[1,2,30,30,.5,'a']], columns=['x1','y1','x2','y2','score','label'])])
def test_show_boxes_takes(pic, boxes):
    ax = show_boxes(pic, boxes)
    assert len(ax.patches)==(0 if boxes is None else 2*len(boxes))
    if isinstance(boxes, pd.DataFrame): assert ax.texts[0].get_text()=='a 0.50'

@pytest.mark.parametrize('boxes,kw,match', [([[1,2,np.nan,4]],{},'Box 0 is not finite'), ([[1,2,3,4],[1,2,np.inf,4]],{},'Box 1'), ([1,2,3,4],{},r'\(n,4\)'), ([[1,2,3]],{},r'\(n,4\)'),
    (pd.DataFrame({'x':[1]}),{},'no column'), ([[1,2,3,4]],dict(scores=[.1,.2]),'1 boxes but 2 scores'), ([[1,2,3,4]],dict(labels=[]),'1 boxes but 0 labels')])
def test_show_boxes_refuses(boxes, kw, match):
    with pytest.raises(ValueError, match=match): show_boxes(im, boxes, **kw)

def test_show_boxes_refuses_what_is_no_picture():
    for bad in (np.zeros(5), np.zeros((2,3,4,5)), np.zeros((4,5,2))):
        with pytest.raises(ValueError, match='no picture'): show_boxes(bad)

def test_show_boxes_colours_and_overlay():
    ax = show_boxes(im, [[1,2,30,30]]); show_boxes(None, [[5,5,20,20]], scores=[.5], ax=ax)
    assert [matplotlib.colors.to_hex(p.get_edgecolor()) for p in ax.patches[1::2]]==[TRUTH, PRED] and len(ax.images)==1

def test_show_grid():
    axs = show_grid([im]*4, [None,[[1,2,3,4]],[],[[1,2,3,4],[4,4,9,9]]], titles=list('abcd'))
    assert [len(a.patches)//2 for a in axs]==[0,1,0,2] and axs[0].figure.axes[4].axison is False
    for bad in (dict(boxes=[None]), dict(titles=['a'])):
        with pytest.raises(ValueError, match='4 pictures'): show_grid([im]*4, **bad)
    with pytest.raises(ValueError, match='0 pictures'): show_grid([])
