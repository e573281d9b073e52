"""Inspect, extract, convert and diff, on golden files and on large ones."""

import collections
import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path, PurePosixPath

import numpy
import pytest
import torch

from mmdet_ema.checkpoint import recipe as recipes
from mmdet_ema.checkpoint.contents import Weights, read_contents
from mmdet_ema.checkpoint.convert import convert
from mmdet_ema.checkpoint.diff import diff
from mmdet_ema.checkpoint.extract import extract
from mmdet_ema.checkpoint.inspect import inspect
from mmdet_ema.errors import CheckpointError, OptionError
from tests.averaging.models import ROOT
from tests.checkpoint.golden.small import EXPECTED, HERE, Small
from tests.needs import SAFELY

GOLDEN = json.loads(EXPECTED.read_text())
OURS = str(HERE / 'mmdet_ema.pth')


def load(path):
    return torch.load(path, **({'weights_only': True} if SAFELY else {}))


@pytest.mark.parametrize('name', ['ema', 'raw', 'fast', None])
def test_extracted_weights_load_into_the_model(name, tmp_path):
    """Nothing but weights and the data set's meta; tied names stay tied."""
    out = str(tmp_path / 'out.pth')
    done = extract(OURS, out, weights=name)
    assert done.path == out
    content = load(out)
    assert sorted(content) == ['meta', 'state_dict']
    assert {*content['meta']} <= {'cfg', 'dataset_meta', recipes.KEY}
    weights = content['state_dict']
    expected = read_contents(OURS).sets[name or 'ema'].tensors
    assert all(torch.equal(weights[k], x) for k, x in expected.items())
    tied, first = weights['tied.weight'], weights['first.weight']
    assert tied.data_ptr() == first.data_ptr()
    Small().load_state_dict(weights)
    again = read_contents(out).sets
    assert [*again] == [name or 'ema']
    role = 'raw' if name == 'raw' else 'average'
    assert again[name or 'ema'].role == role


def test_class_names_and_config_travel(tmp_path):
    """Of both generations; what only training needs does not."""
    for file, kept in (
        ('mmdet_ema_mmcv1.pth', {'CLASSES', 'PALETTE'}),
        ('mmengine.pth', {'cfg', 'dataset_meta'}),
    ):
        out = str(tmp_path / file)
        extract(str(HERE / file), out)
        assert {*load(out)['meta']} == {*kept, recipes.KEY}


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float64'])
def test_dtype_of_floats(dtype, tmp_path):
    """Counters stay integers."""
    out = str(tmp_path / 'out.pth')
    extract(OURS, out, dtype=dtype)
    weights = load(out)['state_dict']
    assert weights['head.weight'].dtype == getattr(torch, dtype)
    assert weights['norm.num_batches_tracked'].dtype == torch.int64


def test_dtype_of_8_bits(tmp_path):
    """It can be read, and made a wider one."""
    kind = getattr(torch, 'float8_e4m3fn', None)
    if kind is None:
        pytest.skip('this torch has no such dtype')
    path, out = str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth')
    values = torch.tensor([0.5, -448.0]).to(kind)
    try:
        torch.save({'state_dict': {'a': values}}, path)
    except Exception:
        pytest.skip('this torch cannot save it')
    extract(path, out, dtype='bfloat16')
    found = load(out)['state_dict']['a']
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [0.5, -448.0]


def test_dtype_that_cannot_hold_the_weights(tmp_path):
    """An overflow is not written."""
    path, out = str(tmp_path / 'a.pth'), tmp_path / 'out.pth'
    torch.save({'state_dict': {'a': torch.tensor([1.0, 1e5])}}, path)
    with pytest.raises(CheckpointError, match='a has values that'):
        extract(path, str(out), dtype='float16')
    assert not out.exists()
    with pytest.raises(OptionError, match="--dtype 'int8' is not known"):
        extract(path, str(out), dtype='int8')


def test_views_that_torch_marks_are_computed(tmp_path):
    """A conjugated or negated view is not what is in its memory."""
    path, out = str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth')
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    for view in (numbers.conj(), numbers.conj().imag):
        torch.save({'state_dict': {'a': view}}, path)
        extract(path, out, force=True)
        # torch 1.13 does not save the mark
        found, expected = (load(x)['state_dict']['a'] for x in (out, path))
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(
    'value',
    [
        *(frozenset({1}), range(3), slice(1), int, types.SimpleNamespace(a=1)),
        *(collections.defaultdict(list, a=[1]), PurePosixPath('a')),
        numpy.zeros((0, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_script_left_in_a_file_is_left_out(value, tmp_path):
    """It is said, and is no reason to refuse the weights."""
    path, out = str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth')
    weights = {'a': torch.ones(1)}
    torch.save(dict(state_dict=weights, meta=dict(x=value, y=1)), path)
    done = convert(path, out, 'plain')
    assert any('meta.x' in words for words in done.lost)
    assert load(out)['meta']['y'] == 1


def test_config_of_omegaconf_need_not_be_installed(tmp_path, monkeypatch):
    """Lightning keeps it in hyper_parameters."""
    path, name = str(tmp_path / 'a.pth'), 'omegaconf.dictconfig'
    kind = type('DictConfig', (), {'__module__': name})
    module = types.SimpleNamespace(DictConfig=kind)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, 'omegaconf', types.SimpleNamespace())
    config = kind()
    config._metadata = {'ref_type': int}
    weights = {'a': torch.ones(1)}
    torch.save(dict(state_dict=weights, hyper_parameters=config), path)
    assert read_contents(path).sets['weights'].tensors['a'] == 1


def test_hash_is_that_of_the_file(tmp_path):
    """As torch.hub checks it: the first 8 digits of the SHA-256."""
    done = extract(OURS, str(tmp_path / 'small.pth'), add_hash=True)
    data = Path(done.path).read_bytes()
    digits = hashlib.sha256(data).hexdigest()[:8]
    assert os.listdir(tmp_path) == [f'small-{digits}.pth']


def test_safetensors_and_back(tmp_path):
    """Tied names, meta and role come back from its metadata."""
    path, back = str(tmp_path / 'a.safetensors'), str(tmp_path / 'b.pth')
    extract(OURS, path)
    extract(path, back)
    assert not diff(OURS, back, weights='ema').differences
    weights = load(back)['state_dict']
    first = weights['first.weight'].data_ptr()
    assert first == weights['tied.weight'].data_ptr()
    assert read_contents(path).sets['ema'].updates == 7
    assert 'cfg' in load(back)['meta']


def test_safetensors_library_reads_ours(tmp_path):
    """The file is one of that format to its own library."""
    library = pytest.importorskip('safetensors.torch')
    path = str(tmp_path / 'a.safetensors')
    extract(OURS, path, weights='raw')
    raw = read_contents(OURS).sets['raw'].tensors
    found = library.load_file(path)
    assert found.keys() == {*raw} - {'tied.weight'}
    assert all(torch.equal(x, raw[k]) for k, x in found.items())
    model = Small()
    library.load_model(model, path)
    assert torch.equal(model.tied.weight, raw['tied.weight'])


def test_nothing_is_overwritten_unless_asked(tmp_path):
    """A file of that name stays as it is, and no part of one is left."""
    out = tmp_path / 'out.pth'
    out.write_text('mine')
    for command in (
        lambda **force: extract(OURS, str(out), **force),
        lambda **force: convert(OURS, str(out), 'timm', **force),
    ):
        out.write_text('mine')
        with pytest.raises(CheckpointError, match='exists already'):
            command()
        assert out.read_text() == 'mine'
        command(force=True)
        assert read_contents(str(out))
    assert os.listdir(tmp_path) == ['out.pth']
    with pytest.raises(CheckpointError, match='there is no folder'):
        extract(OURS, str(tmp_path / 'nowhere' / 'a.pth'))
    with pytest.raises(CheckpointError, match='is a folder'):
        extract(OURS, str(tmp_path), force=True)


def test_a_recipe_repeats_the_same_bytes(tmp_path):
    """Read from the file itself, or from YAML, in another place."""
    for command, options in (
        (extract, dict(weights='raw')),
        (extract, dict(weights='ema', dtype='float16')),
        (extract, dict(safetensors=True)),
        (convert, dict(to='timm')),
        (convert, dict(to='averaged-model')),
    ):
        first, second = str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth')
        command(OURS, first, force=True, **options)
        recipe = recipes.read(first)
        assert recipes.check_inputs(recipe) == [OURS]
        options = recipe['options']
        command(OURS, second, force=True, recipe=recipe, **options)
        assert Path(first).read_bytes() == Path(second).read_bytes()


def test_a_recipe_of_a_changed_file_is_refused(tmp_path):
    """So is a file without one."""
    source, out = tmp_path / 'a.pth', str(tmp_path / 'b.pth')
    torch.save({'state_dict': {'a': torch.zeros(1)}}, source)
    extract(str(source), out)
    torch.save({'state_dict': {'a': torch.ones(1)}}, source)
    with pytest.raises(CheckpointError, match='is not the file that the rec'):
        recipes.check_inputs(recipes.read(out))
    with pytest.raises(CheckpointError, match='has no recipe of mmdet-ema'):
        recipes.read(str(source))
    text = tmp_path / 'r.yaml'
    text.write_text('a: [')
    with pytest.raises(CheckpointError, match='is no recipe'):
        recipes.read(str(text))


def test_report_of_a_file():
    """Every number of it, from the writer's memory and the formulas."""
    report = inspect(OURS)
    known = GOLDEN['mmdet_ema.pth']
    ema = report['sets']['ema']
    assert (ema['role'], ema['updates'], ema['tensors']) == ('average', 7, 10)
    # 9 + 3 of first, 6 + 2 of head, 4 * 3 + 1 of norm; the tied one once
    assert ema['parameters'] == 33
    assert ema['bytes'] == 32 * 4 + 8
    assert ema['dtypes'] == {'float32': 8, 'int64': 1}
    assert ema['tied'] == [['first.weight', 'tied.weight']]
    decay = 0.9 * (1 - 2.718281828459045 ** (-7 / 3))
    assert ema['decay'] == pytest.approx(decay, rel=1e-12)
    assert ema['window'] == pytest.approx(1 / (1 - decay), rel=1e-12)
    squares = {'': [0.0, 0.0]}
    for name, average in known['ema'].items():
        if 'running' in name or 'tracked' in name or name == 'tied.weight':
            continue
        module = name.split('.')[0]
        for key in ('', module):
            off, size = squares.setdefault(key, [0.0, 0.0])
            raw = known['raw'][name]
            off += sum((a - b) ** 2 for a, b in zip(average, raw))
            squares[key] = [off, size + sum(x * x for x in raw)]
    distance = {k: (a / b) ** 0.5 for k, (a, b) in squares.items()}
    total = distance.pop('')
    # sums of float64, in another order
    assert ema['distance']['total'] == pytest.approx(total, rel=1e-12)
    assert ema['distance']['modules'] == pytest.approx(distance, rel=1e-12)
    assert ema['nonfinite'] == {}
    assert report['collisions'] == []
    json.dumps(report)


def test_report_of_what_is_wrong(tmp_path):
    """NaN, names that mmcv's hook takes for one, and a role unknown."""
    path = str(tmp_path / 'a.pth')
    nan = torch.tensor([1.0, float('nan'), float('inf')])
    weights = {'a.b_c': nan, 'a_b.c': torch.zeros(2)}
    torch.save({'state_dict': weights}, path)
    report = inspect(path)
    (found,) = report['sets'].values()
    assert found['role'] == 'unknown'
    assert found['nonfinite'] == {'a.b_c': 2}
    assert report['collisions'] == [['a.b_c', 'a_b.c']]
    assert 'nonfinite' not in inspect(path, quick=True)['sets']['weights']


def test_differences_by_tensor(tmp_path):
    """What is missing, of another shape or dtype, and how far values are."""
    a, b = str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth')
    same, off = torch.zeros(2), torch.tensor([3.0, 4.0])
    nan = torch.tensor(float('nan'))
    torch.save(dict(x=same, y=off, z=same, only=same, n=nan), a)
    other = dict(x=same, y=off + torch.tensor([0.0, 0.5]), n=nan)
    torch.save(dict(**other, z=torch.zeros(3), new=same.half()), b)
    found = diff(a, b)
    kinds = {x.name: x.kind for x in found.differences}
    assert kinds == dict(
        y='values', z='shape', only='only in A', new='only in B'
    )
    (values,) = (x for x in found.differences if x.kind == 'values')
    assert values.largest == 0.5
    # |b| = sqrt(3 ** 2 + 4.5 ** 2)
    assert values.relative == pytest.approx(0.5 / (9 + 20.25) ** 0.5)
    assert found.compared == 4
    assert 'y' not in {x.name for x in diff(a, b, atol=0.5).differences}
    torch.save(dict(x=same.half()), a)
    torch.save(dict(x=same), b)
    assert [x.kind for x in diff(a, b).differences] == ['dtype']
    assert diff(OURS, OURS, weights='ema', against='raw').differences
    with pytest.raises(CheckpointError, match="no weights named 'slow'"):
        diff(OURS, OURS, weights='slow')
    with pytest.raises(OptionError, match='--atol -1'):
        diff(OURS, OURS, atol=-1.0)


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('mean()', 'mean()'),
        ('power(decay=0.9, power=0.75)', 'power(decay=0.9, power=0.75'),
        ('my.module.ramp()', None),
        ('__import__("os").system("x")', None),
        ('exponential(decay=open("x"))', OptionError),
        ('exponential(decay=2)', OptionError),
        ('a' * 2000, None),
        ('(' * 500, None),
        ('', None),
    ],
)
def test_schedules_are_read_not_run(text, said):
    """What is not the text of a schedule is no schedule."""
    weights = Weights({}, schedule=text)
    if said is OptionError:
        with pytest.raises(OptionError):
            weights.build_schedule()
    else:
        found = weights.build_schedule()
        assert (found is None) == (said is None)
        assert str(found).startswith(str(said))


LARGE = """
import sys, torch
from mmdet_ema.checkpoint.extract import extract
from mmdet_ema.checkpoint.inspect import inspect
from tests.memory import peak
path, out = sys.argv[1:]
torch.zeros(8).double().square().sum()
start = peak()
inspect(path)
extract(path, out, weights='raw')
print(peak() - start)
"""


@pytest.mark.slow
def test_memory_is_that_of_one_copy(tmp_path):
    """A file of 800 MB is inspected and extracted with less than 1.3 times."""
    path = tmp_path / 'a.pth'
    torch.manual_seed(0)
    halves = [
        {f'layer{i}.weight': torch.randn(2_500_000) for i in range(40)}
        for _ in range(2)
    ]
    ema = {f'module.{k}': x for k, x in halves[1].items()}
    content = dict(state_dict=halves[0], ema_state_dict=dict(steps=1, **ema))
    torch.save(content, path)
    size = path.stat().st_size
    assert size > 800e6
    done = subprocess.run(
        [sys.executable, '-c', LARGE, str(path), str(tmp_path / 'b.pth')],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) * 2**20 < 1.3 * size
