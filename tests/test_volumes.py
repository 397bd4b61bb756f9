"Volumes: millimetres go there and back, and slices are images of the scan that they came from"
import numpy as np, pandas as pd, pytest
from dataclasses import replace
from hypothesis import given, settings, strategies as st
from lungdet.core import XYXY
from lungdet.pictures import load_picture
from lungdet.volumes import *

def askew(seed):
    "A random affine of right angles and positive spacing"
    g = np.random.default_rng(seed)
    q = np.linalg.qr(g.normal(size=(3,3)))[0]
    a = np.eye(4)
    a[:3,:3],a[:3,3] = q*g.uniform(.3,6,3),g.uniform(-300,300,3)
    return a

@pytest.fixture(scope='module')
def head(): return make_volume(5, lesions=3, shape=(16,64,64), spacing=(3.6,3.6,9.))

@given(st.integers(0,2**31-1))
@settings(max_examples=40, deadline=None)
def test_patient_and_grid_are_inverse_and_keep_distances(seed):
    v,p = Volume(np.zeros((3,4,5)), askew(seed)),np.random.default_rng(seed+1).uniform(-50,50,(6,3))
    there = v.in_patient(p)
    np.testing.assert_allclose(v.in_grid(there), p, atol=1e-8)
    np.testing.assert_allclose(np.linalg.norm(there[0]-there[1]), np.linalg.norm(p[0]-p[1]), rtol=1e-9) # right angles: the grid is rigid
    k = np.array([[2,1,0]])
    np.testing.assert_allclose(v.in_patient((k+.5)*v.spacing), k@v.affine[:3,:3].T+v.affine[:3,3], atol=1e-8) # the centre of a voxel

@pytest.mark.parametrize('array,affine,why', [(np.zeros((2,2)),np.eye(4),'shape'), (np.zeros((2,2,2)),np.zeros((4,4)),'no affine'), (np.zeros((2,2,2)),np.full((4,4),np.nan),'no affine'), (np.zeros((2,2,2)),np.eye(3),'no affine')])
def test_no_volume(array, affine, why):
    with pytest.raises(ValueError, match=why): Volume(array, affine)

def test_heads_are_reproducible_and_differ(head):
    again = make_volume(5, lesions=3, shape=(16,64,64), spacing=(3.6,3.6,9.))
    assert (again[0].array==head[0].array).all() and again[2].equals(head[2])
    assert (make_volume(6, lesions=3, shape=(16,64,64), spacing=(3.6,3.6,9.))[0].array!=head[0].array).any()

@given(st.integers(0,10**6), st.sampled_from([(1.8,1.8,6.),(2.4,2.4,3.)]))
@settings(max_examples=8, deadline=None)
def test_lesions_are_where_the_table_says(seed, spacing):
    shape = (int(144/spacing[2]),*(int(230/o) for o in spacing[1::-1]))
    vol,mask,t = make_volume(seed, lesions=2, shape=shape, spacing=spacing, flashes=0)
    for i,r in t.iterrows():
        k = np.argwhere(mask==i+1)[:,::-1]+.5                             # centres of its voxels, x,y,z
        np.testing.assert_allclose(k.mean(0)*spacing, [r.x,r.y,r.z], atol=max(spacing))
        assert (k*spacing>=r[LESION[:3]].to_numpy(float)-1e-6).all() and (k*spacing<=r[LESION[3:]].to_numpy(float)+1e-6).all()
    assert vol.array[mask>0].mean()>vol.array[(mask==0)&(vol.array>300)].mean()

def test_no_lesion_and_no_flash():
    vol,mask,t = make_volume(1, lesions=0, flashes=0, shape=(8,32,32), spacing=(7,7,18))
    assert len(t)==0 and list(t)[-6:] and not mask.any() and set(LESION)<=set(t)

def test_one_window_for_all_slices(head):
    vol = head[0]
    g = gray_slices(vol)
    pairs = pd.DataFrame(dict(v=vol.array.ravel(), g=g.ravel())).drop_duplicates()
    assert pairs.v.is_unique and pairs.sort_values('v').g.is_monotonic_increasing # a value has one gray, on whichever slice
    assert (gray_slices(replace(vol, array=vol.array.astype(np.float32)))==g).all()

def test_missing_slices_do_not_move_the_window(head):
    vol = replace(head[0], missing=(0,1))
    other = replace(vol, array=np.where(np.arange(16)[:,None,None]<2, 30000, vol.array).astype(np.int16))
    assert (gray_slices(other)[2:]==gray_slices(vol)[2:]).all()

def test_slices_are_pictures_with_boxes_around_the_mask(head, tmp_path):
    vol,mask,_ = head
    ann = slices_of([vol], tmp_path, [mask], label='plaque')
    assert ann.classes==['plaque'] and len(ann)==16 and ann.images.patient_id.eq('P005').all()
    assert (load_picture(ann.images.path[7], mode='gray')==gray_slices(vol)[7]).all()
    for r in ann.boxes.itertuples():
        m = mask[int(r.image_id[-3:])]==r.lesion
        x1,y1,x2,y2 = (int(getattr(r,o)) for o in XYXY)
        assert m[y1:y2,x1:x2].sum()==m.sum()>0 and m[y1].any() and m[y2-1].any() and m[:,x1].any() and m[:,x2-1].any()
    assert set(zip(ann.boxes.image_id, ann.boxes.lesion))=={(slice_id(vol,k),i) for k in range(16) for i in np.unique(mask[k]) if i}
    np.testing.assert_allclose(ann.images.z, (np.arange(16)+.5)*9)

def test_slices_of_several_and_of_none(head, tmp_path):
    vol,mask,_ = head
    two = slices_of([vol,replace(vol, name='b', missing=(3,))], tmp_path, [mask,mask])
    assert len(two)==31 and not two.images.image_id.eq('b_003').any() and not two.boxes.image_id.eq('b_003').any()
    assert len(slices_of([vol], tmp_path).boxes)==0 and len(slices_of([vol], tmp_path, [np.zeros_like(mask)]).boxes)==0
    with pytest.raises(ValueError, match='two volumes of one name'): slices_of([vol,vol], tmp_path)
    with pytest.raises(ValueError): slices_of([vol], tmp_path, [])

def test_masks_of_zeros_and_ones():
    m = np.zeros((4,9,9), bool)
    m[0:2,1:3,1:3] = m[2,3,3] = m[3,7,7] = True                              # (2,3,3) touches by a corner
    n = lesion_mask(m)
    assert n.max()==2 and n[2,3,3]==n[0,1,1]!=n[3,7,7]
    assert mask_boxes(n).groupby('lesion').size().tolist()==[3,1]

def test_viewer_is_in_millimetres_and_draws_what_the_plane_cuts(head):
    vol,_,t = head
    axs = show_planes(vol, t.loc[0,['x','y','z']], t)
    for ax,(u,v) in zip(axs, ((0,1),(0,2),(1,2))):
        assert ax.get_aspect()==1 and sorted(ax.images[0].get_extent()[:2])==[0,vol.size[u]] and max(ax.images[0].get_extent()[2:])==vol.size[v]
        want = t.loc[0,[LESION[u],LESION[v]]].to_numpy(float)
        assert any(np.allclose(p.get_xy(), want) for p in ax.patches)
    assert axs[1].get_ylim()[0]<axs[1].get_ylim()[1] and axs[0].get_ylim()[0]>axs[0].get_ylim()[1] # head up, nose up
    assert [ax.get_title().split()[0] for ax in axs]==['axial','coronal','sagittal']
    assert not show_planes(vol, (1,1,1), t)[0].patches

def test_a_leaning_voxel_holds_its_determinant(head, tmp_path):
    a = np.diag([2.,2,5,1]); a[1,2] = 5*np.tan(np.radians(30))
    v = Volume(np.zeros((2,4,4), np.int16), a, 'lean')
    assert v.voxel==pytest.approx(20) and v.voxel<.9*v.spacing.prod()
    assert slices_of([v], tmp_path).images.voxel.tolist()==pytest.approx([20,20])
    assert head[0].voxel==pytest.approx(head[0].spacing.prod())

@pytest.mark.parametrize('kw', [dict(lesions=50), dict(lesions=1, shape=(2,32,32)), dict(lesions=1, shape=(8,3,3))])
def test_lesions_that_do_not_fit_end_in_an_error(kw):
    with pytest.raises(ValueError, match='found a place in a scan of'): make_volume(0, flashes=0, **kw)

def test_arrays_are_made_of_lists_and_missing_slices_exist():
    assert Volume([[[1]],[[2]]], np.eye(4)).array.shape==(2,1,1)
    for missing in ((2,),(-1,)):
        with pytest.raises(ValueError, match='its slices are 0 to 1'): Volume(np.zeros((2,1,1)), np.eye(4), missing=missing)

@pytest.mark.parametrize('window', [40, (40,), (1,2,3), (40,0), (40,-1)])
def test_windows_are_a_centre_and_a_width(head, window):
    with pytest.raises(ValueError, match='centre and width'): gray_slices(head[0], window)

@pytest.mark.parametrize('change', [lambda m: m>0, lambda m: m.astype(float)])
def test_masks_without_numbers_point_to_lesion_mask(head, tmp_path, change):
    with pytest.raises(ValueError, match='lesion_mask gives them'): slices_of(head[:1], tmp_path, [change(head[1])])
    assert len(slices_of(head[:1], tmp_path, [lesion_mask(change(head[1]))]).boxes)

def test_slices_of_what_is_no_list(head, tmp_path):
    vol,mask,_ = head
    for v in (vol,[]):
        with pytest.raises(ValueError, match='a list of volumes'): slices_of(v, tmp_path)
    with pytest.raises(ValueError, match='head05 has no mask'): slices_of([vol], tmp_path, [None])
    for masks in ([], [mask,mask], mask):
        with pytest.raises(ValueError, match='masks for 1 volumes'): slices_of([vol], tmp_path, masks)

def test_detections_without_a_score_are_drawn(head, tmp_path):
    vol,mask,_ = head
    b = slices_of([vol], tmp_path, [mask]).boxes
    k = int(b.image_id[0][-3:])
    def texts(df): return [t.get_text() for t in show_strip(vol, [k], found=df)[0].texts]
    n = (b.image_id==b.image_id[0]).sum()
    assert texts(b.drop(columns='lesion'))==[] and texts(b)==[str(int(o)) for o in b.lesion[:n]] and texts(b.drop(columns='lesion').assign(score=.5))==['0.50']*n
