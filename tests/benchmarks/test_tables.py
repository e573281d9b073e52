"""Tables hold the medians and the ratios of the samples."""

import pytest

from benchmarks.figures import Case, Figure, Result, failure
from benchmarks.plan import HOOK, MEMORY, STEP, SWAP, UPDATE
from benchmarks.tables import tables


def wall(*milliseconds):
    return Figure({'wall': [value / 1000 for value in milliseconds]})


def lines_of(case, figures):
    return tables([Result(case, figures)]).splitlines()


def row(lines, start):
    (line,) = [line for line in lines if line.startswith(f'| {start} |')]
    return [cell.strip() for cell in line.strip('|').split('|')][1:]


@pytest.fixture
def update():
    case = Case('update', 'yolox-s', UPDATE, setting='cold')
    figures = {name: wall(8, 80, 8) for name in UPDATE}
    figures['floor'] = wall(2, 20, 2)
    figures['ours'] = wall(4, 40, 4)
    figures['ours-ignore'] = wall(3, 30, 3)
    return case, figures


def test_update_has_median_quartiles_and_times_the_floor(update):
    """The quartiles of 4, 40, 4 ms are 4 and 22; twice the floor."""
    lines = lines_of(*update)

    assert ['4 (4 to 22), 2.00x'] == row(lines, 'mmdet_ema')
    assert ['2 (2 to 11)'] == row(lines, 'floor: flat tensors')


def test_update_says_how_many_times_faster_it_is(update):
    """Eight milliseconds against four are twice as fast."""
    found = row(lines_of(*update), 'mmdet, `update_buffers=True` / mmdet_ema')

    assert ['2.00x'] == found


def test_update_says_what_the_gate_costs(update):
    """Four milliseconds instead of three: a quarter of the update."""
    lines = lines_of(*update)

    assert ['1 (1 to 5.5)', '25 %'] == row(lines, 'yolox-s')


def test_missing_figures_are_said_to_be_missing(update):
    """A failed competitor shows its reason, one not there says so."""
    case, figures = update
    figures['timm'] = failure('not installed: No module named timm')
    figures['torch'] = failure(RuntimeError('a | b'))
    lines = lines_of(case, figures)

    assert ['not installed'] == row(lines, 'timm `ModelEmaV3`')
    found = row(lines, 'torch `AveragedModel`, EMA, multi-tensor')
    assert ['failed: RuntimeError: a / b'] == found


def test_tables_survive_a_failed_floor_and_ours(update):
    """Without what others are compared with there are no ratios."""
    case, figures = update
    broken = {name: failure('no') for name in ('floor', 'ours')}
    lines = lines_of(case, {**figures, **broken})

    assert ['8 (8 to 44)'] == row(lines, 'timm `ModelEmaV3`')
    assert ['-'] == row(lines, 'mmdet, `update_buffers=True` / mmdet_ema')


def test_gpu_has_the_time_on_the_device_and_the_syncs(update):
    """On a GPU there are three tables: idle to idle, device, waits."""
    _, figures = update
    for figure in figures.values():
        figure.samples['device'] = [0.001, 0.001, 0.001]
        figure.samples['syncs'] = [3]
    lines = lines_of(Case('update', 'yolox-s', UPDATE, 'cuda'), figures)

    assert '| ms on the device | yolox-s |' in lines
    assert '| host waits for the GPU | yolox-s |' in lines
    assert '**GPU**' in lines


def test_step_has_the_share_of_the_hooks():
    """Two milliseconds more in hooks, of a step of 100, are 2 %."""
    figures = {name: wall(100, 100) for name in STEP}
    figures['ours'] = wall(103, 103)
    for name, figure in figures.items():
        seconds = 0.001 if name == 'none' else 0.003
        figure.samples['hooks'] = [seconds, seconds]
    lines = lines_of(Case('step', 'rtmdet-tiny', STEP), figures)

    assert ['103 (103 to 103)', '3 (3 to 3)', '3 (3 to 3)', '2 %'] == row(
        lines, 'mmdet_ema'
    )


def test_hook_says_what_it_costs_besides_the_update():
    """1.5 ms instead of 1, of which the update is 0.2: 0.3 besides it."""
    figures = {name: wall(1, 1) for name in HOOK}
    figures['ours'], figures['update'] = wall(1.5, 1.5), wall(0.2, 0.2)
    lines = lines_of(Case('hook', 'a linear layer', HOOK), figures)

    expected = ['1.5 (1.5 to 1.5)', '0.5 (0.5 to 0.5)', '0.3 (0.3 to 0.3)']
    assert expected == row(lines, 'mmdet_ema')


def test_memory_is_in_millions_of_bytes():
    """What is not measured of a competitor is a dash."""
    figures = {name: Figure({'kept': [2.5e6]}) for name in MEMORY}
    lines = lines_of(Case('memory', 'yolox-s', MEMORY), figures)

    assert ['2.5', '-', '-', '-'] == row(lines, 'timm `ModelEmaV3`')


def test_swap_is_compared_with_mmengine():
    """The last row is for the same tensors as ours, buffers included."""
    figures = {name: wall(6, 6) for name in SWAP}
    figures['ours'] = wall(3, 3)
    lines = lines_of(Case('swap', 'yolox-s', SWAP), figures)

    found = row(lines, 'mmengine, `update_buffers=True` / mmdet_ema')
    assert ['2.00x'] == found
