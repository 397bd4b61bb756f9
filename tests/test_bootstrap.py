"Weights against resamples that are really made, AUC against scikit-learn, coverage, the same draws whatever the chunk, and one-sided, tiny or empty data"
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import roc_auc_score
from lungdet.evaluate import coco_map, froc, image_level, lesion_counts, precision_recall, rsna_score
from lungdet.formats import Annotations
from lungdet.splits import patients
from lungdet.bootstrap import *
from lungdet.bootstrap import FIGURES
from lungdet.core import XYXY
from tables import random_case

def made(ann, p, w):
    "The resample that weights `w` describe: copies of pictures, in order, with ids of their own"
    ids = np.repeat(ann.images.image_id.to_numpy(), w)
    nth = np.empty(len(ids), int); nth[np.argsort(ids, kind='stable')] = np.arange(len(ids)) # COCO's order of equal scores is that of the ids
    copies = pd.DataFrame(dict(image_id=ids, new=[f'{k:05d}' for k in nth]))
    def move(df): return copies.merge(df, on='image_id').drop(columns='image_id').rename(columns={'new':'image_id'})
    return Annotations(move(ann.images), move(ann.boxes), ann.classes),move(p)

def chapter11(ann, p, t):
    "The figures by the functions that judge a table"
    level,coco,pr = image_level(ann,p,t),coco_map(ann,p),precision_recall(ann,p)
    at,n = pr[pr.score>=t].tail(1),len(ann.boxes)
    box = at.iloc[0][['precision','recall','f1']].tolist() if len(at) else [np.nan,*([0.,0.] if n else [np.nan]*2)]
    return dict(RSNA=rsna_score(ann,p,t), AUC=level.AUC, sensitivity=level.sensitivity, specificity=level.specificity, PPV=level.PPV, NPV=level.NPV,
                AP50=coco.AP50, AP=coco.AP, FROC=froc(ann,p)['mean'], **dict(zip(('precision','recall','F1'),box)))

def check(ann, p, w, t=.3):
    got = Figures(ann, p, t)(w)
    assert list(got)==FIGURES and len(got)==len(w)
    for o,row in zip(np.asarray(w, dtype=int),got.to_dict('records')):
        assert row==pytest.approx(chapter11(*made(ann,p,o),t), abs=1e-9, nan_ok=True)

# ---------- weights are resamples ----------
@pytest.mark.parametrize('classes', [('a',),('a','b','c')])
@pytest.mark.parametrize('tie', ['between','never'])
def test_weights_equal_the_resample_that_is_made(classes, tie):
    for seed in range(25):
        ann,p = random_case(seed, classes, tie=tie)
        check(ann, p, next(patient_weights(patients(ann.images), 3, seed)))

@pytest.mark.parametrize('classes', [('a',),('a','b')])
def test_weights_of_one_equal_chapter_11_with_any_ties(classes):
    for seed in range(80):
        ann,p = random_case(seed, classes, images=1+seed%7, tie=('all','between')[seed%2], preds=6 if seed%3 else 2, boxes=3 if seed%3 else .7)
        check(ann, p, np.ones((1,len(ann))))

def test_weights_of_zero_and_one_equal_chapter_11_with_any_ties():
    for seed in range(30):
        ann,p = random_case(seed, ('a','b'), tie='all')
        w = np.random.default_rng(seed).integers(0,2,(2,len(ann)))
        check(ann, p, w[w.any(1)])

def test_equal_scores_on_one_picture_differ_only_by_their_order():
    "Copies of a picture are walked picture by picture by COCO's code, box by box by weights: same boxes, another order of equals"
    ann,p = random_case(3, tie='all')
    w = next(patient_weights(patients(ann.images), 20))
    f = Figures(ann,p,.3)(w)
    full = [chapter11(*made(ann,p,o.astype(int)),.3) for o in w]
    for k in FIGURES:
        if k not in ('AP','AP50'): assert f[k].to_numpy()==pytest.approx([o[k] for o in full], abs=1e-9, nan_ok=True)

def test_more_than_100_boxes_of_a_class():
    many = pd.DataFrame([(300,300,340,340)]*120, columns=XYXY).assign(image_id='x', label='a', score=.9)
    one = pd.DataFrame([(10,10,90,90)], columns=XYXY).assign(image_id='x', label='a', score=.5)
    ann = Annotations(pd.DataFrame(dict(image_id=['x','y'], height=400, width=400)), pd.concat([one.drop(columns='score')]), ['a','b'])
    for extra,ap in ((many,0),(many.assign(label='b'),1),(many[:99],.01)):
        p = pd.concat([extra,one], ignore_index=True)
        assert Figures(ann,p,figures=['AP50'])().AP50.item()==pytest.approx(coco_map(ann,p).AP50, abs=1e-9)==pytest.approx(ap)

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0,4), st.integers(0,5)), min_size=1, max_size=30))
def test_auc_equals_scikit_learn(rows):
    pos,score,w = np.array([o[0] for o in rows]),np.array([o[1]/4 for o in rows]),np.array([o[2] for o in rows], dtype=float)
    got = weighted_auc(w[None], pos, score)[0]
    if 0 in (w[pos].sum(),w[~pos].sum()): assert np.isnan(got)
    else: assert got==pytest.approx(roc_auc_score(pos, score, sample_weight=w), abs=1e-12)

@settings(max_examples=40, deadline=None)
@given(st.integers(0,10**6), st.sampled_from([2,3,10]))
def test_figures_do_not_change_when_everything_comes_twice(seed, k):
    ann,p = random_case(seed, ('a','b'))
    f = Figures(ann,p,.3)
    assert f(np.full(len(ann),k)).iloc[0].to_numpy()==pytest.approx(f().iloc[0].to_numpy(), abs=1e-9, nan_ok=True)

# ---------- drawing ----------
def test_patients_are_drawn_whole_and_as_many_as_there_are():
    who = pd.array(['a','b','a',None,'c',None,'a'], dtype='string')
    w = np.concatenate(list(patient_weights(who, 500)))
    assert w.shape==(500,7) and (w[:,0]==w[:,2]).all() and (w[:,0]==w[:,6]).all()
    assert (w[:,[0,1,3,4,5]].sum(1)==5).all() and (w[:,3]!=w[:,5]).any()
    assert w.mean(0)==pytest.approx(np.ones(7), abs=.15)

def test_chunks_do_not_change_the_draws():
    one = np.concatenate(list(patient_weights(np.arange(50), 40)))
    for width in (4e6/7, 4e6, 1e9): assert (np.concatenate(list(patient_weights(np.arange(50), 40, width=int(width))))==one).all()
    assert len(next(patient_weights(np.arange(50), 40, width=10**9)))==1
    assert not (np.concatenate(list(patient_weights(np.arange(50), 40, seed=1)))==one).all()

def test_global_random_state_is_left_alone():
    ann,p = random_case(0)
    np.random.seed(0); before = np.random.get_state()[1].copy()
    first = intervals(ann,p,.3,n=20); np.random.rand(5); second = intervals(ann,p,.3,n=20)
    np.random.seed(0)
    assert (np.random.get_state()[1]==before).all() and first.equals(second)

def test_one_patient_or_none_has_no_interval():
    assert not list(patient_weights(['x']*5)) and not list(patient_weights([]))
    ann,p = random_case(1)
    same = Annotations(ann.images.assign(patient_id='x'), ann.boxes, ann.classes)
    t = intervals(same, p, .3, n=30)
    assert t[['lo','hi']].isna().all(axis=None) and (t.n==0).all() and t.value.equals(intervals(ann,p,.3,n=2).value)
    c = compare(same, p, p, n=5)
    assert c[['lo','hi','above']].isna().all(axis=None)

# ---------- bootstrap_ci ----------
def width(o): return o[1]-o[0]

def test_bootstrap_is_seeded_and_covers():
    rng = np.random.default_rng(0)
    v = rng.normal(size=200)
    assert bootstrap_ci(v, n=200)==bootstrap_ci(v, n=200)!=bootstrap_ci(v, n=200, seed=1)
    inside = sum(lo<=0<=hi for lo,hi in (bootstrap_ci(rng.normal(size=80), n=300) for _ in range(200)))
    assert 180<=inside<=199 # nominally 190

def test_bootstrap_groups_and_nan():
    v = np.random.default_rng(0).normal(size=300)
    one,two = bootstrap_ci(v), bootstrap_ci(np.r_[v,v], groups=np.r_[:300,:300])
    assert width(two)==pytest.approx(width(one)) and width(bootstrap_ci(np.r_[v,v]))<.85*width(one)
    assert bootstrap_ci(v, groups=[None]*300)==pytest.approx(one)      # unknown patients are different people
    assert bootstrap_ci(v, groups=pd.array([None]*150+['p']*150, dtype='string'))!=one
    assert np.isnan(bootstrap_ci([np.nan]*5)).all() and np.isnan(bootstrap_ci([])).all() and np.isnan(bootstrap_ci([3.])).all()
    assert bootstrap_ci(np.r_[np.ones(9),np.nan], n=50)==(1,1)
    with pytest.raises(ValueError, match='300 values but 2 groups'): bootstrap_ci(v, groups=[1,2])

def test_bootstrap_of_any_statistic_sees_the_same_resamples():
    v = np.random.default_rng(0).normal(size=(60,2)); v[::7,0] = np.nan
    g = np.arange(60)//3
    assert bootstrap_ci(v[:,0], groups=g)==pytest.approx(bootstrap_ci(v[:,0], groups=g, stat=np.nanmean))
    assert bootstrap_ci(v, groups=g)==pytest.approx(bootstrap_ci(v, groups=g, stat=np.nanmean))
    pos,score = v[:,1]>0,np.round(v[:,1]+np.arange(60)%5,1)
    lo,hi = bootstrap_ci(np.c_[pos,score], groups=g, stat=lambda o: roc_auc_score(o[:,0],o[:,1]) if 0<o[:,0].sum()<len(o) else np.nan)
    res = pd.DataFrame({'AUC':np.concatenate([weighted_auc(w,pos,score) for w in patient_weights(g)])})
    assert summarise([0],res)[['lo','hi']].to_numpy()[0]==pytest.approx([lo,hi])

# ---------- the promise of 95 % ----------
def population(k, rng, people=80):
    "People with one to four pictures; whether they have a lesion and whether it is found runs in the person"
    visits = rng.integers(1,5,people)
    who = np.repeat(np.arange(people),visits)
    ill,seen,alarm = (rng.beta(2,2,people)[who]>rng.random(len(who)) for _ in range(3))
    ids = np.array([f'{k}-{j}' for j in range(len(who))])
    def box(mask, **kw): return pd.DataFrame(dict(image_id=ids[mask], x1=10., y1=10., x2=60., y2=60., label='a', **kw))
    images = pd.DataFrame(dict(image_id=ids, height=400, width=400, patient_id=[f'p{o}' for o in who]))
    hit = ill&seen
    p = pd.concat([box(hit, score=rng.random(hit.sum())*.4+.6), box(alarm, score=rng.random(alarm.sum())*.8).assign(x1=200., x2=260.)], ignore_index=True)
    return Annotations(images, box(ill), ['a']),p

def test_intervals_cover():
    "Of 150 studies 95 % (142) should hold the truth; a percentile interval of 80 people is allowed 88 % to 99 %"
    rng = np.random.default_rng(0)
    figures = ['RSNA','AUC','sensitivity','specificity','AP50','recall','precision']
    truth = pd.concat([Figures(*population(k,rng,1000), .5, figures)() for k in range(6)]).mean()
    ts = [intervals(*population(k,rng), .5, figures, n=250, seed=k) for k in range(150)]
    inside = sum(((t.lo<=truth)&(truth<=t.hi)).astype(int) for t in ts)
    assert inside.between(132,149).all(), inside

def test_paired_difference_covers_zero_for_equal_models_and_finds_a_small_gain():
    rng = np.random.default_rng(1)
    zero = found = 0
    for k in range(30):
        ann,p = population(k,rng)
        q = p.assign(score=(p.score+rng.normal(0,.02,len(p))).clip(.01,.99)) # neither better nor worse
        d = compare(ann, p, q, figures=['AUC'], n=200).loc['AUC']
        zero += d.lo<=0<=d.hi
        missed = ann.boxes[~ann.boxes.image_id.isin(p.image_id[p.x1<100])]
        r = pd.concat([p, missed.iloc[::8].assign(score=.9)])
        both = [intervals(ann, o, .5, ['recall'], n=200).loc['recall'] for o in (p,r)]
        d = compare(ann, p, r, figures=['recall'], n=200).loc['recall']
        found += both[0].hi>both[1].lo and d.lo>0 and d.above>.97
    assert zero>=25 and found>=27 # of 30; nominally 28.5

# ---------- compare ----------
def test_compare_is_paired_and_has_its_own_thresholds():
    ann,p = random_case(5, tie='never')
    q = p.assign(score=p.score/2)
    c = compare(ann, p, q, .4, .2, n=60)
    assert c.difference.abs().max()<1e-12 and (c.lo==0).all() and (c.above==.5).all() # the same boxes are shown
    assert c.a.to_numpy()==pytest.approx(Figures(ann,p,.4)().iloc[0].to_numpy())
    r = random_case(6, tie='never')[1]
    ab,ba = compare(ann,p,r,n=60),compare(ann,r,p,n=60)
    assert ab.difference.to_numpy()==pytest.approx(-ba.difference.to_numpy()) and ab.lo.to_numpy()==pytest.approx(-ba.hi.to_numpy())
    assert (ab.above+ba.above).to_numpy()==pytest.approx(np.ones(len(ab)))
    w = np.concatenate(list(patient_weights(patients(ann.images), 60)))
    d = Figures(ann,r)(w)-Figures(ann,p)(w)
    assert ab.hi.to_numpy()==pytest.approx(d.quantile(.975).to_numpy())

# ---------- one-sided, empty, bad ----------
def test_one_sided_data():
    ann,p = random_case(0)
    none = Annotations(ann.images, ann.boxes[:0], ann.classes)
    t = intervals(none, p, .3, n=20)
    assert t.loc[['AUC','sensitivity','AP50','AP','FROC','recall'],['value','lo','hi']].isna().all(axis=None) and (t.n[['AUC','AP50']]==0).all()
    assert t.value['specificity']<=1 and t.value['precision']==0
    ill = ann.where(lesion_counts(ann)>0)
    t = intervals(ill, p[p.image_id.isin(ill.images.image_id)], .3, n=20)
    assert t.loc[['AUC','specificity'],'n'].eq(0).all() and t.n['AP50']==20

def test_empty_predictions():
    ann,p = random_case(0)
    t = intervals(ann, p[:0], .3, n=20)
    assert (t.value[['RSNA','sensitivity','AP50','AP','FROC','recall','F1']]==0).all() and t.value['specificity']==1 and t.value['AUC']==.5
    assert np.isnan(t.value[['PPV','precision']]).all() and t.n['PPV']==0

def test_undefined_resamples_are_left_out_and_counted():
    df = pd.DataFrame(dict(image_id=list('abc'), height=400, width=400))
    box = pd.DataFrame([('a',10.,10.,50.,50.,'a')], columns=['image_id',*XYXY,'label'])
    t = intervals(Annotations(df,box,['a']), box.assign(score=.9), n=1000)
    assert 600<t.n['sensitivity']<800 and t.n['specificity']>900 # 1-(2/3)**3 = .70; 1-(1/3)**3 = .96
    assert t.loc['sensitivity',['lo','hi']].tolist()==[1,1]

def test_bad_input():
    ann,p = random_case(0)
    with pytest.raises(ValueError, match='no figure is called'): intervals(ann,p,figures=['mAP'])
    with pytest.raises(ValueError, match='no figure is called'): Figures(ann,p,figures=['AUC'],mine=np.ones(len(ann.boxes),bool))
    with pytest.raises(ValueError, match='such as .95'): intervals(ann,p,level=95,n=2)
    with pytest.raises(ValueError, match='no image of this id'): intervals(ann,p.assign(image_id='z'),n=2)
    with pytest.raises(ValueError, match='no figure is asked for'): intervals(ann,p,figures=[])
    with pytest.raises(ValueError, match='no image to judge'): intervals(ann.where(np.zeros(len(ann))), p[:0])
    assert list(intervals(ann, p, .3, 'AUC', n=5).index)==['AUC']

def test_inputs_are_left_alone():
    ann,p = random_case(0)
    before = p.copy(),ann.images.copy(),ann.boxes.copy()
    intervals(ann,p,n=3); compare(ann,p,p,n=3)
    for x,y in zip(before,(p,ann.images,ann.boxes)): pd.testing.assert_frame_equal(x,y)
