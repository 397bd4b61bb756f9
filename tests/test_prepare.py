"Chapter 02b: sizes, boxes that follow, the shape of pixels, channels"
import cv2, numpy as np, pytest
from hypothesis import assume, given, settings, strategies as st

from dicoms import chest, stored
from lungdet.prepare import Fit, enhance, fit_square, pixel_aspect, resize

def test_enhance_and_resize():
    g = chest(200)
    for n in (50, 100): np.testing.assert_allclose(resize(g, n), g.reshape(n,200//n,n,200//n).mean((1,3)), atol=.51)
    assert resize(g, 200) is g and resize(g, 333).shape==(333,333)
    stripes = np.tile(np.array([[0,255]], np.uint8), (40,100))                      # (40,200): shrinks along x, grows along y
    assert resize(stripes, 100).std()<2
    s = enhance(g, 'stack')
    np.testing.assert_array_equal(s[...,1], np.round(255*(g/255)**.6))
    np.testing.assert_array_equal(s[...,2], cv2.createCLAHE(2,(8,8)).apply(g))
    for bad in (lambda: enhance(g,'x'), lambda: enhance(s), lambda: enhance(g/255.), lambda: resize(g,0)):
        with pytest.raises(ValueError): bad()

@settings(max_examples=60, deadline=None)
@given(st.integers(40,300), st.integers(40,300), st.integers(24,200), st.sampled_from(['stretch','letterbox']), st.sampled_from([1.,.5,1.7]), st.integers(0,10**6))
def test_a_mark_is_where_its_box_says(h, w, size, how, aspect, seed):
    "A bright rectangle drawn into the original is found in the square at the place that `Fit` gives, within half a pixel of the original"
    r = np.random.default_rng(seed)
    bw,bh = r.integers(w//2,w*.9),r.integers(h//2,h*.9)
    x,y = r.integers(0,w-bw),r.integers(0,h-bh)
    a = np.zeros((h,w), np.uint8); a[y:y+bh,x:x+bw] = 255
    f,box = fit_square(h,w,size,how,aspect),np.array([[x,y,x+bw,y+bh]], float)
    assume(min(w*f.scale_x,h*f.scale_y)>=12) # or no pixel of the square is covered wholly
    np.testing.assert_allclose(f.back(f.place(box)), box, atol=1e-9)
    out = resize(a, size, how, aspect)/255.
    found = []
    for axis in (0,1): # edges from the area that each row and column covers, so that partly covered pixels count by their share
        line = out.sum(axis); line = line/line.max(); k = np.arange(size)
        centre,length = (line*(k+.5)).sum()/line.sum(),line.sum()
        found += [centre-length/2,centre+length/2]
    found = np.array([[found[0],found[2],found[1],found[3]]])
    slack = .5 if max(h*f.scale_y/h, w*f.scale_x/w)<=1 else .75 # enlarging blurs the edge by up to a pixel of the original
    assert np.abs(f.back(found)-box).max()<=slack

def test_letterbox_keeps_proportions():
    a = np.full((100,200), 200, np.uint8)
    out = resize(a, 64, 'letterbox')
    assert (out[:16]==0).all() and (out[-16:]==0).all() and (out[16:48]==200).all()
    assert fit_square(100,200,64,'letterbox')==(.32,.32,0,16)
    assert (resize(a, 64, 'letterbox', aspect=2)==200).all() # pixels twice as high as wide: the picture is a square
    for bad in (lambda: fit_square(9,9,0), lambda: fit_square(9,9,8,'crop')):
        with pytest.raises(ValueError): bad()

def test_pixel_aspect():
    px = lambda **kw: pixel_aspect(stored(chest(8), **kw))
    assert px()==1 and px(PixelSpacing=[.1,.2])==.5 and px(ImagerPixelSpacing=[.3,.1])==pytest.approx(3) and px(PixelAspectRatio=[1,2])==.5
    assert px(PixelSpacing=[0,.2])==1 and px(PixelSpacing=[0,.2], PixelAspectRatio=[4,3])==pytest.approx(4/3)

def test_fit_takes_any_numbers():
    import torch
    f = Fit(.5,.25,1.,2.)
    for b in (torch.tensor([[2,4,6,8]]), torch.tensor([[2.,4,6,8]]), np.array([[2,4,6,8]])): assert f.place(b).tolist()==[[2,3,4,4]]
