"The site: every link leads somewhere, every kept figure is there, search finds, and a phone can show it"
import functools, html.parser, http.server, importlib, json, subprocess, sys, threading
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    pytest.importorskip('nbdev')
    out = tmp_path_factory.mktemp('docs')/'site'
    res = subprocess.run([sys.executable, ROOT/'tools'/'docs.py', '--out', out, '--strict'], cwd=ROOT, capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr
    return out

class Page(html.parser.HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.links,self.ids,self.pictures,self.text = [],set(),[],''
        self.raw = path.read_text()
        self.feed(self.raw)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        if tag=='img': self.pictures.append(a['src'])
        self.links += [a[k] for k in ('href','src') if a.get(k)]
    def handle_data(self, data): self.text += data

@pytest.fixture(scope='module')
def pages(site): return {o.relative_to(site).as_posix():Page(o) for o in site.glob('**/*.html')}

def test_every_link_leads_somewhere(site, pages):
    lost,n = [],0
    for name,page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or link.startswith('data:') or name=='404.html': continue
            n += 1
            file = (site/name).parent/unquote(url.path) if url.path else site/name
            if file.is_dir(): file = file/'index.html'
            if not file.exists(): lost.append((name,link))
            elif url.fragment and file.suffix=='.html' and unquote(url.fragment) not in pages[file.resolve().relative_to(site.resolve()).as_posix()].ids|{'__top'}: lost.append((name,link))
    assert n>5000 and not lost, (len(lost), Counter(lost).most_common(10))

def test_every_notebook_has_its_page_with_its_figures(pages):
    for nb in sorted((ROOT/'nbs').glob('**/*.ipynb')):
        if '.ipynb_checkpoints' in nb.parts: continue
        name = nb.relative_to(ROOT/'nbs').with_suffix('.html').as_posix()
        page = pages[name]
        assert name in pages['index.html'].links, f'{name} is in no menu'
        kept = sum('image/png' in o.get('data',{}) for c in json.loads(nb.read_text())['cells'] for o in c.get('outputs',[]))
        assert len([o for o in page.pictures if '_files/' in o])==kept, nb.name
        assert 'Traceback' not in page.text

def test_every_public_name_has_its_entry(pages):
    for m in (o.stem for o in (ROOT/'lungdet').glob('*.py') if o.stem not in ('__init__','_modidx','all')):
        for n in importlib.import_module(f'lungdet.{m}').__all__: assert n.lower() in pages[f'api/{m}.html'].ids, f'{m}.{n}'

def test_prose_leads_to_chapters_and_names_and_formulas_are_drawn(pages):
    assert '03_boxes.html' in pages['04_formats.html'].links+pages['07_anchors.html'].links
    assert any(o.startswith('api/boxes.html#') for o in pages['03_boxes.html'].links)
    assert '<math' in pages['09_loss.html'].raw and '$$' not in pages['09_loss.html'].raw

@pytest.fixture
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1',0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown(); server.server_close()

def test_on_a_phone_and_found_by_search(address, browser, pages):
    page,said,asked = browser.new_page(viewport=dict(width=400, height=800)),[],[]
    page.on('console', lambda m: said.append(m.text)); page.on('pageerror', lambda e: said.append(str(e))); page.on('request', lambda r: asked.append(r.url))
    for name in sorted(pages):
        if name=='404.html': continue
        page.goto(f'{address}/{name}')
        assert page.evaluate('document.documentElement.scrollWidth')<=400, f'{name} is wider than a phone'
        assert page.evaluate("[...document.images].every(o => o.complete && o.naturalWidth>0)"), name
    page.set_viewport_size(dict(width=1300, height=900))
    page.goto(f'{address}/index.html')
    page.fill('input.md-search__input', 'focal loss')
    page.wait_for_selector('a.md-search-result__link[href*="09_loss"]', timeout=20_000)
    page.click('a.md-search-result__link[href*="09_loss"]')
    assert '09_loss' in page.url
    assert not said and not [o for o in asked if not o.startswith((address,'data:'))]
    page.close()
