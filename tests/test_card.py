"What a journal asks: nothing is answered that no evidence says"
import numpy as np, pandas as pd, pytest
from lungdet.card import CLAIM, EVIDENCE, OPEN, characteristics, check_evidence, claim, claim_data, claim_model, claim_results, model_card
from lungdet.formats import Annotations
from lungdet.config import read_config
from lungdet.train import config_file, experiments, schema

ITEMS = [n for o in CLAIM.values() for n in o]

def annot(**columns):
    images = pd.DataFrame(dict(image_id=[*'abcd'], height=100, width=100)|columns)
    return Annotations(images, pd.DataFrame(dict(image_id=['a','a'], x1=0., y1=0., x2=[9.,5.], y2=9., label='o')), ['o'])

def test_characteristics_by_hand():
    who = characteristics(annot(patient_id=['p','p','q',None], age=[40,np.nan,60,80], sex=['F','M','F',None], split=['train','train','valid','valid']))
    assert list(who)==['train','valid']
    assert who.train[['patients','images','images with a lesion','lesions','age not known']].tolist()==['1','2','1 (50%)','2','1']
    assert who.valid[['patients','age, median (quartiles)','sex F','sex not known','view not known']].tolist()==['2','70 (65 to 75)','1 (100%)','1','2']
    assert pd.isna(who.valid['sex M']) and pd.isna(who.valid['age not known'])

def test_characteristics_without_metadata_and_without_images():
    assert list(characteristics(annot()))==['all'] and characteristics(annot()).loc['age not known','all']=='4'
    none = annot().where(np.zeros(4,bool))
    assert characteristics(none).loc[['images','images with a lesion'],'all'].tolist()==['0','0']

def test_several_classes_are_counted_each():
    two = Annotations(annot().images, annot().boxes, ['o','never seen'])
    assert characteristics(two).loc[['lesions, o','lesions, never seen'],'all'].tolist()==['2','0']

def test_no_evidence_no_answers():
    t = claim({})
    assert t.item.tolist()==ITEMS==list(range(1,45)) and (t.answer==OPEN).all() and (t.by=='').all()
    assert claim_data({})|claim_model({})|claim_results({})=={}

@pytest.mark.parametrize('key', EVIDENCE)
def test_each_key_alone(key):
    who,figs = characteristics(annot()),pd.DataFrame(dict(value=[.5],lo=[.4],hi=[.6]), index=['AP50'])
    e = {key:{'who':who,'figures':figs,'settings':{},'provenance':{'lungdet':'1'},'judged':'external'}.get(key,'words')}
    assert set(claim(e).columns)=={'item','section','asks','answer','by'} and 'Intended use' in model_card(e,'m')

@pytest.mark.parametrize('name', [o.stem for o in experiments.glob('*.toml')])
def test_the_settings_of_every_experiment_give_answers(name):
    cfg = read_config(config_file(name), schema)
    t = claim(dict(settings=cfg)).set_index('item')
    assert (t.answer[[9,19,20,22,24,25,26,27]]!=OPEN).all() and 'batches of' in t.answer[25] and ('DICOM' in t.answer[9])==(cfg['data']['format']=='rsna') and not t.answer.str.contains(r'\b(?:none|nan)\b|{', regex=True, case=False)[[9,19,22,25]].any()

def test_no_path_of_a_machine_gets_into_it():
    t = claim(dict(settings=dict(data=dict(split='/home/somebody/secret/split.json', valid=.2, seed=1, path='/home/somebody/data'))))
    assert not t.answer.str.contains('somebody').any() and 'split.json' in t.answer[18]

def test_own_answers_replace_ours_and_missing_items_are_refused():
    t = claim(dict(settings=dict(model=dict(pretrained=True))), {'24':'from COCO', 44:'nobody'}).set_index('item')
    assert t.answer[24]=='from COCO' and t.by[[24,44]].tolist()==['author']*2
    with pytest.raises(ValueError, match=r'1 to 44, not \[0, 45\]'): claim({}, {0:'', 45:''})
    assert model_card({}, 'm', {'Not for':'cats'})['Not for']=='cats'

def test_bad_evidence():
    with pytest.raises(ValueError, match="no place for \\['figure'\\]"): check_evidence({'figure':1})
    with pytest.raises(ValueError, match="judged='train'"): model_card({'judged':'train'}, 'm')

def test_results_say_what_they_were_measured_on():
    f = pd.DataFrame(dict(value=[.5,.25],lo=[.4,.2],hi=[.6,.3],n=[500,499]), index=['AUC','sensitivity'])
    for judged,item in (('validation',32),('internal test',32),('external',33)):
        r = claim_results(dict(figures=f, judged=judged))
        assert {32,33}&set(r)=={item} and r[37]=='AUC 0.500 (0.400 to 0.600)' and r[38]=='sensitivity 0.250 (0.200 to 0.300)' and '500 resamples' in r[29]
    r = claim_results(dict(figures=f.assign(lo=np.nan, value=[np.nan,.25])))
    assert r[37]=='AUC not defined' and r[38]=='sensitivity 0.250 (no interval)'

def test_several_findings_count_each_and_ages_are_possible():
    who = characteristics(annot(category=['Mass|Nodule','Mass',None,'No Finding'], age=[411,50,50,50]))['all']
    assert who[['category Mass','category Nodule','category No Finding']].tolist()==['2 (67%)','1 (33%)','1 (33%)'] and who[['age, median (quartiles)','age not known']].tolist()==['50 (50 to 50)','1']

def test_what_speaks_against_it_is_said():
    t = claim(dict(settings=dict(data=dict(valid=.2, seed=1)), warning='3 patients were trained on')).set_index('item')
    assert t.answer[20]=='3 patients were trained on'
    assert 'classify for 5 epochs' in claim_model(dict(settings=dict(model=dict(pretrained=True), train=dict(classify=5))))[24]
