"Images judged class by class, and probabilities, against scikit-learn, SciPy and one-sided data"
import json, warnings
from dataclasses import asdict
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy.special import expit, logit
from scipy.stats import rankdata
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, log_loss, roc_auc_score
from lungdet.evaluate import image_level, image_scores, lesion_counts, rsna_score
from lungdet.formats import Annotations
from lungdet.imagewise import *
from test_evaluate import ONE, annot, frame, random_case

THREE = ('A','B','C')

def scored(score, truth): # one box on every image whose score is not NaN
    ids = [f'i{k}' for k in range(len(score))]
    b = pd.DataFrame(dict(image_id=ids, x1=10., y1=10., x2=60., y2=90., label='A'))
    return Annotations(pd.DataFrame(dict(image_id=ids, height=100, width=100)), b[np.asarray(truth,bool)], ['A']),b.assign(score=score).dropna()

def drawn(n, T=1., b=0., seed=0): # scores that tell the truth once their log-odds are divided by T and moved by b
    rng = np.random.default_rng(seed)
    z = rng.normal(-.5, 1.5, n)
    return scored(expit(T*(z-b)), rng.random(n)<expit(z))

# ---------- class by class ----------
def test_table_and_confusion_equal_scikit_learn():
    seen = 0
    for seed in range(30):
        ann,p = random_case(seed, THREE)
        t = dict(zip(THREE, np.random.default_rng(seed).integers(1,6,3)/5))
        tab,con = image_table(ann,p,t),confusion(ann,p,t)
        aucs = []
        for c in THREE:
            pos = ann.images.image_id.isin(ann.boxes.image_id[ann.boxes.label==c]).to_numpy()
            s = np.array([p.score[(p.image_id==i)&(p.label==c)].max() if ((p.image_id==i)&(p.label==c)).any() else 0. for i in ann.images.image_id])
            assert con.loc[c].to_numpy().tolist()==confusion_matrix(pos, s>=t[c], labels=[True,False]).tolist()
            assert tab.loc[c,['n','positive','threshold']].tolist()==[len(ann),pos.sum(),t[c]]
            if 0<pos.sum()<len(pos): aucs.append(roc_auc_score(pos, s)); assert tab.AUC[c]==pytest.approx(aucs[-1]); seen += 1
            else: assert np.isnan(tab.AUC[c])
        assert tab.AUC['defined']==len(aucs) and tab.AUC['macro']==pytest.approx(np.mean(aucs) if aucs else np.nan, nan_ok=True)
    assert seen>30

def test_one_class_is_what_chapter_11_says():
    for seed in range(20):
        ann,p = random_case(seed)
        lv = image_level(ann,p,.4)
        assert image_table(ann,p,.4).iloc[0][['AUC','sensitivity','specificity','PPV','NPV','accuracy']].astype(float).to_numpy()==pytest.approx(lv.to_numpy()[:6], nan_ok=True)
        assert image_pairs(ann,p).score.tolist()==image_scores(ann,p).tolist()

def test_pairs_of_several_classes():
    ann,p = random_case(4, THREE)
    o = image_pairs(ann,p)
    assert len(o)==3*len(ann) and o.positive.sum()==len(ann.boxes.drop_duplicates(['image_id','label'])) and (o.score[o.silent]==0).all()
    assert (~o.silent).sum()==len(p.drop_duplicates(['image_id','label']))

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('truth', [{'a':[],'b':[]}, {'a':ONE,'b':ONE}, {'a':ONE,'b':[]}])
@pytest.mark.parametrize('found', [{}, {'a':ONE}, {'a':ONE,'b':ONE}])
def test_one_sided_data(truth, found):
    ann,p = annot(truth),frame(found, [.7]*len(found)) # equal scores
    tab,both = image_table(ann,p),len({bool(o) for o in truth.values()})==2
    assert tab.AUC.iloc[:2].notna().all()==both and tab.AUC['defined']==both
    assert confusion(ann,p).to_numpy().sum()==2 and confusion(ann,p)['called'].sum()==len(found)
    assert len(plot_roc(ann,p).lines)==(3 if both else 1)
    assert 0<=ece(ann,p)<=1 and reliability(ann,p).n.sum()==2
    plot_reliability(reliability(ann,p)); plt.close('all')
    with pytest.raises(ValueError, match='some of both kinds|without a mistake|do not rank'): Temperature.fit(ann,p)

def test_image_without_a_box_is_not_called_at_threshold_0():
    assert confusion(annot({'a':ONE,'b':[]}), frame({},[]), 0).loc['Lung Opacity','called'].sum()==0

def test_no_images_at_all():
    ann = annot({'a':[]}).where([False])
    assert np.isnan(ece(ann, frame({},[]))) and len(reliability(ann, frame({},[])))==0 and image_table(ann, frame({},[])).AUC['defined']==0

def test_thresholds_must_fit_the_classes():
    ann,p = random_case(4, THREE)
    for t in ({'A':.5}, {'A':.5,'B':.5,'C':.5,'D':.5}):
        for f in (image_table,confusion,plot_roc):
            with pytest.raises(ValueError, match='each class needs one'): f(ann,p,t)

def test_bad_predictions_are_named():
    ann,p = random_case(5, THREE)
    for f in (per_class,image_table,confusion,plot_roc,image_pairs,reliability,ece,Temperature.fit):
        with pytest.raises(ValueError, match='a label that is none of'): f(ann, p.assign(label='D'))
        with pytest.raises(ValueError, match='logits'): f(ann, p.assign(score=3.))

# ---------- elsewhere ----------
@given(*[st.floats(0,1)]*3)
def test_bayes_equals_counting(se, sp, prev):
    n = 1e6
    tp,fp,tn,fn = n*prev*se,n*(1-prev)*(1-sp),n*(1-prev)*sp,n*prev*(1-se)
    o = at_prevalence(se,sp,prev).iloc[0]
    for got,a,b in ((o.PPV,tp,fp),(o.NPV,tn,fn)):
        if a+b>1e-9: assert got==pytest.approx(a/(a+b))

def test_bayes_at_the_ends():
    o = at_prevalence(.9,.8,[0,1])
    assert o.PPV.tolist()==[0,1] and o.NPV.tolist()==[1,0] and np.isnan(at_prevalence(0,1,.3).PPV.iloc[0])
    assert at_prevalence(np.nan,.8,.3).isna().all(axis=None)
    for bad in ((90,.9,.1),(.9,-.1,.1),(.9,.9,[.1,2])):
        with pytest.raises(ValueError, match='in percent'): at_prevalence(*bad)

# ---------- reliability ----------
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.one_of(st.just(np.nan), st.integers(0,8).map(lambda o: o/8), st.floats(0,1)), st.booleans()), min_size=2, max_size=60), st.integers(1,12))
def test_bins_equal_scikit_learn(rows, bins):
    score,truth = map(np.array, zip(*rows))
    ann,p = scored(score, truth)
    for by,strategy in (('width','uniform'),('mass','quantile')):
        r = reliability(ann,p,bins,by)
        share,mean = calibration_curve(truth, np.nan_to_num(score), n_bins=bins, strategy=strategy)
        assert r.share.to_numpy()==pytest.approx(share) and r.score.to_numpy()==pytest.approx(mean) and r.n.sum()==len(rows)
        assert ece(ann,p,bins,by)==pytest.approx((r.n*(mean-share).__abs__()).sum()/len(rows))

@pytest.mark.parametrize('kw,match', [(dict(by='size'),'mass'), (dict(bins=0),'0 bins')])
def test_bad_bins(kw, match):
    with pytest.raises(ValueError, match=match): reliability(*drawn(20), **kw)

# ---------- temperature ----------
@pytest.mark.parametrize('T', [.5,1.,3.])
def test_the_factor_is_found(T):
    t = Temperature.fit(*drawn(20000, T))
    assert t.T==pytest.approx(T, rel=.06) and t.bias==0 and t.n==20000 and t.silent is None

def test_the_bias_is_found_when_there_is_one():
    t = Temperature.fit(*drawn(20000, 2., b=-1.2))
    assert t.T==pytest.approx(2, rel=.06) and t.bias==pytest.approx(-1.2, abs=.1)

def test_the_bias_is_seldom_kept_when_there_is_none():
    assert sum(Temperature.fit(*drawn(400, 2., seed=k)).bias!=0 for k in range(40))<=4

def test_fit_equals_logistic_regression():
    for seed in range(8):
        ann,p = drawn(300, 2., b=.5, seed=seed)
        t,y = Temperature.fit(ann, p, bias=True),lesion_counts(ann).to_numpy()>0
        lr = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit(p.score.to_numpy())[:,None], y)
        assert [1/t.T,t.bias]==pytest.approx([lr.coef_[0,0],lr.intercept_[0]], rel=1e-3, abs=1e-4)
        one,raw = log_loss(y, Temperature.fit(ann, p, bias=False)(p.score)),log_loss(y, p.score)
        assert log_loss(y, t(p.score))<=one+1e-12<=raw+2e-12
        for T in (.98,1.02): assert log_loss(y, Temperature(Temperature.fit(ann,p,bias=False).T*T)(p.score))>one

def test_silent_images_take_no_part():
    ann,p = drawn(2000, 2.)
    some = p[p.score>.2]
    t = Temperature.fit(ann, some)
    y = lesion_counts(ann).to_numpy()>0
    assert t.n==len(some) and t.silent==pytest.approx(y[~ann.images.image_id.isin(some.image_id)].mean()) and t.T==pytest.approx(2, rel=.3)

@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0,1,width=32), min_size=1, max_size=50), st.floats(.1,10), st.floats(-3,3))
def test_order_ends_and_threshold(scores, T, b):
    t,s = Temperature(T,b),np.array(scores)
    with warnings.catch_warnings(): # zeros and ones give infinite log-odds, silently
        warnings.simplefilter('error')
        out = t(s)
    assert ((out>=0)&(out<=1)).all() and (np.diff(out[np.argsort(s, kind='stable')])>=0).all() # no pair changes places
    assert (out[s==0]==0).all() and (out[s==1]==1).all()
    for u in s: assert ((out>=t(u))>=(s>=u)).all()

def test_order_is_strict_for_scores_of_a_detector():
    s = np.random.default_rng(0).uniform(.01,.99,3000).astype('float32')
    for T in (.3,1,3,10): assert (rankdata(Temperature(T,-1.)(s))==rankdata(s)).all()

def test_metrics_of_order_do_not_change():
    for seed in range(16):
        ann,p = random_case(seed)
        t = Temperature(2.5, -.4); q = t.apply(p)
        assert image_level(ann,q).AUC==pytest.approx(image_level(ann,p).AUC, nan_ok=True)
        for u in (.2,.5,.8): assert rsna_score(ann,q,t(u))==pytest.approx(rsna_score(ann,p,u), nan_ok=True)
        assert len(q)==len(p) and list(q.columns)==list(p.columns)

def test_scores_of_0_and_1_in_the_fit():
    ann,p = drawn(500, 2.)
    t = Temperature.fit(ann, p.assign(score=p.score.where(p.score>.05, 0.).where(p.score<.95, 1.)))
    assert 0<t.T<10

def test_as_numbers():
    t = Temperature.fit(*drawn(500, 2.))
    d = json.loads(json.dumps(asdict(t)))
    assert Temperature(**d).T==t.T and Temperature(**d)([.3,.8]).tolist()==t([.3,.8]).tolist()
    for bad in (0,-1,np.nan,np.inf):
        with pytest.raises(ValueError, match='positive'): Temperature(bad)

def test_input_is_left_alone():
    ann,p = drawn(100, 2.)
    before = p.copy()
    Temperature.fit(ann,p).apply(p); image_table(ann,p); reliability(ann,p)
    pd.testing.assert_frame_equal(p, before)
