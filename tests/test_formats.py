"The two tables and their border"
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from lungdet.core import make_studies
from lungdet.formats import Annotations, read_rsna

def tables(n=3):
    ims = pd.DataFrame(dict(image_id=[f'i{i}' for i in range(n)], height=100, width=200, patient_id=[f'p{i//2}' for i in range(n)]))
    return ims,pd.DataFrame([dict(image_id='i0', x1=1., y1=2., x2=30., y2=40., label='a')])

@pytest.mark.parametrize('change,why', [
    (dict(x2=np.nan), 'row of a negative image'), (dict(x2=1.), 'is this xywh'), (dict(y2=1.), 'is this xywh'), (dict(x2=np.inf), 'not a number'),
    (dict(x2=202.), 'another size'), (dict(y2=150.), 'another size'), (dict(x1=-5.), 'another size'), (dict(image_id='zz'), 'no image of this id'),
    (dict(label='b'), 'none of'), (dict(x1='left'), 'not a number')])
def test_bad_boxes_are_named(change, why):
    ims,boxes = tables()
    bad = pd.concat([boxes, boxes.assign(**change)], ignore_index=True)
    with pytest.raises(ValueError, match=why) as e: Annotations(ims, bad, ['a'])
    assert 'row 1' in str(e.value) and '1 of 2' in str(e.value)

def test_coordinates_beyond_the_image_say_its_size_and_the_likely_cause():
    ims,boxes = tables()
    with pytest.raises(ValueError, match='200 wide and 100 high; already scaled, for another size of the picture'): Annotations(ims, boxes.assign(x2=260.))
    with pytest.raises(ValueError, match='outside of its image; already scaled'): Annotations(ims.assign(height=np.nan), boxes.assign(x1=-9.))

def test_overhang_of_a_pixel_is_cut():
    ims,boxes = tables()
    b = Annotations(ims, boxes.assign(x2=200.7, y1=-.5)).boxes
    assert b.x2[0]==200 and b.y1[0]==0

@pytest.mark.parametrize('change,why', [(dict(image_id='i0'), 'one id'), (dict(height=0), 'not positive'), (dict(image_id=[None,'b','c']), 'without an id')])
def test_bad_images_are_named(change, why):
    ims,boxes = tables()
    with pytest.raises(ValueError, match=why): Annotations(ims.assign(**change), boxes.head(0), ['a'])

def test_missing_columns():
    ims,boxes = tables()
    with pytest.raises(ValueError, match='image_id'): Annotations(ims.drop(columns='image_id'), boxes)
    with pytest.raises(ValueError, match="lacks \\['y2'\\]"): Annotations(ims, boxes.drop(columns='y2'))

def test_sample_keeps_patients_whole():
    ims,boxes = tables(40)
    ann = Annotations(ims, boxes)
    for n in (1,7,40,99):
        some = ann.sample(n, seed=n)
        assert len(some)>=min(n,40) and len(some)<=n+1
        assert (some.images.patient_id.value_counts()==2).all()

@given(st.integers(0,2**31))
@settings(max_examples=20, deadline=None)
def test_save_and_load_give_the_same(tmp_path_factory, seed):
    g,d = np.random.default_rng(seed),tmp_path_factory.mktemp('ann')
    n = int(g.integers(1,8))
    ims = pd.DataFrame(dict(image_id=[f'{i:03}' for i in range(n)], height=100, width=g.integers(50,200,n), age=np.where(g.random(n)<.5,np.nan,40)))
    k = int(g.integers(0,6))
    x,y = g.random(k)*20,g.random(k)*20
    boxes = pd.DataFrame(dict(image_id=g.choice(ims.image_id,k), x1=x, y1=y, x2=x+1+g.random(k)*20, y2=y+1+g.random(k)*20, label=g.choice(['a','b'],k)))
    ann = Annotations(ims, boxes, ['b','a','unused'])
    back = Annotations.load(ann.save(d))
    pd.testing.assert_frame_equal(back.boxes, ann.boxes, check_dtype=False)
    pd.testing.assert_frame_equal(back.images, ann.images, check_dtype=False)
    assert back.classes==ann.classes

def test_ids_that_look_like_numbers_stay_text(tmp_path):
    "A scan in the file 001.nii.gz is the series '001'"
    ims = pd.DataFrame(dict(image_id=['001_000','002_000'], patient_id=['01','02'], series=['001','002'], slice=0))
    back = Annotations.load(Annotations(ims, pd.DataFrame(columns=['image_id','x1','y1','x2','y2','label']), ['lesion']).save(tmp_path))
    assert back.images.series.tolist()==['001','002'] and back.images.patient_id.tolist()==['01','02']

def test_coco_loads_in_pycocotools(tmp_path):
    import json
    from pycocotools.coco import COCO
    ims,boxes = tables()
    (tmp_path/'a.json').write_text(json.dumps(Annotations(ims, boxes).to_coco()))
    c = COCO(tmp_path/'a.json')
    assert len(c.imgs)==3 and c.anns[1]['bbox']==[1,2,29,38] and c.loadCats(c.anns[1]['category_id'])[0]['name']=='a'

def test_patients_come_from_the_mapping_if_there_is_one(tmp_path):
    d = make_studies(tmp_path/'s', n=3, seed=1, size=128)
    ids = sorted(o.stem for o in (d/'stage_2_train_images').glob('*.dcm'))
    pd.DataFrame(dict(patientId=ids, nih_patient=['00001','00001','00002'])).to_csv(d/'nih_patients.csv', index=False)
    ann = read_rsna(d)
    assert ann.images.set_index('image_id').patient_id[ids].tolist()==['00001','00001','00002']

def test_unlabelled_image_and_empty_folder(tmp_path):
    d = make_studies(tmp_path/'s', n=3, seed=1, size=128)
    f = d/'stage_2_train_labels.csv'
    df = pd.read_csv(f)
    df[df.patientId!=df.patientId[0]].to_csv(f, index=False)
    with pytest.raises(ValueError, match='there as a file but not labelled'): read_rsna(d)
    assert len(read_rsna(d, missing='drop'))==2
    for o in (d/'stage_2_train_images').glob('*.dcm'): o.unlink()
    with pytest.raises(ValueError, match='stage_2_train_images'): read_rsna(d)

def test_nan_box_of_a_positive_is_named(tmp_path):
    d = make_studies(tmp_path/'s', n=3, seed=1, size=128)
    f = d/'stage_2_train_labels.csv'
    pd.read_csv(f).assign(Target=1, x=np.nan).to_csv(f, index=False)
    with pytest.raises(ValueError, match='not a number'): read_rsna(d)

def test_pngs_of_another_fit_forget_the_first(tmp_path):
    ann = Annotations(pd.DataFrame(dict(image_id=['a'], height=100, width=200)), pd.DataFrame(columns=['image_id','x1','y1','x2','y2','label']))
    row = dict(image_id='a', path='a.png', status='ok', size=100, scale_x=.5, scale_y=.5, offset_x=0., offset_y=25.)
    boxed = ann.use_pngs(pd.DataFrame([row|dict(fit='letterbox')]))
    assert boxed.images.offset_y[0]==25
    assert 'offset_y' not in boxed.use_pngs(pd.DataFrame([row|dict(fit='stretch')])).images
