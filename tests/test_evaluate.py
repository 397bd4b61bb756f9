"The metrics against slow literal versions, pycocotools, the real labels of the challenge, and bad input"
from pathlib import Path

import matplotlib, numpy as np, pandas as pd, pytest
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from hypothesis import given, settings, strategies as st
from sklearn.metrics import roc_auc_score
from lungdet.evaluate import *
from lungdet.formats import Annotations

XYXY,L = ['x1','y1','x2','y2'],'Lung Opacity'

def frame(boxes, score=None): # {image: [[x,y,w,h], ...]}
    df = pd.DataFrame([(i,x,y,x+w,y+h,L) for i,bs in boxes.items() for x,y,w,h in bs], columns=['image_id',*XYXY,'label'])
    return df if score is None else df.assign(score=np.asarray(score, dtype=float))
def annot(boxes, classes=(L,), **cols): return Annotations(pd.DataFrame({'image_id':list(boxes), 'height':1024, 'width':1024, **cols}), frame(boxes), list(classes))
def ranked(boxes): return frame(boxes, np.linspace(.9,.5,sum(map(len,boxes.values()))))

# ---------- a slow, literal version of the challenge's metric ----------
def slow_iou(a, b):
    w,h = min(a[2],b[2])-max(a[0],b[0]), min(a[3],b[3])-max(a[1],b[1])
    if w<=0 or h<=0: return 0.
    return w*h/((a[2]-a[0])*(a[3]-a[1])+(b[2]-b[0])*(b[3]-b[1])-w*h)

def slow_image(gt, preds, strict):
    if not gt and not preds: return None
    if not gt or not preds: return 0.
    total,overlap = 0.,[[slow_iou(p,g) for g in gt] for p in preds]
    for thr in (.4,.45,.5,.55,.6,.65,.7,.75):
        taken,tp,fp = set(),0,0
        for o in overlap:
            best,at = -1.,None
            for k in range(len(gt)):
                if k not in taken and o[k]>best: best,at = o[k],k
            if at is not None and (best>thr if strict else best>=thr): tp += 1; taken.add(at)
            else: fp += 1
        total += tp/(tp+fp+len(gt)-len(taken))
    return total/8

def slow_rsna(ann, preds, threshold=0., strict=True):
    res = []
    for i in ann.images.image_id:
        rows = [r for r in preds.to_dict('records') if r['image_id']==i and r['score']>=threshold]
        rows = sorted(rows, key=lambda r: -r['score']) # Python's sort is stable
        s = slow_image([[r[c] for c in XYXY] for r in ann.boxes.to_dict('records') if r['image_id']==i], [[r[c] for c in XYXY] for r in rows], strict)
        if s is not None: res.append(s)
    return np.mean(res) if res else np.nan

def random_case(seed, classes=(L,)):
    "Few coordinates and few scores, so that overlaps and confidences tie often; every fourth case is crowded, with two scores at most"
    rng = np.random.default_rng(seed)
    def boxes(n, step):
        xy,wh = rng.integers(0,6,(n,2))*step,rng.integers(1,6,(n,2))*step
        return np.concatenate([xy,xy+wh],1).astype(float)
    crowded = seed%4==3
    ids = [f'i{k}' for k in range(2 if crowded else rng.integers(1,7))]
    step = rng.choice([10,20,33])
    def table(mean):
        who = rng.choice(ids, rng.poisson(mean*len(ids)))
        return pd.DataFrame(boxes(len(who),step), columns=XYXY).assign(image_id=pd.Series(who, dtype=object), label=rng.choice(list(classes), len(who)))
    preds,truth = table(12 if crowded else 2),table(4 if crowded else 1.2)
    preds['score'] = rng.integers(0,2,len(preds))/2 if crowded else rng.integers(0,6,len(preds))/5 if seed%2 else rng.random(len(preds))
    return Annotations(pd.DataFrame({'image_id':ids, 'height':1024, 'width':1024}), truth, list(classes)),preds

# ---------- the challenge's metric ----------
ONE,BESIDE,TIGHT,WIDE = [[100,100,200,200]],[[0,0,100,100],[100,0,100,100]],[0,0,100,100],[0,0,200,100]
@pytest.mark.parametrize('gt,pred,strict,loose', [
    (ONE, [[100,100,300,200]], .75, .75), (ONE, [[100,100,400,200]], .25, .375), (ONE, [[100,100,200,150]], .875, 1),
    (BESIDE, [TIGHT], .5, .5), (ONE, ONE*2, .5, .5), (ONE, ONE+[[600,600,90,90]], .5, .5),
    (BESIDE, [TIGHT,WIDE], .5, 14/24), (BESIDE, [WIDE,TIGHT], 1/3, 1/3), (BESIDE[::-1], [WIDE,TIGHT], .5, 14/24)])
def test_rsna_reference_rows(gt, pred, strict, loose):
    ann,p = annot({'a':gt}), ranked({'a':pred})
    assert rsna_score(ann, p)==pytest.approx(strict, abs=1e-12)
    assert rsna_score(ann, p, strict=False)==pytest.approx(loose, abs=1e-12)
    assert slow_rsna(ann, p)==pytest.approx(strict, abs=1e-12) # the slow version is itself held to the table

def test_equal_scores_keep_the_order_of_the_table():
    far = [[600,600,50,50]]*30 # enough rows that an unstable sort would mix them
    ann = annot({'a':BESIDE+far})
    first,last = (frame({'a':b}, np.full(32,.5)) for b in ([TIGHT,WIDE]+far, [WIDE,TIGHT]+far))
    assert rsna_score(ann,first)==pytest.approx(slow_rsna(ann,first)) and rsna_score(ann,last)==pytest.approx(slow_rsna(ann,last))
    assert rsna_score(ann,first)>rsna_score(ann,last)

def test_sorting_is_stable():
    rng = np.random.default_rng(0)
    ids = {f'i{k}':[] for k in range(50)}
    q = pd.DataFrame({'image_id':rng.choice(list(ids),5000), 'x1':0, 'y1':0, 'x2':9, 'y2':9, 'label':L, 'score':rng.integers(1,3,5000)/2, 'nth':range(5000)})
    got = match_detections(annot(ids), q)[0]
    want = sorted(q.to_dict('records'), key=lambda o: (list(ids).index(o['image_id']),-o['score'])) # Python's sort is stable
    assert got.nth.tolist()==[o['nth'] for o in want]

def test_rsna_empty_sides():
    ann = annot({'a':ONE, 'b':[], 'c':[]})
    each = rsna_score(ann, frame({'a':ONE,'b':ONE}, [.9,.9]), per_image=True)
    assert each['a']==1 and each['b']==0 and np.isnan(each['c']) and list(each.index)==['a','b','c']
    assert rsna_score(ann, frame({}, [])) == 0
    assert np.isnan(rsna_score(annot({'c':[]}), frame({}, [])))
    assert rsna_score(annot({'c':[]}), frame({'c':ONE},[.1]))==0

def test_rsna_threshold_keeps_equal_scores():
    ann,p = annot({'a':ONE,'b':[]}), frame({'a':ONE,'b':ONE}, [.5,.25])
    assert [rsna_score(ann,p,t) for t in (0,.25,.26,.5,.51)]==[.5,.5,1,1,0]

@pytest.mark.parametrize('strict', [True,False])
def test_rsna_equals_slow_version(strict):
    for seed in range(100):
        ann,p = random_case(seed)
        for t in (0.,.4): assert rsna_score(ann,p,t,strict)==pytest.approx(slow_rsna(ann,p,t,strict), abs=1e-12, nan_ok=True), seed

@pytest.mark.parametrize('strict', [True,False])
def test_rsna_equals_slow_version_on_2000_images(strict):
    "Every image is a case: few coordinates, so that overlaps tie; two or six scores on half of the images, so that confidences do; every fifth is crowded"
    rng,n = np.random.default_rng(1),2000
    step,kind = rng.choice([10,20,33],n),np.arange(n)%5
    def table(mean):
        i = np.repeat(np.arange(n), rng.poisson(np.where(kind==4, 4*mean, mean)))
        xy,wh = rng.integers(0,6,(2,len(i),2))*step[i,None]
        return i,pd.DataFrame(np.concatenate([xy,xy+wh+step[i,None]],1).astype(float), columns=XYXY).assign(image_id=i.astype(str), label=L)
    (_,boxes),(i,p) = table(1.2),table(3)
    p['score'] = np.select([kind[i]==4,kind[i]>1], [rng.integers(0,2,len(p))/2,rng.integers(0,6,len(p))/5], rng.random(len(p)))
    ann = Annotations(pd.DataFrame({'image_id':np.arange(n).astype(str), 'height':1024, 'width':1024}), boxes, [L])
    p = p.sample(frac=1, random_state=0)
    gt,found = {},{}
    for k,*b in boxes[['image_id',*XYXY]].itertuples(index=False): gt.setdefault(k,[]).append(b)
    for k,s,*b in p[['image_id','score',*XYXY]].itertuples(index=False): found.setdefault(k,[]).append((-s,b))
    want = [slow_image(gt.get(k,[]), [b for _,b in sorted(found.get(k,[]), key=lambda o: o[0])], strict) for k in ann.images.image_id]
    want = np.array(want, dtype=float)
    assert np.allclose(rsna_score(ann, p, strict=strict, per_image=True), want, rtol=0, atol=1e-12, equal_nan=True)
    assert abs(rsna_score(ann, p, strict=strict)-np.nanmean(want))<1e-12 and abs(rsna_score(ann, p, strict=not strict)-np.nanmean(want))>1e-3

def test_sweep_equals_scores_one_by_one():
    for seed in range(60):
        ann,p = random_case(seed)
        sweep = threshold_sweep(ann, p)
        assert list(sweep.threshold)==sorted(p.score.unique(), reverse=True)
        assert sweep.rsna.to_numpy()==pytest.approx(np.array([rsna_score(ann,p,t) for t in sweep.threshold]), abs=1e-12)
        t,s = best_threshold(ann, p)
        assert s==pytest.approx(sweep.rsna.max() if len(p) else rsna_score(ann,p), abs=1e-12, nan_ok=True)
        if len(p): assert t==sweep.threshold[sweep.rsna>s-1e-9].max()

def test_best_threshold_without_predictions():
    assert best_threshold(annot({'a':ONE}), frame({}, []))==(1.,0.)

@settings(max_examples=40, deadline=None)
@given(st.integers(1000,10**6))
def test_order_of_rows_does_not_matter_without_ties(seed):
    ann,p = random_case(seed*2)
    q = p.sample(frac=1, random_state=0)
    assert rsna_score(ann,p)==pytest.approx(rsna_score(ann,q), abs=1e-12, nan_ok=True)
    assert froc(ann,p).equals(froc(ann,q)) and image_level(ann,p).equals(image_level(ann,q))

def test_class_must_agree():
    ann = annot({'a':ONE}, classes=[L,'Nodule'])
    wrong = frame({'a':ONE}, [.9]).assign(label='Nodule')
    assert rsna_score(ann,wrong)==0 and precision_recall(ann,wrong).tp.tolist()==[0]
    assert rsna_score(ann, pd.concat([wrong,frame({'a':ONE},[.8])]))==.5

# ---------- the real labels: floors and ceilings ----------
@pytest.fixture(scope='module')
def real(challenge_labels):
    df = challenge_labels
    b = df[df.Target==1]
    boxes = pd.DataFrame(dict(image_id=b.patientId, x1=b.x, y1=b.y, x2=b.x+b.width, y2=b.y+b.height, label=L))
    images = pd.DataFrame({'image_id':df.patientId.unique(), 'height':1024, 'width':1024})
    return Annotations(images, boxes, [L])

def simulated(ann, invent, seed=0):
    "A box near four of five true ones, and `invent` per image anywhere"
    rng = np.random.default_rng(seed)
    hit = ann.boxes[rng.random(len(ann.boxes))<.8]
    t,n = hit[XYXY].to_numpy(),int(invent*len(ann))
    xy = rng.uniform(0,700,(n,2))
    b = np.concatenate([t+rng.normal(0,.1,t.shape)*np.tile(t[:,2:]-t[:,:2],2), np.concatenate([xy,xy+rng.uniform(80,320,(n,2))],1)]).clip(0,1024)
    df = pd.DataFrame(b, columns=XYXY).assign(image_id=[*hit.image_id,*rng.choice(ann.images.image_id.to_numpy(),n)], label=L, score=np.r_[rng.beta(5,2,len(t)),rng.beta(2,5,n)])
    return df.sample(frac=1, random_state=seed, ignore_index=True)

def test_real_label_facts(real):
    n = lesion_counts(real)
    assert len(real)==26684 and len(real.boxes)==9555
    assert n[n>0].value_counts().sort_index().to_dict()=={1:2614, 2:3266, 3:119, 4:13}

def test_real_nothing_predicted(real): assert rsna_score(real, real.boxes[:0].assign(score=1.))==0

def test_real_two_median_boxes(real):
    left = real.boxes.index[(real.boxes.x1+real.boxes.x2)<1024]
    med = [real.boxes.loc[left,XYXY].median(), real.boxes.drop(left)[XYXY].median()]
    def both(ids): return pd.concat([pd.DataFrame([m]*len(ids), columns=XYXY).assign(image_id=list(ids), label=L, score=s) for m,s in zip(med,(.9,.8))], ignore_index=True)
    everywhere = both(real.images.image_id)
    assert rsna_score(real, everywhere)==pytest.approx(.021, abs=.0006)
    assert rsna_score(real, both(real.boxes.image_id.unique()))==pytest.approx(.095, abs=.0006)

@pytest.mark.parametrize('share,score', [(.05,.853),(.1,.744),(.2,.593),(.3,.492)])
def test_real_perfect_with_alarms(real, share, score):
    neg = real.images.image_id[~real.images.image_id.isin(real.boxes.image_id)]
    extra = neg.iloc[:round(len(neg)*share)].to_frame().assign(x1=100, y1=100, x2=300, y2=300, label=L)
    assert rsna_score(real, pd.concat([real.boxes,extra]).assign(score=.9))==pytest.approx(score, abs=.0005)

@pytest.mark.parametrize('k,score', [(.875,1),(.85,.875),(.8,.625)])
def test_real_shrunk_truth(real, k, score):
    b = real.boxes[XYXY].to_numpy()
    c,half = (b[:,:2]+b[:,2:])/2,(b[:,2:]-b[:,:2])/2*k
    p = real.boxes.assign(score=.9)
    p[XYXY] = np.concatenate([c-half,c+half],1)
    assert rsna_score(real, p)==pytest.approx(score, abs=1e-3)

def test_real_size_runs_through_everything(real):
    rng = np.random.default_rng(0)
    n = 60000
    xy = rng.uniform(0,700,(n,2)); wh = rng.uniform(60,300,(n,2))
    fp = pd.DataFrame(np.concatenate([xy,xy+wh],1), columns=XYXY).assign(image_id=rng.choice(real.images.image_id, n), label=L, score=rng.random(n)*.8)
    p = pd.concat([real.boxes.assign(score=rng.beta(5,2,len(real.boxes))), fp], ignore_index=True)
    t,s = best_threshold(real, p)
    assert s==pytest.approx(rsna_score(real,p,t), abs=1e-12) and s>rsna_score(real,p)
    assert 0<froc(real,p)['mean']<1 and 0<coco_map(real,p).AP50<1

# ---------- COCO ----------
COCO12 = ['AP','AP50','AP75','AP_small','AP_medium','AP_large','AR1','AR10','AR','AR_small','AR_medium','AR_large'] # the order of COCO's own summary

def pycoco(ann, preds, areas=COCO_AREAS, label=None):
    "COCO's own code, on tables put in the order that `coco_map` promises; one class if `label`"
    import contextlib, io
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    num = {o:i+1 for i,o in enumerate(sorted(ann.images.image_id))}
    def rows(df): return [dict(id=k+1, image_id=num[r['image_id']], category_id=ann.classes.index(r['label'])+1, iscrowd=0, score=r.get('score'),
        bbox=[r['x1'],r['y1'],r['x2']-r['x1'],r['y2']-r['y1']], area=(r['x2']-r['x1'])*(r['y2']-r['y1'])) for k,r in enumerate(df.sort_values(XYXY).to_dict('records'))]
    with contextlib.redirect_stdout(io.StringIO()):
        head = dict(images=[dict(id=i) for i in num.values()], categories=[dict(id=i+1,name=c) for i,c in enumerate(ann.classes)])
        gt,dt = COCO(),COCO()
        for o,df in ((gt,ann.boxes),(dt,preds)): o.dataset = head|dict(annotations=rows(df)); o.createIndex()
        ev = COCOeval(gt, dt, 'bbox')
        ev.params.areaRng = [[0,1e10],[0,areas[0]],list(areas),[areas[1],1e10]]
        if label: ev.params.catIds = [ann.classes.index(label)+1]
        ev.evaluate(); ev.accumulate(); ev.summarize()
    return pd.Series(ev.stats, COCO12).replace(-1,np.nan)

def assert_coco(ann, p, seed=None, **kw): assert coco_map(ann,p,**kw)[COCO12].to_numpy()==pytest.approx(pycoco(ann,p,**kw).to_numpy(), abs=1e-9, nan_ok=True), seed

def test_coco_equals_pycocotools():
    empty = 0
    for seed in range(100):
        ann,p = random_case(seed, classes=(L,) if seed%3 else (L,'Nodule'))
        empty += not len(p) or not len(ann.boxes)
        assert_coco(ann, p, seed, areas=(600,2400) if seed%2 else COCO_AREAS) # many boxes have exactly these areas
    assert empty>2

@pytest.mark.parametrize('boxes,preds', [({'a':ONE,'b':[]},{}), ({'a':[]},{'a':ONE}), ({'a':[]},{}), ({'a':ONE,'b':ONE},{'b':ONE})])
def test_coco_empty_sides(boxes, preds):
    ann,p = annot(boxes),frame(preds, np.full(len(preds),.5))
    assert_coco(ann, p)
    if not ann.boxes.size: assert coco_map(ann,p).isna().all()
    elif not len(p): assert coco_map(ann,p)[['AP','AP50','AP75','AR']].tolist()==[0]*4

def test_coco_equals_pycocotools_on_the_real_labels(real):
    keep = np.random.default_rng(0).permutation(len(real))<4000
    ann = real.where(keep)
    p = simulated(ann, 1.5)
    assert_coco(ann, p); assert_coco(ann, p, areas=(200**2,300**2))
    assert coco_map(ann, p, areas=(200**2,300**2))[['AP_small','AP_medium','AP_large']].between(.01,.99).all()

def test_coco_classes():
    for seed in range(30):
        ann,p = random_case(seed, classes=(L,'Nodule'))
        res = coco_classes(ann, p)
        for c in ann.classes: assert res.loc[c,COCO12].to_numpy(float)==pytest.approx(pycoco(ann,p,label=c).to_numpy(), abs=1e-9, nan_ok=True)
        pd.testing.assert_series_equal(res.mean(), coco_map(ann,p))

def test_coco_more_than_100_boxes_on_an_image():
    ann = annot({'a':ONE})
    p = pd.concat([frame({'a':[[600,600,50,50]]*120}, np.full(120,.9)), frame({'a':ONE},[.5])], ignore_index=True)
    assert_coco(ann, p); assert coco_map(ann,p).AP50==0

def test_coco_does_not_depend_on_the_order_of_rows():
    for seed in range(3,60,4): # crowded, with two scores
        ann,p = random_case(seed)
        mixed = Annotations(ann.images.sample(frac=1, random_state=seed), ann.boxes.sample(frac=1, random_state=seed), ann.classes)
        for s in range(3): pd.testing.assert_series_equal(coco_map(ann,p), coco_map(mixed, p.sample(frac=1, random_state=s)))

def test_coco_says_nothing(capfd, caplog):
    caplog.set_level('INFO')
    coco_map(annot({'a':ONE}), frame({'a':ONE},[.5]))
    out = capfd.readouterr()
    assert not out.out and not out.err and not caplog.records

# ---------- VOC ----------
def slow_voc(ann, preds, label, iou, eleven):
    "A box at a time, without ties: precision and recall after each, then the area or the eleven points, by their definitions"
    p = preds[preds.label==label].sort_values('score', ascending=False)
    gt = ann.boxes[ann.boxes.label==label]
    free,pts,tp = {i:df[XYXY].values.tolist() for i,df in gt.groupby('image_id')},[],0
    for k,r in enumerate(p.to_dict('records'),1):
        boxes = free.get(r['image_id'],[])
        best = max(boxes, key=lambda g: slow_iou([r[c] for c in XYXY],g), default=None)
        if best is not None and slow_iou([r[c] for c in XYXY],best)>=iou: boxes.remove(best); tp += 1
        pts.append((tp/len(gt),tp/k) if len(gt) else (0,0))
    if not len(gt): return np.nan
    def best(r): return max((q for o,q in pts if o>=r-1e-12), default=0.)
    if eleven: return sum(best(t/10) for t in range(11))/11
    return sum(best(j/len(gt)) for j in range(1,len(gt)+1))/len(gt)

@pytest.mark.parametrize('eleven', [True,False])
def test_voc_equals_slow_version(eleven):
    for seed in range(0,120,2):
        ann,p = random_case(seed, classes=(L,'Nodule'))
        p = p.assign(score=np.random.default_rng(seed).permutation(len(p))/(len(p)+1)) # no ties
        res = voc_ap(ann, p, iou=.3, eleven=eleven)
        assert res.to_numpy()==pytest.approx([slow_voc(ann,p,c,.3,eleven) for c in ann.classes], abs=1e-12, nan_ok=True), seed

def test_voc_is_near_coco(real):
    ann = real.where(np.arange(len(real))<6000)
    p = simulated(ann, .8)
    assert abs(voc_ap(ann,p).mean()-coco_map(ann,p).AP50)<.01 and voc_ap(ann,p[:0])[L]==0
    assert voc_ap(annot({'a':ONE}), frame({'a':[[100,100,200,100]]},[.5]))[L]==1 # an overlap of exactly one half is enough

# ---------- precision, recall, FROC ----------
def slow_tp(ann, preds, thr): # hits and false positives by greedy matching, IoU > thr
    tp = 0
    for i in ann.images.image_id:
        gt = ann.boxes.loc[ann.boxes.image_id==i, XYXY].values.tolist(); free = set(range(len(gt)))
        for b in preds[preds.image_id==i].sort_values('score', ascending=False, kind='stable')[XYXY].values.tolist():
            o = max(free, key=lambda k: (slow_iou(b,gt[k]),-k), default=None)
            if o is not None and slow_iou(b,gt[o])>thr: free.remove(o); tp += 1
    return tp

def test_precision_recall_equals_slow_version():
    for seed in range(60):
        ann,p = random_case(seed)
        for r in precision_recall(ann,p,iou=.3).itertuples():
            kept = p[p.score>=r.score]; tp = slow_tp(ann,kept,.3); fp,fn = len(kept)-tp,len(ann.boxes)-tp
            assert (r.tp,r.fp)==(tp,fp) and r.precision==pytest.approx(tp/(tp+fp))
            if len(ann.boxes): assert r.recall==pytest.approx(tp/(tp+fn)) and r.f1==pytest.approx(2*tp/(2*tp+fp+fn))

def test_box_level_is_a_row_of_the_curve():
    for seed in range(40):
        ann,p = random_case(seed)
        pr = precision_recall(ann,p,iou=.3)
        for r in pr.to_dict('records'):
            at = box_level(ann,p,r['score'],iou=.3)
            for k in ('tp','fp','precision','recall'): assert at[k]==pytest.approx(r[k], nan_ok=True)
            assert at.fn==len(ann.boxes)-at.tp and (not len(ann.boxes) or at.f1==pytest.approx(r['f1']))
    none = box_level(annot({'a':ONE}), frame({},[]))
    assert np.isnan(none.precision) and none.recall==none.f1==0 and none.fn==1
    exact = frame({'a':[[100,100,400,200]]},[.5]) # overlap of one half
    assert box_level(annot({'a':ONE}),exact).tp==0 and box_level(annot({'a':ONE}),exact,strict=False).tp==1

def test_precision_recall_of_one_class():
    ann,p = random_case(10, classes=(L,'Nodule'))
    only = Annotations(ann.images, ann.boxes[ann.boxes.label==L], [L])
    pd.testing.assert_frame_equal(precision_recall(ann,p,label=L), precision_recall(only,p[p.label==L]))
    with pytest.raises(ValueError, match="no class 'x'"): precision_recall(ann,p,label='x')
    for bad in (50,-.1,np.nan):
        with pytest.raises(ValueError, match='between 0 and 1'): precision_recall(ann,p,iou=bad)

def test_curves_are_drawn_as_computed():
    ids = {f'i{k}':(ONE if k<4 else []) for k in range(8)}
    ann,p = annot(ids),frame({'i0':ONE,'i4':ONE,'i1':ONE,'i5':ONE,'i2':ONE}, [.9,.8,.7,.6,.5])
    pr = precision_recall(ann,p)
    a,b = plot_precision_recall(pr, .65)
    assert a.lines[0].get_ydata().tolist()==pr.precision.tolist() and a.lines[1].get_ydata().tolist()==[1,2/3,2/3,.6,.6]
    assert [o.get_xdata().tolist() for o in b.lines[-3:]]==[[.7]]*3
    x,y = plot_froc(ann,p).lines[0].get_data()
    assert x.tolist()==[0,0,1/8,1/8,2/8,2/8,8] and y.tolist()==[0,.25,.25,.5,.5,.75,.75]
    plot_froc(annot({'a':[]}), frame({'a':ONE},[.5])); plot_froc(ann, p[:0]); plot_precision_recall(precision_recall(ann, p[:0]), .5)
    plt.close('all')

def test_froc_by_hand():
    ids = {f'i{k}':(ONE if k<4 else []) for k in range(8)} # 4 lesions on 8 images
    p = frame({'i0':ONE,'i4':ONE,'i1':ONE,'i5':ONE,'i2':ONE}, [.9,.8,.7,.6,.5]) # hit, fp, hit, fp, hit
    res = froc(annot(ids), p)
    assert res.tolist()[:-1]==[.5,.75,.75,.75,.75,.75,.75] and res['mean']==pytest.approx(np.mean([.5]+[.75]*6))
    assert list(res.index)==['1/8','1/4','1/2','1','2','4','8','mean']
    assert froc(annot(ids), p[:0]).tolist()==[0]*8 and froc(annot({'a':[]}), frame({'a':ONE},[.5])).isna().all()
    assert froc(annot({'a':ONE}), frame({'a':[[800,800,9,9]]+ONE},[.9,.8])).tolist()[:4]==[0,0,0,1] # nothing before the first false positive

# ---------- image level ----------
def test_image_level_equals_scikit_learn():
    for seed in range(60):
        ann,p = random_case(seed)
        pos = lesion_counts(ann).to_numpy()>0; called = ann.images.image_id.isin(p.image_id[p.score>=.5]).to_numpy(); lv = image_level(ann,p,.5)
        assert lv[['tp','fp','fn','tn']].tolist()==[(pos&called).sum(),(~pos&called).sum(),(pos&~called).sum(),(~pos&~called).sum()]
        assert lv.accuracy==pytest.approx((pos==called).mean())
        if 0<pos.sum()<len(pos): assert lv.AUC==pytest.approx(roc_auc_score(pos, [p.score[p.image_id==i].max() if (p.image_id==i).any() else 0 for i in ann.images.image_id]))
        else: assert np.isnan(lv.AUC)

def test_image_without_predictions_is_never_called():
    lv = image_level(annot({'a':ONE,'b':[]}), frame({},[]), threshold=0)
    assert lv.tp==lv.fp==0 and np.isnan(lv.PPV) and lv.specificity==1

# ---------- bad input ----------
@pytest.mark.parametrize('change,match', [
    (lambda p: p.drop(columns=['score','label']), r"lack \['label', 'score'\]"), (lambda p: p.assign(image_id='z'), 'no image of this id'),
    (lambda p: p.assign(image_id=[7,8,9]), 'read as numbers'), (lambda p: p.assign(x1=[1,np.nan,1]), '1 of 3 rows: a coordinate or score is not a number'),
    (lambda p: p.assign(x1=p.x2, x2=p.x1), 'xywh'), (lambda p: p.assign(y2=p.y1), 'xywh'), (lambda p: p.assign(score=[.1,1.2,.3]), 'row 1'),
    (lambda p: p.assign(score=[.1,np.nan,.3]), 'not a number'), (lambda p: p.assign(score=-.1), 'logits'), (lambda p: p.assign(x1=['a','b','c']), 'not a number'),
    (lambda p: p.assign(x2=np.inf), 'not a number'), (lambda p: p.assign(label='opacity'), 'a label that is none of'),
    (lambda p: p.assign(image_id=[None,'a','b']), 'no image of this id'), (lambda p: p.assign(label=None), 'a label that is none of'),
    (lambda p: p.assign(x2=[300,2048,300]), r'1 of 3 rows: far outside of the picture, 1024 wide and 1024 high[^\n]*another size of it[^\n]*\n  row 1: image_id=a'),
    (lambda p: p.assign(y1=-200), 'far outside'), (lambda p: pd.DataFrame(), 'lack'), (lambda p: p.to_dict(), 'not a dict'), (lambda p: None, 'not a NoneType')])
def test_bad_predictions(change, match):
    ann,p = annot({'a':ONE,'b':[]}), ranked({'a':ONE*2,'b':ONE})
    for f in (rsna_score, threshold_sweep, best_threshold, coco_map, coco_classes, voc_ap, precision_recall, box_level, froc, plot_froc, image_scores, image_level,
              lambda a,q: write_submission(a,q,'x.csv')):
        with pytest.raises(ValueError, match=match): f(ann, change(p))

def test_boxes_may_stick_out_a_little():
    p = ranked({'a':[[900,900,200,200],[-100,-100,300,300]]})
    assert rsna_score(annot({'a':ONE}), p)==0
    with pytest.raises(ValueError, match='far outside'): rsna_score(annot({'a':ONE}), p.assign(x1=p.x1-3))
    unknown = Annotations(pd.DataFrame({'image_id':['a']}), frame({'a':ONE}), [L]) # pictures of unknown size
    assert rsna_score(unknown, frame({'a':[[9e4,0,9,9]]},[.5]))==0

def test_an_image_twice_is_refused():
    with pytest.raises(ValueError, match='one id for several images'): Annotations(pd.DataFrame({'image_id':['a','a']}), frame({}), [L])

def test_inputs_are_left_alone():
    ann,p = annot({'a':ONE,'b':[]}), ranked({'a':ONE*2,'b':ONE})
    before = p.copy(), ann.images.copy(), ann.boxes.copy()
    for f in (rsna_score, best_threshold, coco_map, voc_ap, precision_recall, box_level, froc, image_scores, image_level): f(ann, p)
    for x,y in zip(before,(p,ann.images,ann.boxes)): pd.testing.assert_frame_equal(x,y)

# ---------- submissions ----------
HEAD = 'patientId,PredictionString\n'

def test_submission_by_hand(tmp_path):
    ann = annot({'a':[],'b':[],'007':[]})
    p = frame({'a':[[1.5,2,30,40.25]],'007':[[0,0,10,10]],'a ':[]}, [.25,1]); p = pd.concat([p, frame({'a':[[5,5,5,5]]},[.5])])
    f = write_submission(ann, p, tmp_path/'new'/'s.csv')
    assert f.read_bytes()==(HEAD+'a,0.5 5 5 5 5 0.25 1.5 2 30 40.25\nb,\n007,1 0 0 10 10\n').encode() and [o.name for o in f.parent.iterdir()]==['s.csv']
    q = read_submission(f, ann)
    assert list(q)==pred_cols and q.image_id.tolist()==['a','a','007'] and q.index.tolist()==[0,1,2] and q.x2.tolist()==[10,31.5,10]
    assert write_submission(ann, p, f, threshold=.5).read_text()==HEAD+'a,0.5 5 5 5 5\nb,\n007,1 0 0 10 10\n'
    assert len(read_submission(write_submission(ann, p[:0], f), ann))==0

def test_submission_keeps_the_order_of_scores_that_rounding_makes_equal(tmp_path):
    ann,p = annot({'a':BESIDE}),frame({'a':[WIDE,TIGHT]},[.5,.5+1e-9]) # the tight box claims first
    q = read_submission(write_submission(ann, p, tmp_path/'s.csv'), ann)
    assert q.score.tolist()==[.5,.5] and rsna_score(ann,q)==rsna_score(ann,p)!=rsna_score(ann,p[::-1].assign(score=.5).iloc[::-1])

def test_submission_that_fails_leaves_the_old_file(tmp_path):
    ann,f = annot({'a':ONE}),tmp_path/'s.csv'
    f.write_text('old')
    with pytest.raises(ValueError, match='xywh'): write_submission(ann, frame({'a':[[1,1,1e-8,5]]},[.5]), f) # nothing is left of it at six decimals
    assert f.read_text()=='old'

@settings(max_examples=60, deadline=None)
@given(st.integers(0,10**6))
def test_submission_round_trip_is_exact(seed):
    import tempfile
    rng,n = np.random.default_rng(seed),30
    ann = annot({f'i{k}':(ONE if k%2 else []) for k in range(8)})
    xy = rng.uniform(0,900,(n,2))*rng.choice([1,1e-3,1/3],(n,1))
    p = pd.DataFrame(np.concatenate([xy,xy+10**rng.uniform(-3,2,(n,2))],1), columns=XYXY).assign(image_id=rng.choice(ann.images.image_id.to_numpy(),n), label=L, score=rng.choice([rng.random(),1e-7,.5000005,1/3],n))
    with tempfile.TemporaryDirectory() as d:
        f = write_submission(ann, p, Path(d)/'s.csv'); q,text = read_submission(f, ann),f.read_text()
        want = match_detections(ann, p)[0].round({c:6 for c in [*XYXY,'score']})
        assert (q[[*XYXY,'score']].to_numpy()==want[[*XYXY,'score']].to_numpy()).all() and q.image_id.tolist()==want.image_id.tolist()
        assert write_submission(ann, q, f).read_text()==text

def test_submission_of_real_size(real, tmp_path):
    p = simulated(real, 3)
    q = read_submission(write_submission(real, p, tmp_path/'s.csv'), real)
    assert len(q)==len(p) and rsna_score(real,q)==pytest.approx(rsna_score(real,p), abs=1e-4)

@pytest.mark.parametrize('text,match', [
    ('', 'begins with'), ('a,\nb,\n', 'begins with'), ('patientId;PredictionString\na;\n', 'not with the header'), ('PredictionString,patientId\n,a\n,b\n', 'begins with'),
    (HEAD, "2 images have no line, for example \\['a', 'b'\\]"), (HEAD+'a,\n', "1 images have no line"), (HEAD+'a,\nb,\nb,.5 1 1 5 5\n', r'2 of 3 rows: this id stands in several lines[^\n]*\n  row 3: image_id=b\n  row 4'),
    (HEAD+'a,\nz,\nb,\n', 'no image of this id[^\n]*\n  row 3: image_id=z'), (HEAD+'a,\nb,.5 1 1 5\n', 'fives[^\n]*\n  row 3'), (HEAD+'a,.5 1 1 5 5 .5\nb,\n', 'fives[^\n]*\n  row 2'),
    (HEAD+'a,.5,1,1,5,5\nb,\n', 'commas'), (HEAD+'a\nb,\n', 'not an id and one string'), (HEAD+'a,.5 1 1 x 5\nb,\n', 'not a number[^\n]*\n  row 2'),
    (HEAD+'a,.5 1 1 nan 5\nb,\n', 'not a number'), (HEAD+'a,.5 1 1 -5 5\nb,\n', 'not positive[^\n]*\n  row 2'), (HEAD+'a,\nb,.5 1 1 5 0\n', 'not positive[^\n]*\n  row 3'),
    (HEAD+'a,1.5 1 1 5 5\nb,\n', 'logits[^\n]*\n  row 2'), (HEAD+'a,.9 1 1 5 5\n\nb,.5 600 600 800 5\n', 'far outside[^\n]*\n  row 4')])
def test_bad_submissions(text, match, tmp_path):
    f = tmp_path/'s.csv'; f.write_text(text)
    with pytest.raises(ValueError, match=match): read_submission(f, annot({'a':ONE,'b':[]}))

def test_submissions_that_others_write(tmp_path):
    f,ann = tmp_path/'s.csv',annot({'a':ONE,'b':[]})
    f.write_bytes(b'\xef\xbb\xbfpatientId,PredictionString\r\n"b",""\r\n"a"," 0.5  1 1 5.0 5 .4 1 1 5 5 "\r\n\r\n') # Excel's mark, quotes, other line ends, spaces
    assert read_submission(f, ann)[['image_id','score','x2']].values.tolist()==[['a',.5,6.],['a',.4,6.]]

def test_submission_has_one_class(tmp_path):
    ann = annot({'a':ONE}, classes=[L,'Nodule'])
    for f in (lambda: write_submission(ann, frame({'a':ONE},[.5]), tmp_path/'s.csv'), lambda: read_submission(tmp_path/'s.csv', ann)):
        with pytest.raises(ValueError, match='one class'): f()

@pytest.mark.parametrize('t', [50, -.1, np.nan])
def test_thresholds_are_scores(t):
    ann,p = annot({'a':ONE}),frame({'a':ONE}, [.5])
    for f in (rsna_score, box_level, image_level):
        with pytest.raises(ValueError, match='in percent'): f(ann, p, t)
    with pytest.raises(ValueError, match='in percent'): write_submission(ann, p, 'never.csv', t)

def test_tables_with_text_for_numbers_and_with_an_index_of_ids():
    ann,p = annot({'a':ONE,'b':[]}),frame({'a':ONE,'b':ONE}, [.9,.4])
    odd = p.assign(score=p.score.astype(str)).set_index('image_id', drop=False)
    pd.testing.assert_series_equal(image_level(ann, odd, .5), image_level(ann, p, .5))
    assert rsna_score(ann, odd, .5)==rsna_score(ann, p, .5)==1

def test_froc_curve_ends_at_its_right_edge():
    ann,p = annot({'a':ONE}),frame({'a':[[500,500,50,50+k] for k in range(12)]+[ONE[0]]}, np.linspace(.9,.1,13)) # found after twelve false positives
    ax = plot_froc(ann, p)
    x,y = ax.lines[0].get_data()
    assert (np.diff(x)>=0).all() and x[-1]==8 and y[-1]==0==froc(ann, p)['8']
    plt.close('all')

def test_sizes_rise():
    with pytest.raises(ValueError, match='must rise'): coco_map(annot({'a':ONE}), frame({'a':ONE}, [.5]), areas=(96**2,32**2))
