"Age, sex and view: from the table or the header, through batches, model, files and fastai's verbs"
import json, math, numpy as np, pandas as pd, pytest, torch, warnings
from fastai.vision.all import GradientClip, set_seed
from hypothesis import given, settings, strategies as st
from lungdet.anchors import Anchors
from lungdet.augment import Augment
from lungdet.checkpoint import Checkpoint
from lungdet.checks import check_learner
from lungdet.core import make_studies
from lungdet.data import *
from lungdet.ensemble import detect_tta # noqa: F401, brings `tta`
from lungdet.evaluate import coco_map
from lungdet.formats import Annotations, read_rsna
from lungdet.learner import *
from lungdet.metadata import *
from lungdet.monitor import DetectionScores
from lungdet.pretrain import classify_first
from lungdet.retinanet import RetinaNet
from lungdet.single import Backbone
from lungdet.speed import optimise_for_inference
from lungdet.splits import split_patients
from lungdet.train import check_values, schema
from lungdet.config import read_config
from lungdet.callbacks import Precision, StopOnNonFinite
from lungdet.study import run_name
from test_data import toy

COLS,WAYS = ['age','sex','view'],['pad','concat','film']
FIELDS = [dict(name='age', mean=50., sd=15.), dict(name='sex', values=['F','M']), dict(name='view', values=['AP','PA'])]
NET = dict(backbone='test_efficientnet', pretrained=False, width=16, depth=1)
SMALL = Anchors(((12,16,20),(24,30,36),(40,48,56)), levels=(3,4,5))
nan = math.nan

def told(folder, n=12, **kw):
    ann = toy(folder, n)
    cols = dict(age=np.linspace(20,75,n), sex=['F','M']*(n//2), view=['AP']*(n//2)+['PA']*(n//2))|kw
    return Annotations(ann.images.assign(**cols), ann.boxes, ann.classes)

def learner(folder, way='film', n=12, size=64, bs=4, ann=None, metadata=COLS, **kw):
    dls = detection_dls(ann or told(folder, n), size=size, bs=bs, aug=None, metadata=metadata)
    return retinanet_learner(dls, **NET, anchors=SMALL, metadata=way, path=folder, **kw)

def wake(learn):
    "Tables as if they had learnt something"
    c = learn.model.condition
    for k,p in c.named_parameters(): torch.nn.init.normal_(p, std=.5) if 'conv' not in k else None
    if hasattr(c,'conv'): torch.nn.init.normal_(c.conv.weight.data[:,16:], std=.5)
    torch.nn.init.normal_(learn.model.cls_head.out.weight, std=.3)
    return learn

values = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.integers(-10**9,10**9), st.sampled_from(['F','M','AP','PA','','x','058Y','63',pd.NA]))

@settings(deadline=None, max_examples=60)
@given(age=values, sex=values, view=values)
def test_any_value_gives_finite_weights_that_sum_to_one(age, sex, view):
    v = LoadMetadata(FIELDS)(dict(path=np.zeros((4,4),np.uint8), age=age, sex=sex, view=view))
    assert v.shape==(3,) and v.dtype==torch.float32
    w = TableRows(FIELDS).eval()(v[None].as_subclass(torch.Tensor))
    assert w.isfinite().all() and (w>=0).all()
    torch.testing.assert_close(torch.stack([o.sum() for o in w[0].split([6,3,3])]), torch.ones(3), atol=1e-5, rtol=0)

def test_fields_are_those_of_the_training_part(tmp_path):
    ann = told(tmp_path, view=['AP']*10+['LL']*2)
    dls = detection_dls(ann, size=32, bs=2, metadata=COLS)
    train = ann.part('train').images
    assert dls.metadata[0]==dict(name='age', mean=pytest.approx(train.age.mean()), sd=pytest.approx(train.age.std(ddof=0))) and dls.metadata[2]['values']==['AP']
    x,meta,*_ = dls.valid.one_batch()
    assert meta[:,2].isnan().all() and meta[:,0].tolist()==pytest.approx([70,75]) # LL was not there in training
    json.dumps(dls.metadata)
    one = metadata_fields(train.assign(age=40.), ['age'])
    assert one==[dict(name='age', mean=40., sd=1.)] # no division by 0
    assert metadata_fields(train.assign(age=[np.inf,*train.age[1:]]), 'age')[0]['mean']<100
    for bad in (dict(age=[None]*10), dict(age=[np.inf]*10)):
        with pytest.raises(ValueError, match='unknown of all 10'): metadata_fields(train.assign(**bad), ['age'])
    with pytest.raises(ValueError, match='single-box'): single_box_dls(ann, size=32, metadata=COLS)
    for kw in (dict(mixup=.1), dict(mosaic=.1)):
        with pytest.raises(ValueError, match='different patients'): detection_dls(ann, size=32, aug=Augment(**kw), metadata=COLS)

def test_batches_and_copies(tmp_path):
    "Augmentation leaves metadata alone, and they stay with their picture; copies and test loaders bring them along"
    ann = told(tmp_path, 12, age=np.arange(12.)+30)
    by = ann.images.set_index('image_id').age
    dls = detection_dls(ann, size=32, bs=4, metadata=COLS, positives=None, num_workers=0)
    assert dls.n_inp==dls.valid.n_inp==dls.train.new(bs=2).n_inp==2
    seen = sorted(o for b in dls.train for o in b[1][:,0].tolist())
    assert seen==sorted(by[ann.part('train').images.image_id]) and all(len(b)==4 and b[2].shape[1:]==(1,4) for b in dls.train)
    test = dls.test_dl(ann.images)
    assert test.n_inp==2 and [len(b) for b in test]==[2]*3 and torch.cat([b[1] for b in test])[:,0].tolist()==by.tolist()
    assert len(dls.test_dl(ann.images, with_labels=True).one_batch())==4
    three = detection_dls(Annotations(ann.images.assign(category=['a','b']*6), ann.boxes[:0], ann.classes), size=32, bs=4, metadata=COLS, categories=['a','b'])
    assert [tuple(o.shape) for o in three.one_batch()]==[(4,3,32,32),(4,3),(4,1,4),(4,1),(4,)]
    assert [t.get_text() for t in [ax.title for ax in test.show_batch(max_n=2)]]==['age 30, F, AP','age 31, M, AP']
    assert detection_dls(ann, size=32, bs=4, metadata=COLS, num_workers=2).valid.one_batch()[1].shape==(2,3)

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('size,levels,neck', [(96,(3,4,5),'fpn'), (100,(3,4,5,6,7),'fpn'), (72,(4,5,6),'bifpn')])
def test_shapes_do_not_change(way, size, levels, neck):
    "As many answers as there are anchors, for sides that nothing divides too; unknown and nothing said are the same; NaN never gets out"
    torch.manual_seed(0)
    a = Anchors([[16,20,25]]*len(levels), levels=levels)
    m = RetinaNet(Backbone('resnet18', in_channels=1), 2, a.per_cell, 16, 1, levels, neck, metadata=way, fields=FIELDS, n_categories=3).eval()
    x = torch.randn(2,1,size,size)
    with torch.no_grad():
        out,none = m(x, torch.full((2,3),nan)),m(x)
        known = m(x, torch.tensor([[30.,1,nan],[1e9,0,1]]))
    assert [tuple(o.shape) for o in out]==[(2,len(a(size,size)),2),(2,len(a(size,size)),4),(2,3)]
    for o,p,q in zip(out,none,known): assert torch.equal(o,p) and o.isfinite().all() and q.isfinite().all()
    with pytest.raises(ValueError, match=r'metadata of shape \(2, 2\)'): m(x, torch.zeros(2,2))

def test_untrained_film_changes_nothing_and_padding_moves_nothing():
    nets = {}
    for way in (None,'film','concat'):
        torch.manual_seed(0)
        nets[way] = RetinaNet(Backbone('resnet18'), 1, 9, 16, 1, metadata=way, fields=FIELDS if way else None).eval()
    x,meta = torch.randn(2,3,64,64),torch.tensor([[30.,1,nan],[70.,0,1]])
    with torch.no_grad():
        want = nets[None](x)
        for o,p in zip(nets['film'](x,meta), want): assert torch.equal(o,p)
        for o,p in zip(nets['concat'](x,meta), want): torch.testing.assert_close(o, p, atol=.05, rtol=0) # the same weights elsewhere
        for o,p in zip(nets[None](x,meta), want): assert torch.equal(o,p) # who has no use for it ignores it
    pad = PadPicture(FIELDS, 16, (3,4,5)).eval()
    y = pad.picture(x, meta)
    assert torch.equal(y[:,:,:64,:64], x) and y.shape==(2,3,96,96) and len(y[0,0,0,64:].unique())==3

@pytest.mark.parametrize('way', WAYS)
def test_training_makes_the_answers_depend_on_them(tmp_path, way):
    set_seed(0)
    disc = ambiguous_studies(tmp_path/'d', 96)
    learn = learner(tmp_path, way, bs=8, ann=disc, cbs=GradientClip(1.))
    c = learn.model.condition
    before = {k:p.detach().clone() for k,p in c.named_parameters()}
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 3e-3, cbs=StopOnNonFinite())
    assert all(not torch.equal(before[k],p) for k,p in c.named_parameters()) # all of it learns
    x = learn.dls.valid.one_batch()[0]
    with torch.no_grad(): a,b,u = (learn.model.eval()(x, torch.tensor([o]*len(x))) for o in ([25.,0,0],[75.,0,0],[nan]*3))
    for p,q in ((a,b),(a,u)): assert all((s-t).abs().max()>1e-4 for s,t in zip(p,q))
    ids = {id(p) for p in c.parameters()}
    assert ids<={id(p) for p in retina_splitter(learn.model)[2]}
    learn.freeze()
    assert all(p.requires_grad for p in c.parameters())

def test_forgetting_is_for_training_only():
    rows,meta = TableRows(FIELDS, drop=.5),torch.tensor([[50.,1,0]]).expand(400,-1)
    torch.manual_seed(0)
    w = rows(meta)
    assert .4<w[:,5].mean()<.6 and torch.equal(rows.eval()(meta)[:,5], torch.zeros(400))

@pytest.mark.parametrize('way', WAYS)
def test_verbs_of_fastai(tmp_path, way):
    "Everything that a fastai user types works with two inputs"
    ann = told(tmp_path)
    learn = learner(tmp_path, way, ann=ann, cbs=GradientClip(1.))
    assert 'Total params' in str(learn.summary())
    with learn.no_bar(), learn.no_logging():
        before = {k:v.clone() for k,v in learn.model.state_dict().items()}
        assert learn.lr_find(num_it=6, show_plot=False).valley>0
        assert all(torch.equal(before[k],v) for k,v in learn.model.state_dict().items() if k.startswith('condition'))
        learn.fine_tune(1, 1e-3)
        learn.freeze_to(-2)
        learn.fit_one_cycle(1, slice(1e-5,1e-3), cbs=[DetectionScores(score_thr=.001), Checkpoint(tmp_path/'c')])
        assert np.isfinite(learn.validate()[0])
        (cls,box),(boxes,labels) = learn.get_preds()
        assert len(cls)==len(box)==len(boxes)==2
        (x,meta),*_ = learn.get_preds(with_input=True)
        assert x.shape[0]==len(meta)==2
        row = ann.images.iloc[0].to_dict()
        for item in (row, row['path']):
            found,dec,raw = learn.predict(item)
            assert found.shape==dec.shape and raw[0].shape[1]==1
        learn.show_results(max_n=2); learn.dls.show_batch(max_n=2); learn.dls.show_batch(unique=True, max_n=2)
        assert len(learn.tta(score_thr=.001))
        learn.save('m'); learn.load('m')

def test_a_killed_run_goes_on(tmp_path):
    from fastai.vision.all import Callback
    class Stop(Callback):
        order = 101 # after the checkpoint
        def after_epoch(self):
            if self.epoch==0: raise RuntimeError('power cut')
    def run(folder, *cbs):
        set_seed(0)
        learn = learner(tmp_path, 'film')
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-3, cbs=[*cbs, Checkpoint(folder, resume=True)])
        return learn.model.state_dict()
    whole = run(tmp_path/'a')
    with pytest.raises(RuntimeError, match='power cut'): run(tmp_path/'b', Stop())
    again = run(tmp_path/'b')
    assert all(torch.equal(whole[k],v) for k,v in again.items())

def test_scale_is_saved_and_old_files_load(tmp_path):
    ann = told(tmp_path)
    learn = wake(learner(tmp_path, 'film', ann=ann))
    path = save_detector(learn, tmp_path/'d.safetensors')
    older = Annotations(ann.images.assign(age=ann.images.age+20, view='PA'), ann.boxes, ann.classes)
    for other in (older, Annotations(older.images.assign(split='valid'), older.boxes, older.classes)):
        again = detector_learner(path, other)
        assert again.dls.metadata==learn.dls.metadata
        rows = again.model.condition.rows
        assert rows.mean[0]==pytest.approx(ann.part('train').images.age.mean()) and rows.fields==learn.dls.metadata
        pd.testing.assert_frame_equal(detect(again, other, score_thr=.001), detect(learn, other, score_thr=.001))
    with again.no_bar(), again.no_logging(): detector_learner(path, ann).fit(1, 1e-4)
    plain = retinanet_learner(detection_dls(ann, size=64, bs=4), **NET, anchors=SMALL)
    for k in ('metadata','fields'): plain.detector['model'].pop(k, None) # as files were before there were metadata
    model,cfg = load_detector(save_detector(plain, tmp_path/'old.safetensors'))
    assert model.condition is None and not any('condition' in k for k in model.state_dict())
    assert detector_learner(tmp_path/'old.safetensors', ann).dls.n_inp==1

def test_switch_without_columns_and_columns_without_switch(tmp_path):
    ann = told(tmp_path)
    with pytest.raises(ValueError, match='name the columns'): learner(tmp_path, 'film', ann=ann, metadata=None)
    with pytest.raises(ValueError, match="take one of.*film"): learner(tmp_path, 'filmm', ann=ann)
    without = learner(tmp_path, None, ann=ann)
    assert without.model.condition is None and without.dls.n_inp==2
    with without.no_bar(), without.no_logging(): without.fit(1, 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        detect(without, Annotations(ann.images.drop(columns=COLS), ann.boxes, ann.classes)) # it needs none, so it misses none

@pytest.fixture(scope='module')
def dicoms(tmp_path_factory): return split_patients(read_rsna(make_studies(tmp_path_factory.mktemp('s')/'x', 16, size=64)), valid=.25)

def test_header_says_what_the_table_says(dicoms, tmp_path):
    "A path, a row with a path alone, and the whole row; but a row that says something is taken at its word"
    learn = wake(learner(tmp_path, 'film', ann=dicoms))
    bare = Annotations(dicoms.images[['image_id','path','height','width']], dicoms.boxes, dicoms.classes)
    a,b = detect(learn, dicoms, score_thr=.001),detect(learn, bare, score_thr=.001)
    assert len(a)
    pd.testing.assert_frame_equal(a, b)
    row = dicoms.images.iloc[0].to_dict()
    ms = [learn.dls.test_dl([o]).one_batch()[1] for o in (row, row['path'], dict(path=row['path']), row|dict(age=None, sex=None, view=None))]
    assert all(torch.equal(ms[0],o) for o in ms) and ms[0].isfinite().all()
    m = learn.dls.test_dl([row|dict(age=None, view=None)]).one_batch()[1]
    assert m.isnan().tolist()==[[True,False,True]]
    c = detect(learn, Annotations(dicoms.images.assign(age=80., sex='F', view='AP'), dicoms.boxes, dicoms.classes), score_thr=.001)
    assert len(c)!=len(a) or not np.allclose(c.score, a.score)

def test_unknown_of_all_is_a_warning_once(tmp_path):
    ann = told(tmp_path)
    learn = wake(learner(tmp_path, 'film', ann=ann))
    lost = Annotations(ann.images.drop(columns=COLS).assign(Age=40), ann.boxes, ann.classes)
    with pytest.warns(UserWarning, match='age, sex, view, and of these 12 images none') as w: got = detect(learn, lost, score_thr=.001)
    assert len([o for o in w if 'none is known' in str(o.message)])==1 and np.isfinite(got.score).all()
    with pytest.warns(UserWarning, match='unknown of all these 12 images: age, sex; are the columns') as w:
        detect(learn, Annotations(ann.images.assign(age=None, sex=None, view=['AP']+[None]*11), ann.boxes, ann.classes))
    assert len(w)==1
    with pytest.warns(UserWarning, match="unknown of all these 12 images: sex; sex 'f' is none of F, M"):
        detect(learn, Annotations(ann.images.assign(sex='f'), ann.boxes, ann.classes))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        detect(learn, Annotations(ann.images.assign(age=[40]+[None]*11, sex=['f']*11+['M']), ann.boxes, ann.classes)) # one of each is known

def test_an_ensemble_warns_too(tmp_path):
    ann = told(tmp_path)
    learn = wake(learner(tmp_path, 'film', ann=ann))
    class Both(torch.nn.Module):
        def __init__(self, models):
            super().__init__()
            self.models = torch.nn.ModuleList(models)
        def forward(self, *xb): return self.models[0](*xb)
    learn.model = Both([learn.model])
    with pytest.warns(UserWarning, match='none is known'): detect(learn, Annotations(ann.images.drop(columns=COLS), ann.boxes, ann.classes))

def test_a_wrong_row_is_taken_at_its_word(dicoms):
    row,view = dicoms.images.iloc[0].to_dict(),LoadMetadata(FIELDS[2:])
    true = view(dict(path=row['path']))
    assert true.isfinite().all()
    for odd in ('LL','ap'): assert view(row|dict(view=odd)).isnan().all() # no header undoes it
    assert torch.equal(view(row|dict(view=None)), true)
    assert view(row|dict(instead=dict(view=None))).isnan().all() and view(dict(path=row['path'], instead=dict(view='PA'))).tolist()==[1]
    assert LoadMetadata(FIELDS)(dict(path=row['path'], instead=dict(view='PA')))[:2].isfinite().all() # a lie about one, the header for the others

def test_lies(dicoms, tmp_path):
    "Unknown is a lie of its own, also about DICOMs; what cannot be one is refused"
    for cols in (['view'],COLS):
        learn = wake(learner(tmp_path, 'film', ann=dicoms, metadata=cols))
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            full = what_if(learn, dicoms, 'view', [nan,'AP','PA'], score_thr=.001)
        assert full.index[0]=='as they are' and len(full)==4 and not full['score without'].iloc[1:].duplicated().any()
        bare = Annotations(dicoms.images[['image_id','path','height','width']], dicoms.boxes, dicoms.classes)
        pd.testing.assert_frame_equal(what_if(learn, bare, 'view', [nan,'AP','PA'], score_thr=.001), full)
        for col,vs,why in (('veiw',['AP'],"not told 'veiw', but .*view"), ('view',['AP','ap'],"'ap' is nothing .*AP, PA"), ('view','AP',"'A' is nothing")):
            with pytest.raises(ValueError, match=why): what_if(learn, dicoms, col, vs)
    with pytest.raises(ValueError, match="'abc' is nothing .*numbers"): what_if(learn, dicoms, 'age', [50,'abc'])
    assert 'instead' not in dicoms.images

@pytest.mark.parametrize('way', WAYS)
def test_scores_of_the_epoch_are_those_of_detect(tmp_path, way):
    set_seed(0)
    disc = ambiguous_studies(tmp_path/'d', 64)
    learn = learner(tmp_path, way, bs=8, ann=disc)
    cb = DetectionScores(score_thr=.005)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 3e-3, cbs=cb)
    preds,valid = detect(learn, score_thr=.005),disc.part('valid')
    assert len(preds) and cb.scores['AP50']==pytest.approx(coco_map(valid, preds).AP50, abs=1e-6)

@pytest.mark.parametrize('way', WAYS)
def test_faster_copy_hears_the_same(tmp_path, way):
    learn = wake(learner(tmp_path, way))
    x,meta = learn.dls.valid.one_batch()[:2]
    model = learn.model.eval()
    fast = optimise_for_inference(model, x, torch.float32)
    with torch.no_grad():
        for o,p in zip(fast(x,meta), model(x,meta)): torch.testing.assert_close(o.as_subclass(torch.Tensor), p.as_subclass(torch.Tensor), atol=1e-3, rtol=1e-3)
        for o,p in zip(fast(x), model(x)): torch.testing.assert_close(o.as_subclass(torch.Tensor), p.as_subclass(torch.Tensor), atol=1e-3, rtol=1e-3)
        half = optimise_for_inference(model, x, torch.bfloat16)(x,meta)
    assert all(o.dtype==torch.float32 and o.isfinite().all() for o in half)

@pytest.mark.parametrize('way', WAYS)
def test_half_precision_trains(tmp_path, way):
    learn = learner(tmp_path, way, cbs=Precision('bf16'))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert all(p.isfinite().all() for p in learn.model.parameters())

@pytest.mark.parametrize('way', WAYS)
def test_a_sound_learner_passes_the_checks(tmp_path, way):
    set_seed(0)
    res = check_learner(learner(tmp_path, way, n=16, bs=8), 3e-3, n=2, steps=150)
    assert not {'gradients','groups','labels','boxes','tables','first class loss'}&set(res.failed), str(res)
    res.show()

def test_the_classifier_takes_no_notice(tmp_path):
    learn = learner(tmp_path, 'concat')
    before = learn.model.condition.table.detach().clone()
    with learn.no_bar(), learn.no_logging(): classify_first(learn, 1)
    assert torch.equal(before, learn.model.condition.table)

def test_shuffled_within_parts_and_together(tmp_path):
    ann = told(tmp_path, 12, age=[*np.arange(10.),100,101])
    new = shuffle_metadata(ann, seed=1).images
    assert sorted(new.age[:10])==sorted(ann.images.age[:10]) and set(new.age[10:])=={100,101} and new.age.tolist()!=ann.images.age.tolist()
    def people(o): return sorted(o[COLS].astype(str).agg(' '.join, axis=1))
    assert people(new)==people(ann.images) and new.path.tolist()==ann.images.path.tolist()
    assert shuffle_metadata(ann, seed=1).images.equals(new) and not shuffle_metadata(ann, seed=2).images.equals(new)
    unsplit = Annotations(ann.images.assign(split=None), ann.boxes, ann.classes)
    assert sorted(shuffle_metadata(unsplit).images.age)==sorted(ann.images.age)

def test_shuffled_columns_are_named_and_there(tmp_path):
    ann = told(tmp_path)
    new = shuffle_metadata(ann, 'age').images
    assert new.sex.equals(ann.images.sex) and sorted(new.age)==sorted(ann.images.age) and not new.age.equals(ann.images.age)
    with pytest.raises(ValueError, match="no column 'agge'"): shuffle_metadata(ann, ['age','agge'])

def test_ages_as_text_are_named(tmp_path):
    ann = told(tmp_path, age='045Y')
    with pytest.raises(ValueError, match="unknown of all 10.*'45Y' counts as unknown"): detection_dls(ann, size=32, metadata=COLS)

def test_scores_as_published(tmp_path):
    ann = toy(tmp_path, 4)
    p = ann.boxes.assign(score=[.9,.8,.7,.6])
    wrong = p.head(1).assign(x1=0, y1=0, x2=50, y2=50, score=.65)
    s = paper_scores(ann, pd.concat([p,wrong]))
    assert (s.precision,s.recall,s.threshold)==(.8,1,.6) and s.mAP==pytest.approx(coco_map(ann, pd.concat([p,wrong])).AP50)
    assert paper_scores(ann, pd.concat([p,wrong]), .68)[['precision','recall']].tolist()==[1,.75]
    none = paper_scores(ann, p[:0])
    assert none.recall==0 and none.mAP==0 and math.isnan(none.precision)

def test_settings(tmp_path):
    cfg = read_config(None, schema, ['dls.metadata=["age","sex","view"]','model.metadata=film'])
    assert cfg['dls']['metadata']==('age','sex','view') and cfg['model']['metadata']=='film'
    check_values(cfg)
    for more,why in ((['model.metadata=film'],'names no columns'), (['dls.metadata=["age"]','model.metadata=flim'],'is not one of')):
        with pytest.raises(ValueError, match=why): check_values(read_config(None, schema, more))
    assert run_name(read_config(None, schema))==run_name({s:{k:v for k,v in o.items() if 'metadata' not in k} for s,o in read_config(None, schema).items()}) # older runs are found again

def test_parts_of_an_epoch_bring_them_along(tmp_path):
    from lungdet.distributed import SharedDL
    dls = detection_dls(told(tmp_path, 14), size=32, bs=3, aug=None, metadata=COLS)
    order = list(dls.train.get_idxs())
    parts = [SharedDL(dls.train, r, 2, 'cpu') for r in range(2)]
    for p in parts: p._broadcast = lambda t, r: order
    seen = [b[1][:,0].tolist() for p in parts for b in p]
    assert [p.n_inp for p in parts]==[2,2] and sorted(sum(seen,[]))==pytest.approx(sorted(dls.ann.part('train').images.age), rel=1e-6)
