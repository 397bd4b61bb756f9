"Matching by threshold against torchvision, ATSS against its definition written out"
import math, pickle, pytest, torch
from hypothesis import given, settings, strategies as st
from torchvision.models.detection._utils import Matcher
from lungdet.anchors import Anchors
from lungdet.boxes import iou
from lungdet.matching import *
from lungdet.matching import BACKGROUND, IGNORE, candidates
from test_boxes import random_boxes

seeds = st.integers(0,2**31)
S,ANCHORS = 128,Anchors()
A,COUNTS = ANCHORS(S,S),[r*c*ANCHORS.per_cell for r,c in ANCHORS.grid(S,S)]

@st.composite
def tables(draw):
    "IoU tables with ties, zeros, rows without overlap and copies of rows"
    g = torch.Generator().manual_seed(draw(seeds))
    m,n,steps = draw(st.integers(1,12)),draw(st.integers(1,80)),draw(st.sampled_from([1,2,5,10,20,1000]))
    o = (torch.rand(m,n,generator=g)**draw(st.sampled_from([.3,1,4]))*steps).round()/steps
    o *= (torch.rand(m,1,generator=g)>draw(st.sampled_from([0,.3,.9])))
    return o[torch.randint(0,m,(m,),generator=g)] if draw(st.booleans()) else o

thresholds = st.tuples(st.sampled_from([0,.1,.3,.4,.5,.7,1.]),st.sampled_from([0,.1,.3,.4,.5,.7,1.])).map(sorted)

@given(tables(), thresholds, st.booleans())
@settings(max_examples=300, deadline=None)
def test_matching_is_torchvisions_for_any_table(o, bgfg, low):
    bg,fg = bgfg
    assert torch.equal(match(o, fg, bg, low, zero_ties=True), Matcher(fg, bg, allow_low_quality_matches=low)(o))
    assert torch.equal(match(o, .5, .4, low, zero_ties=True), Matcher(.5, .4, allow_low_quality_matches=low)(o))

@given(tables(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_only_ties_at_zero_differ(o, low):
    "Boxes that meet no anchor change nothing, and without them there is no difference"
    got,meets = match(o, low_quality=low),o.amax(1)>0
    if meets.all(): assert torch.equal(got, Matcher(.5,.4,allow_low_quality_matches=low)(o))
    elif meets.any():
        index = meets.nonzero()[:,0]
        rest = match(o[meets], low_quality=low)
        assert torch.equal(got, torch.where(rest>=0, index[rest.clamp(min=0)], rest))
    else: assert (got==BACKGROUND).all()

@given(tables())
@settings(max_examples=200, deadline=None)
def test_what_matching_promises(o):
    m = match(o)
    for j in range(o.shape[1]):
        i,best = m[j].item(),o[:,j].max()
        if i>=0: assert o[i,j]==best>0 and (best>=.5 or (o[:,j]==o.max(1).values).any())
        elif i==IGNORE: assert .4<=best<.5
        else: assert i==BACKGROUND and best<.4
    for row in o:
        if row.max()>0: assert (m[row==row.max()]>=0).all()

@pytest.mark.parametrize('m', [1,3,60])
def test_matching_real_anchors_is_torchvisions(m):
    for seed in range(5):
        o = iou(random_boxes(m,seed), A)
        assert torch.equal(match(o), Matcher(.5,.4,allow_low_quality_matches=True)(o))
        assert torch.equal(match(o.double()), Matcher(.5,.4,allow_low_quality_matches=True)(o.double()))

def test_torchvisions_tie_at_zero_is_the_one_difference():
    o = torch.tensor([[0.,0,0],[.6,.1,0]])
    assert Matcher(.5,.4,allow_low_quality_matches=True)(o).tolist()==match(o, zero_ties=True).tolist()==[1,1,0]
    assert match(o).tolist()==[1,BACKGROUND,BACKGROUND]

def test_no_boxes_no_anchors():
    for o in (torch.zeros(0,7),torch.zeros(3,0)):
        m = match(o)
        assert m.dtype==torch.int64 and m.tolist()==[BACKGROUND]*o.shape[1]

@pytest.mark.parametrize('kw', [dict(fg=.4,bg=.5),dict(bg=float('nan'))])
def test_thresholds_are_checked(kw):
    for f in (lambda: match(torch.zeros(1,1), **kw), lambda: IoUMatcher(**kw)):
        with pytest.raises(ValueError, match='background ends at'): f()

# ATSS, box by box and anchor by anchor as algorithm 1 says it, in Python's numbers

def slow_atss(boxes, anchors, counts, topk):
    centre = [((x1+x2)/2,(y1+y2)/2) for x1,y1,x2,y2 in anchors.tolist()]
    res,won = [BACKGROUND]*len(anchors),[-1.]*len(anchors)
    for i,(x1,y1,x2,y2) in enumerate(boxes.tolist()):
        overlap,cands,start = iou(boxes[i:i+1],anchors)[0].tolist(),[],0
        for n in counts:
            level = range(start,start+n)
            k = min(n, topk*sum(centre[j]==centre[start] for j in level))
            dist = {j:(centre[j][0]-(x1+x2)/2)**2+(centre[j][1]-(y1+y2)/2)**2 for j in level}
            last = sorted(dist.values())[k-1]
            cands += [j for j in level if dist[j]<=last]
            start += n
        mean = sum(overlap[j] for j in cands)/len(cands)
        std = math.sqrt(sum((overlap[j]-mean)**2 for j in cands)/max(1,len(cands)-1))
        for j in cands:
            if overlap[j]>=mean+std and x1<centre[j][0]<x2 and y1<centre[j][1]<y2 and overlap[j]>won[j]: res[j],won[j] = i,overlap[j]
    return res

@st.composite
def awkward_boxes(draw, size=S):
    "Boxes on quarters of a pixel: touching the border, of one pixel, the whole picture, the same twice"
    def one():
        kind = draw(st.sampled_from(['any','tiny','border','whole']))
        if kind=='whole': return [0,0,size,size]
        w,h = (1,1) if kind=='tiny' else (draw(st.integers(1,4*size))/4 for _ in 'wh')
        x,y = (draw(st.integers(0,int(4*(size-o))))/4 for o in (w,h))
        if kind=='border': x,y = draw(st.sampled_from([(0,y),(size-w,y),(x,0),(x,size-h)]))
        return [x,y,x+w,y+h]
    rows = [one() for _ in range(draw(st.integers(0,4)))]
    if rows and draw(st.booleans()): rows.append(rows[0])
    return torch.tensor(rows, dtype=torch.float32).reshape(-1,4)

@given(awkward_boxes(), st.sampled_from([1,2,3,9,1000]))
@settings(max_examples=60, deadline=None)
def test_atss_is_its_definition(b, topk):
    assert atss(b, A, COUNTS, topk).tolist()==slow_atss(b, A, COUNTS, topk)

@given(seeds, st.integers(0,5), st.lists(st.integers(1,30), min_size=1, max_size=3), st.integers(1,12))
@settings(max_examples=100, deadline=None)
def test_atss_of_one_anchor_at_each_place(seed, m, counts, topk):
    a,b = random_boxes(sum(counts),seed),random_boxes(m,seed+1)
    assert atss(b, a, counts, topk).tolist()==slow_atss(b, a, counts, topk)

@given(awkward_boxes())
@settings(max_examples=60, deadline=None)
def test_what_atss_promises(b):
    m,near,c = atss(b,A,COUNTS),candidates(b,A,COUNTS) if len(b) else None,(A[:,:2]+A[:,2:])/2
    assert m.dtype==torch.int64 and m.min()>=BACKGROUND
    for j in (m>=0).nonzero()[:,0].tolist():
        i = m[j]
        assert near[i,j] and (c[j]>b[i,:2]).all() and (c[j]<b[i,2:]).all()
    for i in range(len(b)):
        if (b[i,2:]-b[i,:2]>=48).all(): assert ((m==i)|(m>=0)&(b[m.clamp(min=0)]==b[i]).all(1)).any(), 'a large box has somebody, or a copy of it has'

def test_atss_of_mirrored_boxes_is_mirrored():
    "Places that tie for the last rank are all candidates, so no side is favoured"
    a = torch.tensor([[x-6.,y-6,x+6,y+6] for y in range(4,64,8) for x in range(4,64,8)])
    flip = lambda o: torch.stack([64-o[:,2],o[:,1],64-o[:,0],o[:,3]], 1)
    b = torch.tensor([[10.,20,30,44],[24,8,56,24]])
    order = torch.arange(64).reshape(8,8).flip(1).flatten()
    assert torch.equal(atss(flip(b), a, [64], 5), atss(b, a, [64], 5)[order])

def test_atss_of_one_candidate_and_of_equal_candidates():
    a = torch.tensor([[0.,0,8,8]]*3)
    b = torch.tensor([[1.,1,8,9]])
    assert atss(b, a[:1], [1]).tolist()==[0]
    assert atss(b, a, [3]).tolist()==atss(b, a, [1,2]).tolist()==[0,0,0]

def test_rules_are_what_they_wrap_and_survive_pickling():
    b = random_boxes(3,0)
    for rule,want in ((IoUMatcher(.6,.3,False),match(iou(b,A),.6,.3,False)), (IoUMatcher(zero_ties=True),match(iou(b,A),zero_ties=True)), (ATSS(5),atss(b,A,COUNTS,5))):
        assert torch.equal(rule(b,A,COUNTS), want) and pickle.loads(pickle.dumps(rule))==rule
        assert (rule(b[:0],A,COUNTS)==BACKGROUND).all()
