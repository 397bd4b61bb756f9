"Planted defects are found, sound data get one line; nobody sits on two sides; a split on file cannot change unseen"
import json, shutil, cv2, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from pathlib import Path
from lungdet.core import make_studies
from lungdet.convert import convert_folder
from lungdet.doctor import *
from lungdet.doctor import _hands, _seal
from lungdet.formats import Annotations, box_cols, read_rsna
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

# Splits

def table(seed, n, m, heavy=False):
    "`n` images of up to `m` patients, some of unknown patient, view or category"
    g = np.random.default_rng(seed)
    pid = [None if g.random()<.1 else f'p{o}' for o in ((g.pareto(1,n)*3).astype(int) if heavy else g.integers(0,m,n))]
    ims = pd.DataFrame(dict(image_id=[f'i{i}' for i in range(n)], patient_id=pid, height=10, width=10,
                            view=g.choice(['AP','PA',None],n), category=g.choice(['Normal','Other',None],n)))
    b = pd.DataFrame([dict(image_id=f'i{i}', x1=1, y1=1, x2=5, y2=5, label=g.choice(['a','b'])) for i in g.choice(n,n//3)], columns=box_cols)
    return Annotations(ims, b, ['a','b'])

def parts(ann): return dict(zip(ann.images.image_id, ann.images.split))
def shuffled(ann, seed):
    return Annotations(ann.images.sample(frac=1, random_state=seed), ann.boxes.sample(frac=1, random_state=seed), ann.classes)

tables = dict(seed=st.integers(0,2**31-1), n=st.integers(3,100), m=st.integers(1,100), heavy=st.booleans())

@given(valid=st.floats(.02,.5), test=st.floats(0,.3), **tables)
@settings(max_examples=40, deadline=None)
def test_hold_out(seed, n, m, heavy, valid, test):
    ann = table(seed, n, m, heavy)
    who = patients(ann.images)
    if who.nunique()<3: return
    res = split_patients(ann, valid, seed, test)
    audit_split(res, ['train','valid']+['test']*(test>0))
    assert not two_sides(res) and set(res.images.split)=={'train','valid'}|({'test'} if test>0 else set())
    tol = 1/min(20,who.nunique()) + who.value_counts(normalize=True).max() # one hand (a twentieth, or one of fewer patients), and the largest patient
    for p,share in (('valid',valid), ('test',test)): assert abs((res.images.split==p).mean()-share)<=tol+1e-9
    assert parts(split_patients(shuffled(ann, seed%99), valid, seed, test))==parts(res)

@given(seed=st.integers(0,2**31-1), n=st.integers(150,400), valid=st.floats(.05,.4), test=st.one_of(st.just(0.), st.floats(.05,.3)))
@settings(max_examples=25, deadline=None)
def test_shares_of_an_ordinary_data_set(seed, n, valid, test):
    ann = table(seed, n, n*3//4)
    for v,t,tol in ((valid,test,.04), (.2,0,.02), (.2,.2,.02)): # half a hand of twenty and a patient or two; a whole hand is met nearer
        side = split_patients(ann, v, seed, t).images.split
        assert abs((side=='valid').mean()-v)<=tol and abs((side=='test').mean()-t)<=tol

@given(k=st.integers(2,10), **tables)
@settings(max_examples=30, deadline=None)
def test_folds(seed, n, m, heavy, k):
    ann = table(seed, n, m, heavy)
    if patients(ann.images).nunique()<k: return
    folds = kfold_patients(ann, k, seed)
    assert len(folds)==k and (sum((o.images.split=='valid').astype(int) for o in folds)==1).all()
    for o in folds: audit_split(o)
    assert [parts(o) for o in kfold_patients(shuffled(ann, seed%99), k, seed)]==[parts(o) for o in folds]

def test_nih_patients_are_kept_together_where_known(made, tmp_path):
    d = shutil.copytree(made, tmp_path/'s')
    ids = sorted(p.stem for p in (d/'stage_2_train_images').glob('*.dcm'))
    nih = pd.Series([f'{k//3:08}' for k in range(24)], index=ids) # other people than the headers say
    nih.rename('nih_patient').rename_axis('patientId').reset_index().to_csv(d/'nih_patients.csv', index=False)
    for o in (split_patients(read_rsna(d)), *kfold_patients(read_rsna(d), 4)):
        assert o.images.split.groupby(o.images.image_id.map(nih)).nunique().max()==1

@given(st.integers(2,200), st.floats(.01,.98))
@settings(max_examples=60, deadline=None)
def test_hands_are_the_nearest(n, valid):
    k = _hands(n, valid)
    def off(k): return min(abs(v/k-valid) for v in range(1,k))
    assert 2<=k<=max(2,min(20,n)) and off(k)<=min(off(o) for o in range(2,max(2,min(20,n))+1))+1e-8

def test_strata_are_dealt_evenly():
    ann = table(1, 600, 400)
    s = strata(ann)
    for o in (*kfold_patients(ann), split_patients(ann), *(split_patients(ann, .2, i) for i in range(3))):
        share = (o.images.split=='valid').groupby(s).mean()
        assert share.between(.13,.27).all() and .18<(o.images.split=='valid').mean()<.22

def test_small_strata_give_up_view_then_label():
    ims = pd.DataFrame(dict(image_id=[*'abcdefghij'], height=9, width=9, view=['AP']*5+['PA','AP','AP','PA','PA'], category=['N']*5+['N','M','M','M','O']))
    assert strata(Annotations(ims, pd.DataFrame(columns=box_cols)), 3).tolist()==['N, AP']*5+['rest']+['M']*3+['rest']

def test_the_rarest_label_of_an_image_decides():
    ims = pd.DataFrame(dict(image_id=[*'abc'], height=9, width=9))
    b = pd.DataFrame([dict(image_id=i, x1=1, y1=1, x2=5, y2=5, label=l) for i,l in (('a','x'),('b','x'),('b','x'),('b','y'))])
    assert strata(Annotations(ims, b), 1).tolist()==['x, unknown','y, unknown','unknown, unknown']

def test_unknown_patients_are_not_one_person():
    ims = pd.DataFrame(dict(image_id=[str(i) for i in range(50)], height=9, width=9, patient_id=[None,'']*25))
    res = split_patients(Annotations(ims, pd.DataFrame(columns=box_cols)))
    assert (res.images.split=='valid').sum()==10 and patients(res.images).is_unique

def test_label_is_dealt_to_the_image():
    ims = pd.DataFrame(dict(image_id=[str(i) for i in range(500)], height=10, width=10, patient_id=[f'p{i//2}' for i in range(500)], category='Normal'))
    ann = Annotations(ims, pd.DataFrame(dict(image_id=[str(i) for i in range(100)], x1=1, y1=1, x2=5, y2=5, label='a')))
    for s in (1,2):
        res = split_patients(ann, .2, s)
        assert (res.images.split=='valid').sum()==100 and res.part('valid').boxes.image_id.nunique()==20

def test_someone_with_very_many_images_trains():
    for seed in range(8):
        ims = pd.DataFrame(dict(image_id=[str(i) for i in range(100)], height=9, width=9, patient_id=['big']*40+[f'p{i}' for i in range(60)]))
        res = split_patients(Annotations(ims, pd.DataFrame(columns=box_cols)), .2, seed)
        assert res.images.split[0]=='train' and .1<=(res.images.split=='valid').mean()<=.3

def test_seed_and_repetition():
    ann = table(3, 80, 60)
    assert parts(split_patients(ann))==parts(split_patients(ann))!=parts(split_patients(ann, seed=1))

@pytest.mark.parametrize('kw', [dict(valid=0), dict(valid=1), dict(valid=-.1), dict(test=-.1), dict(valid=.6,test=.4), dict(valid=float('nan'))])
def test_senseless_shares(kw):
    with pytest.raises(ValueError, match='leave nothing'): split_patients(table(0,20,20), **kw)

def test_too_few_patients():
    ann = table(0, 30, 20)
    with pytest.raises(ValueError, match='is the data set empty'): split_patients(ann.where([False]*30))
    with pytest.raises(ValueError, match='cannot be on both sides'): kfold_patients(new(ann, patient_id='p'))
    two = new(ann, patient_id=['p','q']*15)
    with pytest.raises(ValueError, match='2 patients cannot be dealt to 3 parts'): split_patients(two, test=.2)
    for k in (1,3):
        with pytest.raises(ValueError, match='cannot be dealt'): kfold_patients(two, k)
    assert set(split_patients(two).images.split)=={'train','valid'}

def test_audit_names_everything_at_once():
    ims = pd.DataFrame(dict(image_id=[*'abcd'], height=9, width=9, patient_id=['p','p','q','r'], split=['train','test','train',None]))
    with pytest.raises(ValueError) as e: audit_split(Annotations(ims, pd.DataFrame(columns=box_cols)))
    assert all(o in str(e.value) for o in ("1 patients are on two sides, such as ['p']", "1 images have no part, such as ['d']", "no image is in ['valid']"))

def test_save_and_load(tmp_path):
    ann = table(5, 60, 40)
    res = split_patients(ann, .2, 1, .2)
    path = save_split(res, tmp_path/'new'/'s.json')
    assert parts(load_split(shuffled(ann, 1), path))==parts(res) and [o.name for o in path.parent.iterdir()]==['s.json']
    before = path.read_bytes()
    save_split(shuffled(res, 2), path)
    assert path.read_bytes()==before
    with pytest.raises(ValueError, match='have no part'): save_split(put(res, 'images', split=pd.NA), path)
    assert path.read_bytes()==before

def test_folds_on_file(tmp_path):
    ann = table(7, 60, 40)
    for i,o in enumerate(kfold_patients(ann, 5)):
        path = save_split(o, tmp_path/f'{i}.json')
        assert parts(load_split(ann, path))==parts(o)
        assert json.loads(path.read_text())['sha256']==_seal({k:sorted(o.part(k).images.image_id) for k in ('train','valid')})

def test_a_split_that_does_not_fit(tmp_path):
    ann = table(5, 60, 40)
    path = save_split(split_patients(ann), tmp_path/'s.json')
    with pytest.raises(ValueError, match='0 of its images are missing here \\[\\], 2 are new'):
        more = pd.DataFrame(dict(image_id=['x','y'], height=10, width=10))
        load_split(Annotations(pd.concat([ann.images,more]), ann.boxes, ann.classes), path)
    with pytest.raises(ValueError, match="3 of its images are missing here"): load_split(ann.where(ann.images.index>2), path)
    with pytest.raises(ValueError, match='on two sides'): load_split(new(ann, patient_id='one'), path)

@pytest.mark.parametrize('spoil', [lambda o: o['parts']['train'].append(o['parts']['valid'].pop()), lambda o: o['parts'].update(test=[]),
                                   lambda o: o['parts']['valid'].pop(), lambda o: o.update(sha256='0'*64)])
def test_a_split_that_was_changed(tmp_path, spoil):
    ann = table(5, 60, 40)
    path = save_split(split_patients(ann), tmp_path/'s.json')
    o = json.loads(path.read_text()); spoil(o); path.write_text(json.dumps(o))
    with pytest.raises(ValueError, match='was changed'): load_split(ann, path)

@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"parts": {}}', 'null', b'\xff\xfe\x00'])
def test_what_is_no_split(tmp_path, text):
    p = tmp_path/'s.json'; p.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match='is no split'): load_split(table(5,9,9), p)
    with pytest.raises(ValueError, match='is no split'): load_split(table(5,9,9), tmp_path/'none.json')

def test_an_image_in_two_parts_though_sealed(tmp_path):
    p,o = tmp_path/'s.json',dict(train=['i0','i1'], valid=['i0','i2'])
    p.write_text(json.dumps(dict(sha256=_seal(o), parts=o)))
    with pytest.raises(ValueError, match="'i0' twice"): load_split(table(5,3,3), p)

@needs_real
def test_real_data():
    ann = split_patients(read_rsna(REAL/'rsna'))
    assert len(ann.boxes)==342 and ann.boxes.image_id.nunique()==223 and patients(ann.images).nunique()==502
    assert ann.images.category.value_counts().to_dict()=={'No Lung Opacity / Not Normal':286,'Lung Opacity':223,'Normal':96}
    res = found(ann)
    assert [*res.index]==['tiny box'] and res.n['tiny box']==5
    by = audit_split(ann)
    assert by.images.to_dict()==dict(train=484, valid=121) and by.boxed.sum()==223
    share = (ann.images.split=='valid').groupby(strata(ann)).mean()
    assert share.between(.17,.23).all()
    for o in kfold_patients(ann): assert audit_split(o).images['valid'] in (119,120,121,122,123)

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
    assert audit_split(split_patients(ann)).loc['valid'].to_dict()==dict(images=5337, patients=5337, boxed=1203)
