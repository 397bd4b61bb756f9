"Tiles: every pixel seen, every lesion reported once, and the same as the whole picture where that is possible"
import cv2, numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import set_seed
from hypothesis import assume, given, settings, strategies as st
from torch import nn, tensor
from lungdet.anchors import Anchors
from lungdet.boxes import clip_boxes, iou
from lungdet.core import XYXY
from lungdet.data import detection_dls
from lungdet.formats import Annotations
from lungdet.learner import detect, retinanet_learner
from lungdet.loss import RetinaLoss
from lungdet.patches import whole_learner
from lungdet.tiles import *
from lungdet.tiles import within

@given(st.integers(1,900), st.integers(1,900), st.integers(1,12), st.integers(0,200), st.sampled_from([1,8,32]))
@settings(max_examples=300, deadline=None)
def test_tiles_cover_the_picture_and_overlap(h, w, t, overlap, step):
    tile = t*step
    assume(-(-overlap//step)<t)
    b = tile_boxes((h,w), tile, overlap, step)
    assert (b[:,2:]-b[:,:2]==tile).all() and (b%step==0).all() and len(b.unique(dim=0))==len(b)
    for axis,n in ((0,w),(1,h)):
        at = b[:,axis].unique().tolist()
        assert at[0]==0 and at[-1]+tile>=n and (len(at)==1 or at[-1]+tile<n+step)
        assert all(tile-(y-x)>=overlap for x,y in zip(at,at[1:]))
        if len(at)>1 and n<=at[-2]+tile: raise AssertionError('a tile too many')

@given(st.integers(100,400), st.integers(100,400), st.lists(st.tuples(st.floats(0,1), st.floats(0,1), st.integers(6,30), st.integers(6,30)), max_size=6), st.integers(0,99))
@settings(max_examples=200, deadline=None)
def test_lesions_not_larger_than_the_overlap_come_back_as_they_are(h, w, raw, seed):
    "A perfect detector that sees only its tile; lesions that do not lie together"
    lesions = tensor([(x*(w-a),y*(h-b),x*(w-a)+a,y*(h-b)+b) for x,y,a,b in raw]).reshape(-1,4)
    big = torch.cat([lesions[:,:2]-3, lesions[:,2:]+3], 1)
    assume((iou(big,big)-torch.eye(len(big))<=0).all())
    same(lesions, (h,w), tile_boxes((h,w), 96, 36), seed)

def simulate(lesions, tiles, shape):
    b = torch.cat([within(lesions, t.expand(len(lesions),4).float()) for t in tiles]+[torch.empty(0,4)])
    tile = torch.arange(len(tiles)).repeat_interleave(len(lesions))
    b = clip_boxes(b, shape); ok = (b[:,2:]-b[:,:2]>0).all(1)
    return b[ok],tile[ok]

def same(lesions, shape, tiles, seed=0):
    b,tile = simulate(lesions, tiles, shape)
    i = torch.randperm(len(b), generator=torch.Generator().manual_seed(seed)) # the order of tiles says nothing
    got,scores,labels = fuse_tiles(b[i], torch.rand(len(b)), torch.zeros(len(b)).int(), tile[i], tiles, shape)
    order = lambda o: np.array(sorted(o.tolist())).reshape(-1,4)
    np.testing.assert_allclose(order(got), order(lesions), atol=1e-3)
    assert (scores[:-1]>=scores[1:]).all()

@given(st.integers(20,250), st.integers(20,250), st.integers(0,150), st.integers(0,150), st.integers(0,9))
@settings(max_examples=200, deadline=None)
def test_one_lesion_of_any_size_is_reported_once(a, b, x, y, seed):
    shape = (300,340)
    same(tensor([[x,y,min(x+a,340),min(y+b,300)]]).float(), shape, tile_boxes(shape, 96, 32), seed)

def test_two_classes_are_not_fused():
    shape,tiles = (100,160),tile_boxes((100,160), 100, 40)
    b,tile = tensor([[20.,30,100,60],[60,30,140,60]]),tensor([0,1])
    assert len(fuse_tiles(b, torch.ones(2), tensor([0,1]), tile, tiles, shape)[0])==2
    got,s,l = fuse_tiles(b, tensor([.4,.9]), tensor([1,1]), tile, tiles, shape)
    assert got.tolist()==[[20,30,140,60]] and s.tolist()==pytest.approx([.9]) and l.tolist()==[1]

def test_the_border_of_the_picture_cuts_nothing():
    "A lesion at the edge touches it in every tile, and is no part of anything"
    shape,tiles = (100,160),tile_boxes((100,160), 100, 40)
    b = tensor([[0.,0,30,30],[130,70,160,100]])
    assert not touches(b, tiles[[0,1]], shape).any()
    assert len(fuse_tiles(b, torch.ones(2), torch.zeros(2).int(), tensor([0,1]), tiles, shape)[0])==2

def test_nothing_found():
    tiles = tile_boxes((100,160), 100, 40)
    got = fuse_tiles(torch.empty(0,4), torch.empty(0), torch.empty(0).long(), torch.empty(0).long(), tiles, (100,160))
    assert [len(o) for o in got]==[0,0,0]

class Cells(nn.Module):
    "What a cell of 8 px says depends on nothing else; corrections too"
    def __init__(self):
        super().__init__()
        self.conv,self.sizes = nn.Conv2d(3, 5, 8, stride=8),[]
        with torch.no_grad(): self.conv.weight[1:] *= .3; self.conv.weight[0] = 4/64; self.conv.bias[:] = 0; self.conv.bias[0] = -5
    def forward(self, x):
        self.sizes.append(len(x))
        o = self.conv(x).permute(0,2,3,1).reshape(len(x),-1,5)
        return o[...,:1],o[...,1:]

def cells(ann, size, model):
    dls = detection_dls(ann, size=size, bs=4, aug=None, stats=([0.,0,0],[1.,1,1]))
    learn = retinanet_learner(dls, 'tf_efficientnet_lite0', pretrained=False, width=8, depth=1)
    learn.model,learn.loss_func = model,RetinaLoss(Anchors(sizes=((14,),), ratios=(1.,), levels=(3,)), (size,size))
    return learn

@pytest.fixture
def bright(tmp_path):
    "Bright cells, far from each other, in a square picture that is letterboxed: black above and below"
    rng,im = np.random.default_rng(5),np.zeros((256,256), np.uint8)
    im[64:192] = 20
    for y,x in [(y,x) for y in range(9,23,4) for x in range(2,31,4)]:
        if rng.random()<.7: im[8*y:8*y+8,8*x:8*x+8] = rng.integers(160,250,(8,8))
    cv2.imwrite(str(tmp_path/'a.png'), im); cv2.imwrite(str(tmp_path/'black.png'), np.zeros((256,256), np.uint8))
    row = dict(patient_id='p', height=1024, width=2048, split='valid', scale_x=.125, scale_y=.125, offset_x=0., offset_y=64., png_size=256.)
    ims = pd.DataFrame([row|dict(image_id=o, path=str(tmp_path/f'{o}.png')) for o in ('a','black')])
    return Annotations(ims, pd.DataFrame(columns=['image_id',*XYXY,'label']), ['Mass'])

@pytest.mark.parametrize('tile,overlap', [(64,32),(96,40),(128,64)])
def test_equal_to_the_whole_picture_where_a_lesion_lies_inside_one_tile(bright, tile, overlap):
    set_seed(3, reproducible=True); model = Cells()
    whole = detect(cells(bright, 256, model), bright, score_thr=.1)
    tiled = detect_tiles(cells(bright, tile, model), bright, overlap=overlap, score_thr=.1)
    assert len(whole)>10 and set(tiled.image_id)=={'a'}
    cols = [*XYXY,'score']
    np.testing.assert_allclose(tiled.sort_values(XYXY)[cols].to_numpy()[:,:4], whole.sort_values(XYXY)[cols].to_numpy()[:,:4], atol=1e-2)  # px of an original 8 times as large
    np.testing.assert_allclose(np.sort(tiled.score), np.sort(whole.score), atol=1e-5)

def test_each_tile_with_something_in_it_is_seen_once_and_few_at_a_time(bright, monkeypatch):
    from lungdet import tiles as module
    seen,real = [],module.cut_patch
    monkeypatch.setattr(module, 'cut_patch', lambda im,l,t,a,b: seen.append((l,t)) or real(im,l,t,a,b))
    model = Cells()
    detect_tiles(cells(bright, 64, model), bright, overlap=16, bs=5)
    im = cv2.imread(bright.images.path[0], 0)
    want = [(l,t) for l,t,r,b in tile_boxes(im.shape, 64, 16, 32).tolist() if im[t:b,l:r].any()]
    assert sorted(seen)==sorted(want) and len(set(seen))==len(seen) # the black picture has none
    assert max(model.sizes)<=5 and sum(model.sizes)==len(want)

def test_a_tile_of_another_size_is_resized(bright):
    "A lesion of twice the size, seen through tiles of twice the size, is the same lesion"
    learn = cells(bright, 64, Cells())
    big = bright.where([True,False])
    cv2.imwrite(big.images.path[0].replace('a.png','big.png'), cv2.resize(cv2.imread(big.images.path[0],0), (512,512), interpolation=cv2.INTER_NEAREST))
    a = detect_tiles(learn, big, overlap=32, score_thr=.1)
    big.images['path'] = big.images.path.str.replace('a.png','big.png')
    b = detect_tiles(learn, big, tile=128, overlap=64, score_thr=.1)
    np.testing.assert_allclose(a[[*XYXY,'score']], b[[*XYXY,'score']], atol=1e-3)

def test_a_learner_of_whole_pictures_takes_tiles_too_and_an_empty_answer_is_a_table(bright):
    train = Annotations(pd.concat([bright.images.assign(split='train', image_id=lambda d: 't'+d.image_id), bright.images]), bright.boxes, bright.classes)
    dls = detection_dls(train, size=64, bs=2)
    learn = retinanet_learner(dls, 'tf_efficientnet_lite0', pretrained=False, width=8, depth=1)
    p2 = whole_learner(learn, dls)
    assert len(detect_tiles(p2, score_thr=0., max_det=7))==7
    none = detect_tiles(p2, bright.where([False,True]), score_thr=0.)
    assert list(none)==['image_id',*XYXY,'label','score'] and len(none)==0 and none.score.dtype==float

def test_what_cannot_be_looked_at_is_named_and_not_answered_with_an_empty_table(bright):
    learn = cells(bright, 64, Cells())
    def find(**kw): return detect_tiles(learn, Annotations(bright.images.assign(**kw), bright.boxes, bright.classes))
    with pytest.raises(ValueError, match="image 'a' has no height and width"): find(height=None)
    with pytest.raises(ValueError, match="image 'a' has no path"): find(path=None)
    with pytest.raises(ValueError, match="image 'a': there is no file gone.png"): find(path='gone.png')
    with pytest.raises(ValueError, match='there are no images'): detect_tiles(learn, bright.where([False,False]))

@pytest.mark.parametrize('bad,why', [(dict(least=1.5),'least=1.5'), (dict(least=1.),'least=1.0'), (dict(least=-.1),'least=-0.1'), (dict(bs=0),'bs=0'), (dict(max_det=0),'max_det=0'),
                                     (dict(tile=0),'tiles of 0 px hold nothing'), (dict(fuse=dict(nms_thr=.1)),"fuse has \\['nms_thr'\\]"), (dict(overlap=-1),'cannot overlap by -1 px; take 0 or more')])
def test_settings_that_find_nothing(bright, bad, why):
    with pytest.raises(ValueError, match=why): detect_tiles(cells(bright, 64, Cells()), bright, **bad)

def test_each_condition_on_tiles_has_its_own_message():
    with pytest.raises(ValueError, match='cannot overlap by 100 px; take 0 or more, and less than a tile$'): tile_boxes((300,300), 96, 100, 32)
    with pytest.raises(ValueError, match='^step=0: tiles begin'): tile_boxes((300,300), 96, 10, 0)

def test_an_overlap_is_rounded_up_to_the_step():
    assert tile_boxes((300,300), 96, 40, 32).equal(tile_boxes((300,300), 96, 64, 32)) and not tile_boxes((300,300), 96, 40, 1).equal(tile_boxes((300,300), 96, 64, 1))
