"Fusion of tables against the literal one, properties of ensembles, looks"
import lungdet.metadata # noqa: F401, fills `conditions`
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from lungdet.anchors import Anchors
from lungdet.boxes import fuse_boxes
from lungdet.core import XYXY
from lungdet.data import detection_dls
from lungdet.decode import lesion_prob, postprocess
from lungdet.ensemble import *
from lungdet.evaluate import pred_cols
from lungdet.formats import Annotations
from lungdet.learner import detect, load_detector, retinanet_learner, save_detector
from test_data import toy

NUMBERS = [*XYXY,'score']

def table(seed, n, images=4, classes=2, ties=False):
    g = np.random.default_rng(seed)
    xy,wh = g.uniform(0,60,(n,2)),g.uniform(5,40,(n,2))
    score = g.integers(1,5,n)/5 if ties else g.uniform(.01,.99,n)
    if ties: xy,wh = xy//20*20,wh//20*20+20
    return pd.DataFrame(np.hstack([xy,xy+wh]), columns=XYXY).assign(image_id=[f'i{k}' for k in g.integers(images,size=n)], label=[f'c{k}' for k in g.integers(classes,size=n)], score=score)[pred_cols]

def same(a, b, atol=1e-6):
    assert a[['image_id','label']].to_numpy().tolist()==b[['image_id','label']].to_numpy().tolist()
    np.testing.assert_allclose(a[NUMBERS].to_numpy(float), b[NUMBERS].to_numpy(float), atol=atol)

def literal(preds, thr, weights):
    "`fuse_boxes`, one class of one image after the other"
    d,out = pd.concat([p.assign(model=i) for i,p in enumerate(preds)]),[]
    for (i,c),o in d.groupby(['image_id','label']):
        each = [o[o.model==k] for k in range(len(preds))]
        b,s = fuse_boxes([torch.tensor(p[XYXY].to_numpy(float)) for p in each], [torch.tensor(p.score.to_numpy(float)) for p in each], thr, weights)
        out.append(pd.DataFrame(b.double().numpy(), columns=XYXY).assign(image_id=i, label=c, score=s.double().numpy()))
    res = pd.concat(out) if out else d
    return res.sort_values(['image_id','score'], ascending=[True,False])[pred_cols].reset_index(drop=True)

lists = st.lists(st.integers(0,25), min_size=1, max_size=4)

@given(st.integers(0,2**31), lists, st.floats(.2,.8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_all_groups_at_once_are_fused_as_one_by_one(seed, n, thr, weighed):
    preds = [table(seed+i,k) for i,k in enumerate(n)]
    w = (np.random.default_rng(seed).uniform(.1,2,len(n))).tolist() if weighed else None
    same(fuse_predictions(preds, thr=thr, weights=w, min_score=0.), literal(preds, thr, w), 1e-3)

@given(st.integers(0,2**31), lists, st.sampled_from(['wbf','soft','nms']), st.booleans(), st.permutations(range(4)))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_models_is_of_no_matter(seed, n, how, ties, order):
    preds = [table(seed+i, k, ties=ties) for i,k in enumerate((n+[0]*4)[:4])]
    w = np.array([1.,2,1,.5]) if not ties else np.ones(4)
    a,b = fuse_predictions(preds, how, w),fuse_predictions([preds[i] for i in order], how, w[list(order)])
    same(a, b, 1e-9)

@given(st.integers(0,2**31), st.integers(0,30), st.integers(1,4))
@settings(max_examples=40, deadline=None)
def test_copies_of_a_model_are_the_model(seed, n, copies):
    "Of one that has suppressed its own doubles"
    p = fuse_predictions([table(seed,n)], 'nms', thr=.5)
    same(fuse_predictions([p]*copies), p)
    same(fuse_predictions([p]*copies, 'nms'), p)

@given(st.integers(0,2**31), st.lists(st.integers(0,20), min_size=2, max_size=3), st.sampled_from(['wbf','soft','nms']))
@settings(max_examples=40, deadline=None)
def test_images_and_classes_do_not_mix(seed, n, how):
    preds = [table(seed+i,k) for i,k in enumerate(n)]
    whole = fuse_predictions(preds, how)
    for i in ('i0','i3'):
        for c in ('c0','c1'):
            def of(p): return p[(p.image_id==i)&(p.label==c)]
            same(of(whole), fuse_predictions([of(p) for p in preds], how))

@given(st.integers(0,2**31), lists)
@settings(max_examples=40, deadline=None)
def test_fused_boxes_lie_among_their_parts_and_scores_stay_scores(seed, n):
    preds = [table(seed+i,k) for i,k in enumerate(n)]
    res,d = fuse_predictions(preds),pd.concat(preds)
    assert res.score.between(0,1).all() and len(res)<=len(d)
    for r in res.itertuples():
        o = d[(d.image_id==r.image_id)&(d.label==r.label)]
        assert all(o[k].min()-1e-9<=getattr(r,k)<=o[k].max()+1e-9 for k in XYXY) and r.score<=o.score.max()+1e-9

def one(*rows): return pd.DataFrame(rows, columns=['image_id',*XYXY,'score']).assign(label='a')[pred_cols]

def test_cases_by_hand():
    a,b = one(('x',0,0,10,10,.8)),one(('x',0,0,20,10,.4),('y',0,0,5,5,.6))
    o = fuse_predictions([a,b], thr=.5)
    assert len(o)==3 and o.score.tolist()==[.4,.2,.3]                  # an overlap of exactly a half is not more than a half
    o = fuse_predictions([a,b], thr=.49)
    np.testing.assert_allclose(o[NUMBERS], [[0,0,(8*10+4*20)/12,10,.6],[0,0,5,5,.3]])
    o = fuse_predictions([a,b,a[:0]], thr=.49)                          # one that saw all and said nothing
    np.testing.assert_allclose(o.score, [.6*2/3,.2])
    o = fuse_predictions([a,b], thr=.49, weights=[1,3])
    np.testing.assert_allclose(o[NUMBERS], [[0,0,(8*10+12*20)/20,10,2/4],[0,0,5,5,.6*3/4]])
    twice = one(('x',0,0,10,10,.8),('x',0,0,10,10,.4))                  # two boxes of one model are one vote
    np.testing.assert_allclose(fuse_predictions([twice,a[:0]]).score, [.6/2])
    np.testing.assert_allclose(fuse_predictions([a,b], 'nms', [1,.5], thr=.4)[NUMBERS], [[0,0,10,10,.8],[0,0,5,5,.3]])
    np.testing.assert_allclose(fuse_predictions([a,b], 'soft')[NUMBERS], [[0,0,10,10,.8],[0,0,20,10,.4*np.exp(-.5)],[0,0,5,5,.6]])
    assert fuse_predictions([a,b], min_score=.35).image_id.tolist()==['x']

def test_disagreeing_models():
    "Two boxes apart: each keeps half, and a chain of overlaps is cut where the fused box ends"
    a,b = one(('x',0,0,10,10,.8)),one(('x',50,50,60,60,.8))
    assert fuse_predictions([a,b]).score.tolist()==[.4,.4]
    chain = [one(('x',d,0,d+10,10,s)) for d,s in ((0,.9),(3,.8),(6,.7))] # neighbours overlap by 7/13, the ends by 4/16
    assert len(fuse_predictions(chain, thr=.5))==2

@pytest.mark.parametrize('how', ['wbf','soft','nms'])
def test_nothing_and_tables_that_cannot_be_fused(how):
    a = one(('x',0,0,10,10,.8))
    for o in ([a[:0]],[a[:0]]*3,[a.assign(score=0.)]): assert list(fuse_predictions(o, how).columns)==pred_cols and not len(fuse_predictions(o, how))
    before = a.copy(); fuse_predictions([a,a], how); assert a.equals(before)
    for kw,match in ((dict(weights=[1,-1]),'not be negative'),(dict(weights=[1,np.nan]),'not be negative'),(dict(weights=[[1,1]]),'one') ,(dict(thr=55),'between 0 and 1')):
        with pytest.raises(ValueError, match=match): fuse_predictions([a,a], how, **kw)
    odd = fuse_predictions([a.set_index(pd.Index([7])),a], how) # any index
    assert odd.index.tolist()==list(range(len(odd)))

def test_the_logit_of_a_mean():
    z = torch.randn(5,40,3).double()*4
    torch.testing.assert_close(mean_logits([*z]), z.sigmoid().mean(0).logit())
    assert torch.isfinite(mean_logits([torch.tensor([200.,-200.,200.])]*1+[torch.tensor([-200.,-200.,200.])])).all()
    y = torch.randn(3,6,3)
    torch.testing.assert_close(mean_category([*y]).softmax(1), y.softmax(2).mean(0))
    torch.testing.assert_close(lesion_prob(mean_category([*y[...,:1]])), y[...,0].sigmoid().mean(0))

def files(tmp_path, n=2, **kw):
    out = []
    for k in range(n):
        torch.manual_seed(k)
        learn = retinanet_learner(detection_dls(toy(tmp_path), **dict(size=64, bs=4)|kw.get('dls',{})), 'resnet18', pretrained=False, width=16, depth=1, **{k:v for k,v in kw.items() if k!='dls'})
        out.append(save_detector(learn, tmp_path/f"{k}{'-'.join(kw)}.safetensors"))
    return out

def test_an_ensemble_is_the_mean_of_its_models(tmp_path):
    ann,fs = toy(tmp_path),files(tmp_path, 3)
    learn = ensemble_learner(fs, ann.part('valid'))
    x = torch.randn(2,3,64,64)
    with torch.no_grad():
        learn.model.eval()
        logits,deltas = learn.model(x)
        each = [m(x) for m in learn.model.models]
    torch.testing.assert_close(logits.sigmoid(), torch.stack([o[0].sigmoid() for o in each]).mean(0))
    torch.testing.assert_close(deltas, torch.stack([o[1] for o in each]).mean(0))
    a,b = (detect(ensemble_learner(o, ann.part('valid')), score_thr=.001) for o in (fs,fs[::-1]))
    same(a, b, 1e-3)
    assert np.isfinite(learn.validate()[0]) and len(learn.get_preds()[0][0])==2
    assert isinstance(ensemble_learner(fs, ann, bs=2).dls.one_batch()[1], torch.Tensor) and ensemble_learner(fs, ann, bs=2).dls.bs==2

def test_an_image_head_is_averaged_too(tmp_path):
    ann = toy(tmp_path)
    ann = Annotations(ann.images.assign(category=['n','l']*4), ann.boxes[ann.boxes.image_id.isin(['i1','i3','i5','i7'])], ann.classes)
    def model(k):
        torch.manual_seed(k)
        return retinanet_learner(detection_dls(ann, size=64, bs=4, categories=['n','l']), 'resnet18', pretrained=False, width=16, depth=1).model.eval()
    models,x = [model(k) for k in range(2)],torch.randn(2,3,64,64)
    with torch.no_grad(): out,each = RawEnsemble(models)(x),[m(x) for m in models]
    torch.testing.assert_close(out[2].softmax(1), torch.stack([o[2].softmax(1) for o in each]).mean(0))
    assert postprocess(out, Anchors(), 64, 0.).shape==(2,100,6)

@pytest.mark.parametrize('kw,match', [(dict(dls=dict(size=96)),'size=96'), (dict(dls=dict(mode='gray', stats=([.4],[.2]))),'in_channels=1'), (dict(dls=dict(stats=([.4]*3,[.2]*3))),'stats='),
                                      (dict(anchors=Anchors(sizes=((8,),(16,),(32,),(64,),(128,)))),'sizes=')], ids=str)
def test_models_that_mean_different_things(tmp_path, kw, match):
    with pytest.raises(ValueError, match=match) as e: ensemble_learner([*files(tmp_path, 1),*files(tmp_path, 1, **kw)], toy(tmp_path).part('valid'))
    assert 'fuse_predictions' in str(e.value)

def test_other_backbones_are_welcome(tmp_path):
    a = files(tmp_path, 1)
    learn = retinanet_learner(detection_dls(toy(tmp_path), size=64, bs=4), 'resnet34', pretrained=False, width=32, depth=2, model=dict(neck='bifpn'))
    assert len(detect(ensemble_learner([*a,save_detector(learn, tmp_path/'b.safetensors')], toy(tmp_path).part('valid')), score_thr=.001))
    with pytest.raises(ValueError, match='no models'): ensemble_learner([], toy(tmp_path))

def test_looks(tmp_path):
    learn = ensemble_learner(files(tmp_path), toy(tmp_path).part('valid'))
    one = detect(learn, score_thr=.001)
    same(detect_tta(learn, flip=False, scales=(1,), score_thr=.001, how='nms', thr=.5), one.sort_values(['image_id','score'], ascending=[True,False]).reset_index(drop=True), 1e-4)
    o = learn.tta(scales=(1,2), score_thr=.001)
    assert len(o) and set(o.image_id)<=set(one.image_id) and o.score.max()<=1
    assert tta_sizes(100, (1,)) == [100] and tta_sizes(100,(.5,1,1.01)) == [64,100,96] and tta_sizes(32,(.3,)) == [32]
    for bad in ((),(0,),(9,)):
        with pytest.raises(ValueError, match='they are factors'): tta_sizes(64, bad)

def test_two_copies_are_one(tmp_path):
    f, = files(tmp_path, 1)
    same(*(detect(ensemble_learner([f]*n, toy(tmp_path).part('valid')), score_thr=.001) for n in (1,2)), 1e-3)

def asked(ann, fields, seed=0):
    "A detector that is told `fields`, none if there are none"
    torch.manual_seed(seed)
    told = dict(metadata='film') if fields else {}
    return retinanet_learner(detection_dls(ann, size=64, bs=4, **({'metadata':fields} if fields else {})), 'resnet18', pretrained=False, width=16, depth=1, **told)

def test_models_that_are_told_different_things(tmp_path):
    ann = toy(tmp_path)
    ann = Annotations(ann.images.assign(age=[float(20+7*i) for i in range(len(ann))], view=['AP','PA']*(len(ann)//2)), ann.boxes, ann.classes)
    age,view = dict(name='age', mean=50., sd=10.),dict(name='view', values=['AP','PA'])
    def file(name, fields, seed=0): return save_detector(asked(ann, fields, seed), tmp_path/f'{name}.safetensors')
    first,valid = file('first', [age,view]),ann.part('valid')
    others = dict(permuted=[view,age], none=None, fewer=[view], vocabulary=[age,view|dict(values=['PA','AP'])], text=[dict(name='age', values=['20','30']),view])
    for name,fields in others.items():
        f = file(name, fields)
        for pair in ([first,f],[f,first]):
            with pytest.raises(ValueError, match='has metadata=') as e: ensemble_learner(pair, valid)
            assert name in str(e.value) and 'fuse_predictions' in str(e.value)
    fold = file('fold', [age|dict(mean=30., sd=20.),view], 1)           # of another fold: its own scale, which it brings
    whole = ensemble_learner([first,fold], valid)
    meta = torch.tensor([[40.,1.],[70.,float('nan')]])
    x = torch.randn(2,3,64,64)
    with torch.no_grad():
        whole.model.eval()
        got,each = whole.model(x, meta)[0],[m(x, meta)[0] for m in whole.model.models]
    torch.testing.assert_close(got.sigmoid(), torch.stack([o.sigmoid() for o in each]).mean(0))
    assert each[1].allclose(load_detector(fold)[0](x, meta)[0])
    with pytest.raises(ValueError, match='is one file'): ensemble_learner(str(first), valid)
    with pytest.raises(ValueError, match='is one file'): ensemble_learner(first, valid)

@pytest.mark.parametrize('how', ['wbf','soft','nms'])
@pytest.mark.parametrize('change,match', [(dict(score=85.),'a score outside 0 to 1'), (dict(score=-.1),'a score outside'), (dict(score=np.nan),'is not a number'), (dict(score='sure'),'is not a number'), (dict(x2=-5.),'is this xywh'),
                                          (dict(y1=np.inf),'is not a number'), (dict(image_id=7),'no text'), (dict(image_id=None),'no text'), (dict(label=np.nan),'no text')], ids=str)
def test_tables_with_rows_that_are_no_predictions(how, change, match):
    good = one(('x',0,0,10,10,.8))
    with pytest.raises(ValueError, match=match) as e: fuse_predictions([good,good.assign(**change)], how)
    assert 'table 1' in str(e.value)

def test_what_is_no_list_of_tables():
    a = one(('x',0,0,10,10,.8))
    with pytest.raises(ValueError, match='this is one table'): fuse_predictions(a)
    with pytest.raises(ValueError, match='table 1 is a str'): fuse_predictions([a,'b.csv'])
    for bad in (0,-1,np.nan,np.inf):
        with pytest.raises(ValueError, match='is no width'): fuse_predictions([a,a], 'soft', sigma=bad)
    with pytest.raises(ValueError, match='in percent'): fuse_predictions([a,a], min_score=5)
    assert fuse_predictions([a.astype({k:object for k in NUMBERS}),a[:0].astype(object)]).score.tolist()==[.4] # numbers, however they are kept

def test_knobs_of_looks(tmp_path):
    learn = ensemble_learner(files(tmp_path), toy(tmp_path).part('valid'))
    looks = [detect(learn, flip=f, score_thr=.001) for f in (False,True)]
    pd.testing.assert_frame_equal(learn.tta(scales=(1,), score_thr=.001, weights=[3,1], min_score=.002), fuse_predictions(looks, weights=[3,1], min_score=.002))
    pd.testing.assert_frame_equal(learn.tta(scales=(1,), score_thr=.001, how='soft', sigma=.1), fuse_predictions(looks, 'soft', sigma=.1))
    with pytest.raises(ValueError, match='2 models'): learn.tta(scales=(1,), weights=[1])
    with pytest.raises(ValueError, match='the sizes of'): learn.tta(size=96)
    with pytest.raises(ValueError, match='they are factors'): learn.tta(scales=1)
