"DICOM series and NIfTI: one scan is one volume, however it was filed; what is not whole is refused by name"
import numpy as np, pytest, shutil, zipfile
from dataclasses import replace
from hypothesis import given, settings, strategies as st
from itertools import permutations, product
from pydicom import dcmread
from lungdet.dicom import DicomError
from lungdet.series import *
from lungdet.volumes import Volume, make_volume
from test_volumes import askew

SIDES = [''.join(o) for p in permutations(('LR','PA','SI')) for o in product(*p)]

@pytest.fixture(scope='module')
def vol(): return make_volume(2, lesions=1, shape=(7,24,20), spacing=(9.,9.5,20.))[0]

@pytest.fixture
def folder(vol, tmp_path): return write_series(vol, tmp_path/'s')

def change(folder, i=2, **header):
    f = sorted(folder.iterdir())[i]
    ds = dcmread(f)
    for k,v in header.items(): setattr(ds, k, v)
    ds.save_as(f)
    return f.name

def by_height(folder): return [f for _,f in sorted((float(dcmread(f).ImagePositionPatient[2]),f) for f in folder.iterdir())]

@given(st.integers(0,10**6), st.sampled_from(SIDES))
@settings(max_examples=30, deadline=None)
def test_dicom_and_nifti_of_one_scan_are_one_volume(tmp_path_factory, seed, to):
    "Slices acquired in any direction, at any angle, under names in any order"
    d,g = tmp_path_factory.mktemp('v'),np.random.default_rng(seed)
    v = reorient(Volume(g.integers(-1000,3000,(4,5,6)).astype(np.int16), askew(seed), 'v'), to)
    a,b = read_series(write_series(v, d/'s', seed)),read_nifti(write_nifti(v, d/'v.nii.gz'))
    a,b,v = (reorient(o) for o in (a,b,v))
    assert (a.array==b.array).all() and (a.array==v.array).all() and a.array.dtype==b.array.dtype==np.int16
    np.testing.assert_allclose(a.affine, b.affine, atol=2e-3); np.testing.assert_allclose(a.affine, v.affine, atol=1e-6)

@given(st.integers(0,10**6), st.sampled_from(SIDES), st.sampled_from(SIDES))
@settings(max_examples=60, deadline=None)
def test_turning_keeps_every_voxel_in_its_place(seed, one, two):
    v = Volume(np.arange(4*5*6).reshape(4,5,6), askew(seed))
    t = reorient(reorient(v, one), two)
    assert (reorient(t, two).array==t.array).all() and (t.array==reorient(v, two).array).all()
    ijk = np.argwhere(np.ones(v.array.shape))[::7]
    for k,i,j in ijk:
        z,y,x = np.argwhere(t.array==v.array[k,i,j])[0]
        np.testing.assert_allclose((t.affine@[x,y,z,1]), v.affine@[j,i,k,1], atol=1e-8)

def test_turning_an_upright_scan():
    v = Volume(np.arange(24).reshape(2,3,4), np.diag([2,3,5,1]), missing=(0,))
    assert (reorient(v).array==v.array).all() and reorient(v).missing==(0,)
    t = reorient(v, 'ILA')                                                     # slices to the feet, rows to the left, columns to the front
    assert t.array.shape==(2,4,3) and t.spacing.tolist()==[3,2,5] and t.missing==(1,) and t.array[0,0,0]==v.array[1,2,0]
    with pytest.raises(ValueError, match=r"lacks the slices \[0\], which are no slices towards 'LPS'"): reorient(v, 'LPS')
    assert reorient(replace(v, missing=()), 'LPS').missing==()
    for bad in ('LPL','LP','XYZ',''):
        with pytest.raises(ValueError, match='three letters'): reorient(v, bad)

def test_names_folders_and_zips_do_not_matter(vol, folder, tmp_path):
    for n,f in enumerate(sorted(folder.iterdir())): (tmp_path/f't/{n%3}').mkdir(parents=True, exist_ok=True); shutil.copy(f, tmp_path/f't/{n%3}/{n//3}') # no suffix, same names
    (tmp_path/'t/DICOMDIR').write_bytes(b'x'); (tmp_path/'t/notes.txt').write_text('x')
    with zipfile.ZipFile(tmp_path/'z.zip','w') as z:
        for f in folder.iterdir(): z.write(f, f.name)
    for o in (folder,tmp_path/'t',tmp_path/'z.zip'):
        v = read_series(o)
        assert (v.array==vol.array).all() and v.patient_id=='P002'
        np.testing.assert_allclose(v.affine, vol.affine, atol=1e-9)

def test_rescale_differs_from_slice_to_slice(vol, folder):
    a,b = by_height(folder)[:2]
    change(folder, sorted(folder.iterdir()).index(a), RescaleSlope=2, RescaleIntercept=-1000); change(folder, sorted(folder.iterdir()).index(b), RescaleSlope=.5, RescaleIntercept=0)
    v = read_series(folder)
    np.testing.assert_allclose(v.array[0], vol.array[0]*2.-1000); np.testing.assert_allclose(v.array[1], vol.array[1]*.5); np.testing.assert_allclose(v.array[2], vol.array[2])

def test_padding_becomes_the_lowest_value(vol, folder):
    for i,f in enumerate(sorted(folder.iterdir())):
        ds = dcmread(f); a = ds.pixel_array.copy(); a[0] = -2000
        ds.PixelData,ds.PixelPaddingValue,ds['PixelPaddingValue'].VR = a.astype('<i2').tobytes(),-2000,'SS'
        ds.save_as(f)
    v = read_series(folder)
    assert v.array.min()>=0 and (v.array[:,1:]==vol.array[:,1:]).all() and (v.array[:,0]==v.array.min()).all()

@given(st.sets(st.integers(1,10), min_size=1, max_size=4), st.integers(0,10**6))
@settings(max_examples=25, deadline=None)
def test_lost_slices_are_named_and_leave_their_places(lost, seed):
    g,n = np.random.default_rng(seed),12
    a = askew(seed)
    order = g.permutation([k for k in range(n) if k not in lost])
    pos = np.array([(a@[0,0,k,1])[:3] for k in order])
    orient = (a[:3,:2]/np.linalg.norm(a[:3,:2],axis=0)).T.ravel()
    k,affine = slice_grid(pos, orient, np.linalg.norm(a[:3,:2],axis=0)[::-1], [f'f{o}' for o in order])
    forward = np.linalg.det(a[:3,:3])>0
    assert k.tolist()==[int(o if forward else n-1-o) for o in order]
    back = np.eye(4)
    if not forward: back[2,2],back[2,3] = -1,n-1
    np.testing.assert_allclose(affine@back, a, atol=1e-6)

def test_half_of_the_slices_lost():
    "The smallest distance counts as the step"
    pos = np.array([[0,0,z] for z in (0.,2,4,8)])
    assert slice_grid(pos, [1,0,0,0,1,0], (1,1), [*'abcd'])[0].tolist()==[0,1,2,4]

def test_tilted_gantry_keeps_every_point():
    pos = np.array([[0,2.*k,5.*k] for k in range(6)])
    k,affine = slice_grid(pos[::-1], [1,0,0,0,1,0], (1,1), [*'abcdef'])
    assert k.tolist()==[5,4,3,2,1,0]
    np.testing.assert_allclose([affine@[0,0,o,1] for o in range(6)], np.c_[pos,np.ones(6)], atol=1e-9)

@pytest.mark.parametrize('change_of,why', [
    (dict(ImagePositionPatient=[0,0,999]), 'unevenly|missing|sideways'), (dict(ImagePositionPatient=None), 'IM0002.dcm has no ImagePositionPatient'),
    (dict(ImageOrientationPatient=[1,0,0,0,0,1]), 'two orientations'), (dict(PixelSpacing=[1,1]), 'two pixel spacings'), (dict(Rows=12), 'two sizes'),
    (dict(NumberOfFrames=4), 'IM0002.dcm holds 4 frames'), (dict(PatientID='Q'), '2 patients'), (dict(SeriesInstanceUID='1.2.3'), 'has 2 series'),
    (dict(PhotometricInterpretation='MONOCHROME1'), 'MONOCHROME1'), (dict(PixelData=b'12'), 'pixels cannot be read')])
def test_one_bad_slice_is_named(folder, change_of, why):
    change(folder, **change_of)
    with pytest.raises(ValueError, match=why): read_series(folder)

def test_copies_and_second_echoes(folder):
    shutil.copy(sorted(folder.iterdir())[0], folder/'copy.dcm')
    with pytest.raises(ValueError, match='IM0000.dcm and copy.dcm lie in one place'): read_series(folder)

def test_bad_orientations_and_single_slices(folder):
    for f in folder.iterdir(): ds = dcmread(f); ds.ImageOrientationPatient = [1,0,0,1,0,0]; ds.save_as(f)
    with pytest.raises(ValueError, match='no pair of directions'): read_series(folder)
    for f in sorted(folder.iterdir())[1:]: f.unlink()
    ds = dcmread(f := next(folder.iterdir())); ds.ImageOrientationPatient = [1,0,0,0,1,0]; ds.save_as(f)
    with pytest.raises(ValueError, match='only slice'): read_series(folder)

def test_unreadable_files_and_gaps_can_be_accepted(vol, folder):
    f = by_height(folder)
    f[3].write_bytes(f[3].read_bytes()[:300]); f[5].unlink()
    with pytest.raises(ValueError, match='1 of 6 files cannot be read, such as '+f[3].stem): read_series(folder)
    v = read_series(folder, incomplete='accept')
    assert v.missing==(3,5) and (v.array[[0,1,2,4,6]]==vol.array[[0,1,2,4,6]]).all() and (v.array[[3,5]]==v.array.min()).all()
    whole = f[4].read_bytes()
    f[4].write_bytes(whole[:-900])                                         # the header is whole, the pixels are not
    assert read_series(folder, incomplete='accept').missing==(3,4,5)
    f[4].write_bytes(whole); f[3].unlink()
    with pytest.raises(ValueError, match=f'2 of 7 slices are missing, the first between {f[2].name} and {f[4].name}'): read_series(folder)
    with pytest.raises(ValueError, match="'raise' or 'accept'"): read_series(folder, incomplete='yes')

def test_choice_of_series(vol, folder, tmp_path):
    both = tmp_path/'both'
    shutil.copytree(folder, both/'a'); write_series(replace(vol, array=vol.array[:4]+1), both/'b', SeriesDescription='T1')
    t = series_table(both)
    assert sorted(t.files)==[4,7]
    with pytest.raises(ValueError, match='(?s)both has 2 series.*T1, 4 files'): read_series(both)
    assert (read_series(both, t.series[t.files==4].iloc[0]).array==vol.array[:4]+1).all()
    with pytest.raises(ValueError, match="no series '9.9'"): read_series(both, '9.9')
    with pytest.raises(DicomError, match='no DICOM'): read_series(tmp_path/'both'/'a'/'..'/'..'/'nothing' if (tmp_path/'nothing').mkdir() else tmp_path/'nothing')

def test_a_report_beside_the_scan_is_no_slice(vol, folder):
    ds = dcmread(sorted(folder.iterdir())[0])
    for k in ('PixelData','Rows','Columns'): delattr(ds, k)
    ds.SeriesInstanceUID = '1.2.3'
    ds.save_as(folder/'report.dcm')
    assert (read_series(folder).array==vol.array).all()

def test_what_does_not_fit_into_a_series(vol, tmp_path):
    for a in (vol.array+.5, vol.array.astype(int)+2**15):
        with pytest.raises(ValueError, match='do not fit into 16 bits'): write_series(replace(vol, array=a), tmp_path/'x')

nib = pytest.importorskip('nibabel')

def test_nifti_units_frames_scaling_and_holes(tmp_path):
    a = np.random.default_rng(0).integers(0,500,(4,5,6)).astype(np.int16)
    img = nib.Nifti1Image(a, np.diag([-.002,-.002,.005,1])); img.header.set_xyzt_units('meter'); nib.save(img, tmp_path/'m.nii')
    v = read_nifti(tmp_path/'m.nii')
    np.testing.assert_allclose(v.spacing, [2,2,5], rtol=1e-6); assert (v.array==a.transpose(2,1,0)).all() and v.name=='m'
    img = nib.Nifti1Image(np.stack([a,a+1],-1), np.eye(4)); nib.save(img, tmp_path/'t.nii.gz')
    with pytest.raises(ValueError, match=r'shape \(4, 5, 6, 2\).*frame='): read_nifti(tmp_path/'t.nii.gz')
    one,two = (read_nifti(tmp_path/'t.nii.gz', frame=k) for k in (0,1))
    assert (two.array==one.array+1).all() and (one.array==a.transpose(2,1,0)[:,::-1,::-1]).all() # to the left and to the back
    f = a.astype(np.float32)*.25; f[0,0,0] = np.nan
    nib.save(nib.Nifti1Image(f, np.diag([-1,-1,1,1])), tmp_path/'f.nii')
    v = read_nifti(tmp_path/'f.nii')
    assert v.array.dtype==np.float32 and v.array[0,0,0]==np.nanmin(f) and (v.array[1:]==f.transpose(2,1,0)[1:]).all()
    nib.save(nib.Nifti1Image(a, None), tmp_path/'u.nii')
    with pytest.raises(ValueError, match='u.nii has no orientation'): read_nifti(tmp_path/'u.nii')
    (tmp_path/'x.nii').write_bytes(b'no')
    for o in ('x.nii','y.nii'):
        with pytest.raises(ValueError, match=f'{o} cannot be read as NIfTI'): read_nifti(tmp_path/o)

def test_nibabel_agrees_on_where_a_voxel_lies(vol, tmp_path):
    img = nib.load(write_nifti(vol, tmp_path/'v.nii'))
    k,i,j = 4,9,3
    assert np.asarray(img.dataobj)[j,i,k]==vol.array[k,i,j]
    np.testing.assert_allclose((img.affine@[j,i,k,1])[:3]*[-1,-1,1], vol.in_patient([(np.array([j,i,k])+.5)*vol.spacing])[0], atol=1e-3)

def thinned(folder, **header):
    for o in by_height(folder)[::2]: o.unlink()
    for i in range(len([*folder.iterdir()])): change(folder, i, **header)
    return folder

def test_every_second_slice_lost_is_seen_in_the_header(vol, folder):
    with pytest.raises(ValueError, match='40.00 mm apart, and the header says 20.00; is every second'): read_series(thinned(folder))
    assert read_series(folder, incomplete='accept').array.shape[0]==3

@pytest.mark.parametrize('header', [dict(SpacingBetweenSlices=None), dict(SpacingBetweenSlices=2, SliceThickness=38)])
def test_headers_that_do_not_say_how_far_apart_the_slices_were(folder, header):
    assert read_series(thinned(folder, **header)).array.shape[0]==3

def test_a_single_file_has_its_name(folder):
    with pytest.raises(ValueError, match='^IM0000.dcm is the only slice'): read_series(folder/'IM0000.dcm')

def saved(path, array, affine=np.eye(4)):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path

@pytest.mark.parametrize('suffix', ['nii','nii.gz'])
@pytest.mark.parametrize('keep', [100, 400, -50])
def test_a_nifti_cut_short(vol, tmp_path, suffix, keep):
    p = write_nifti(vol, tmp_path/f'cut.{suffix}')
    p.write_bytes(p.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f'cut.{suffix} cannot be read as NIfTI; was it cut short'): read_nifti(p)

def test_frames_that_are_not_there(tmp_path):
    one,three = (saved(tmp_path/f'{n}.nii', np.zeros(s, np.int16)) for n,s in (('one',(2,2,2)),('three',(2,2,2,3))))
    for p,frame,n in ((three,9,3),(three,-1,3),(three,3,3),(one,1,1)):
        with pytest.raises(ValueError, match=f'holds {n} volumes and none of number {frame}'): read_nifti(p, frame=frame)
    assert read_nifti(one, frame=0).array.shape==read_nifti(three, frame=2).array.shape==(2,2,2)

def test_niftis_that_are_no_volume(tmp_path):
    rgb = np.zeros((2,2,2), [('R','u1'),('G','u1'),('B','u1')])
    for a,why in ((rgb,'colours or complex'), (np.ones((2,2,2), np.complex64),'colours or complex'), (np.ones((4,5), np.int16),'a volume has three dimensions')):
        with pytest.raises(ValueError, match=why): read_nifti(saved(tmp_path/'a.nii', a))
    flat = nib.Nifti1Image(np.ones((2,2,2), np.int16), None)
    flat.header.set_sform(np.diag([1,1,0,1]), 1)
    (tmp_path/'flat.nii').write_bytes(flat.to_bytes())
    with pytest.raises(ValueError, match='affine without volume'): read_nifti(tmp_path/'flat.nii')

def test_a_sheared_nifti_keeps_its_volume(tmp_path):
    a = np.diag([1.,2,3,1]); a[1,2] = 2
    v = read_nifti(saved(tmp_path/'a.nii', np.zeros((4,4,4), np.int16), a))
    assert v.voxel==pytest.approx(6) and v.voxel<v.spacing.prod()
