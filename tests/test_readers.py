"Other formats: round trips, real files, and what is wrong with files in the wild"
import importlib.util, plistlib, tempfile
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from lungdet.core import XYXY
from lungdet.formats import Annotations
from lungdet.readers import *
from lungdet.readers import _ids
from dicoms import save, stored
from real import REAL, needs_real

CLASSES = ['zebra','mass, <left> & "right"','Läsion']

@st.composite
def annotations(draw, whole=False):
    "Images of any size with boxes of any place, some without; ids and class names that trip a careless writer"
    sizes = draw(st.lists(st.tuples(st.integers(2,3000), st.integers(2,3000)), min_size=1, max_size=4))
    ids = ['1.2.840.113','a b','ünï','x-1'][:len(sizes)]
    rows = []
    for o,(h,w) in zip(ids,sizes):
        for _ in range(draw(st.integers(0,3))):
            num = (lambda hi: draw(st.integers(0,hi))) if whole else (lambda hi: draw(st.floats(0,hi)))
            (x1,x2),(y1,y2) = (sorted([num(w),num(w)]) for w in (w,h))
            if x2-x1<.01 or y2-y1<.01: continue
            rows.append([o,x1,y1,x2,y2,draw(st.sampled_from(CLASSES))])
    ims = pd.DataFrame(dict(image_id=ids, path=[f'{o}.png' for o in ids], height=[h for h,_ in sizes], width=[w for _,w in sizes]))
    return Annotations(ims, pd.DataFrame(rows, columns=['image_id',*XYXY,'label']), CLASSES)

def with_pictures(ann, folder):
    "The same, its pictures in `folder`"
    folder.mkdir()
    for r in ann.images.itertuples(): Image.new('1', (int(r.width),int(r.height))).save(folder/r.path)
    return Annotations(ann.images.assign(path=[str(folder/o) for o in ann.images.path]), ann.boxes, ann.classes)

def same(a, b, grow=0., tol=0.):
    "Is `b` what was written as `a`, with each side at most `grow` further out, and exact to `tol`?"
    a_,b_ = (o.boxes.sort_values(['image_id',*XYXY,'label'], kind='stable') if tol else o.boxes for o in (a,b))
    cols = ['image_id','height','width']
    x,y = (o.images[cols].sort_values('image_id').to_numpy().tolist() for o in (a,b))
    assert x==y and a.classes==b.classes and len(a_)==len(b_)
    for o in a.images.image_id:
        p,q = a.of(o),b.of(o)
        assert p.label.tolist()==q.label.tolist()
        d = q[XYXY].to_numpy(float)-p[XYXY].to_numpy(float)
        assert (d[:,:2]<=tol).all() and (d[:,:2]>-grow-tol).all() and (d[:,2:]>=-tol).all() and (d[:,2:]<grow+tol).all() if grow else (abs(d)<=tol).all()

quick = settings(max_examples=25, deadline=None)

@given(annotations())
@quick
def test_coco_there_and_back(ann):
    with tempfile.TemporaryDirectory() as d:
        f = write_coco(ann, Path(d)/'a.json')
        same(ann, read_coco(f), tol=1e-9)
        again = write_coco(read_coco(f), Path(d)/'b.json')
        same(read_coco(f), read_coco(again), tol=1e-9)

@given(annotations())
@quick
def test_voc_there_and_back(ann):
    with tempfile.TemporaryDirectory() as d:
        back = read_voc(write_voc(ann, Path(d)), classes=CLASSES)
        same(ann, back, grow=1)
        same(back, read_voc(write_voc(back, Path(d)), classes=CLASSES)) # whole numbers stay

@given(annotations())
@settings(max_examples=10, deadline=None)
def test_keras_csv_there_and_back(ann):
    with tempfile.TemporaryDirectory() as d:
        ann,d = with_pictures(ann, Path(d)/'pngs'),Path(d)
        back = read_keras_csv(write_keras_csv(ann, d/'sub'/'labels.csv', d/'names.csv'), d/'names.csv')
        same(ann, back, grow=1)
        same(back, read_keras_csv(write_keras_csv(back, d/'again.csv'), d/'classes.csv'))

@given(annotations())
@settings(max_examples=10, deadline=None)
def test_yolo_there_and_back(ann):
    with tempfile.TemporaryDirectory() as d:
        ann,d = with_pictures(ann, Path(d)/'images'),Path(d)
        write_yolo(ann, d)
        same(ann, read_yolo(d/'images', names=d/'data.yaml'), tol=1e-4)

@given(annotations(whole=True))
@quick
def test_whole_pixels_survive_voc_exactly(ann):
    with tempfile.TemporaryDirectory() as d: same(ann, read_voc(write_voc(ann, Path(d)), classes=CLASSES))

@pytest.fixture
def small(tmp_path):
    "Two pictures, one box"
    ims = pd.DataFrame(dict(image_id=['a','b'], path=['a.png','b.png'], height=48, width=64))
    return with_pictures(Annotations(ims, pd.DataFrame([['a',1.,2.,30.,40.,'mass']], columns=['image_id',*XYXY,'label'])), tmp_path/'images')

def test_pycocotools_reads_what_is_written(small, tmp_path):
    from pycocotools.coco import COCO
    c = COCO(write_coco(small, tmp_path/'a.json'))
    assert c.anns[1]['bbox']==[1,2,29,38] and len(c.imgs)==2 and c.loadCats(1)[0]['name']=='mass'
    assert [o.name for o in tmp_path.iterdir() if o.name.startswith('.')]==[]

def coco(**kw):
    return dict(images=[dict(id=1, file_name='a.png', height=48, width=64)], categories=[dict(id=5, name='mass')],
                annotations=[dict(id=9, image_id=1, category_id=5, bbox=[1,2,29,38])])|kw
def ann_of(**kw): return coco(annotations=[dict(id=9, image_id=1, category_id=5)|kw])

@pytest.mark.parametrize('d,why', [
    (ann_of(bbox=[1,2,29]), 'annotation 9 cannot be read'), (ann_of(bbox=[1,2,None,3]), 'annotation 9 cannot be read'),
    (ann_of(bbox=[30,20,60,40]), 'is this x1,y1,x2,y2'), (ann_of(bbox=[1,2,0,3]), 'annotation 9'), (ann_of(bbox=[1,2,float('nan'),3]), 'not a number'),
    (ann_of(bbox=[1,2,3,4], category_id=6), 'category_id 6 is none'), (ann_of(bbox=[1,2,3,4], image_id=6), 'image_id 6 is none'),
    (ann_of(segmentation=dict(counts='x', size=[1,1])), 'run-length'), (ann_of(), 'annotation 9 cannot be read'), (ann_of(segmentation=[]), 'annotation 9'),
    (coco(categories=[dict(id=1, name='a'), dict(id=2, name='a')]), 'two categories'), (coco(images=coco()['images']*2), 'two images of one id'),
    (coco(images=[dict(id=1)]), 'file_name'), (coco(images=[dict(id=i, file_name='a.png') for i in (1,2)]), 'one id'), (dict(images=[]), 'lacks')])
def test_bad_coco(d, why):
    with pytest.raises(ValueError, match=why): read_coco(d)

def test_coco_of_a_results_file_and_of_no_json(tmp_path):
    f = tmp_path/'r.json'
    f.write_text('[{"image_id":1}]')
    with pytest.raises(ValueError, match='r.json lacks .*results'): read_coco(f)
    f.write_text('{')
    with pytest.raises(ValueError, match='r.json cannot be read'): read_coco(f)

def test_coco_folders_tell_images_apart(tmp_path):
    d = coco(images=[dict(id=i, file_name=f'{k}/a.png', height=48, width=64) for i,k in enumerate(('train','valid'))], annotations=[])
    assert read_coco(d).images.image_id.tolist()==['train/a','valid/a']
    with pytest.raises(ValueError, match="called 'a.png'"): write_coco(read_coco(d), tmp_path/'x.json') # to_coco drops the folder
    assert not list(tmp_path.iterdir())

def test_coco_outlines_and_crowds():
    a = read_coco(ann_of(segmentation=[[1,2,30,2,30,40,1,40]]))
    assert a.boxes[XYXY].to_numpy().tolist()==[[1,2,30,40]]
    a = read_coco(ann_of(segmentation=dict(counts=[1], size=[1,1]), iscrowd=1))
    assert len(a.boxes)==0 and a.images.ignored[0]==1

def test_sizes_are_needed_to_write(small, tmp_path):
    bare = Annotations(small.images.assign(height=None), small.boxes)
    for f in (write_coco,write_voc,write_yolo):
        with pytest.raises(ValueError, match='no height or width'): f(bare, tmp_path/'x')
    with pytest.raises(ValueError, match='no path'): write_keras_csv(Annotations(small.images.assign(path=None), small.boxes), tmp_path/'x.csv')

VOC = """<annotation><filename>a.png</filename><size><width>64</width><height>48</height></size><object><name>mass</name><difficult>{d}</difficult>
<bndbox><xmin>{x}</xmin><ymin>3</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>"""

@pytest.mark.parametrize('text,why', [
    (VOC.format(d=0,x=31), 'row b.xml, object 1'), (VOC.format(d=0,x='two'), "b.xml cannot be read.*two"), (VOC.format(d='maybe',x=2), 'b.xml cannot'),
    (VOC.replace('<xmin>{x}</xmin>','').format(d=0), 'not a number'), (VOC.format(d=0,x=2).replace('>30<','>300<'), 'outside of a picture 64 wide'),
    (VOC.format(d=0,x=2).replace('<name>mass</name>',''), 'without a label'), (VOC.format(d=0,x=2).replace('>64<','>0<'), 'b.xml cannot be read.*a.png'),
    ('<html/>', 'another kind of XML'), ('', 'b.xml cannot be read')])
def test_one_bad_voc_file_among_many_is_named(tmp_path, text, why):
    for o in 'ac': (tmp_path/f'{o}.xml').write_text(VOC.format(d=0,x=2))
    (tmp_path/'b.xml').write_text(text)
    with pytest.raises(ValueError, match=f'(?s){why}'): read_voc(tmp_path)

def test_voc_size_from_the_picture_and_difficult_objects(small, tmp_path):
    (tmp_path/'x').mkdir()
    (tmp_path/'x'/'a.xml').write_text(VOC.format(d=1,x=2).replace('>64<','>0<'))
    a = read_voc(tmp_path/'x', tmp_path/'images')
    assert (a.images.width[0],a.images.height[0])==(64,48) and a.boxes[XYXY].to_numpy().tolist()==[[1,2,30,40]]
    a = read_voc(tmp_path/'x', tmp_path/'images', difficult=False)
    assert len(a.boxes)==0 and a.images.ignored[0]==1

@pytest.mark.parametrize('line,why', [
    ('images/a.png,1,2,30,40', '2 has 5 fields'), ('images/a.png,1,2,30,,mass', 'not a number\n.*labels.csv:2'), ('images/a.png,30,2,1,40,mass', 'labels.csv:2'),
    ('images/a.png,x1,y1,x2,y2,class', 'not a number'), ('images/z.png,,,,,', "no picture in .*'z'"), ('images/a.png,1,2,30,40,lump', 'none of'),
    ('images/a.png,,,,,mass', 'not a number')])
def test_bad_keras_lines(small, tmp_path, line, why):
    (tmp_path/'labels.csv').write_text(f'images/b.png,,,,,\n{line}\n')
    with pytest.raises(ValueError, match=why): read_keras_csv(tmp_path/'labels.csv', ['mass'])

def test_bad_keras_classes(small, tmp_path):
    (tmp_path/'labels.csv').write_text('images/b.png,,,,,\n'); (tmp_path/'c.csv').write_text('mass;0\n')
    with pytest.raises(ValueError, match='c.csv cannot be read'): read_keras_csv(tmp_path/'labels.csv', tmp_path/'c.csv')

@pytest.mark.parametrize('line,why', [
    ('3 .5 .5 .1 .1', 'class 3'), ('-1 .5 .5 .1 .1', 'class -1'), ('mass .5 .5 .1 .1', "b.txt:2 cannot be read.*'mass'"), ('0 .5 .5 .1 .1 .9', '6 numbers'),
    ('0 32 24 10 10', 'are these pixels'), ('0 .5 .5 0 .1', 'b.txt:2'), ('0 .5 .5 nan .1', 'not a number'), ('0 .9 .5 .9 .1', 'outside of a picture')])
def test_bad_yolo_lines(small, tmp_path, line, why):
    (tmp_path/'labels').mkdir()
    (tmp_path/'labels'/'b.txt').write_text(f'0 .5 .5 .1 .1\n{line}\n')
    with pytest.raises(ValueError, match=why): read_yolo(tmp_path/'images', names=['mass'])

def test_yolo_folders_and_names(small, tmp_path):
    for k in ('train','val'):
        (tmp_path/'y/images'/k).mkdir(parents=True); (tmp_path/'y/labels'/k).mkdir(parents=True)
        Image.new('L',(64,48)).save(tmp_path/'y/images'/k/f'{k}.png')
    (tmp_path/'y/labels/train/train.txt').write_text('1 .5 .5 .5 .5\n\n')
    (tmp_path/'y/data.yaml').write_text("names:\n  1: mass\n  0: nodule # the smaller\n")
    a = read_yolo(tmp_path/'y/images', names=tmp_path/'y/data.yaml')
    assert a.boxes[XYXY].to_numpy().tolist()==[[16,12,48,36]] and a.boxes.label.tolist()==['mass'] and len(a)==2
    assert len(read_yolo(tmp_path/'y/images/train', names=['x','y']).boxes)==1
    with pytest.raises(ValueError, match='right folder'): read_yolo(tmp_path/'y/images/val', names=['x','y'])
    (tmp_path/'y/data.yaml').write_text('nc: 2')
    with pytest.raises(ValueError, match='data.yaml cannot be read'): read_yolo(tmp_path/'y/images', names=tmp_path/'y/data.yaml')

def test_pictures_of_one_name(tmp_path):
    for o in ('a.png','a.jpg'): Image.new('L',(9,9)).save(tmp_path/o)
    with pytest.raises(ValueError, match='two pictures of one name'): read_yolo(tmp_path)

@given(st.lists(st.from_regex(r'[a-c]{1,2}(/[a-c.]{1,3})?\.(png|dcm|JPG)', fullmatch=True), min_size=1, max_size=6, unique_by=lambda o: o.rsplit('.',1)[0]))
def test_ids_are_as_many_as_files(names): assert len(set(_ids(names)))==len(names)

def test_inbreast_dicoms_and_regions(tmp_path):
    (tmp_path/'AllDICOMs').mkdir(); (tmp_path/'AllXML').mkdir()
    save(stored(np.zeros((400,300), np.uint16), 12, PatientID='removed'), tmp_path/'AllDICOMs'/'1_ff_MG_L_ML_ANON.dcm')
    (tmp_path/'INbreast.csv').write_text('Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads\nremoved;removed;L;MLO;201001;1;3;4b\n')
    def roi(name, pts, n=None): return dict(Name=name, NumberOfPoints=len(pts) if n is None else n, Point_px=[f'({x}, {y})' for x,y in pts])
    def write(*rois): (tmp_path/'AllXML'/'1.xml').write_bytes(plistlib.dumps(dict(Images=[dict(ROIs=list(rois))])))
    write(roi('Mass',[(10,20),(60,20),(30,90)]), roi('mass',[(1,1),(5,5)]), roi('Assymetry',[(3,3),(3,9),(3,20)]), roi('Calcification',[]))
    a = read_inbreast(tmp_path)
    assert a.boxes[XYXY].to_numpy().tolist()==[[10,20,60,90]] and a.images.ignored[0]==1
    r = a.images.iloc[0]
    assert (r.image_id,r.patient_id,r['view'],r.birads,r.height,r.width)==('1','ff','MLO','4b',400,300)
    assert read_inbreast(tmp_path, None).images.ignored[0]==3
    write(roi('Mass',[(10,20),(60,20),(30,90)], n=9))
    with pytest.raises(ValueError, match='1.xml cannot be read: region .Mass. announces 9 points'): read_inbreast(tmp_path)
    write(roi('Mass',[(10,20),(600,20),(30,90)]))
    with pytest.raises(ValueError, match='outside of a picture 300 wide .*\n.*1.xml, region 0'): read_inbreast(tmp_path)
    write(roi('Mass',[('ten',20)]))
    with pytest.raises(ValueError, match="1.xml cannot be read.*'ten"): read_inbreast(tmp_path)

@pytest.mark.parametrize('call', [lambda: read_nih('nowhere'), lambda: read_vindr('nowhere.csv'), lambda: read_inbreast('nowhere'), lambda: read_coco('nowhere.json'),
                                  lambda: read_voc('nowhere'), lambda: read_keras_csv('nowhere.csv'), lambda: read_yolo('nowhere')])
def test_what_is_not_there_is_named(call):
    with pytest.raises(ValueError, match='nowhere'): call()

@needs_real
def test_nih_boxes_and_people():
    a = read_nih(REAL/'nih')
    assert (len(a),len(a.boxes),len(a.classes))==(686,771,8)
    assert a.images.width.eq(512).all() and a.images.patient_id.str.len().eq(8).all() and a.images.boxed.all() and a.images.spacing.between(.3,1).all()
    assert set(a.images.sex)=={'F','M'} and set(a.images['view'])=={'AP','PA'} and a.images.age.notna().all()

@needs_real
def test_two_copies_of_the_mri_slices_agree():
    c,v = read_coco(REAL/'brain_mri'/'annotations.coco.json', REAL/'brain_mri'/'images'),read_voc(REAL/'brain_mri'/'voc', REAL/'brain_mri'/'images', offset=(1,1))
    for a in (c,v): assert len(a)==300 and len(a.boxes)==228 and (~a.images.image_id.isin(a.boxes.image_id)).sum()==80 and a.classes==['tumor']
    b,w = (a.boxes.sort_values(['image_id','x1']).reset_index(drop=True) for a in (c,v))
    assert (b.image_id==w.image_id).all() and abs(b[XYXY]-w[XYXY]).max().max()<=.5
    far = read_voc(REAL/'brain_mri'/'voc').boxes.sort_values(['image_id','x1']).reset_index(drop=True)
    assert abs(b[XYXY]-far[XYXY]).max().tolist()==[.5,.5,1.5,1.5] # by the book: these files have one added to both corners

def test_vindr_of_three_readers(tmp_path):
    "All labels of the set, which the wheel of torchxrayvision carries"
    f = Path(importlib.util.find_spec('torchxrayvision').submodule_search_locations[0])/'data'/'vinbigdata-train.csv.gz'
    a = read_vindr(f)
    assert (len(a),len(a.boxes),a.boxes.reader.nunique(),len(a.classes))==(15000,36096,11,14) and a.boxes.image_id.nunique()==4394
    assert a.classes[:4]==['Aortic enlargement','Atelectasis','Calcification','Cardiomegaly'] # in the order of class_id
    one = read_vindr(f, readers='R9')
    assert (one.boxes.reader=='R9').all() and len(one)<15000
    df = pd.read_csv(f)
    few = df[df.image_id.isin(df.image_id[df.x_min.notna()].unique()[:40])]
    few.to_csv(tmp_path/'few.csv', index=False)
    b = read_vindr(tmp_path/'few.csv', readers='fuse')
    assert len(b)==40 and len(b.boxes)<few.x_min.notna().sum()
    assert set((b.boxes.agreement*3).round(4))=={1,2,3}
    few.assign(x_max=few.x_max-few.x_min).to_csv(tmp_path/'xywh.csv', index=False)
    with pytest.raises(ValueError, match='is this xywh.*\n.*row xywh.csv:'): read_vindr(tmp_path/'xywh.csv')
