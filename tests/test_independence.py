"""No import runs upwards; averaging imports torch alone, training no runner.

Proved twice: the imports are read from the source, and the modules are
imported in a fresh process that refuses every framework. Either proof is
shown to fail where it should.
"""

import ast
import pkgutil
import sys
import sysconfig
from pathlib import Path

import pytest

import mmdet_ema
from tests.averaging.models import run_python

FRAMEWORKS = ('mmengine', 'mmcv', 'mmdet', 'mmdet3d', 'numpy', 'torchvision')
PACKAGE = Path(mmdet_ema.__file__).parent
# Python before 3.10 keeps no list of its standard modules
STANDARD = getattr(sys, 'stdlib_module_names', None) or {
    *sys.builtin_module_names,
    *(
        module.name
        for path in ('stdlib', 'platstdlib')
        for end in ('', '/lib-dynload')
        for module in pkgutil.iter_modules([sysconfig.get_path(path) + end])
    ),
}

HARNESS = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f'{{name}} is blocked', name=name)

sys.meta_path.insert(0, Blocker())
sys.path[:0] = sys.argv[2:]
importlib.import_module(sys.argv[1])
roots = {{name.partition('.')[0] for name in sys.modules}}
assert not roots & set({blocked!r}), roots & set({blocked!r})
print('\\n'.join(n for n in sys.modules if n.startswith('mmdet_ema')))
"""


def import_alone(module, *paths):
    """Import a module where no framework can be imported."""
    code = HARNESS.format(blocked=FRAMEWORKS)
    return run_python(code, module, *paths, OMP_NUM_THREADS='1')


def files_of(*modules):
    """Return the source files of packages and modules by dotted name."""
    files = []
    for module in modules:
        path = PACKAGE.joinpath(*module.split('.'))
        files += sorted(path.rglob('*.py')) or [path.with_suffix('.py')]
    return files


def imports_of(path):
    """Return the absolute names of everything that a file imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            names += [f'{node.module}.{alias.name}' for alias in node.names]
    return names


def strangers(path, packages):
    """Return the imports of a file that are not standard, torch or ours."""
    standard = {*STANDARD, 'torch', '__future__'}
    return [
        name
        for name in imports_of(path)
        if name.partition('.')[0] not in standard
        and not name.startswith(tuple(f'mmdet_ema.{p}.' for p in packages))
        and name not in {f'mmdet_ema.{p}' for p in packages}
    ]


# who may import whom: no arrow runs upwards
TOP = ['errors', 'version', 'checks', 'schedules']
MAY_IMPORT = {
    'averaging': TOP,
    'checkpoint': [*TOP, 'averaging'],
    'optimizers': [*TOP, 'averaging'],
    'training': [*TOP, 'averaging', 'checkpoint', 'optimizers'],
}
# random generators are put back in training/; a recipe may be YAML
ALSO = {'training': {'numpy'}, 'checkpoint': {'yaml'}}
FOLDERS = [*MAY_IMPORT, 'for_mmengine', 'for_mmcv1', 'cli']


@pytest.mark.parametrize('folder', MAY_IMPORT)
def test_no_upward_import(folder):
    """A folder imports torch and the folders below it, nothing else."""
    files = files_of(folder)
    assert len(files) > 3
    allowed = [folder, *MAY_IMPORT[folder]]
    assert {} == {
        str(path): found
        for path in files
        if (found := set(strangers(path, allowed)) - ALSO.get(folder, set()))
    }


def test_generations_do_not_know_each_other():
    """Dropping a generation is deleting its folder and a few lines on top."""
    for name in ('for_mmengine', 'for_mmcv1'):
        naming = {
            path.relative_to(PACKAGE).parts[0]
            for path in PACKAGE.rglob('*.py')
            if f'mmdet_ema.{name}' in path.read_text(encoding='utf-8')
        }
        assert naming <= {name, 'frameworks.py', 'cli', '__init__.py'}
        above = ('mmdet_ema.frameworks', 'mmdet_ema.cli')
        names = [x for path in files_of(name) for x in imports_of(path)]
        assert [] == [x for x in names if x.startswith(above)]


def test_every_folder_has_a_rule():
    """The folders of the package are those of the table, and the adapters."""
    found = {p.name for p in PACKAGE.iterdir() if (p / '__init__.py').exists()}
    assert found == set(FOLDERS)


@pytest.mark.parametrize(
    'module',
    [
        'mmdet_ema',
        'mmdet_ema.averaging',
        'mmdet_ema.checkpoint',
        'mmdet_ema.training.lifecycle',
        'mmdet_ema.training.options',
        'mmdet_ema.training.steps',
        'mmdet_ema.optimizers.construction',
        'mmdet_ema.optimizers.warmup',
    ],
)
def test_imports_without_frameworks(module):
    """The module imports where no framework can be."""
    run = import_alone(module)
    assert 0 == run.returncode, run.stderr
    loaded = run.stdout.split()
    assert module in loaded
    assert [] == [name for name in loaded if 'for_mm' in name]


LIKE_THE_CORE = 'import torch\n\nfrom mmdet_ema.averaging import swap\n\n{}\n'


@pytest.mark.parametrize('name', FRAMEWORKS)
def test_an_import_is_caught(name, tmp_path):
    """A module like the core that imports a framework is caught."""
    path = tmp_path / 'like_the_core.py'
    path.write_text(LIKE_THE_CORE.format(f'import {name}'))
    assert [name] == strangers(path, ['averaging'])


@pytest.mark.parametrize('name', ['mmengine', 'numpy'])
def test_an_import_is_caught_at_run_time(name, tmp_path):
    """A module like the core that imports a framework does not import."""
    path = tmp_path / 'like_the_core.py'
    path.write_text(LIKE_THE_CORE.format(f'import {name}'))
    run = import_alone('like_the_core', tmp_path)
    assert 0 != run.returncode
    assert f'{name} is blocked' in run.stderr


@pytest.mark.parametrize(
    'line',
    [
        'def f():\n    from mmengine.hooks import Hook',
        'try:\n    import mmcv\nexcept ImportError:\n    mmcv = None',
        'from mmdet_ema.training import options',
        'import mmdet_ema.frameworks',
    ],
)
def test_a_hidden_import_is_caught(line, tmp_path):
    """An import in a function or a ``try`` is caught in the source."""
    path = tmp_path / 'like_the_core.py'
    path.write_text(LIKE_THE_CORE.format(line))
    assert 1 == len(strangers(path, ['averaging']))


def test_a_clean_module_passes(tmp_path):
    """A module like the core passes both proofs."""
    path = tmp_path / 'like_the_core.py'
    path.write_text(LIKE_THE_CORE.format('import math'))
    assert [] == strangers(path, ['averaging'])
    run = import_alone('like_the_core', tmp_path)
    assert 0 == run.returncode, run.stderr
