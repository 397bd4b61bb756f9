"Synthetic mammograms: reproducible, resumable, and what they claim to be"
import numpy as np, pytest
from pydicom import dcmread
from lungdet.mammograms import VIEWS, describe_woman, make_mammograms, mammogram
from lungdet.readers import read_inbreast
from lungdet.splits import audit_split, split_patients

H = 640

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make_mammograms(tmp_path_factory.mktemp('m')/'inbreast', 4, 1, H)

def test_real_size_black_over_half_and_masses_inside_the_breast():
    for i in (0,5,9):
        for side,view in VIEWS:
            im,outlines,dots = mammogram(describe_woman(i), side, view)
            assert im.shape==(2294,1914) and im.dtype==np.uint16 and im.max()<4096 and (im==0).mean()>.5
            assert (im[:,-1 if side=='R' else 0]>0).any() and not (im[:,0 if side=='R' else -1]>0).any() # chest wall on its side
            assert len(outlines)==len(describe_woman(i).masses[side])
            for p,m in zip(outlines, describe_woman(i).masses[side]):
                assert np.ptp(p,axis=0).max()==pytest.approx(m.size*2294) and .01<=m.size<=.04
                x,y = p.round().astype(int).T
                assert (im[y,x]>0).all()

def test_a_mass_is_brighter_than_what_surrounds_it():
    gain = []
    for i in range(12):
        for side,view in VIEWS:
            im,outlines,_ = mammogram(describe_woman(i,3), side, view)
            for p in outlines:
                (x,y),r = p.mean(0).round().astype(int),int(np.ptp(p,axis=0).max())
                core,around = (im[y-k:y+k,x-k:x+k].astype(float) for k in (max(2,r//5),r))
                gain.append(core.mean()-around.mean())
    assert len(gain)>10 and np.mean(np.array(gain)>0)>.9

def test_the_same_files_again_and_another_seed_other_ones(folder, tmp_path):
    again = make_mammograms(tmp_path/'a', 4, 1, H, n_workers=1)
    def content(d): return {p.name:p.read_bytes() for p in d.rglob('*') if p.is_file()}
    assert content(again)==content(folder)
    more = content(make_mammograms(tmp_path/'more', 5, 1, H)) # a woman does not depend on how many there are
    assert all(more[k]==v for k,v in content(folder).items() if k.endswith('.dcm'))
    assert not set(content(make_mammograms(tmp_path/'b', 1, 2, H)))&{k for k in more if k.endswith('.dcm')}

def test_an_interrupted_folder_is_finished_and_nothing_is_drawn_twice(folder, tmp_path, monkeypatch):
    from lungdet import mammograms
    done,real = [],mammograms.mammogram
    def cut(s, side, view, height):
        if len(done)==5: raise KeyboardInterrupt
        done.append((s.i,side,view)); return real(s, side, view, height)
    monkeypatch.setattr(mammograms, 'mammogram', cut)
    d = tmp_path/'a'
    with pytest.raises(KeyboardInterrupt): make_mammograms(d, 4, 1, H, n_workers=1)
    with pytest.raises(ValueError, match='INbreast.csv'): read_inbreast(d)
    monkeypatch.setattr(mammograms, 'mammogram', lambda s,side,view,h: done.append((s.i,side,view)) or real(s,side,view,h))
    make_mammograms(d, 4, 1, H, n_workers=1)
    assert len(done)==len(set(done))==16 and not list(d.rglob('.*.tmp'))
    assert {p.name:p.read_bytes() for p in d.rglob('*.*')}=={p.name:p.read_bytes() for p in folder.rglob('*.*')}

def test_the_labels_of_inbreast(folder):
    ann = read_inbreast(folder)
    assert len(ann)==16 and ann.images.patient_id.nunique()==4 and set(ann.images['view'])=={'CC','MLO'} and ann.classes==['Mass']
    for r in ann.images.itertuples():
        ds = dcmread(r.path)
        assert (ds.Modality,ds.ImageLaterality,ds.ViewPosition,ds.PatientID,ds.BitsStored)==('MG',r.laterality,r.view,'removed',12)
        assert len(ann.of(r.image_id))==len(describe_woman(int(r.image_id[2:])//4, 1).masses[r.laterality])
    assert (ann.images.birads[ann.images.image_id.isin(ann.boxes.image_id)]>='2').all()
    assert set(read_inbreast(folder, None).classes)<={'Mass','Calcification'}
    audit_split(split_patients(ann, .25))

def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path/'thesis.txt').write_text('mine')
    with pytest.raises(ValueError, match='not from this call'): make_mammograms(tmp_path, 1)
    with pytest.raises(ValueError, match='at least 1 and 256'): make_mammograms(tmp_path/'x', 0)
    assert [o.name for o in tmp_path.iterdir()]==['thesis.txt']
