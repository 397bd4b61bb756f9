"Planted defects are found, and sound data get one line"
import shutil, cv2, numpy as np, pandas as pd, pytest
from pathlib import Path
from lungdet.core import make_studies
from lungdet.convert import convert_folder
from lungdet.doctor import *
from lungdet.formats import Annotations, box_cols, read_rsna
from lungdet.splits import split_patients
from real import REAL, needs_real

@pytest.fixture(scope='session')
def made(tmp_path_factory): return make_studies(tmp_path_factory.mktemp('doctor')/'s', 24, size=128)

@pytest.fixture
def study(made, tmp_path):
    "24 sound studies in a folder of their own"
    return read_rsna(shutil.copytree(made, tmp_path/'s'))

def found(ann, **kw): return doctor(ann, progress=False, **kw).set_index('finding')
def examples(ann, what, **kw): return found(ann, **kw).examples.get(what, '')
def new(ann, boxes=None, **cols): return Annotations(ann.images.assign(**cols), ann.boxes if boxes is None else boxes, ann.classes)
def put(ann, table, **kw):
    res = new(ann)
    for k,v in kw.items(): getattr(res, table).loc[0,k] = v
    return res

def test_sound_data_get_one_line(study, capsys):
    assert len(doctor(study, progress=False))==0
    out = capsys.readouterr().out
    assert out.count('\n')==1 and 'nothing found' in out and '24 images of' in out

def test_the_sample_has_another_size_and_nothing_else():
    assert [*found(read_rsna(Path(__file__).resolve().parent.parent/'data'/'sample')).index]==['several sizes']

def test_the_table_is_what_is_printed(study, capsys):
    df = doctor(put(study, 'images', age=150), progress=False)
    assert [*df.columns]==['finding','n','examples','what to do'] and '1 finding\n' in (out := capsys.readouterr().out)
    assert all(str(v) in out for v in df.iloc[0])

def test_every_finding_has_an_advice(study):
    keys = people_findings(study)|file_findings(study)|box_findings(study)|class_findings(study)|pixel_findings(study, False)
    assert set(keys)==set(ADVICE)

@pytest.mark.parametrize('change,what', [
    (dict(x2=129.), 'box outside its image'), (dict(x1=-1.), 'box outside its image'), (dict(y2=140.), 'box outside its image'),
    (dict(x1=0.,x2=12.,y1=0.,y2=13.), 'tiny box'), (dict(x1=0.,x2=128.,y1=0.,y2=128.), 'huge box')])
def test_odd_boxes(study, change, what):
    assert found(put(study, 'boxes', **change)).n[what]==1 and examples(put(study, 'boxes', **change), what)==study.boxes.image_id[0]

def test_boxes_drawn_twice(study):
    b = study.boxes.head(1)
    near,far = b.assign(x2=b.x2+1),b.assign(x2=b.x2+(b.x2-b.x1)*.3)
    assert found(new(study, pd.concat([study.boxes,near,near]))).n['box drawn twice']==3
    assert found(new(study, pd.concat([study.boxes,far])).where(study.images.image_id==b.image_id[0])).n.get('box drawn twice')!=1

def test_boxes_of_an_image_of_unknown_size_are_not_judged(study):
    res = found(put(study, 'images', height=np.nan))
    assert res.n['size unknown']==1 and 'several sizes' not in res.index

def test_lost_files(study):
    f = Path(study.images.path[3]); f.unlink()
    assert examples(study, 'image without a file')==study.images.image_id[3]
    assert found(put(study, 'images', path=None)).n['image without a file']==2
    (f.parent/'stray.PNG').write_bytes(b''); (f.parent/'notes.txt').write_bytes(b''); (f.parent/'.hidden.png').write_bytes(b'')
    assert examples(study, 'file without an image')=='stray.PNG'

def test_a_copy_under_another_id(study):
    p,ids = study.images.path,study.images.image_id
    shutil.copy(p[0], p[7])
    assert examples(study, 'same pixels')==f'{ids[0]} = {ids[7]}' and 'same pixels in two parts' not in found(study).index
    side = ['train']*7+['valid']+['train']*16
    assert examples(new(study, split=side), 'same pixels in two parts')==f'{ids[0]} = {ids[7]}'
    assert 'same pixels' not in found(study, pixels=False).index

def test_a_copy_with_another_header_or_in_another_format(study, tmp_path):
    import pydicom
    p = study.images.path
    ds = pydicom.dcmread(p[0]); ds.PatientID = 'somebody else'; ds.SOPInstanceUID = '1.2.3'; ds.save_as(tmp_path/'o.dcm')
    assert pixel_hash(p[0])==pixel_hash(tmp_path/'o.dcm')!=pixel_hash(p[1])
    png = convert_folder([Path(p[0])], tmp_path/'png', size=128, progress=False).path[0]
    cv2.imwrite(str(tmp_path/'rgb.png'), cv2.cvtColor(cv2.imread(png), cv2.COLOR_BGR2RGB))
    assert pixel_hash(png)==pixel_hash(p[0])==pixel_hash(tmp_path/'rgb.png')

def test_pixels_of_another_shape_are_no_copy(tmp_path):
    for k,shape in dict(a=(4,16), b=(16,4)).items(): cv2.imwrite(str(tmp_path/f'{k}.png'), np.zeros(shape, np.uint8))
    assert pixel_hash(tmp_path/'a.png')!=pixel_hash(tmp_path/'b.png')

@pytest.mark.parametrize('left', [0,10,3000])
def test_damaged_pictures(study, left, recwarn):
    f = Path(study.images.path[2]); f.write_bytes(f.read_bytes()[:left])
    assert examples(study, 'picture cannot be read')==study.images.image_id[2] and not len(recwarn)
    (f.parent/'x.png').write_bytes(b'no picture')
    assert 'x.png' not in examples(study, 'picture cannot be read')
    with pytest.raises(ValueError, match='cannot be decoded'): pixel_hash(f.parent/'x.png')

def test_people(study):
    i,ims = study.images.image_id,study.images
    twice = ims.patient_id[ims.patient_id.duplicated()].iloc[0]
    side = pd.Series('train', index=ims.index); side[ims.index[ims.patient_id==twice][0]] = 'valid'
    assert examples(new(study, split=side), 'patient in two parts')==twice
    assert found(new(study, split=side.where(side.index>1))).n['image without a part']==2
    for v in (None,' ',i[0]): assert examples(put(study, 'images', patient_id=v), 'no patient')==i[0]
    assert found(new(study, patient_id=None)).n['no patient']==24
    assert examples(put(study, 'images', age=101), 'age implausible')==i[0]==examples(put(study, 'images', age=-1), 'age implausible')
    assert 'age implausible' not in found(put(study, 'images', age=100)).index

def write_ages(study, *ages):
    import pydicom
    for k,age in enumerate(ages):
        ds = pydicom.dcmread(study.images.path[k]); ds[0x00101010] = pydicom.DataElement(0x00101010, 'AS', age, validation_mode=0)
        ds.save_as(study.images.path[k])
    return read_rsna(Path(study.images.path[0]).parent.parent)

def test_ages_of_148_to_155_are_NA_and_counted(study, capsys):
    old = '148','150','151','153','155'
    ann = write_ages(study, *old)
    assert ann.images.age[:5].isna().all() and ann.images.age[5:].notna().all()
    res = found(ann)
    assert res.n['age implausible, made NA']==res.n['age unknown']==5 and 'age implausible' not in res.index
    assert '     5 age implausible, made NA: '+', '.join(f"{i} ('{a}')" for i,a in zip(ann.images.image_id[:3],old))+' ...' in capsys.readouterr().out
    assert lost_ages(ann.images)==dict(zip(ann.images.image_id, old))

def test_other_ages_that_are_NA(study):
    ann = write_ages(study, '148Y','','030M','999D','9999M','unknown','1','120','121')
    i,age = ann.images.image_id,ann.images.age
    assert lost_ages(ann.images)=={i[0]:'148Y', i[4]:'9999M', i[8]:'121'}
    assert age.isna()[:9].tolist()==[True,True,False,False,True,True,False,False,True]
    assert examples(ann, 'age implausible')==i[7] and found(ann).n['age unknown']==5

def test_ages_that_no_header_can_tell(study, tmp_path):
    ann = write_ages(study, '155')
    pngs = convert_folder([Path(p) for p in ann.images.path], tmp_path/'png', size=32, progress=False)
    assert lost_ages(ann.use_pngs(pngs).images)=={}
    Path(ann.images.path[0]).write_bytes(b'')
    for p in (ann.images.path[0], pd.NA, 'gone'): assert lost_ages(put(ann, 'images', path=p).images)=={}

def test_classes(study):
    ids = study.images.image_id
    b = pd.concat([study.boxes, study.boxes.head(1).assign(label='Nodule', x1=5.)])
    res = found(Annotations(study.images, b, ['Lung Opacity','Nodule','never']))
    assert res.examples['few boxes']=='Nodule (1), never (0)' and res.examples['class imbalance']=='Nodule on 4.2% of the images, never on 0.0% of the images'
    every = pd.DataFrame(dict(image_id=ids, x1=10, y1=10, x2=60, y2=60, label='Lung Opacity'))
    assert 'all images have a box' in found(new(study, every)).index
    assert found(put(study, 'images', width=130)).n['several sizes']==1

def test_limits_can_be_moved(study):
    assert found(study, small=.5).n['tiny box']>0 and found(study, large=.001).n['huge box']==len(study.boxes)

def test_tables_that_know_next_to_nothing(capsys):
    none = pd.DataFrame(columns=box_cols)
    assert set(found(Annotations(pd.DataFrame(dict(image_id=['a','b'])), none)).index)>={'no patient','image without a file','size unknown','age unknown'}
    assert len(doctor(Annotations(pd.DataFrame(dict(image_id=[])), none)))==0

@needs_real
def test_real_data():
    ann = split_patients(read_rsna(REAL/'rsna'))
    assert len(ann.boxes)==342 and ann.boxes.image_id.nunique()==223
    assert ann.images.category.value_counts().to_dict()=={'No Lung Opacity / Not Normal':286,'Lung Opacity':223,'Normal':96}
    res = found(ann)
    assert [*res.index]==['tiny box'] and res.n['tiny box']==5

@needs_real
def test_real_copies_and_leaks(tmp_path):
    ann = read_rsna(REAL/'rsna').sample(20)
    (tmp_path/'x').mkdir()
    shutil.copy(ann.images.path[0], tmp_path/'x'/'copy.dcm')
    more = pd.concat([ann.images, ann.images.head(1).assign(image_id='copy', path=str(tmp_path/'x'/'copy.dcm'), patient_id='z')])
    more['split'] = ['train']*(len(more)-1)+['valid']
    res = found(Annotations(more, ann.boxes, ann.classes))
    assert res.examples['same pixels in two parts']==f'{ann.images.image_id[0]} = copy'

def test_all_labels_of_the_challenge_in_seconds(challenge_labels, challenge_headers):
    h = challenge_headers.drop_duplicates('PatientID')
    b = challenge_labels[challenge_labels.Target==1]
    ims = pd.DataFrame(dict(image_id=h.PatientID, patient_id=h.PatientID, height=1024, width=1024, view=h.ViewPosition, age=h.PatientAge))
    ann = Annotations(ims, pd.DataFrame(dict(image_id=b.patientId, x1=b.x, y1=b.y, x2=b.x+b.width, y2=b.y+b.height, label='Lung Opacity')))
    res = found(ann, pixels=False)
    assert res.n['tiny box']==127 and res.n['age implausible']==5 and res.n['no patient']==26684
