"""Write README.md from nbs/index.ipynb, without Quarto: prose as it is, code and its output in blocks, pictures from nbs/.

The picture of the README is the one that chapter 10 keeps of its detections."""
import base64, json, re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent

def picture()->bytes:
    "The figure that chapter 10 keeps of its detections, as PNG"
    for c in json.loads((ROOT/'nbs'/'10_learner.ipynb').read_text())['cells']:
        pngs = [o['data']['image/png'] for o in c.get('outputs',[]) if 'image/png' in o.get('data',{})]
        if pngs and 'show_detections(' in ''.join(c['source']): return base64.b64decode(pngs[0])
    raise SystemExit('10_learner.ipynb keeps no figure of show_detections; renew its outputs with `make outputs`')

def readme()->str:
    nb = nbformat.read(ROOT/'nbs'/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*(hide|export|default_exp)', c.source, flags=re.M)]
    nb.cells = [nbformat.v4.new_markdown_cell(c.outputs[0].data['text/markdown']) if 'echo: false' in c.source else c for c in nb.cells] # a table, without its code
    for c in nb.cells: c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    nb.metadata['language_info'] = {'name':'python'} # so that code blocks are coloured
    text,_ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?!https?:|#|\.\./)([^)]+)\)', r'](nbs/\1)', text).replace('](../', '](')
    return re.sub(r'\n{3,}', '\n\n', text).strip()+'\n'

if __name__=='__main__':
    (ROOT/'nbs'/'images').mkdir(exist_ok=True)
    (ROOT/'nbs'/'images'/'detections.png').write_bytes(picture())
    (ROOT/'README.md').write_text(readme())
