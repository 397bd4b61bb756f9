"Geometry of boxes: parity with torchvision, round trips, edge cases"
import torch
from hypothesis import given, settings, strategies as st
from torchvision import ops
from lungdet.boxes import *

def random_boxes(n, seed, size=100.):
    g = torch.Generator().manual_seed(seed)
    xy,wh = torch.rand(n,2,generator=g)*size,torch.rand(n,2,generator=g)*size/2+.5
    return torch.cat([xy,xy+wh],1)

seeds = st.integers(0, 2**31)

@given(seeds, st.integers(0,30), st.integers(0,30))
@settings(max_examples=50, deadline=None)
def test_overlaps_equal_torchvision(seed, n, m):
    a,b = random_boxes(n,seed),random_boxes(m,seed+1)
    torch.testing.assert_close(area(a), ops.box_area(a))
    torch.testing.assert_close(iou(a,b), ops.box_iou(a,b))
    torch.testing.assert_close(giou(a,b), ops.generalized_box_iou(a,b), atol=1e-5, rtol=1e-5)

@given(seeds, st.integers(0,30))
@settings(max_examples=50, deadline=None)
def test_conversions_go_there_and_back(seed, n):
    b = random_boxes(n,seed)
    for there,back,fmt in ((xyxy2xywh,xywh2xyxy,'xywh'),(xyxy2cxcywh,cxcywh2xyxy,'cxcywh')):
        torch.testing.assert_close(back(there(b)), b)
        torch.testing.assert_close(there(b), ops.box_convert(b,'xyxy',fmt))

def test_conversions_keep_leading_dimensions():
    b = random_boxes(12,0).reshape(3,4,4)
    assert xyxy2cxcywh(b).shape==xyxy2xywh(b).shape==(3,4,4) and area(b).shape==(3,4)

def test_degenerate_boxes_have_no_overlap():
    flat,swapped,box = torch.tensor([[5.,5,5,9]]),torch.tensor([[9.,9,1,1]]),torch.tensor([[0.,0,10,10]])
    for o in (flat,swapped): assert iou(o,box).item()==0 and area(o).item()==0 and iou(o,o).item()==0

@given(seeds)
@settings(max_examples=30, deadline=None)
def test_clip_and_scale(seed):
    b = random_boxes(20,seed)-20
    torch.testing.assert_close(clip_boxes(b,(60,80)), ops.clip_boxes_to_image(b,(60,80)))
    torch.testing.assert_close(scale_boxes(scale_boxes(b,(60,80),(512,256)),(512,256),(60,80)), b)

def test_scale_knows_height_from_width():
    assert scale_boxes(torch.tensor([[10.,10,20,20]]), (100,200), (200,200)).tolist()==[[10,20,20,40]]

@given(seeds, st.integers(0,60), st.floats(.1,.9))
@settings(max_examples=50, deadline=None)
def test_nms_leaves_no_pair_that_overlaps_and_drops_only_the_overlapped(seed, n, thr):
    b,s = random_boxes(n,seed),torch.rand(n,generator=torch.Generator().manual_seed(seed))
    keep = nms(b,s,thr=thr)
    o = iou(b[keep],b[keep]).fill_diagonal_(0) if len(keep) else torch.zeros(1)
    assert (o<=thr+1e-6).all() and (s[keep].diff()<=0).all()
    for i in set(range(n))-set(keep.tolist()):
        assert ((iou(b[i][None],b[keep])[0]>thr-1e-6)&(s[keep]>=s[i])).any()

def test_nms_respects_classes():
    b,s = torch.tensor([[0.,0,10,10],[0,0,10,10]]),torch.tensor([.5,.9])
    assert nms(b,s).tolist()==[1] and nms(b,s,torch.tensor([0,1])).tolist()==[1,0]

def test_soft_nms_decays_by_overlap():
    b,s = torch.tensor([[0.,0,10,10],[0,0,10,10],[50,50,60,60]]),torch.tensor([.9,.8,.7])
    keep,new = soft_nms(b,s,sigma=.5)
    assert keep.tolist()==[0,2,1]
    torch.testing.assert_close(new, torch.tensor([.9,.7,.8*torch.e**-2]))
    assert soft_nms(b,s,min_score=.2)[0].tolist()==[0,2]
    torch.testing.assert_close(s, torch.tensor([.9,.8,.7])) # the argument is left alone

def test_fusion_by_hand():
    b,s = fuse_boxes([torch.tensor([[0.,0,10,10]]),torch.tensor([[0.,0,12,10]])], [torch.tensor([.6]),torch.tensor([.2])])
    torch.testing.assert_close(b, torch.tensor([[0.,0,10.5,10]]))
    torch.testing.assert_close(s, torch.tensor([.4]))
    b,s = fuse_boxes([torch.tensor([[0.,0,10,10]]),torch.empty(0,4)], [torch.tensor([.6]),torch.empty(0)])
    torch.testing.assert_close(s, torch.tensor([.3]))

def literal_fusion(boxes, scores, weights, thr):
    "Solovyev et al., section 3, one box at a time in plain Python; the score is the `box_and_model_avg` of their package"
    rows = sorted(((s*w, b, m, s) for m,(bs,ss,w) in enumerate(zip(boxes,scores,weights)) for b,s in zip(bs,ss)), key=lambda o: -o[0])
    clusters,fused = [],[]
    def overlap(a, b):
        w,h = min(a[2],b[2])-max(a[0],b[0]),min(a[3],b[3])-max(a[1],b[1])
        i = max(w,0)*max(h,0)
        return i/((a[2]-a[0])*(a[3]-a[1])+(b[2]-b[0])*(b[3]-b[1])-i)
    for row in rows:
        best = max(range(len(fused)), key=lambda k: overlap(row[1],fused[k]), default=None)
        if best is None or overlap(row[1],fused[best])<=thr: best = len(fused); clusters.append([]); fused.append(None)
        clusters[best].append(row)
        total = sum(o[0] for o in clusters[best])
        fused[best] = [sum(o[0]*o[1][k] for o in clusters[best])/total for k in range(4)]
    score = [sum(o[0] for o in c)/sum(weights[o[2]] for o in c)*sum(weights[m] for m in {o[2] for o in c})/sum(weights) for c in clusters]
    order = sorted(range(len(score)), key=lambda k: -score[k])
    return [fused[k] for k in order],[score[k] for k in order]

@given(seeds, st.lists(st.integers(0,12), min_size=1, max_size=4), st.floats(.2,.8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_fusion_is_that_of_the_paper(seed, n, thr, weighed):
    g = torch.Generator().manual_seed(seed)
    boxes,scores = [random_boxes(k,seed+i,40.) for i,k in enumerate(n)],[torch.rand(k,generator=g)*.98+.01 for k in n]
    weights = (torch.rand(len(n),generator=g)+.1).tolist() if weighed else [1.]*len(n)
    b,s = fuse_boxes(boxes, scores, thr, weights if weighed else None)
    B,S = literal_fusion([o.tolist() for o in boxes], [o.tolist() for o in scores], weights, thr)
    assert len(s)==len(S)
    torch.testing.assert_close(s, torch.tensor(S), atol=1e-5, rtol=1e-4)
    if len(S): torch.testing.assert_close(b, torch.tensor(B), atol=1e-3, rtol=1e-4)
