"Settings: what is refused, what is kept"
import pytest
from hypothesis import given, settings, strategies as st
from lungdet.config import *

def f(n:int=1, x:float=.5, name:str='a', on:bool=True, sizes:tuple=((1,2),), maybe:float|None=None, more:dict|None=None): "A function"
schema = Schema(one=keys_of(f), two=keys_of(f, ('n','x')))

values = st.fixed_dictionaries({}, optional=dict(n=st.integers(-10**6,10**6), x=st.floats(allow_nan=False,allow_infinity=False), name=st.text(st.characters(codec='utf-8',exclude_categories=['Cs']),max_size=20).filter(lambda o: o!='none'),
    on=st.booleans(), sizes=st.lists(st.tuples(st.floats(0,10),st.floats(0,10)),max_size=3), maybe=st.none()|st.floats(0,1), more=st.dictionaries(st.text(st.characters(codec='ascii'),max_size=5), st.integers(), max_size=3)))

@given(values)
@settings(max_examples=150, deadline=None)
def test_written_settings_come_back(tmp_path_factory, one):
    path = tmp_path_factory.mktemp('cfg')/'c.toml'
    cfg = schema.resolve(dict(one=one))
    assert read_config(write_config(cfg, path), schema)==cfg

@pytest.mark.parametrize('kind,good,bad', [(int,[1,-3],[1.,'1',True,None]), (float,[1,.5],['1',True,None]), (bool,[True],[1,'yes']), (str,['a'],[1,None]),
                                           (tuple,[[1],(2,)],['a',1]), (float|None,[None,1],['x',True]), (dict|None,[{},None],[[1]])])
def test_types(kind, good, bad):
    assert all(fits(o,kind) for o in good) and not any(fits(o,kind) for o in bad)

@pytest.mark.parametrize('changes,match', [(['nn=1'],"no section has a key 'nn'; did you mean"), (['name=b'],'in several sections, one, two; write one.name'), (['one.n=1.5'],'one.n = 1.5 is of type float; it must be int'),
    (['one.on=yes'],"one.on = 'yes' is of type str; it must be bool"), (['n'],"'n' is no key=value"), (['two.name='],"'two.name=': there is nothing behind"), (['three.n=1'],r'no section is called \[three\]'), (['two.n=1'],r"\[two\] has no key 'n'")])
def test_changes_that_mean_nothing(changes, match):
    with pytest.raises(ValueError, match=match): read_config(None, schema, changes)

def test_changes():
    cfg = read_config(None, schema, ['n=3','one.x=.25','two.name=none','one.maybe=1e-3','one.sizes=[[1,2],[3,4]]','one.more={a=1}'])
    assert cfg['one'] | dict(n=3,x=.25,maybe=.001,sizes=((1,2),(3,4)),more=dict(a=1))==cfg['one'] and cfg['two']['name']=='none' # a text cannot be None
    assert [read_config(None, schema, [f'two.name={o}'])['two']['name'] for o in ('007','2024-01-01','"a b"','a b')]==['007','2024-01-01','a b','a b']
    assert type(read_config(None, schema, ['one.x=1'])['one']['x']) is float and fits(('a',), list[str])
    assert read_config(None, schema, ['one.maybe=none'])['one']['maybe'] is None

def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match='cannot be read'): read_config(tmp_path/'gone.toml', schema)
    (tmp_path/'x.toml').write_text('[one]\nn = two')
    with pytest.raises(ValueError, match='x.toml is not TOML'): read_config(tmp_path/'x.toml', schema)
    (tmp_path/'y.toml').write_text('n = 3')
    with pytest.raises(ValueError, match=r'n = 3 stands outside of a section; does it belong to \[one\]'): read_config(tmp_path/'y.toml', schema)
    (tmp_path/'z.toml').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='is not TOML'): read_config(tmp_path/'z.toml', schema)
