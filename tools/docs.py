"""Build the site in _docs/ from the notebooks, without Quarto: nbdev prepares them, nbconvert writes Markdown, Material for MkDocs makes pages.

A chapter keeps its code, since it is a course; a page for each module has the signatures. `name` in the prose leads to the page of its module, and
"chapter 07a" to the chapter. Formulas become MathML, so no page asks another server for anything."""
import argparse, importlib, json, re, sys, tempfile
from pathlib import Path
import nbformat
from execnb.nbio import dict2nb
from latex2mathml.converter import convert as mathml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, strip_ansi, strip_hidden_metadata
from nbdev.showdoc import show_doc

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'bench'))
NBS,REPO = ROOT/'nbs','https://github.com/lungdet/lungdet'
PARTS = {'Data':range(0,6), 'A detector':range(6,11), 'How good is it?':range(11,12), 'Going further':range(12,16), 'In use':range(16,18)}
CSS = """.md-typeset math[display="block"] { display: block math; overflow-x: auto; padding: .5em 0 }
.md-typeset img { background: white } /* figures are drawn for paper */
"""

def read(nb): return json.loads(nb.read_text())
def source(c): return ''.join(c['source'])
def module(nb): # name of the module that a notebook exports, if any
    return next((m[1] for c in nb['cells'] if (m := re.search(r'^#\|\s*default_exp (\S+)', source(c), re.M))), None)
def title(nb): return next(m[1] for c in nb['cells'] if (m := re.match(r'# (.+)', source(c))))

class Site:
    "All pages, by notebook, and where each exported name is explained"
    def __init__(self):
        self.nbs = {f.relative_to(NBS).with_suffix('').as_posix():read(f) for f in sorted(NBS.glob('**/*.ipynb')) if '.ipynb_checkpoints' not in f.parts}
        self.modules = {m:k for k,nb in self.nbs.items() if (m := module(nb)) and m!='all'}
        self.names = {n:m for m in self.modules for n in importlib.import_module(f'lungdet.{m}').__all__}
        self.chapters = {k.split('_')[0]:k for k in reversed(self.nbs) if re.match(r'\d', k)} # of several with one number the first

    def linked(self, text, up):
        "Prose `text` with links, `up` being the way to the top, and formulas; code blocks as they are"
        def name(m): return f"[`{m[1]}`]({up}api/{self.names[m[1]]}.md#{m[1].lower()})" if m[1] in self.names else m[0]
        def number(m): return f"[{m[0]}]({up}{self.chapters[m[1]]}.md)" if m[1] in self.chapters else m[0]
        def chapters(m): return re.sub(r'(?:[Cc]hapter )?\b(\d\d[a-z]?)\b', number, m[0])
        def formula(m): return mathml(m[1] or m[2], 'block' if m[1] else 'inline')
        parts = re.split(r'(^```.*?^```$|^(?: {4}.*\n?)+|<details>|\[[^\]]*\]\([^)]*\)|`[^`\n]+`|<(?:img|table|svg).*?>)', text, flags=re.S|re.M)
        for i,o in enumerate(parts):
            if i%2==0: parts[i] = re.sub(r'\$\$(.+?)\$\$|\$([^$\n]+?)\$', formula, re.sub(r'\b[Cc]hapters? \d\d[a-z]?(?:(?:, | and | to )\d\d[a-z]?)*\b', chapters, o), flags=re.S)
            elif re.fullmatch(r'`\w+`', o): parts[i] = re.sub(r'`(\w+)`', name, o)
        return ''.join(parts)

    def page(self, key, nb):
        "Markdown of a notebook and its pictures, {name: bytes}"
        up = '../'*key.count('/')
        nb = NBProcessor(nb=dict2nb(json.loads(json.dumps(nb))), procs=[strip_ansi, hide_line, filter_stream_, clean_magics, hide_, strip_hidden_metadata])
        nb.process()
        nb = nbformat.reads(json.dumps(nb.nb), as_version=4)
        nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*(hide\s*$|default_exp)', c.source, re.M)]
        for c in nb.cells:
            if c.cell_type=='markdown': c.source = self.linked(c.source, up)
            else: c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
        nb.cells = [c for c in nb.cells if c.source.strip()]
        nb.metadata['language_info'] = {'name':'python'}
        text,res = MarkdownExporter(exclude_input_prompt=True).from_notebook_node(nb, resources={'output_files_dir':Path(key).name+'_files'})
        text = re.sub(r'\]\((?!https?:)([^)#]+)\.ipynb', r'](\1.md', text)
        text = re.sub(r'\]\((?:\.\./)+([A-Z]+(?:\.md)?|bench/|data/README\.md)\)', rf']({REPO}/blob/main/\1)', text).replace('](exp/)', f"]({next(k for k in self.nbs if k.startswith('exp/'))}.md)")
        text = re.sub(r'<style scoped>.*?</style>\s*|(?<=<table) [^>]*', '', text, flags=re.S) # the theme knows better
        return fenced(text),res['outputs']

    def api(self, m):
        "Markdown of the page of a module: what it exports, with signatures"
        mod = importlib.import_module(f'lungdet.{m}')
        out = [f"# lungdet.{m}\n\n{mod.__doc__ or ''}\n\nExplained in [{title(self.nbs[self.modules[m]])}](../{self.modules[m]}.md).\n"]
        for n in mod.__all__:
            o = getattr(mod, n)
            text = show_doc(o)._repr_markdown_() if callable(o) else f"### {n}\n\n```python\n{short(o)}\n```\n"
            text = re.sub(r'^---\s*\n', '', text)
            text = re.sub(r'\[source\]\([^)]*\)\{[^}]*\}\s*', '', text).replace('### ', '## ', 1)
            out.append(text)
        return '\n'.join(out)

def short(o, n=300):
    s = repr(o)
    return s if len(s)<=n else s[:n]+' ...'

def fenced(text):
    "Indented output of nbconvert as blocks without colours"
    def block(m): return '\n```text\n'+re.sub(r'^ {4}', '', m[0].strip('\n'), flags=re.M).rstrip()+'\n```\n'
    parts = re.split(r'(^```.*?^```$)', text, flags=re.S|re.M)
    return ''.join(o if i%2 else re.sub(r'(?:\A|(?<=\n))\n(?: {4}[^\n]*\n(?:[ ]*\n(?= {4}))*)+', block, o) for i,o in enumerate(parts))

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())

def nav(site):
    "The order of the pages, for MkDocs"
    def chapters(numbers): return [{f"{k.split('_')[0]} {title(nb)}":f'{k}.md'} for k,nb in site.nbs.items() if re.match(r'\d', k) and int(k[:2]) in numbers]
    return [{'lungdet':'index.md'}, *({part:chapters(numbers)} for part,numbers in PARTS.items()),
            {'Experiments':[{'All results':'results.md'}, *({title(nb):f'{k}.md'} for k,nb in site.nbs.items() if k.startswith('exp/'))]}, {'API':[{m:f'api/{m}.md'} for m in site.modules]}]

def make_docs(out, strict=False):
    "Build the site in the folder `out`"
    site = Site()
    with tempfile.TemporaryDirectory() as made:
        made = Path(made)
        for key,nb in site.nbs.items():
            text,pictures = site.page(key, nb)
            write(made/f'{key}.md', text)
            for k,o in pictures.items(): write((made/key).parent/k, o)
        for m in site.modules: write(made/'api'/f'{m}.md', site.api(m))
        for f in (NBS/'images').iterdir(): write(made/'images'/f.name, f.read_bytes())
        write(made/'results.md', importlib.import_module('results').page())
        write(made/'site.css', CSS)
        build(load_config(str(ROOT/'mkdocs.yml'), docs_dir=str(made), site_dir=str(Path(out).resolve()), nav=nav(site), strict=strict))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default=ROOT/'_docs', help="folder of the site (_docs)")
    p.add_argument('--strict', action='store_true', help="stop at a link that leads nowhere")
    make_docs(**vars(p.parse_args()))
