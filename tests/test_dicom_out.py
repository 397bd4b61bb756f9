"Chapter 16c: reports and drawings read back to the boxes, and pass the validators of dicom3tools and dcmtk, whatever the source looks like"
import shutil, subprocess, sys, warnings
from datetime import datetime
import numpy as np, pandas as pd, pydicom, pytest
from hypothesis import given, settings, strategies as st
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sr._concepts_dict import concepts
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from dicoms import chest, stored
from lungdet.core import XYXY
from lungdet.dicom import DicomError
from lungdet.dicom_out import CODES, Algorithm, label_code, read_sr, write_sr, _rectangle
from lungdet.gsps import read_gsps, write_gsps, _shown

pytest.importorskip('highdicom', reason="needs the extra [dicom-out]")
DAY = datetime(2026, 1, 31, 12)
NIH = 'Atelectasis Cardiomegaly Effusion Infiltrate Mass Nodule Pneumonia Pneumothorax'.split()
DX,SC,MULTI = '1.2.840.10008.5.1.4.1.1.1.1','1.2.840.10008.5.1.4.1.1.7','1.2.840.10008.5.1.4.1.1.7.2'
needs_dciodvfy = pytest.mark.skipif(shutil.which('dciodvfy') is None, reason='no dciodvfy: apt-get install dicom3tools')
needs_dcmtk = pytest.mark.skipif(shutil.which('dsrdump') is None, reason='no dsrdump: apt-get install dcmtk')

def image(a=None, name='a', study='s', kind='MONOCHROME2', **header):
    "A Dataset with UIDs and a patient"
    ds = stored(chest(64) if a is None else a, kind=kind)
    for k,o in (('StudyInstanceUID',study),('SeriesInstanceUID','series'),('SOPInstanceUID',name)): setattr(ds, k, generate_uid(entropy_srcs=[o,k]))
    who = dict(SOPClassUID=DX, PatientID='p1', PatientName='Doe^Jane', PatientSex='F', PatientBirthDate='19700101', StudyDate='20250101', StudyTime='1200', StudyID='1')
    for k,v in (who|header).items(): setattr(ds, k, v)
    return ds

def table(*rows, i='a'): return pd.DataFrame([(r[6] if len(r)>6 else i,*r[:6]) for r in rows], columns=['image_id',*XYXY,'label','score'])
BOXES = table((1.25,2.5,30,40.125,'Mass',.9), (10,10,20.1,30.3,'Cardiomegaly',.123456789))
ALG = Algorithm('net', '3', NIH, .1)

def errors(path):
    r = subprocess.run(['dciodvfy',str(path)], capture_output=True, text=True)
    return [l for l in (r.stdout+r.stderr).splitlines() if l.startswith('Error')]

def same(got, want, decimals=None):
    "Coordinates as float32; scores to 15 digits, or to `decimals`"
    np.testing.assert_array_equal(got[XYXY].to_numpy(float), want[XYXY].to_numpy(float).astype(np.float32))
    np.testing.assert_allclose(got.score.astype(float), want.score.astype(float), rtol=1e-15 if decimals is None else 0, atol=0 if decimals is None else .5*10**-decimals+1e-9)
    assert got.label.tolist()==want.label.tolist()

CASES = dict(
    plain=(image(), BOXES), none=(image(), BOXES[:0]), negative=(image(kind='MONOCHROME1'), BOXES),
    deep=(image(chest(64).astype(np.uint16)*16, WindowCenter=2048, WindowWidth=4000, RescaleSlope=1, RescaleIntercept=0, RescaleType='US'), BOXES),
    oblong=(image(chest(64)[:48], PixelSpacing=[.3,.15]), table((0,0,64,48,'Mass',1.))), flat=(image(PixelAspectRatio=[2,1]), BOXES),
    empty=(image(PatientID='', PatientName='', PatientSex='', PatientBirthDate='', StudyDate='', StudyTime='', StudyID=''), BOXES),
    umlauts=(image(SpecificCharacterSet='ISO_IR 100', PatientName='Müller^Zoë'), BOXES), secondary=(image(SOPClassUID=SC), BOXES))

@needs_dciodvfy
@pytest.mark.parametrize('case', [*CASES])
def test_no_error_for_dciodvfy_and_the_same_boxes(case, tmp_path):
    ds,boxes = CASES[case]
    a,b = write_sr(boxes, ds, ALG, tmp_path/'sr.dcm', when=DAY),write_gsps(boxes, ds, ALG, tmp_path/'ps.dcm', when=DAY)
    assert errors(a)==[] and errors(b)==[]

@pytest.mark.parametrize('case', [*CASES])
def test_the_same_boxes_come_back(case, tmp_path):
    ds,boxes = CASES[case]
    got = read_sr(write_sr(boxes, ds, ALG, tmp_path/'sr.dcm', when=DAY), {'a':ds})
    same(got.boxes, boxes)
    assert got.algorithm==ALG and got.when==DAY and got.images.image_id.tolist()==['a'] and got.images.findings.tolist()==[len(boxes)]
    drawn = read_gsps(write_gsps(boxes, ds, ALG, tmp_path/'ps.dcm', when=DAY), {'a':ds})
    same(drawn.boxes, boxes, 2)
    assert drawn.images.findings.tolist()==[len(boxes)]
    for f in ('sr.dcm','ps.dcm'):
        ps = pydicom.dcmread(tmp_path/f)
        assert (ps.PatientID,str(ps.PatientName),ps.StudyInstanceUID)==(ds.PatientID,str(ds.PatientName),ds.StudyInstanceUID)

@needs_dcmtk
@pytest.mark.parametrize('case', [*CASES])
def test_dcmtk_parses_the_tree(case, tmp_path):
    ds,boxes = CASES[case]
    r = subprocess.run(['dsrdump','+Pu',str(write_sr(boxes, ds, ALG, tmp_path/'sr.dcm', when=DAY))], capture_output=True, text=True)
    assert r.returncode==0 and 'E:' not in r.stderr, r.stderr
    assert r.stdout.count('SCOORD')==len(boxes) and ds.SOPInstanceUID in r.stdout and 'UNVERIFIED' in r.stdout and 'PRELIMINARY' in r.stdout
    assert ('without findings' in r.stdout)==(not len(boxes))

def test_several_images_of_a_study(tmp_path):
    dss = {i:image(name=i) for i in ('pa','lateral','none')}
    boxes = table((1,1,9,9,'Mass',.5,'lateral'), (2,2,9,9,'Nodule',.7,'pa'), (3,3,9,9,'Mass',.9,'lateral'))
    path = write_sr(boxes, dss, ALG, tmp_path/'sr.dcm', when=DAY)
    got = read_sr(path, dss)
    assert got.boxes.image_id.tolist()==['pa','lateral','lateral'] and got.boxes.score.tolist()==[.7,.9,.5]
    assert dict(zip(got.images.image_id, got.images.findings))==dict(pa=1, lateral=2, none=0)
    assert set(read_sr(path).boxes.image_id)=={dss['pa'].SOPInstanceUID, dss['lateral'].SOPInstanceUID}
    if shutil.which('dciodvfy'): assert errors(path)==[]
    for bad,why in ((dss|dict(other=image(name='x', study='t')), 'StudyInstanceUID'), (dss|dict(other=image(name='x', PatientID='p2')), 'PatientID'),
                    (dss|dict(twin=image(name='pa')), 'one SOPInstanceUID'), ({}, 'no image'), (dss['pa'], 'boxes of 2 images')):
        with pytest.raises(ValueError, match=why): write_sr(boxes, bad, ALG, tmp_path/'no.dcm')
    assert not (tmp_path/'no.dcm').exists()

def test_frames(tmp_path):
    ds = image(np.stack([chest(64)]*3), SOPClassUID=MULTI)
    for frame,why in ((None,'holds 3 frames'), (3,'none of number 3'), (-1,'none of number -1')):
        for write in (write_sr,write_gsps):
            with pytest.raises(ValueError, match=why): write(BOXES, ds, ALG, tmp_path/'no.dcm', frame=frame)
    a,b = (w(BOXES, ds, ALG, tmp_path/f'{w.__name__}.dcm', frame=1, when=DAY) for w in (write_sr,write_gsps))
    for got in (read_sr(a), read_gsps(b)): assert got.images.frame.tolist()==[1] and len(got.boxes)==2
    assert pydicom.dcmread(b).ReferencedSeriesSequence[0].ReferencedImageSequence[0].ReferencedFrameNumber==2
    if shutil.which('dciodvfy'): assert errors(a)==[] and errors(b)==[]
    assert read_sr(write_sr(BOXES, image(), ALG, tmp_path/'one.dcm', frame=2)).images.frame.isna().all() # a frame is for those that have several

@pytest.mark.filterwarnings('ignore:Invalid value for VR UI')
@pytest.mark.parametrize('uid', ['StudyInstanceUID','SeriesInstanceUID','SOPInstanceUID','SOPClassUID'])
@pytest.mark.parametrize('value', [None,'','not.a.uid','1.02.3'])
def test_a_source_without_uids_is_refused(uid, value, tmp_path):
    ds = image()
    if value is None: del ds[uid]
    else:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore'); setattr(ds, uid, value)
    for write in (write_sr,write_gsps):
        with pytest.raises(ValueError, match=uid): write(BOXES, ds, ALG, tmp_path/'no.dcm')
    assert [*tmp_path.iterdir()]==[]

def test_what_breaks_the_standard_is_left_out_and_what_identifies_is_kept(tmp_path):
    ds = image(PatientID='x'*64)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for k,v in dict(PatientAge='58', PatientSex='female', PatientBirthDate='1.1.1970', StudyDate='yesterday', PatientID='long '*20).items():
            ds.add(pydicom.DataElement(k, pydicom.datadict.dictionary_VR(k), v, validation_mode=0))
        for write,read in ((write_sr,read_sr),(write_gsps,read_gsps)):
            path = write(BOXES, ds, ALG, tmp_path/f'{write.__name__}.dcm')
            out = pydicom.dcmread(path)
            assert 'PatientAge' not in out and not out.PatientSex and not out.PatientBirthDate and not out.StudyDate
            assert out.PatientID.strip()==('long '*20).strip() and len(read(path).boxes)==2

def test_bare_source(tmp_path):
    "Nothing but UIDs and a size"
    ds = Dataset()
    for k in ('StudyInstanceUID','SeriesInstanceUID','SOPInstanceUID'): setattr(ds, k, generate_uid())
    ds.SOPClassUID,ds.Rows,ds.Columns,ds.PhotometricInterpretation = SC,64,64,'MONOCHROME2'
    for write,read in ((write_sr,read_sr),(write_gsps,read_gsps)): assert len(read(write(BOXES, ds, ALG, tmp_path/'x.dcm')).boxes)==2
    del ds.Rows
    with pytest.raises(ValueError, match='no size'): write_sr(BOXES, ds, ALG, tmp_path/'y.dcm')

def test_an_unknown_class_of_image(tmp_path):
    with pytest.raises(ValueError, match='class that the standard does not know'): write_sr(BOXES, image(SOPClassUID='1.2.3.4'), ALG, tmp_path/'x.dcm')

def test_colours(tmp_path):
    ds = image(np.stack([chest(64)]*3, -1), kind='RGB', SOPClassUID=SC)
    with pytest.raises(ValueError, match='RGB'): write_gsps(BOXES, ds, ALG, tmp_path/'x.dcm')
    same(read_sr(write_sr(BOXES, ds, ALG, tmp_path/'x.dcm')).boxes, BOXES)

def test_a_presentation_state_shows_what_the_image_showed():
    neg,wide = image(kind='MONOCHROME1'),image(ImagerPixelSpacing=[.2,.1])
    assert _shown(neg).PresentationLUTShape=='INVERSE' and _shown(image()).PresentationLUTShape=='IDENTITY'
    assert _shown(wide).DisplayedAreaSelectionSequence[0].PresentationPixelSpacing==[.2,.1]
    assert _shown(image()).DisplayedAreaSelectionSequence[0].PresentationPixelAspectRatio==[1,1]
    two = image(WindowCenter=[100,200], WindowWidth=[50,60], RescaleSlope=2, RescaleIntercept=-1)
    assert (_shown(two).SoftcopyVOILUTSequence[0].WindowCenter,_shown(two).RescaleSlope)==(100,2)
    assert 'SoftcopyVOILUTSequence' not in _shown(image(WindowCenter=1, WindowWidth=0))

def test_uids_are_the_reports_own(tmp_path):
    ds,other = image(),datetime(2026, 2, 1)
    def uid(*a, **kw): return pydicom.dcmread(write_sr(*a, path=tmp_path/'x.dcm', **kw)).SOPInstanceUID
    base = uid(BOXES, ds, ALG, when=DAY)
    assert base==uid(BOXES[::-1], ds, ALG, when=DAY)
    changed = [uid(BOXES, ds, ALG, when=other), uid(BOXES[:1], ds, ALG, when=DAY), uid(BOXES.assign(score=[.9,.12345678]), ds, ALG, when=DAY),
               uid(BOXES, ds, Algorithm('net','4',NIH,.1), when=DAY), uid(BOXES, ds, Algorithm('net','3',NIH,.2), when=DAY),
               uid(BOXES, image(name='b'), ALG, when=DAY), uid(BOXES.assign(x1=[1.5,10]), ds, ALG, when=DAY)]
    assert len({base,*changed})==8
    ps = pydicom.dcmread(write_gsps(BOXES, ds, ALG, tmp_path/'y.dcm', when=DAY))
    assert ps.SOPInstanceUID!=base and ps.SeriesInstanceUID!=ds.SeriesInstanceUID
    assert all(pydicom.uid.UID(o).is_valid for o in (base, ps.SOPInstanceUID, ps.SeriesInstanceUID))

def test_codes_are_those_of_the_standard():
    for label,code in CODES.items():
        known = {(v,m) for vs in concepts[code.scheme_designator].values() for v,(m,_) in vs.items()}
        assert (code.value,code.meaning) in known, label
    private = [label_code(o) for o in NIH if o.lower() not in CODES]
    assert len({o.value for o in private})==len(private)==3 and all(o.scheme_designator.startswith('99') and len(o.value)<=16 for o in private)

def test_codes_of_your_own(tmp_path):
    alg = Algorithm('net', '1', ['Atelectasis'], codes={'Atelectasis':('46621007','SCT','Atelectasis')})
    path = write_sr(table((1,1,9,9,'Atelectasis',.5)), image(), alg, tmp_path/'x.dcm')
    assert read_sr(path).boxes.label.tolist()==['Atelectasis']
    assert read_sr(path).algorithm.code('Atelectasis')[:2]==('46621007','SCT')

@pytest.mark.parametrize('label', ['a "quoted" one: 1 2', "Verdichtung, größer", '肺野', 'x'*64, 'class "b": 1 DCM', '</script>'])
def test_odd_labels_come_back(label, tmp_path):
    alg,boxes = Algorithm('net', '1', [label,'Mass']),table((1,1,9,9,label,.5))
    assert read_sr(write_sr(boxes, image(), alg, tmp_path/'x.dcm')).boxes.label.tolist()==[label]
    assert read_gsps(write_gsps(boxes, image(), alg, tmp_path/'y.dcm')).boxes.label.tolist()==[label]

@pytest.mark.parametrize('label', ['', ' ', 'a\\b', 'two\nlines', 'x'*65])
def test_labels_that_are_no_code(label):
    with pytest.raises(ValueError, match='cannot be the meaning'): Algorithm('net', '1', [label])

def test_bad_tables(tmp_path):
    for bad,why in ((BOXES.assign(score=2), 'outside 0 to 1'), (BOXES.assign(x2=0), 'xywh'), (BOXES.assign(x1=np.nan), 'not a number'), (BOXES.assign(label='?'), 'none of'),
                    (BOXES.drop(columns='score'), 'lack'), (BOXES.assign(x1=500, x2=600), 'far outside'), (table((-6,1,-1,9,'Mass',.5)), 'within the picture')):
        for write in (write_sr,write_gsps):
            with pytest.raises(ValueError, match=why): write(bad, image(), ALG, tmp_path/'x.dcm')
    assert [*tmp_path.iterdir()]==[]
    got = read_sr(write_sr(table((-3,-2,70,66,'Mass',.5)), image(), ALG, tmp_path/'x.dcm')).boxes
    assert got[XYXY].iloc[0].tolist()==[0,0,64,64]

def test_what_is_no_report(tmp_path):
    ds = image()
    ds.file_meta = FileMetaDataset(); ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.save_as(tmp_path/'im.dcm', enforce_file_format=True)
    (tmp_path/'text.dcm').write_text('hello'); (tmp_path/'empty.dcm').write_bytes(b'')
    whole = write_sr(BOXES, ds, ALG, tmp_path/'sr.dcm').read_bytes()
    (tmp_path/'cut.dcm').write_bytes(whole[:len(whole)//2])
    for f in ('im','text','empty','cut','absent'):
        with pytest.raises(DicomError): read_sr(tmp_path/f'{f}.dcm')
    for f in ('im','text','sr','absent'):
        with pytest.raises(DicomError): read_gsps(tmp_path/f'{f}.dcm')

def test_another_programs_report(tmp_path):
    "Without our parameters labels are the meanings of their codes; a circle is refused"
    path = write_sr(BOXES, image(), ALG, tmp_path/'x.dcm')
    ds = pydicom.dcmread(path)
    def walk(o):
        for c in o.get('ContentSequence', []): yield c; yield from walk(c)
    for o in walk(ds):
        if 'ContentSequence' in o: o.ContentSequence = [c for c in o.ContentSequence if c.ConceptNameCodeSequence[0].CodeValue!='111002']
    ds.save_as(tmp_path/'y.dcm')
    got = read_sr(tmp_path/'y.dcm')
    assert got.algorithm is None and got.boxes.label.tolist()==['Mass','Cardiomegaly']
    next(o for o in walk(ds) if o.ValueType=='SCOORD').GraphicType = 'ELLIPSE'
    ds.save_as(tmp_path/'z.dcm')
    with pytest.raises(ValueError): read_sr(tmp_path/'z.dcm')

def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'highdicom', None)
    with pytest.raises(ImportError, match=r"lungdet\[dicom-out\]"): write_sr(BOXES, image(), ALG, tmp_path/'x.dcm')
    same(read_gsps(write_gsps(BOXES, image(), ALG, tmp_path/'y.dcm')).boxes, BOXES, 2) # a drawing needs no more than pydicom

f32 = st.floats(0, 64, width=32)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(f32, f32, f32, f32, st.sampled_from(NIH), st.floats(0,1)), max_size=4))
def test_any_boxes(tmp_path_factory, rows):
    rows = [r for r in rows if r[0]<r[2] and r[1]<r[3]]
    boxes = table(*rows).sort_values('score', ascending=False, kind='stable')
    p = tmp_path_factory.mktemp('any')
    same(read_sr(write_sr(boxes, image(), ALG, p/'x.dcm')).boxes, boxes)

def test_rectangles():
    with pytest.raises(ValueError): _rectangle([[0,0],[1,0],[1,1],[0,0]], 'a')
    with pytest.raises(ValueError): _rectangle([[0,0],[1,1],[1,0],[0,1],[0,1]], 'a')
    with pytest.raises(ValueError): _rectangle([[0,0],[2,1],[2,3],[0,3],[0,0]], 'a')
