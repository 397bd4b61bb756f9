"Patches: every lesion whole, nothing cut without a word, and a backbone that stands still"
import cv2, numpy as np, pandas as pd, pytest, tempfile, torch
from fastai.vision.all import set_seed
from hypothesis import given, settings, strategies as st
from pathlib import Path
from lungdet.anchors import Anchors
from lungdet.core import XYXY
from lungdet.data import detection_dls
from lungdet.formats import Annotations
from lungdet.learner import load_detector, retinanet_learner, save_detector
from lungdet.patches import *

BOX = st.tuples(st.floats(0,280), st.floats(0,180), st.floats(2,40), st.floats(2,40))

def boxes_of(raw, h=200, w=300):
    b = np.array([(x,y,min(x+a,w),min(y+c,h)) for x,y,a,c in raw], float).reshape(-1,4)
    return b[(b[:,2]-b[:,0]>1)&(b[:,3]-b[:,1]>1)]

@given(st.lists(BOX, min_size=1, max_size=5), st.integers(0,999), st.integers(0,12), st.integers(66,260))
@settings(max_examples=150, deadline=None)
def test_the_lesion_of_a_patch_lies_in_it_whole(raw, seed, margin, side):
    b = boxes_of(raw)
    for i in range(len(b)):
        x,y = place_patch(np.random.default_rng(seed), b, i, (200,300), side, margin)
        assert 0<=x<=max(0,300-side) and 0<=y<=max(0,200-side)
        assert seen_share(b[i:i+1], (x,y,x+side,y+side))[0]==1
        near = np.r_[b[i,:2]-[x,y], [x+side,y+side]-b[i,2:]]
        edge = np.array([x==0, y==0, x+side>=300, y+side>=200])
        assert ((near>=margin-1e-6)|edge).all() # the margin, except where the picture ends

@given(st.lists(BOX, min_size=0, max_size=4), st.integers(0,99))
@settings(max_examples=40, deadline=None)
def test_boxes_of_patches_are_those_of_the_picture(raw, seed):
    b,im = boxes_of(raw),np.random.default_rng(seed).integers(1, 255, (200,300), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as d:
        cv2.imwrite(f'{d}/a.png', im)
        ann = Annotations(pd.DataFrame(dict(image_id=['a'], path=[f'{d}/a.png'], height=[200], width=[300])),
                          pd.DataFrame(b, columns=XYXY).assign(image_id='a', label='Mass', nth=range(len(b))), ['Mass'])
        p = crop_patches(ann, Path(d)/'p', size=80, k=3, m=2, seed=seed, larger='raise')
        assert len(p)==(max(3,len(b)) if len(b) else 2)
        back,whole = on_parents(p, p.boxes),set()
        for r in p.images.itertuples():
            got,cut = p.of(r.image_id),seen_share(b, (r.left,r.top,r.right,r.bottom)) if len(b) else np.empty(0)
            assert sorted(got.nth)==np.flatnonzero((cut>=.5)&(cut>0)).tolist() and r.cut==is_cut_count(cut)
            whole |= set(np.flatnonzero(cut==1))
            x,y = int(r.left),int(r.top)
            assert (cv2.imread(r.path, 0)==im[y:y+80,x:x+80]).all()
        assert whole==set(range(len(b)))
        for o in back.itertuples():
            r = p.images.set_index('image_id').loc[p.boxes.image_id[o.Index]]
            want = np.r_[np.maximum(b[o.nth,:2],[r.left,r.top]), np.minimum(b[o.nth,2:],[r.right,r.bottom])]
            assert np.allclose([o.x1,o.y1,o.x2,o.y2], want, atol=1e-6)

def is_cut_count(share): return int(((share>0)&(share<1-1e-9)).sum())

def pictures(folder, n=6, h=160, w=200, letterbox=False):
    "Blobs on black, half of them positive, in `folder`; the ids look like numbers"
    rng,rows,boxes = np.random.default_rng(0),[],[]
    for i in range(n):
        im = np.zeros((h,w), np.uint8); im[:,80:] = rng.integers(40, 80, (h,w-80))
        o = f'{i:04d}'
        if i%2:
            x,y = rng.integers(90,160),rng.integers(10,120)
            cv2.circle(im, (int(x)+12,int(y)+12), 11, 200, -1); boxes.append([o,x,y,x+24,y+24,'Mass'])
        cv2.imwrite(str(folder/f'{o}.png'), im)
        rows.append(dict(image_id=o, path=str(folder/f'{o}.png'), patient_id=f'p{i//2}', height=h, width=w, split='valid' if i//2==0 else 'train', birads='4a'))
    return Annotations(pd.DataFrame(rows), pd.DataFrame(boxes, columns=['image_id',*XYXY,'label']))

def test_background_patches_lie_on_the_foreground(tmp_path):
    p = crop_patches(pictures(tmp_path), tmp_path/'p', size=48, k=1, m=20)
    neg = p.images[~p.images.image_id.isin(p.boxes.image_id)]
    assert len(neg)==60 and min((cv2.imread(o,0)>0).mean() for o in neg.path)>=.5
    assert not neg[['left','top']].duplicated().all()

def test_a_picture_does_not_depend_on_the_others(tmp_path):
    ann = pictures(tmp_path)
    a,b = crop_patches(ann, tmp_path/'p', 48),crop_patches(ann.part('train'), tmp_path/'q', 48)
    cols = ['image_id','left','top']
    assert a.part('train').images[cols].reset_index(drop=True).equals(b.images[cols])
    assert not crop_patches(ann, tmp_path/'p', 48, seed=1).images[cols].equals(a.images[cols])

def test_what_is_there_is_read_and_what_was_interrupted_is_made_again(tmp_path, monkeypatch):
    from lungdet import patches
    ann,calls,real = pictures(tmp_path),[],patches.encode_png
    def cut(im):
        calls.append(1)
        if len(calls)==7: raise KeyboardInterrupt
        return real(im)
    monkeypatch.setattr(patches, 'encode_png', cut)
    with pytest.raises(KeyboardInterrupt): crop_patches(ann, tmp_path/'p', 48, n_workers=1)
    first = crop_patches(ann, tmp_path/'p', 48, n_workers=1)
    n = len(calls)
    again = crop_patches(ann, tmp_path/'p', 48)
    assert len(calls)==n and again.images.equals(first.images) and again.boxes.equals(first.boxes) and not list(tmp_path.rglob('.*.tmp'))
    assert again.images.parent.str.len().eq(4).all() and again.images.birads.eq('4a').all() # '0001' is no number
    (tmp_path/'p').rename(tmp_path/'moved')
    moved = crop_patches(ann, tmp_path/'moved', 48)
    assert len(calls)==n and all(Path(o).exists() for o in moved.images.path)
    cv2.imwrite(ann.images.path[0], np.full((160,200), 9, np.uint8)) # another picture of that name
    crop_patches(ann, tmp_path/'moved', 48)
    assert len(calls)>n

def test_a_letterboxed_picture_and_its_boxes(tmp_path):
    "A 2:1 original of 400 x 200 in a square of 100, black above and below"
    im = np.zeros((100,100), np.uint8); im[25:75] = 50; im[45:55,40:60] = 200
    cv2.imwrite(str(tmp_path/'a.png'), im)
    row = dict(image_id='a/b c', path=str(tmp_path/'a.png'), height=200, width=400, scale_x=.25, scale_y=.25, offset_x=0., offset_y=25., png_size=100.)
    ann = Annotations(pd.DataFrame([row]), pd.DataFrame([['a/b c',160,80,240,120,'Mass']], columns=['image_id',*XYXY,'label']))
    p = crop_patches(ann, tmp_path/'p', size=50, k=3, margin=4)
    assert 'scale_x' not in p.images and p.images.parent.eq('a/b c').all()
    for r in p.images.itertuples():
        x1,y1,x2,y2 = p.of(r.image_id)[XYXY].to_numpy()[0].astype(int)
        assert (cv2.imread(r.path,0)[y1:y2,x1:x2]==200).all() and (x2-x1,y2-y1)==(20,10)
    assert np.allclose(on_parents(p, p.boxes)[XYXY], [160,80,240,120])

def test_a_large_lesion(tmp_path):
    ann = pictures(tmp_path)
    with pytest.raises(ValueError, match="image '0001': a lesion of 24 x 24 px and a margin of 8 px do not fit into patches of 32 px"): crop_patches(ann, tmp_path/'p', 32)
    p = crop_patches(ann, tmp_path/'p', 32, k=2, larger='scale')
    side = p.images.right-p.images.left
    assert set(side[p.images.image_id.isin(p.boxes.image_id)])=={41.} and {cv2.imread(o,0).shape for o in p.images.path}=={(32,32)}
    assert np.allclose(on_parents(p, p.boxes)[XYXY].drop_duplicates(), ann.boxes[XYXY])
    for bad in (dict(size=0), dict(k=0), dict(m=-1), dict(larger='crop')):
        with pytest.raises(ValueError): crop_patches(ann, tmp_path/'p', **dict(size=64)|bad)

@pytest.fixture(scope='module')
def phases(tmp_path_factory):
    d = tmp_path_factory.mktemp('phases'); ann = pictures(d, 8)
    set_seed(0, reproducible=True)
    dls = detection_dls(crop_patches(ann, d/'p', 48, k=2), size=64, bs=4)
    anchors = Anchors(sizes=((16,24),(32,48),(64,96)), levels=(3,4,5))
    learn = retinanet_learner(dls, 'tf_efficientnet_lite0', pretrained=False, width=16, depth=1, anchors=anchors)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn,ann

def fit(learn, n=2):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, 1e-2)

@pytest.mark.parametrize('norm', ['batch','frozen','group'])
def test_the_backbone_does_not_move_and_the_rest_does(phases, norm, tmp_path):
    first,ann = phases
    learn = first if norm=='batch' else retinanet_learner(first.dls, 'tf_efficientnet_lite0', pretrained=False, width=16, depth=1, anchors=first.loss_func.anchors, model=dict(norm=norm))
    whole = detection_dls(ann, size=96, bs=4)
    p2 = whole_learner(learn, whole, scale_anchors(learn.loss_func.anchors, .5))
    x = whole.one_batch()[0]
    with torch.no_grad():
        old,now = learn.model.eval().backbone(x),p2.model.train().backbone(x) # in training mode too
        for a,b in zip(old,now): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    before = {k:v.clone() for k,v in p2.model.state_dict().items()}
    for do in (p2.freeze,p2.unfreeze): do(); fit(p2)
    for k,v in p2.model.state_dict().items():
        if k.startswith('backbone.'): assert torch.equal(v, before[k]), k
    assert all(not torch.equal(v, before[k]) for k,v in p2.model.named_parameters() if not k.startswith('backbone.'))
    ids = [id(p) for p,*_ in p2.opt.all_params()]
    assert len(ids)==len(set(ids)) and set(ids)=={id(p) for k,p in p2.model.named_parameters() if not k.startswith('backbone.')}
    model,cfg = load_detector(save_detector(p2, tmp_path/'d.safetensors'))
    with torch.no_grad():
        for a,b in zip(model(x), p2.model.eval()(x)): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

def test_phase_1_is_left_alone_and_a_thawed_phase_2_learns_all(phases):
    first,ann = phases
    before = {k:v.clone() for k,v in first.model.state_dict().items()}
    p2 = whole_learner(first, detection_dls(ann, size=96, bs=4), frozen=False)
    assert all(p.requires_grad for p in p2.model.parameters()) and p2.detector['model']==first.detector['model']
    fit(p2, 1)
    assert all(torch.equal(v, before[k]) for k,v in first.model.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k,v in p2.model.state_dict().items() if k.startswith('backbone.') and 'weight' in k)

def test_pictures_that_do_not_fit_phase_1(phases):
    first,ann = phases
    named = Annotations(ann.images, ann.boxes.assign(label='Tumour'))
    with pytest.raises(ValueError, match="phase 1 had classes=\\['Mass'\\]"): whole_learner(first, detection_dls(named, size=64, bs=4))
    with pytest.raises(ValueError, match='phase 1 had in_channels=3'): whole_learner(first, detection_dls(ann, size=64, bs=4, mode='gray'))
    with pytest.raises(ValueError, match='a frozen backbone cannot adapt'): whole_learner(first, detection_dls(ann, size=64, bs=4, stats=([.1]*3,[.2]*3)))
    with pytest.raises(ValueError, match='do not fit the heads'): whole_learner(first, detection_dls(ann, size=64, bs=4), Anchors(((16,),(32,),(64,)), levels=(3,4,5)))

def test_counting_leaves_the_model_as_it_was(phases):
    model = phases[0].model.train()
    before = {k:v.clone() for k,v in model.state_dict().items()}
    n = training_macs(model, torch.zeros(2,3,64,64))
    assert n==2*training_macs(model, torch.zeros(1,3,64,64)) and model.training
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items()) and not any(m._forward_hooks for m in model.modules())

@pytest.mark.parametrize('bad', [dict(part=2), dict(part=-.1), dict(part=float('nan')), dict(least=5), dict(margin=-20)])
def test_settings_that_would_lose_lesions_without_a_word(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))): crop_patches(pictures(tmp_path), tmp_path/'p', 48, **bad)
    assert not (tmp_path/'p').exists()

def test_what_is_wrong_with_a_picture_is_said_of_it_by_name(tmp_path):
    ann = pictures(tmp_path)
    def crop(**kw): return crop_patches(Annotations(ann.images.assign(**kw), ann.boxes), tmp_path/'p', 48)
    with pytest.raises(ValueError, match="image '0000' has no path"): crop(path=None)
    with pytest.raises(ValueError, match="image '0003': there is no file gone.png"): crop(path=ann.images.path.where(ann.images.image_id!='0003', 'gone.png'))
    with pytest.raises(ValueError, match="image '0000' has no height and width"): crop(width=None)
    with pytest.raises(ValueError, match='there are no images'): crop_patches(ann.where([False]*6), tmp_path/'p', 48)

def test_boxes_of_other_patches(tmp_path):
    ann = pictures(tmp_path); p = crop_patches(ann, tmp_path/'p', 48)
    with pytest.raises(ValueError, match="1 of 1 boxes lie on none of these patches, such as on 'x_0'"): on_parents(p, p.boxes.head(1).assign(image_id='x_0'))
    with pytest.raises(ValueError, match='these images have no `parent`'): on_parents(ann, ann.boxes)
    assert len(on_parents(p, p.boxes.head(0)))==0

def test_a_picture_smaller_than_a_patch_gives_the_same_one_again(tmp_path):
    ann = pictures(tmp_path, 2)
    p = crop_patches(ann, tmp_path/'p', size=256, k=3, m=2)
    assert len(p)==5 and len(p.images[['parent','left','top']].drop_duplicates())==2
