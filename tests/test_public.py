"Every public name says what it is, and what each of its parameters is"
import dataclasses, importlib, inspect, re
from pathlib import Path
import pytest
from fastcore.docments import docments

MODULES = sorted(o.stem for o in (Path(__file__).resolve().parent.parent/'lungdet').glob('*.py') if o.stem not in ('__init__','_modidx','all'))
EVENT = re.compile(r'__\w+__|(before|after)_\w+|forward|reset|accumulate|encodes|decodes|setup') # torch's and fastai's: their names say what they take

def undocumented(name, f):
    "What `f` does not say"
    if not inspect.getdoc(f) and not name.endswith('__init__'): yield f'{name} has no docstring'
    if inspect.isclass(f) and not dataclasses.is_dataclass(f): return
    rest = {k for k,p in inspect.signature(f).parameters.items() if p.kind in (p.VAR_POSITIONAL,p.VAR_KEYWORD)} # fastcore reads no docment of these
    for k,v in docments(f, full=False).items():
        if v is None and k not in {'self','cls','return'}|rest: yield f'{name} has no docment of `{k}`'

def public(mod):
    "(name, function or class) of all that `mod` exports, with the methods that it gives to its own and to other classes"
    for n in mod.__all__:
        o = getattr(mod, n)
        if getattr(o,'__module__',None)!=mod.__name__: continue                # a constant, or a name of another package
        if inspect.isfunction(o) or inspect.isclass(o): yield n,o
    classes = {c for c in vars(mod).values() if inspect.isclass(c) and c.__module__.startswith('lungdet.')}
    for c in classes:
        for k,f in vars(c).items():
            f = getattr(f, '__func__', getattr(f, 'fget', f))
            if not inspect.isfunction(f) or f.__module__!=mod.__name__: continue # of the module that the class comes from
            if k=='__init__' and not c.__name__.startswith('_') and not dataclasses.is_dataclass(c): yield f'{c.__name__}.{k}',f
            if k.startswith('_') or c.__name__.startswith('_') or EVENT.fullmatch(k) or any(k in vars(b) for b in c.__mro__[1:]): continue
            yield f'{c.__name__}.{k}',f

@pytest.mark.parametrize('module', MODULES)
def test_public_names_are_documented(module):
    bad = [o for n,f in public(importlib.import_module(f'lungdet.{module}')) for o in undocumented(n, f)]
    assert not bad, '\n'.join(bad)
