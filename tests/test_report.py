"The report: one page that loads nothing, says what it knows, and is legible in a browser of any width"
import base64, json, re
from html.parser import HTMLParser
import cv2, matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from lungdet.card import OPEN
from lungdet.evaluate import best_threshold, coco_map, image_level, rsna_score
from lungdet.operate import OperatingPoint, tune_rsna
from lungdet.report import GALLERIES, HEADLINE, Report
from test_evaluate import ONE, annot, frame, random_case

EVIL = '<script>alert("x")</script> & co'

class Page(HTMLParser):
    VOID = {'meta','img','br','link'}
    def __init__(self): super().__init__(); self.stack,self.tags,self.text,self.src,self.ids = [],[],'',[],[]
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag); self.src += [v for k,v in attrs if k in ('src','href')]; self.ids += [v for k,v in attrs if k=='id']
        if tag not in self.VOID: self.stack.append(tag)
    def handle_endtag(self, tag): assert self.stack.pop()==tag
    def handle_data(self, d): self.text += d

def parsed(text):
    page = Page(); page.feed(text); page.close()
    assert not page.stack
    return page

@pytest.fixture(scope='module')
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    cv2.imwrite(str(folder/'a.png'), rng.integers(0,255,(256,256)).astype(np.uint8)) # a quarter of the original
    ids = {f'i{k}':ONE if k%3==0 else [] for k in range(60)}
    ann = annot(ids, path=[str(folder/'a.png') if k%2 else None for k in range(60)], patient_id=[f'p{k//2}' for k in range(60)], age=[20+k for k in range(60)],
                sex=['F','M']*30, view=['AP','PA','AP']*20, category=['Lung Opacity' if k%3==0 else 'Normal' if k%3==1 else 'No Lung Opacity / Not Normal' for k in range(60)])
    found = {i:[[105,102,200,205]] for i in list(ids)[::3][:15]}|{i:[[500,500,100,120]] for i in list(ids)[1::6]}
    return ann,frame(found, rng.uniform(.2,.9,len(found)))

@pytest.fixture(scope='module')
def report(case): return Report(*case, EVIL, force=True, n=60, own={44:EVIL}, against={'other':case[1].assign(score=case[1].score/2), 'none':case[1][:0]})

def test_figures_are_those_of_their_functions(case, report):
    ann,preds = case
    t = best_threshold(ann, preds)[0]
    v,level = report.figures.value,image_level(ann, preds, t)
    assert report.threshold==t and report.tuned_here and 'flatters' in report.words()
    assert v.RSNA==pytest.approx(rsna_score(ann, preds, t)) and v.AP50==pytest.approx(coco_map(ann, preds).AP50) and v.AUC==pytest.approx(level.AUC)
    assert v.specificity==pytest.approx(level.specificity) and list(report.table().columns)==['images','positive','threshold',*HEADLINE]

def test_a_point_is_used_and_refuses_its_own_images(case):
    ann,preds = case
    first = ann.images.patient_id.isin([f'p{k}' for k in range(15)])
    tune,test = ann.where(first),ann.where(~first)
    on = lambda a: preds[preds.image_id.isin(a.images.image_id)]
    point = tune_rsna(tune, on(tune), shrinks=(.9,), nmss=(.3,))[0]
    r = Report(test, on(test), 'm', point, n=20)
    assert not r.tuned_here and r.threshold==point.threshold and '30 other images' in r.words() and 'shrunk to 0.9' in r.words()
    assert r.figures.value.RSNA==pytest.approx(rsna_score(test, point.apply(on(test))))
    with pytest.raises(ValueError, match='chosen on 30 images'): Report(tune, on(tune), 'm', point, n=20)
    forced = Report(tune, on(tune), 'm', point, n=20, force=True)
    assert forced.threshold==point.threshold and forced.tuned_here and 'flatters' in forced.words()
    assert Report(test, on(test), 'm', .3, n=20).threshold==.3 and 'given' in Report(test, on(test), 'm', .3, n=20).words()

def test_page_is_whole_and_loads_nothing(report, tmp_path):
    before = plt.get_fignums()
    path = report.save(tmp_path/'new'/'report.html')
    assert sorted(o.name for o in path.parent.iterdir())==['report.csv','report.html','report.json','report_curves.csv'] # nothing half-written beside them
    text = path.read_text(encoding='utf-8'); page = parsed(text)
    assert not {'script','link','iframe','object','form'}&set(page.tags) and 'url(' not in text
    links,pictures = [o for o in page.src if o.startswith('#')],[o for o in page.src if not o.startswith('#')]
    assert [o[1:] for o in links]==page.ids and len(set(page.ids))==8
    assert all(o.startswith('data:image/png;base64,') for o in pictures) and not re.search(r'https?://', re.sub(r'base64,[^"]*', '', text))
    for o in pictures: assert cv2.imdecode(np.frombuffer(base64.b64decode(o.split(',')[1], validate=True), np.uint8), 1).shape[2]==3
    assert page.text.count(EVIL)>=3 and 'Not for clinical use' in page.text and OPEN in page.text and 'other' in page.text
    for title in GALLERIES.values(): assert title in page.text
    assert plt.get_fignums()==before # figures are closed

def test_json_and_csv_hold_every_figure(report, tmp_path):
    path = report.save(tmp_path/'r.html')
    facts,table = json.loads(path.with_suffix('.json').read_text()),pd.read_csv(path.with_suffix('.csv'))
    assert facts['name']==EVIL and facts['chosen_on_these_images'] and len(facts['figures'])==len(table)==len(report.figures_table())
    assert set(table.part)=={'all','age','sex','view','size','COCO','FROC','class','difference to'}
    curves = pd.read_csv(path.with_name('r_curves.csv'))
    assert len(curves)==len(facts['curves']) and curves.curve.nunique()==5 and curves[['x','y']].notna().all().all()
    auc = table[(table.part=='all')&(table.figure=='AUC')].iloc[0]
    assert auc.value==pytest.approx(report.figures.value.AUC) and auc.lo<=auc.value<=auc.hi
    assert json.loads(re.sub('NaN','null',json.dumps(facts)))==facts # no NaN, which is no JSON

def test_paths_of_a_machine_stay_there(case, tmp_path):
    e = dict(settings=dict(data=dict(path='/home/somebody/data', split='/home/somebody/split.json')), provenance={'torch':'1'}, judged='external')
    text = Report(*case, 'm', .3, evidence=e, n=10).html()
    assert 'somebody' not in text and '>data<' in text and 'another source' in text

@pytest.mark.parametrize('ids,preds', [({'a':ONE,'b':[]}, {}), ({'a':[],'b':[]}, {'a':ONE}), ({'a':[],'b':[]}, {}), ({'a':ONE}, {'a':ONE})])
@pytest.mark.filterwarnings('error')
def test_one_sided_data(ids, preds, tmp_path):
    r = Report(annot(ids), frame(preds, np.full(len(preds),.5)), 'm', force=True, n=20)
    assert parsed(r.save(tmp_path/'r.html').read_text()).tags.count('section')==8

def test_several_classes(tmp_path):
    ann,preds = random_case(5, classes=('a','b'))
    text = Report(ann, preds, 'm', .3, n=20).html()
    assert 'macro' in parsed(text).text

def test_bad_input(case):
    ann,preds = case
    with pytest.raises(ValueError, match='no image to judge'): Report(ann.where(np.zeros(len(ann),bool)), preds[:0])
    with pytest.raises(ValueError, match='logits'): Report(ann, preds.assign(score=3.))
    with pytest.raises(ValueError, match='no operating point'): Report(ann, preds)
    with pytest.raises(ValueError, match="no place for \\['judge'\\]"): Report(ann, preds, evidence=dict(judge=1), n=10)
    with pytest.raises(ValueError, match='percent'): Report(ann, preds, point=30)
    with pytest.raises(ValueError, match='1 to 44'): Report(ann, preds, own={45:'x'})
    with pytest.raises(ValueError, match='model itself'): Report(ann, preds, 'm', against={'m':preds})
    with pytest.raises(ValueError, match='no image of this id'): Report(ann, preds, against={'o':preds.assign(image_id='z')})

def test_shows_itself_in_a_notebook(report):
    pytest.importorskip('IPython')
    assert parsed(report._repr_html_()).text.count(EVIL)==1 and report.show(300).data.count('srcdoc')==1

@pytest.mark.parametrize('width', [1200,400])
def test_in_a_browser(report, browser, tmp_path, width):
    path = report.save(tmp_path/'report.html')
    page,said,asked = browser.new_page(viewport=dict(width=width, height=900)),[],[]
    page.on('console', lambda m: said.append(m.text)); page.on('pageerror', lambda e: said.append(str(e))); page.on('request', lambda r: asked.append(r.url))
    page.goto(path.as_uri())
    assert not said and [o for o in asked if not o.startswith('data:')]==[path.as_uri()]
    assert page.evaluate('document.documentElement.scrollWidth')<=width # nothing sticks out
    pictures = page.evaluate("[...document.images].map(o => [o.complete, o.naturalWidth, o.getBoundingClientRect().width, o.alt])")
    assert len(pictures)>15 and all(done and natural>100 and 250<shown<=width and alt for done,natural,shown,alt in pictures)
    assert page.evaluate("Math.min(...[...document.querySelectorAll('p,td,th,figcaption,span')].map(o => parseFloat(getComputedStyle(o).fontSize)))")>=13
    page.click('nav a >> text=CLAIM'); assert page.evaluate("document.getElementById('claim-checklist').getBoundingClientRect().top")<200
    page.close()

def test_names_are_no_formulas_and_many_categories_are_legible(tmp_path):
    ids = {f'$x^${k}':ONE if k%2 else [] for k in range(14)}
    ann = annot(ids, category=[f'$a^${k}' for k in range(14)])
    ann = type(ann)(ann.images, ann.boxes.assign(label='$y^$'), ['$y^$'])
    page = parsed(Report(ann, frame({i:ONE for i in ids}, np.full(14,.5)).assign(label='$y^$'), 'm', .3, n=10, evidence=dict(warning='5 < 6 were trained on')).save(tmp_path/'r.html').read_text())
    assert '5 < 6 were trained on' in page.text

def test_other_models_are_compared_as_detect_left_them(case):
    ann,preds = case
    r = Report(ann, preds, 'm', OperatingPoint(.3, shrink=.5), n=20, against={'same':preds})
    assert (r.compared().difference==0).all() and r.figures.value.AP50<coco_map(ann, preds).AP50
