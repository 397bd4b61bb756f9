"Groups hold everybody once and equal their images judged alone, sizes share lesions out, too few is said, and bad input"
import matplotlib, numpy as np, pandas as pd, pytest
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from lungdet.bootstrap import BOX_FIGURES, FIGURES, IMAGE_FIGURES, Figures, intervals
from lungdet.formats import Annotations
from lungdet.subgroups import *
from lungdet.subgroups import LEAST
from tables import XYXY, random_case

@pytest.fixture(scope='module')
def clinic():
    ann,p = random_case(11, images=150, tie='never')
    rng = np.random.default_rng(0)
    images = ann.images.assign(age=rng.choice([3.,30.,40.,59.,60.,90.,148.,np.nan],150), sex=rng.choice(['F','M',None],150), view='PA')
    return Annotations(images, ann.boxes, ann.classes),p

def test_groups_hold_everybody_once(clinic):
    t = subgroups(*clinic, .3, n=10)
    for by in ('age','sex','view'):
        one = t[(t.by==by)&(t.figure=='RSNA')]
        assert one.images.sum()==150 and one.boxes.sum()==len(clinic[0].boxes)
    assert t[(t.by=='size')&(t.figure=='recall')].boxes.sum()==len(clinic[0].boxes)
    age = t[(t.by=='age')&(t.figure=='RSNA')].set_index('group').images
    a = clinic[0].images.age
    assert list(age.index)==['under 40','40 to 60','60 or more','unknown']
    assert age.tolist()==[(a<40).sum(), a.isin([40,59]).sum(), a.isin([60,90]).sum(), (a.isna()|(a>120)).sum()]
    assert list(t[(t.by=='sex')&(t.figure=='RSNA')].group)==['F','M','unknown']

def test_a_group_equals_its_images_judged_alone(clinic):
    ann,p = clinic
    t = subgroups(ann, p, .3, by='sex', figures=FIGURES, n=30)
    sub = ann.where(ann.images.sex.eq('F').fillna(False))
    alone = intervals(sub, p[p.image_id.isin(sub.images.image_id)], .3, n=30)
    got = t[t.group=='F'].set_index('figure')[['value','lo','hi','n']]
    pd.testing.assert_frame_equal(got, alone, check_dtype=False)

def test_sizes_share_hits_and_misses_out(clinic):
    ann,p = clinic
    share,own = relative_size(ann, ann.boxes),relative_size(ann, p)
    assert share[0]==pytest.approx(np.prod(ann.boxes.loc[0,['x2','y2']].to_numpy(float)-ann.boxes.loc[0,['x1','y1']].to_numpy(float))/400**2)
    edges,tp,fp,n = [.02,.05],0,0,0
    whole = Figures(ann,p,0,['precision'])
    for lo,hi in ((0,.02),(.02,.05),(.05,9)):
        f = Figures(ann, p, 0, ['precision','recall'], mine=(share>=lo)&(share<hi), counts=(own>=lo)&(own<hi))
        a,b = f.sums['precision']
        tp,fp,n = tp+a.sum(),fp+(b-a).sum(),n+f.sums['recall'][1].sum()
    assert (tp,tp+fp,n)==(*(o.sum() for o in whole.sums['precision']),len(ann.boxes))
    t = subgroups(ann, p, 0., by='size', sizes=edges, figures=FIGURES, n=5)
    assert list(t[t.by=='size'].group.unique())==['under 2 %','2 to 5 %','5 % or more'] and set(t[t.by=='size'].figure)==set(BOX_FIGURES)
    assert set(IMAGE_FIGURES)<set(t[t.by=='all'].figure)

def test_a_claim_on_another_size_is_neither_right_nor_wrong():
    df = pd.DataFrame(dict(image_id=['a'], height=100, width=100))
    lesions = pd.DataFrame([('a',0,0,10,10,'a'),('a',40,40,90,90,'a')], columns=['image_id',*XYXY,'label'])
    ann = Annotations(df, lesions, ['a'])
    p = pd.concat([lesions.assign(score=.9), lesions.assign(x1=lesions.x1+.0, score=.5).iloc[[1]].assign(y1=0, y2=30)], ignore_index=True) # both found; a large box on nothing
    for mine,precision in (([True,False],1),([False,True],.5)):
        got = Figures(ann, p, 0, ['precision','recall','AP50'], mine=mine, counts=bands(relative_size(ann,p),[.05]).eq('under 0.05').to_numpy()==mine[0])()
        assert got.iloc[0].tolist()==[precision,1,1]

def test_pictures_of_unknown_size_are_a_group(clinic):
    ann,p = clinic
    blind = Annotations(ann.images.assign(height=ann.images.height.astype(float).mask(ann.images.index<75)), ann.boxes, ann.classes)
    t = subgroups(blind, p, by='size', n=3)
    assert t.group.iloc[-1]=='unknown' and t[t.figure=='recall'].groupby('by').boxes.sum()['size']==len(ann.boxes)

def test_too_few_counts_patients_not_pictures():
    im = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(100)], patient_id=[f'p{k%30}' for k in range(100)]))
    pos = np.arange(100)%30<10
    assert group_note(im, pos)['note']=='' and LEAST==dict(patients=20, positive=10, negative=10)
    assert group_note(im, np.arange(100)%30<9)['note']=='too few: 9 positive'
    assert group_note(im.assign(patient_id='x'), pos)['note']=='too few: 1 patients, 1 positive, 1 negative'
    assert group_note(im.assign(patient_id=pd.NA), pos)['patients']==100

def test_no_spread_is_noted():
    ids = [f'i{k}' for k in range(60)]
    box = pd.DataFrame(dict(image_id=ids[:30], x1=10., y1=10., x2=60., y2=60., label='a'))
    ann = Annotations(pd.DataFrame(dict(image_id=ids, height=400, width=400, sex='F')), box, ['a'])
    t = subgroups(ann, box.assign(score=.9), by='sex', n=20)
    assert (t.note=='no spread').all() and (t.value==1).all()

def test_plot(clinic):
    t = subgroups(*clinic, by=('age','sex'), n=10)
    ax = plot_subgroups(t, 'sensitivity')
    want = t[t.figure=='sensitivity']
    assert len(ax.get_yticklabels())==len(want) and np.allclose(ax.collections[1].get_offsets()[:,0], want.value)
    gray = matplotlib.colors.to_rgba('#7f7f7f')
    assert [tuple(o)==gray for o in ax.collections[1].get_facecolors()]==want.note.str.startswith('too few').tolist()
    plt.close('all')

def test_figures_of_images_have_no_groups_by_size():
    ann,p = random_case(8)
    t = subgroups(ann, p, .3, ('size',), ['AUC'], n=5)
    assert set(t['by'])=={'all'}

def test_empty_predictions():
    ann,p = random_case(0)
    assert subgroups(ann, p[:0], n=5).figure.isin(FIGURES).all()

def test_bad_input():
    ann,p = random_case(0)
    with pytest.raises(ValueError, match='no image of this id'): subgroups(ann,p.assign(image_id='z'))
    with pytest.raises(ValueError, match="no 'ward'"): subgroups(ann,p,by='ward',n=2)
    with pytest.raises(ValueError, match='do not rise'): subgroups(ann,p,by='age',ages=(60,40),n=2)
    with pytest.raises(ValueError, match="no figure 'AUCC'"): plot_subgroups(subgroups(ann,p,by=(),n=2),'AUCC')

def test_inputs_are_left_alone():
    ann,p = random_case(0)
    before = p.copy(),ann.images.copy(),ann.boxes.copy()
    subgroups(ann,p,n=3)
    for x,y in zip(before,(p,ann.images,ann.boxes)): pd.testing.assert_frame_equal(x,y)
