"Batches of pictures and boxes, and the cache behind them"
import cv2, errno, multiprocessing, numpy as np, os, pandas as pd, pickle, pytest, signal, time, torch
from fastai.vision.all import set_seed
from lungdet.augment import Augment, PAD
from lungdet.data import *
from lungdet.pictures import *
from lungdet.formats import Annotations
import lungdet.pictures

def toy(folder, n=8, boxes=True, size=128, **kw):
    im = np.zeros((size,size), np.uint8); im[30:70,75:105] = 255
    cv2.imwrite(str(folder/'box.png'), im)
    ims = pd.DataFrame(dict(image_id=[f'i{i}' for i in range(n)], path=str(folder/'box.png'), height=4*size, width=4*size, split=['train']*(n-2)+['valid']*2))
    b = pd.DataFrame([dict(image_id=f'i{i}', x1=300, y1=120, x2=420, y2=280, label='a') for i in range(n if boxes else 0)], columns=['image_id','x1','y1','x2','y2','label'])
    return Annotations(ims, b, ['a'])

@pytest.mark.parametrize('mode,channels', [('gray',1),('repeat',3),('stack',3)])
def test_batches_are_in_pixels_of_the_picture(tmp_path, mode, channels):
    dls = detection_dls(toy(tmp_path), size=64, bs=2, mode=mode, aug=None)
    x,boxes,labels = dls.one_batch()
    assert x.shape==(2,channels,64,64) and labels.tolist()==[[0],[0]]
    torch.testing.assert_close(boxes[0].as_subclass(torch.Tensor), torch.tensor([[37.5,15,52.5,35]]))

def test_negatives_only(tmp_path):
    dls = detection_dls(toy(tmp_path, boxes=False), size=64, bs=4)
    x,boxes,labels = dls.one_batch()
    assert boxes.shape==(4,1,4) and labels.dtype==torch.int64 and (labels==PAD).all()
    dls.show_batch(max_n=2)

def test_last_small_batch_and_workers(tmp_path):
    dls = detection_dls(toy(tmp_path, 7), size=32, bs=4, num_workers=1)
    assert [len(b[0]) for b in dls.train]==[4,1] and [len(b[0]) for b in dls.valid]==[2]

def test_missing_picture_is_named(tmp_path):
    ann = toy(tmp_path)
    ann.images['path'] = str(tmp_path/'gone.png')
    with pytest.raises(ValueError, match='gone.png'): detection_dls(ann, size=32, bs=2).one_batch()

def pictures(folder, n=12, size=40, channels=1):
    g = np.random.default_rng(0)
    for i in range(n): cv2.imwrite(str(folder/f'{i}.png'), g.integers(0,255,(size,size,channels),dtype=np.uint8))
    return [str(folder/f'{i}.png') for i in range(n)]

@pytest.mark.parametrize('channels,mode', [(1,'gray'),(1,'stack'),(3,'gray')])
def test_cache_holds_what_load_picture_reads(tmp_path, channels, mode):
    paths = pictures(tmp_path, channels=channels)
    c = PictureCache(paths, tmp_path/'c', 32, mode)
    for p in paths: np.testing.assert_array_equal(c[p], np.atleast_3d(load_picture(p, 32, mode)))
    assert c.a.shape==(12,32,32,1 if (channels,mode)==(1,'gray') else 3) and not c.a.flags.writeable and isinstance(c.a, np.memmap)
    assert len(c)==12 and paths[0] in c and 'other.png' not in c

def test_cached_batches_are_the_same(tmp_path):
    ann = toy(tmp_path)
    (x,b,l),(cx,cb,cl) = (detection_dls(ann, size=64, bs=4, aug=None, cache=c).valid.one_batch() for c in (None,tmp_path/'c'))
    assert torch.equal(x,cx) and torch.equal(b,cb) and torch.equal(l,cl)

def test_cache_is_made_again_when_a_source_changes(tmp_path):
    paths = pictures(tmp_path)
    old = PictureCache(paths, tmp_path/'c', 32)
    before = old[paths[3]]
    cv2.imwrite(paths[3], np.full((40,40), 7, np.uint8))
    with pytest.raises(ValueError, match='3.png has changed'): old[paths[3]]
    new = PictureCache(paths, tmp_path/'c', 32)
    assert (new[paths[3]]==7).all() and not (before==7).all() and new.file==old.file

@pytest.mark.parametrize('harm', ['cut','gone','json'])
def test_damaged_cache_is_made_again(tmp_path, harm):
    paths = pictures(tmp_path)
    c = PictureCache(paths, tmp_path/'c', 32)
    want = c[paths[5]]
    if harm=='cut': os.truncate(c.file, c.file.stat().st_size//2)
    if harm=='gone': c.file.unlink()
    if harm=='json': c.file.with_suffix('.json').write_text('{')
    np.testing.assert_array_equal(PictureCache(paths, tmp_path/'c', 32)[paths[5]], want)

def test_cache_names_what_it_cannot_read(tmp_path):
    paths = pictures(tmp_path)
    (tmp_path/'4.png').write_bytes(b'x'); (tmp_path/'7.png').write_bytes(b'')
    with pytest.raises(ValueError, match='2 of 12 pictures cannot be used.*4.png.*7.png'): PictureCache(paths, tmp_path/'c', 32)
    with pytest.raises(ValueError, match='there is no file.*gone'): PictureCache([*paths,'gone.png'], tmp_path/'c', 32)
    colour = tmp_path/'colour.png'
    cv2.imwrite(str(colour), np.random.default_rng(0).integers(0,255,(8,8,3),dtype=np.uint8))
    with pytest.raises(ValueError, match='colour.png has 3 channels, those before it 1'): PictureCache([paths[0],str(colour)], tmp_path/'c', 32)
    assert not [*(tmp_path/'c').glob('*.npy')] and not [*(tmp_path/'c').glob('.*.tmp')]

def test_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    paths = pictures(tmp_path)
    real = lungdet.pictures.np.lib.format.write_array_header_1_0
    def full(f, d): real(f, d); raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(lungdet.pictures.np.lib.format, 'write_array_header_1_0', full)
    with pytest.raises(OSError, match='cannot hold the pictures: No space left.*12 of them need 0.0 GB'): PictureCache(paths, tmp_path/'c', 32)
    assert not [o for o in (tmp_path/'c').iterdir() if o.suffix!='.lock']

def _make(paths, folder, out):
    c = PictureCache(paths, folder, 32)
    out.put((int(c.a.sum()), c.file.stat().st_mtime_ns))

def test_two_that_want_the_same_cache_make_it_once(tmp_path):
    paths,ctx = pictures(tmp_path, 200),multiprocessing.get_context('fork')
    out = ctx.Queue()
    ps = [ctx.Process(target=_make, args=(paths,tmp_path/'c',out)) for _ in range(3)]
    for p in ps: p.start()
    got = [out.get(timeout=60) for _ in ps]
    for p in ps: p.join()
    assert len(set(got))==1 and len([*(tmp_path/'c').glob('*.npy')])==1

def test_killed_while_making_it(tmp_path, monkeypatch):
    paths = pictures(tmp_path, 60)
    pid = os.fork()
    if not pid:
        real = lungdet.pictures.load_picture
        lungdet.pictures.load_picture = lambda *a: (time.sleep(.05), real(*a))[1]
        try: PictureCache(paths, tmp_path/'c', 32, n_workers=1)
        finally: os._exit(0)
    while not [*(tmp_path/'c').glob('.*.tmp')]: time.sleep(.01)
    time.sleep(.3); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    assert not [*(tmp_path/'c').glob('*.npy')]
    c = PictureCache(paths, tmp_path/'c', 32)
    np.testing.assert_array_equal(c[paths[59]], np.atleast_3d(load_picture(paths[59], 32, 'gray')))
    assert not [*(tmp_path/'c').glob('.*.tmp')]

def test_workers_map_the_cache_themselves(tmp_path):
    c = PictureCache(pictures(tmp_path), tmp_path/'c', 32)
    assert c.a is not None
    assert len(pickle.dumps(c))<10_000 and pickle.loads(pickle.dumps(c)).a.shape==c.a.shape
    ann = toy(tmp_path, 12)
    xs = [torch.cat([b[0] for b in detection_dls(ann, size=32, bs=4, aug=None, cache=tmp_path/'c', num_workers=k).valid]) for k in (0,2)]
    assert torch.equal(*xs)

def test_positive_images_can_be_drawn_more_often(tmp_path):
    ann = toy(tmp_path, 102)
    ann = Annotations(ann.images, ann.boxes.head(10), ann.classes) # 10 of 100 in training
    set_seed(0)
    def share(**kw): return float(torch.cat([(b[2]!=PAD).any(1) for _ in range(10) for b in detection_dls(ann, size=8, bs=50, aug=None, **kw).train]).float().mean())
    assert abs(share()-.1)<1e-6 and abs(share(positives=.5)-.5)<.06 and abs(share(positives=.3)-.3)<.06
    for bad in (0,1,-1):
        with pytest.raises(ValueError, match='positives='): detection_dls(ann, size=8, positives=bad)
    assert len(detection_dls(ann, size=8, bs=50, positives=.5).train)==2 # an epoch is as long as before

def classes(folder):
    "100 images to train on: 'a' on all of the first 80, 'b' on the first 5, nothing on the last 20"
    ann = toy(folder, 102)
    rows = pd.concat([ann.boxes.head(80), ann.boxes.head(5).assign(label='b')])
    return Annotations(ann.images, rows, ['a','b'])

def test_repeat_factors_are_those_of_the_paper(tmp_path):
    ann = classes(tmp_path)
    ids = ann.part('train').images.image_id.tolist()
    def slow(t):
        f = {c:ann.part('train').boxes[lambda b: b.label==c].image_id.nunique()/len(ids) for c in 'ab'}
        return [max([1,*((t/f[c])**.5 for c in set(ann.of(i).label))]) for i in ids]
    for t in (0,.04,.2,.5,1): np.testing.assert_allclose(repeat_factors(ann, ids, t), slow(t), rtol=1e-12)
    twice = Annotations(ann.images, pd.concat([ann.boxes]*2), ['a','b'])
    pd.testing.assert_series_equal(repeat_factors(twice, ids, .5), repeat_factors(ann, ids, .5)) # boxes of one class on one image are one
    none = Annotations(ann.images, ann.boxes[:0], ['a'])
    assert repeat_factors(none, ids, .5).tolist()==[1.]*len(ids)
    for bad in (-.1,1.1):
        with pytest.raises(ValueError, match=f'balance={bad}'): repeat_factors(ann, ids, bad)

def test_rare_classes_are_drawn_more_often(tmp_path):
    "With `positives`, balance says which of the images with a box come, and not how many"
    ann = classes(tmp_path)
    set_seed(0)
    def share(**kw):
        labels = [b[2] for _ in range(30) for b in detection_dls(ann, size=8, bs=50, aug=None, **kw).train]
        return [torch.cat([(o==k).any(1) for o in labels]).float().mean().item() for k in (0,1)]
    assert share()==pytest.approx([.8,.05], abs=1e-6)
    r = np.r_[np.full(5,20**.5), np.full(75,1.25**.5), np.ones(20)] # balance 1
    assert share(balance=1.)==pytest.approx([r[:80].sum()/r.sum(), r[:5].sum()/r.sum()], abs=.025)
    assert share(balance=1., positives=.5)==pytest.approx([.5, .5*r[:5].sum()/r[:80].sum()], abs=.025)
    assert detection_dls(ann, size=8, bs=50).train.weights is None and len(detection_dls(ann, size=8, bs=50, balance=1.).train)==2

def test_one_box_cannot_be_mixed(tmp_path):
    with pytest.raises(ValueError, match='mixup and mosaic'): single_box_dls(toy(tmp_path), size=32, bs=2, aug=Augment(mosaic=.1))

def test_show_results_writes_class_and_score_in_two_colours(tmp_path):
    import matplotlib.colors as mc
    from lungdet.core import PRED, TRUTH
    ann = toy(tmp_path)
    dls = detection_dls(Annotations(ann.images, ann.boxes.assign(label=['a','b']*4), ['a','b']), size=64, bs=2, aug=None)
    b = dls.valid.one_batch()
    axs = dls.valid.show_results(b, torch.tensor([[[5,5,20,20,.75,1.]],[[1,1,9,9,.1,0.]]]))
    text = [[t.get_text() for t in ax.texts] for ax in axs]
    assert text==[['a','b 0.75'],['b']] # the second prediction is below the threshold
    edge = {mc.to_hex(p.get_edgecolor()) for ax in axs for p in ax.patches}
    assert edge=={TRUTH,PRED,'#000000'}
    lum = [.2126*r+.7152*g+.0722*b for r,g,b in (mc.to_rgb(c) for c in (TRUTH,PRED))]
    assert mc.to_rgb(TRUTH)[2]-mc.to_rgb(PRED)[2]>.5 and min(lum)>.3 # blue against yellow, the difference that red-green blindness leaves
    shown = axs[0].images[0].get_array()
    assert shown.min()>=0 and shown.max()<=1 and np.unique(np.asarray(shown).round(2)).size<=4 # the rectangle as it is on disk, not normalised

def test_pictures_that_are_none_of_ours(tmp_path):
    "16 bits are refused, gray in three channels is gray, colours stay"
    g = np.random.default_rng(0)
    for name,im in dict(deep=g.integers(0,2**16,(8,8),dtype=np.uint16), deeprgb=g.integers(0,2**16,(8,8,3),dtype=np.uint16), alpha=g.integers(0,255,(8,8,4),dtype=np.uint8)).items():
        cv2.imwrite(str(tmp_path/f'{name}.png'), im)
        with pytest.raises(ValueError, match=f'{name}.png is uint'): load_picture(tmp_path/f'{name}.png')
    gray = g.integers(0,255,(8,8),dtype=np.uint8)
    cv2.imwrite(str(tmp_path/'rgb.png'), np.stack([gray]*3,-1))
    np.testing.assert_array_equal(load_picture(tmp_path/'rgb.png', mode='gray'), gray)
    assert not (load_picture(tmp_path/'rgb.png', mode='stack')==gray[...,None]).all()

def test_every_split_finds_the_same_cache(tmp_path):
    paths = pictures(tmp_path)
    assert PictureCache(paths, tmp_path/'c', 32).file==PictureCache(paths[::-1]*2, tmp_path/'c', 32).file!=PictureCache(paths, tmp_path/'c', 31).file
    with pytest.raises(ValueError, match='no pictures'): PictureCache([], tmp_path/'c', 32)

def test_copies_of_a_loader_know_what_it_knew(tmp_path):
    ann = toy(tmp_path, 12)
    ann = Annotations(ann.images, ann.boxes.head(4), ['a'])
    dls = detection_dls(ann, size=16, bs=4, positives=.5)
    assert dls.train.new(bs=2).weights==dls.train.weights and dls.train.new(bs=2).classes==['a']
    test = dls.test_dl(ann.images)
    assert test.classes==['a'] and test.weights is None and len(test.one_batch())==1
    test.show_batch(); dls.train.show_batch(unique=True, nrows=1, ncols=2)
    x = [dls.test_dl([o]).one_batch()[0] for o in (ann.images.path[0], ann.images.iloc[0].to_dict())]
    assert torch.equal(*x)
    with pytest.raises(ValueError, match='nothing to predict on'): dls.test_dl([])

def test_unknown_is_not_negative(tmp_path):
    ann = toy(tmp_path)
    with pytest.raises(ValueError, match='no height and width'): detection_dls(Annotations(ann.images.assign(width=None), ann.boxes), size=16)
    dls = detection_dls(ann, size=16, bs=2)
    with pytest.raises(ValueError, match="'x' is not among"): dls.test_dl([dict(path=ann.images.path[0], image_id='x')], with_labels=True).one_batch()

def test_letterboxed_and_stretched_do_not_mix(tmp_path):
    ann = toy(tmp_path)
    ims = ann.images.assign(scale_x=.25, scale_y=.25, offset_x=0., offset_y=0., png_size=128.)
    dls = detection_dls(Annotations(ims, ann.boxes), size=16, bs=2)
    with pytest.raises(ValueError, match='would be stretched'): dls.test_dl([ann.images.path[0]]).one_batch()
    with pytest.raises(ValueError, match='stats of 3 channels for pictures of 1'): detection_dls(ann, size=16, mode='gray', stats=([0.]*3,[1.]*3))
    with pytest.raises(ValueError, match='even side'): detection_dls(ann, size=15, aug=Augment(mosaic=.1))
