"Nobody sits on two sides, strata are dealt evenly, and a split on file cannot change unseen"
import json, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from lungdet.core import make_studies
from lungdet.formats import Annotations, box_cols, read_rsna
from lungdet.splits import *
from lungdet.splits import _hands, _seal
from real import REAL, needs_real

def new(ann, **cols): return Annotations(ann.images.assign(**cols), ann.boxes, ann.classes)

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

def test_nih_patients_are_kept_together_where_known(tmp_path):
    d = make_studies(tmp_path/'s', 24, size=128)
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
    with pytest.raises(ValueError, match='have no part'): save_split(new(res, split=res.images.split.mask(res.images.index==0)), path)
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

@pytest.mark.parametrize('seed', range(3))
def test_more_images_join_a_split(seed):
    "The answer to the exercise of the page"
    ann,first = table(seed, 120, 60),np.arange(120)<60
    old,more = split_patients(ann.where(first)),ann.where(~first)
    seat = dict(zip(patients(old.images), old.images.split))
    side = patients(more.images).map(seat)
    assert 0<side.notna().sum()<60
    strangers = split_patients(more.where(side.isna()))
    side[side.isna()] = strangers.images.split.to_numpy()
    both = Annotations(pd.concat([old.images, more.images.assign(split=side)]), ann.boxes, ann.classes)
    assert audit_split(both).images.sum()==120 and parts(old).items()<=parts(both).items()

@needs_real
def test_real_data():
    ann = split_patients(read_rsna(REAL/'rsna'))
    assert patients(ann.images).nunique()==502
    by = audit_split(ann)
    assert by.images.to_dict()==dict(train=484, valid=121) and by.boxed.sum()==223
    share = (ann.images.split=='valid').groupby(strata(ann)).mean()
    assert share.between(.17,.23).all()
    for o in kfold_patients(ann): assert audit_split(o).images['valid'] in (119,120,121,122,123)

def test_the_challenge_is_dealt_in_seconds(challenge_labels, challenge_headers):
    h = challenge_headers.drop_duplicates('PatientID')
    b = challenge_labels[challenge_labels.Target==1]
    ims = pd.DataFrame(dict(image_id=h.PatientID, patient_id=h.PatientID, height=1024, width=1024, view=h.ViewPosition, age=h.PatientAge))
    ann = Annotations(ims, pd.DataFrame(dict(image_id=b.patientId, x1=b.x, y1=b.y, x2=b.x+b.width, y2=b.y+b.height, label='Lung Opacity')))
    assert audit_split(split_patients(ann)).loc['valid'].to_dict()==dict(images=5337, patients=5337, boxed=1203)
