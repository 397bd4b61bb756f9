"Kinds of errors against a slow literal version, chapter 11's counts, hand-made cases, detectors with one fault, and galleries"
import cv2, matplotlib, numpy as np, pandas as pd, pytest
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from hypothesis import given, settings, strategies as st
from lungdet.core import XYXY
from lungdet.errors import *
from lungdet.errors import CASE_KINDS, FALSE_POSITIVES, _tags
from lungdet.evaluate import coco_map, precision_recall, pred_cols, rsna_score
from lungdet.formats import Annotations

CLASSES = ['Mass','Nodule']
CATEGORIES = ['Normal','No Finding','Effusion',None]

def table(rows, cols): return pd.DataFrame(rows, columns=cols)
def make(lesions, boxes, category='Lung Opacity', **images):
    "One image 'a': lesions [x,y,w,h] and boxes [x,y,w,h,score]"
    ann = Annotations(pd.DataFrame([dict(image_id='a', height=1000, width=1000, category=category)|images]),
                      table([('a',x,y,x+w,y+h,'o') for x,y,w,h in lesions], ['image_id',*XYXY,'label']), ['o'])
    return ann,table([('a',x,y,x+w,y+h,'o',s) for x,y,w,h,s in boxes], pred_cols)

def random_case(seed):
    "Few places and few scores, so that overlaps and confidences tie; two classes"
    g = np.random.default_rng(seed)
    ids = [f'i{k}' for k in range(g.integers(1,6))]
    def boxes(mean):
        who = g.choice(ids, g.poisson(mean*len(ids)))
        xy,wh = g.integers(0,5,(len(who),2))*20.,g.integers(1,6,(len(who),2))*20.
        return pd.DataFrame(np.concatenate([xy,xy+wh],1), columns=XYXY).assign(image_id=pd.Series(who, dtype=object), label=g.choice(CLASSES, len(who)))
    truth,preds = boxes(1.5),boxes(3)
    images = pd.DataFrame(dict(image_id=ids, height=1024, width=1024, category=g.choice(CATEGORIES, len(ids))))
    return Annotations(images, truth, CLASSES),preds.assign(score=g.integers(0,6,len(preds))/5)

# ---------- a slow, literal version ----------
def slow_iou(a, b):
    w,h = min(a.x2,b.x2)-max(a.x1,b.x1),min(a.y2,b.y2)-max(a.y1,b.y1)
    if w<=0 or h<=0: return 0.
    return w*h/((a.x2-a.x1)*(a.y2-a.y1)+(b.x2-b.x1)*(b.y2-b.y1)-w*h)

def slow_kinds(ann, preds, threshold, iou, loose):
    "Kinds of the shown boxes, by image and falling score, and of the lesions"
    boxes,lesions = [],{}
    for im in ann.images.itertuples():
        truth = list(ann.boxes[ann.boxes.image_id==im.image_id].itertuples())
        shown,taken = [],{}
        for p in sorted(preds[preds.image_id==im.image_id].itertuples(), key=lambda o: -o.score):
            free = [t for t in truth if t.label==p.label and t.Index not in taken]
            best = max(free, key=lambda t: slow_iou(p,t), default=None) # the first of equals
            hit = best is not None and slow_iou(p,best)>iou
            if hit: taken[best.Index] = p
            if p.score<threshold: continue
            own,other = (max([slow_iou(p,t) for t in truth if (t.label==p.label)==same], default=0) for same in (True,False))
            if hit: kind = 'hit'
            elif own>iou: kind = 'duplicate'
            elif other>iou: kind = 'wrong class'
            elif own>loose: kind = 'poorly localised'
            elif truth: kind = 'false positive beside a lesion'
            elif pd.isna(im.category): kind = 'false positive, category unknown'
            else: kind = 'false positive on normal' if im.category in ('Normal','No Finding') else 'false positive on not normal'
            shown.append((p,kind))
        boxes += [k for _,k in shown]
        for t in truth:
            if t.Index in taken and taken[t.Index].score>=threshold: kind = 'hit'
            elif any(k=='wrong class' and p.label!=t.label and slow_iou(p,t)>iou for p,k in shown): kind = 'wrong class'
            elif any(k=='poorly localised' and p.label==t.label and slow_iou(p,t)>loose for p,k in shown): kind = 'poorly localised'
            else: kind = 'below the threshold' if t.Index in taken else 'missed'
            lesions[t.Index] = kind
    return boxes,[lesions[i] for i in ann.boxes.index]

def test_kinds_equal_the_slow_version():
    seen = set()
    for seed in range(50):
        ann,preds = random_case(seed)
        for threshold,iou,loose in ((.4,.5,.1),(0,.3,0),(.6,.6,.25)):
            p,t = classify_errors(ann, preds, threshold, iou, loose)
            assert (p.kind.tolist(),t.kind.tolist())==slow_kinds(ann, preds, threshold, iou, loose), seed
            seen |= {*p.kind,*('lesion '+t.kind)}
    assert seen=={*BOX_KINDS,*('lesion '+o for o in LESION_KINDS)} # every kind occurs in this test

@given(st.integers(0,10**6), st.sampled_from([.3,.5,.7]))
@settings(max_examples=15, deadline=None)
def test_counts_are_those_of_precision_recall(seed, iou):
    ann,preds = random_case(seed)
    for row in precision_recall(ann, preds, iou).itertuples():
        p,t = classify_errors(ann, preds, row.score, iou)
        assert ((p.kind=='hit').sum(),(p.kind!='hit').sum(),(t.kind=='hit').sum())==(row.tp,row.fp,row.tp)
        n = error_counts(ann, preds, row.score, iou)
        assert n.loc[('boxes','hit'),'all']==row.tp and n.loc['boxes','all'].sum()==row.tp+row.fp
        assert n.loc['lesions','all'].sum()==len(ann.boxes) and n.loc['images','all'].sum()==len(ann)
        assert (n.drop(columns=['all','share']).sum(axis=1)==n['all']).all()

def test_what_a_box_is_about():
    for seed in range(40):
        ann,preds = random_case(seed)
        p,t = classify_errors(ann, preds, .4)
        assert all(o and 'nan' not in o for o in [*p.reason,*t.reason])
        for r in p.itertuples():
            if r.kind.startswith('false'): assert r.truth==-1; continue
            lesion = ann.boxes.loc[r.truth]
            assert lesion.image_id==r.image_id and slow_iou(r, lesion)==pytest.approx(r.iou) and (lesion.label==r.label)==(r.kind!='wrong class')
        hits = p[p.kind=='hit']
        assert hits.truth.is_unique and sorted(hits.truth)==sorted(t.index[t.kind=='hit'])
        assert t.score[t.kind=='missed'].isna().all() and (t.score[t.kind=='below the threshold']<.4).all()

def test_input_is_left_alone_and_odd_columns_do_no_harm():
    ann,preds = random_case(3)
    odd = preds.assign(kind='x', iou=9, truth=7, gap=1, order=2, category=3, shown=False, reason=0)
    odd.index = [0]*len(odd)
    before = odd.copy()
    for a,b in zip(classify_errors(ann, preds, .4), classify_errors(ann, odd, .4)): pd.testing.assert_frame_equal(a, b)
    pd.testing.assert_frame_equal(odd, before)

# ---------- reasons ----------
L = [300,300,200,400] # x, y, w, h
@pytest.mark.parametrize('box,words', [
    ([200,300,200,400], 'shifted left by 50 % of its width'), ([400,300,200,400], 'shifted right by 50 % of its width'),
    ([300,100,200,400], 'shifted up by 50 % of its height'), ([300,500,200,400], 'shifted down by 50 % of its height'),
    ([350,420,200,400], 'shifted down by 30 % of its height and right by 25 % of its width'),
    ([200,200,400,600], 'too big (area ×3.00)'), ([350,400,100,200], 'too small (area ×.25)'),
    ([150,300,500,400], 'too wide (×2.50)'), ([360,300,80,400], 'too narrow (×.40)'),
    ([300,50,200,900], 'too tall (×2.25)'), ([300,420,200,160], 'too short (×.40)'),
    ([240,425,320,150], 'too wide (×1.60) and too short (×.38)'),
    ([300,300,100,160], 'too small (area ×.20), shifted up by 30 % of its height and left by 25 % of its width')])
def test_poorly_localised_says_how(box, words):
    p,t = classify_errors(*make([L], [[*box,.8]]), .3)
    assert p.kind.tolist()==t.kind.tolist()==['poorly localised']
    assert p.reason[0].split(': ')[1]==t.reason[0].split(': ')[1]==words
    assert p.reason[0].startswith(f'overlap {p.iou[0]:.2f}'.replace('0.','.')) and t.reason[0].startswith('best overlap .')

side = st.floats(1,500)
@given(st.tuples(side,side,side,side), st.tuples(side,side,side,side))
@settings(max_examples=400, deadline=None)
def test_a_box_that_does_not_fit_is_told_why(a, b):
    "Whatever overlaps by half or less has a fault that is worth a word; a box on itself has none; neither zoom nor move changes the words"
    a,b = (np.array([[x,y,x+w,y+h]]) for x,y,w,h in (a,b))
    words = fit_words(*box_fit(a,b)[0])
    inter = (np.minimum(a[:,2:],b[:,2:])-np.maximum(a[:,:2],b[:,:2])).clip(min=0).prod()
    if inter/((a[:,2:]-a[:,:2]).prod()+(b[:,2:]-b[:,:2]).prod()-inter)<=.5: assert words and not words.endswith('shifted ')
    assert fit_words(*box_fit(a,a)[0])==''
    np.testing.assert_allclose(box_fit(2*a+8,2*b+8), box_fit(a,b), rtol=1e-6, atol=1e-6)

def test_one_for_several_and_several_for_one():
    ann,preds = make([[100,300,150,300],[300,300,150,300],[500,300,150,300]], [[100,300,550,300,.9]])
    p,t = classify_errors(ann, preds, .3)
    assert p.reason.tolist()==['one box around 3 lesions'] and t.reason.tolist()==['in one box with 2 other lesions']*3
    ann,preds = make([[100,300,600,300]], [[100,300,200,300,.9],[300,300,200,300,.8],[500,300,200,300,.7]])
    p,t = classify_errors(ann, preds, .3)
    assert p.reason.tolist()==['one of 3 boxes that share a lesion']*3 and t.reason.tolist()==['split into 3 boxes']
    assert classify_errors(ann, preds, .75)[1].reason.tolist()==['split into 2 boxes'] # the third is not shown; two cover two thirds
    assert classify_errors(ann, preds, .85)[0].reason.tolist()==['overlap .33 with a lesion: too narrow (×.33), shifted left by 33 % of its width']
    far = make([[0,0,100,100],[900,900,100,100]], [[0,0,100,290,.9]]) # the other lesion is elsewhere
    assert 'around' not in classify_errors(*far, .3)[0].reason[0]

def test_a_piece_of_a_lesion_that_is_found_is_no_split():
    p,t = classify_errors(*make([[100,300,600,300]], [[100,300,400,300,.9],[500,300,200,300,.8]]), .3)
    assert p.kind.tolist()==['hit','poorly localised'] and t.kind.tolist()==['hit']
    assert p.reason[1].startswith('overlap .33 with a lesion already found: ')

def test_other_reasons():
    p,_ = classify_errors(*make([L], [[*L,s] for s in (.9,.8,.7,.6,.5,.45)]), .3)
    assert p.reason.tolist()==['overlap 1.00: lies well']+[f'{o} box on a lesion already found (overlap 1.00)' for o in ('second','third','fourth','fifth','6th')]
    p,t = classify_errors(*make([L], [[*L,.5],[530,740,100,100,.9],[490,300,200,400,.2]]), .1)
    assert p.reason.tolist()[0]=='nearest lesion 50 px away; more confident than 100 % of the hits' # 30 right and 40 down
    assert p.reason.tolist()[2]=='only touches a lesion (overlap .03)'
    ann,preds = make([L], [[*L,.2996]])
    assert classify_errors(ann, preds, .31)[1].reason[0]=='found at .300, below the threshold .310'
    for category,said in (('Effusion','no lesion here (Effusion)'),(None,'no lesion here (category unknown)')):
        assert classify_errors(*make([], [[*L,.5]], category), .1)[0].reason[0]==said

def test_missed_lesions_say_how_large_they_are():
    lesions = [[0,0,100,100],[200,0,200,200],[500,0,300,300],[0,500,400,400]]
    ann,none = make(lesions, [])
    assert classify_errors(ann, none, .3)[1].reason.tolist()==['no box on it; 1.0 % of the picture, smaller than 75 % of the lesions',
        'no box on it; 4.0 % of the picture, smaller than 50 % of the lesions','no box on it; 9.0 % of the picture, larger than 50 % of the lesions',
        'no box on it; 16.0 % of the picture, larger than 75 % of the lesions']
    ann,none = make(lesions, [], height=None, width=None)
    assert classify_errors(ann, none, .3)[1].reason[0]=='no box on it; 100 px across, smaller than 75 % of the lesions'
    assert classify_errors(*make(lesions[:1], []), .3)[1].reason[0]=='no box on it; 1.0 % of the picture'
    ann,huge = make([[450,450,100,100]], [[0,0,1000,1000,.9]])
    assert classify_errors(ann, huge, .3)[1].reason[0].startswith('in a box that marks something else; ')

def test_nothing_at_all():
    for ann,preds in (make([], []),make([L], []),make([], [[*L,.9]])):
        p,t = classify_errors(ann, preds, .5)
        assert len(p)==len(preds) and len(t)==len(ann.boxes)
        assert error_counts(ann, preds, .5).loc['images','all'].sum()==1
        assert error_costs(ann, preds, .5).index[0]=='as it is'
        for kind in CASE_KINDS: assert len(error_cases(ann, preds, .5, kind))<=1
        plt.close(show_errors(ann, preds, .5))

def test_bad_input():
    ann,preds = make([L], [[*L,.9]])
    for kw,why in ((dict(threshold=50),'percentage'),(dict(threshold=.5,iou=.1,loose=.5),'a loose overlap'),(dict(threshold=float('nan')),'no score')):
        with pytest.raises(ValueError, match=why): classify_errors(ann, preds, **kw)
    with pytest.raises(ValueError, match='xywh'): classify_errors(ann, preds.assign(x2=0), .5)
    with pytest.raises(ValueError, match="'funniest'"): show_errors(ann, preds, .5, 'funniest')

# ---------- what repairing is worth ----------
def detector(ann, fault, seed=0):
    "Perfect boxes, but for one `fault`"
    g = np.random.default_rng(seed)
    b = ann.boxes.assign(score=g.uniform(.6,.95,len(ann.boxes)))
    some = g.random(len(b))<.4
    if fault=='missed': return b[~some]
    if fault=='below the threshold': return b.assign(score=b.score.where(~some, .2))
    if fault=='poorly localised': w = .5*(b.x2-b.x1)*some; return b.assign(x1=b.x1+w, x2=b.x2+w)
    if fault=='wrong class': return b.assign(label=b.label.mask(some, b.label.map(dict(zip(CLASSES,CLASSES[::-1])))))
    if fault=='duplicate': return pd.concat([b[some].assign(score=.97), b])
    group = next(k for k,v in FALSE_POSITIVES.items() if v==fault)
    ids = image_kinds(ann); ids = ids.index[ids==group]
    return pd.concat([b, pd.DataFrame(dict(image_id=ids, x1=700., y1=700., x2=900., y2=900., label=CLASSES[0], score=.97))])

def one_fault_set(seed=0):
    g = np.random.default_rng(seed)
    ids = [f'i{k:02}' for k in range(60)]
    with_lesion = ids[:30]
    rows = [(i,x,100.,x+100+g.integers(50),250.,g.choice(CLASSES)) for i in with_lesion for x in (50.,350.)[:g.integers(1,3)]]
    images = pd.DataFrame(dict(image_id=ids, height=1000, width=1000, category=['Opacity']*30+['Normal']*10+['Other']*10+[None]*10))
    return Annotations(images, table(rows, ['image_id',*XYXY,'label']), CLASSES)

@pytest.mark.parametrize('fault', ['missed','below the threshold','poorly localised','wrong class','duplicate',*FALSE_POSITIVES.values()])
def test_the_only_fault_costs_most_and_repairing_it_is_enough(fault):
    ann = one_fault_set()
    costs = error_costs(ann, detector(ann, fault), .3)
    rest = costs.drop(['as it is',fault])
    for k in ('AP50','RSNA'): # AP50 does not mind duplicates that come after all of the hits or fit as well
        assert costs.loc[fault,f'{k} gain']>(0 if (k,fault)!=('AP50','duplicate') else -1e-9) and costs.loc[fault,k]==pytest.approx(1)
        assert (rest[f'{k} gain']<=1e-9).all(), (k,rest)

def test_costs_start_from_the_scores_of_what_is_shown_and_tight_hits_count():
    ann = one_fault_set()
    b = ann.boxes.assign(score=.8)
    loose = b.assign(x1=b.x1+.2*(b.x2-b.x1)) # IoU .8: passes all; then .6: passes four of eight
    assert error_costs(ann, loose, .3).loc['hit','RSNA gain']==pytest.approx(0)
    loose = b.assign(x1=b.x1+.4*(b.x2-b.x1))
    costs = error_costs(ann, pd.concat([loose, loose.assign(score=.1)]), .3)
    assert costs.loc['hit','RSNA gain']==pytest.approx(1-rsna_score(ann, loose)) and costs.loc['hit','AP50 gain']==0
    assert costs.loc['as it is',['AP50','RSNA']].tolist()==pytest.approx([coco_map(ann, loose).AP50,rsna_score(ann, loose)])

# ---------- galleries ----------
def pictures(fig): return [ax for ax in fig.axes if ax.images]
def below(ax): return next(o.get_text() for o in ax.texts if o.get_position()[1]==-.02).replace('\n',' ').replace('\xa0',' ')

def test_cases_are_in_order_one_per_image():
    ann = one_fault_set()
    preds = detector(ann, 'missed')
    got = error_cases(ann, preds, .3, 'missed', k=60)
    size = (got.x2-got.x1)*(got.y2-got.y1)
    assert got.image_id.is_unique and size.is_monotonic_decreasing and (got.of=='lesion').all()
    made = detector(ann, 'false positive on normal')
    got = error_cases(ann, made.assign(score=np.linspace(.9,.4,len(made))), .3, k=60)
    assert (got.title=='Mass: false positive on normal').all() and got.score.is_monotonic_decreasing and len(got)==10
    each = rsna_score(ann, preds, .3, per_image=True)
    best,worst = (error_cases(ann, preds, .3, o, k=60) for o in ('best','worst'))
    assert each[best.image_id].is_monotonic_decreasing and each[worst.image_id].is_monotonic_increasing
    assert set(best.image_id)==set(worst.image_id)==set(preds.image_id)

def test_gallery_without_pictures_says_so():
    ann = one_fault_set()
    fig = show_errors(ann, detector(ann, 'false positive on normal'), .3, k=50)
    axs = pictures(fig)
    assert len(axs)==6 and all('no picture' in [o.get_text() for o in ax.texts] for ax in axs)
    assert all(below(ax)=='no lesion here (Normal); more confident than 100 % of the hits' for ax in axs)
    fig.canvas.draw()
    width = axs[0].get_window_extent().width/fig.dpi
    assert width>2.4
    spots = [ax.get_tightbbox() for ax in axs]
    assert not any(a.overlaps(b) for i,a in enumerate(spots) for b in spots[:i]) # no text runs into another panel
    plt.close(fig)

def test_boxes_find_their_place_on_smaller_and_letterboxed_pictures(tmp_path):
    cv2.imwrite(str(tmp_path/'a.png'), np.full((256,256),90,np.uint8))
    for kw,want in (({}, (75,50)), (dict(scale_x=.2, scale_y=.2, offset_x=10., offset_y=28., png_size=256), (70,68))):
        ann,preds = make([], [[300,200,100,100,.9]], path=str(tmp_path/'a.png'), height=1024, width=1024, **kw)
        fig = show_errors(ann, preds, .3)
        ax, = pictures(fig)
        assert ax.patches[-1].get_xy()==pytest.approx(want) and 'no picture' not in [o.get_text() for o in ax.texts]
        plt.close(fig)
    missing = make([], [[300,200,100,100,.9]], path='gone.png', scale_x=.2, scale_y=.2, offset_x=10., offset_y=28., png_size=256)
    ax, = pictures(show_errors(*missing, .3))
    assert ax.patches[-1].get_xy()==(300,200) # on the original, since there is no letterboxed picture
    plt.close('all')

def test_a_box_below_the_threshold_is_drawn_where_it_is_the_point():
    ann,preds = make([L], [[*L,.2],[0,0,100,100,.15]])
    ax, = pictures(show_errors(ann, preds, .3, 'below the threshold'))
    assert [o.get_text() for o in ax.texts if o.get_text().startswith('.')]==['.20']
    plt.close('all')

@given(st.lists(st.tuples(*[st.floats(0,900)]*2, *[st.floats(10,900)]*2), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_scores_are_on_the_picture(boxes):
    tags = _tags([(x,y,min(x+w,1000),min(y+h,1000)) for x,y,w,h in boxes], 1000, 1000)
    assert all(0<=x<=890 and 0<=y<=940 for x,y in tags)

def test_scores_of_boxes_in_one_place_do_not_cover_each_other():
    tags = _tags([(300,300,600,700)]*4, 1000, 1000)
    assert all(abs(a-c)>=110 or abs(b-d)>=60 for i,(a,b) in enumerate(tags) for c,d in tags[:i])
