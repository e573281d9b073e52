"""The command itself, on tiny models and for a moment."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import launch
from benchmarks.figures import Case
from benchmarks.plan import HOOK, LOOP, MEMORY, PARTS, SAVE, STEP, SWAP
from benchmarks.rounds import QUICK, Limits
from benchmarks.worker import measure

FILES = {'bench.json', 'bench.md', 'bench.png'}


def run(folder, *words, **more):
    return subprocess.run(
        [
            *(sys.executable, '-m', 'benchmarks', '--quick'),
            *('--device', 'cpu', '--models', 'toy-1000'),
            *('--threads', '1', '--out', str(folder), *words),
        ],
        cwd=launch.ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **more},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope='module')
def updated(tmp_path_factory):
    pytest.importorskip('mmengine')
    folder = tmp_path_factory.mktemp('bench')
    return run(folder, '--only', 'update,tensors'), folder


def test_run_writes_json_tables_and_plot(updated):
    """All three files are there, and the exit status is 0."""
    done, folder = updated

    assert done.returncode == 0, done.stderr
    assert FILES <= {path.name for path in folder.iterdir()}
    assert (folder / 'bench.png').read_bytes().startswith(b'\x89PNG')


def test_tables_are_printed(updated):
    """What is in the file is on the screen too."""
    done, folder = updated

    assert (folder / 'bench.md').read_text() in done.stdout


def test_json_says_what_was_measured_on_what(updated):
    """Machine, versions, and a figure for every competitor or a reason."""
    content = json.loads((updated[1] / 'bench.json').read_text())

    assert torch.__version__ == content['machine']['torch']
    assert {'processor', 'cores', 'date'} <= content['machine'].keys()
    for result in content['results']:
        for figure in result['figures'].values():
            reason = figure['failed'] or ''
            assert figure['samples'] or reason.startswith('not installed')


def test_try_is_marked_as_one(updated):
    """Nobody takes the numbers of ``--quick`` for figures."""
    content = json.loads((updated[1] / 'bench.json').read_text())

    assert content['kind'].startswith('a try')


def test_figure_that_was_not_measured_is_an_error(tmp_path, monkeypatch):
    """A process that is ended leaves failures, not gaps."""
    monkeypatch.setattr(launch, 'LONGEST', 0.01)
    case = Case('update', 'toy-1000', ('floor', 'ours'))

    (result,) = launch.run_process([case], QUICK, tmp_path)

    assert ['floor', 'ours'] == list(result.figures)
    assert all('more than 0.01 s' in line for line in result.failures)


def test_wrong_word_ends_with_status_two(tmp_path):
    """Nothing is written then."""
    done = run(tmp_path / 'none', '--only', 'upgrade')

    assert done.returncode == 2
    assert not (tmp_path / 'none').exists()


def test_failed_figure_ends_with_status_one(tmp_path):
    """The line says which figure there is not, and why."""
    (tmp_path / 'sitecustomize.py').write_text(
        'import mmdet_ema\n'
        'def broken(*args, **options):\n'
        "    raise RuntimeError('out of order')\n"
        'mmdet_ema.WeightAverager = broken\n'
    )
    folder = tmp_path / 'out'
    done = run(folder, '--only', 'tensors', PYTHONPATH=str(tmp_path))

    assert done.returncode == 1
    assert 'ours: RuntimeError: out of order' in done.stderr
    assert '| failed: RuntimeError: out of order |' in done.stdout


@pytest.mark.parametrize('place', ['memory', 'disk'])
def test_saving_is_measured(place):
    """All who save have a figure, in memory and on disk."""
    pytest.importorskip('mmengine')

    assert_walls(Case('save', '3x3072', SAVE, setting=place))


def test_swapping_is_measured():
    """All who swap have a figure."""
    pytest.importorskip('mmengine')

    assert_walls(Case('swap', '3x3072', SWAP, setting='cold'))


def test_hook_is_measured_in_a_real_runner():
    """An iteration with a hook takes longer than one without."""
    pytest.importorskip('mmengine')
    limits = Limits(seconds=60, least=15, most=15)

    figures = measure(Case('hook', 'a linear layer', HOOK), limits)

    fastest = {n: min(f.samples['wall']) for n, f in figures.items()}
    assert fastest['none'] < fastest['ours']
    assert fastest['none'] < fastest['mmengine-buffers']


def test_step_of_a_detector_is_measured():
    """RTMDet-tiny trains with every hook; hooks take a part."""
    pytest.importorskip('mmdet')

    figures = assert_walls(Case('step', 'rtmdet-tiny', STEP))

    for name, figure in figures.items():
        hooks, whole = (min(figure.samples[m]) for m in ('hooks', 'wall'))
        assert 0 < hooks < whole
        bare = min(figures['none'].samples['hooks'])
        assert name == 'none' or hooks > bare


def test_plain_loop_is_measured():
    """The RetinaNet trains and is averaged without a framework."""
    pytest.importorskip('mmdet')

    assert_walls(Case('loop', 'retinanet-r50', LOOP))


def test_memory_of_an_average_is_that_of_a_model():
    """16 tensors of 4 MiB: one copy is kept, little is needed beyond.

    What a process takes is counted in pages, by each core in batches: less
    than one tensor more or less is let pass.
    """
    pytest.importorskip('mmengine')
    size = 64 * 2**20
    names = tuple(n for n in MEMORY if n in ('ours', 'mmengine-buffers'))

    figures = measure(Case('memory', f'16x{size}', names), QUICK)

    for figure in figures.values():
        kept, update = (figure.samples[m][0] for m in ('kept', 'update'))
        assert abs(kept - size) < size / 16
        assert update < size / 16


def test_every_part_can_be_measured():
    """There is a module for every part of the plan."""
    same = {'tensors', 'bytes'}
    for part in PARTS.keys() - same:
        assert importlib.import_module(f'benchmarks.parts.{part}').measure


def assert_walls(case):
    figures = measure(case, Limits(seconds=0, least=3))
    assert list(case.competitors) == list(figures)
    for figure in figures.values():
        assert figure.failed is None
        assert min(figure.samples['wall']) > 0
    return figures
