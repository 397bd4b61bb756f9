"The demo page: a real upload in a real browser, and requests that no browser of ours would send"
import asyncio, base64, http.client, json, subprocess, sys, tempfile, threading, time, urllib.error, urllib.request
import cv2, numpy as np, pandas as pd, pytest, torch
from lungdet.anchors import Anchors
from lungdet.convert import encode_png
from lungdet.demo import demo_app, demo_page, free_port, look, main, serve_in_background
from lungdet.detector import Detector
from lungdet.operate import OperatingPoint
from lungdet.retinanet import RetinaNet
from lungdet.single import Backbone
from dicoms import chest, jpeg, save

EVIL = '<img src=x onerror=alert(1)>'

def detector(label='opacity', expected=True):
    "A network that has learned nothing, with scores that differ"
    torch.manual_seed(0)
    anchors = Anchors(((16,20,24),(32,40,50),(64,80,96)), (1.,), (3,4,5))
    m = RetinaNet(Backbone('resnet18'), 1, anchors.per_cell, 16, 1, anchors.levels, prior=.2)
    with torch.no_grad(): m.cls_head.out.weight.mul_(20)
    cfg = dict(backbone='resnet18', in_channels=3, mode='repeat', stats=[[.5]*3,[.2]*3], classes=[label], size=96, width=16, depth=1,
               sizes=anchors.sizes, ratios=anchors.ratios, levels=anchors.levels, categories=[], model=dict(prior=.2))
    e = pd.DataFrame(dict(threshold=[.1,.5,.9], sensitivity=[.9,.6,.2], fp_per_image=[3.,1.,.1])).assign(images=40, lesions=24) if expected else None
    return Detector(m, cfg, point=OperatingPoint(.5), expected=e, device='cpu')

@pytest.fixture(scope='module')
def dicom(tmp_path_factory):
    f = tmp_path_factory.mktemp('scan')/'a.dcm'
    ds = jpeg(chest(1200))
    ds.PixelSpacing = [.5,.25]
    save(ds, f)
    return f

@pytest.fixture(scope='module')
def url():
    with serve_in_background(demo_app(detector(), max_mb=3)) as o: yield o

def ask(url, data=None, **headers):
    req = urllib.request.Request(url, data, {k.replace('_','-'):v for k,v in headers.items()})
    try:
        with urllib.request.urlopen(req) as r: return r.status,r.headers,r.read()
    except urllib.error.HTTPError as e: return e.code,e.headers,e.read()

def test_boxes_are_those_of_the_detector(dicom):
    det = detector()
    seen,found = look(det, dicom.read_bytes()),det(dicom, .05)
    b = found.boxes.sort_values('score', ascending=False)
    s = 1024/1200
    assert (seen['height'],seen['width'])==(1200,1200) and len(b)==len(seen['boxes'])>5
    assert np.allclose([o['xyxy'] for o in seen['boxes']], b[['x1','y1','x2','y2']]*s, atol=.06)
    assert [o['score'] for o in seen['boxes']]==b.score.tolist() and seen['probability']==found.images.probability[0]
    assert seen['boxes'][0]['mm']==[round(b.width_mm.iloc[0]),round(b.height_mm.iloc[0])]
    assert max(seen['boxes'][0]['xyxy'])<=1024

@pytest.mark.parametrize('im', [np.full((40,60),90,np.uint8), np.dstack([np.full((300,200),k,np.uint8) for k in (10,90,200)]), np.full((1500,30),7,np.uint8)])
def test_pictures_without_a_header(im):
    seen = look(detector(), encode_png(im))
    back = cv2.imdecode(np.frombuffer(base64.b64decode(seen['png']), np.uint8), cv2.IMREAD_UNCHANGED)
    assert (seen['height'],seen['width'])==im.shape[:2] and max(back.shape)<=1024 and all(o['mm'] is None for o in seen['boxes'])
    assert abs(back.astype(int).reshape(-1, *back.shape[2:]).mean(0)[...,::-1]-im.reshape(-1, *im.shape[2:]).mean(0)).max()<1 if im.ndim==3 else abs(back.mean()-im.mean())<1

@pytest.mark.parametrize('data,why', [(b'', 'empty'), (b'\x89PNG', 'header'), (b'\xff\xd8\xff\xe0', 'header'), (bytes(128)+b'DICM'+b'\xff'*50, ''), (b'PK\x03\x04'+bytes(100), 'DICOM')])
def test_what_cannot_be_looked_at_is_refused_with_a_reason(url, data, why):
    code,_,said = ask(url+'/look', data, X_Lungdet='1')
    assert code==422 and why in json.loads(said)['error'] and 'Traceback' not in said.decode()

def test_what_no_page_of_ours_sends(url, dicom):
    data = dicom.read_bytes()
    assert ask(url+'/look', data, X_Lungdet='1')[0]==200
    assert ask(url+'/look', data)[0]==403                     # from another page: it cannot set the header
    assert ask(url, Host='evil.example')[0]==400               # another name for this machine
    assert ask(url+'/look', X_Lungdet='1')[0]==405             # GET
    assert ask(url+'/../../etc/passwd')[0]==404
    code,headers,_ = ask(url)
    assert code==200 and headers['cache-control']=='no-store' and "default-src 'none'" in headers['content-security-policy'] and 'access-control-allow-origin' not in headers
    assert ask(url)[1]['content-security-policy']!=headers['content-security-policy'] # a nonce is used once

def test_a_body_without_a_length_is_cut_off_at_the_limit():
    got,sent = 0,[]
    async def receive():
        nonlocal got
        got += 1
        return dict(type='http.request', body=bytes(2**16), more_body=True) # for ever
    async def send(o): sent.append(o)
    scope = dict(type='http', method='POST', path='/look', raw_path=b'/look', query_string=b'', root_path='', scheme='http', http_version='1.1', asgi=dict(version='3.0'),
                 headers=[(b'host',b'localhost'),(b'x-lungdet',b'1')], client=('127.0.0.1',1), server=('127.0.0.1',80))
    asyncio.run(demo_app(detector(), max_mb=1)(scope, receive, send))
    assert sent[0]['status']==413 and got*2**16<1_200_000

def test_a_length_that_is_a_lie_or_no_number(url):
    for length in ('9'*30, '-5', 'many'):
        c = http.client.HTTPConnection(url.removeprefix('http://'), timeout=30)
        c.putrequest('POST', '/look'); c.putheader('X-Lungdet','1'); c.putheader('Content-Length',length); c.endheaders()
        assert c.getresponse().status in (400,413)
    assert ask(url)[0]==200

def test_several_at_once_get_their_own_answers(url):
    ims = [np.full((50+10*i,80), 20*i, np.uint8) for i in range(8)]
    res = [None]*8
    def one(i): res[i] = json.loads(ask(url+'/look', encode_png(ims[i]), X_Lungdet='1')[2])['height']
    ts = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert res==[50+10*i for i in range(8)]

def test_class_names_stay_text():
    page = demo_page(detector('</script>'+EVIL), nonce='n')
    assert EVIL not in page and page.count('</script>')==1

def test_nothing_is_written(url, dicom, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    assert ask(url+'/look', dicom.read_bytes()+bytes(2_000_000), X_Lungdet='1')[0] in (200,422)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('width', [1200,400])
def test_in_a_browser(url, browser, dicom, tmp_path, width):
    page,said,asked = browser.new_page(viewport=dict(width=width, height=900)),[],[]
    page.on('console', lambda m: said.append(m.text)); page.on('pageerror', lambda e: said.append(str(e))); page.on('request', lambda r: asked.append(r.url))
    page.goto(url)
    assert 'Research use only' in page.inner_text('#banner')
    page.set_input_files('#file', dicom)
    page.wait_for_selector('#drop.full')
    seen = look(detector(), dicom.read_bytes())
    def shown(t):
        page.evaluate(f"document.getElementById('threshold').value={t}; document.getElementById('threshold').dispatchEvent(new Event('input'))")
        assert page.locator('#boxes rect').count()==page.locator('#list tr').count()
        return page.locator('#boxes rect').count()
    for t in (.05,.2,.5,.9): assert shown(t)==sum(o['score']>=t for o in seen['boxes'])
    shown(.3); assert '60 % of 24 lesions, with 1.00 false boxes per image, on 40 images' in page.inner_text('#expected')
    shown(.95); assert '0 % of 24 lesions' in page.inner_text('#expected')
    shown(.2)
    x1,y1,x2,y2 = seen['boxes'][0]['xyxy']
    box,im = page.locator('#boxes rect').first.bounding_box(),page.locator('#picture').bounding_box()
    k = im['width']/1024
    assert abs(box['x']-im['x']-x1*k)<3 and abs(box['y']-im['y']-y1*k)<3 and abs(box['width']-(x2-x1)*k)<5
    assert page.evaluate('document.documentElement.scrollWidth')<=width
    big = tmp_path/'big.dcm'; big.write_bytes(bytes(4_000_000))
    page.set_input_files('#file', big); page.wait_for_selector('#state:has-text("more than the limit")')
    bad = tmp_path/f'{EVIL.replace("/","")}.png'; bad.write_bytes(b'\x89PNG broken')
    page.set_input_files('#file', bad); page.wait_for_selector('#state:has-text("header")')
    assert page.locator('#boxes rect').count()==0 # not those of the picture before
    named = cv2.putText(np.zeros((1024,1024),np.uint8), 'DOE JANE 1970', (50,60), cv2.FONT_HERSHEY_SIMPLEX, 1., 255, 2)
    (tmp_path/'n.png').write_bytes(encode_png(named))
    page.set_input_files('#file', tmp_path/'n.png'); page.wait_for_selector('#notes p')
    assert [o for o in said if '422' not in o]==[] and not [o for o in asked if not o.startswith((url,'data:'))]
    page.close()

def test_the_command(tmp_path, capsys):
    assert main([str(tmp_path/'none.safetensors')])==2 and 'no file' in capsys.readouterr().err
    file,port = detector().save(tmp_path/'d.safetensors'),free_port()
    run = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', 'import sys; from lungdet.demo import main; sys.exit(main())', file, '--port', str(port), '--device', 'cpu'], stdout=subprocess.PIPE, text=True)
    try:
        assert f':{port}' in run.stdout.readline()
        for _ in range(100):
            try: assert ask(f'http://127.0.0.1:{port}')[0]==200; break
            except urllib.error.URLError: time.sleep(.1)
        else: raise AssertionError('it never answered')
        assert main([str(file), '--port', str(port)])==2 # taken
    finally: run.terminate(); run.wait(20)
