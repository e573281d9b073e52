"""What is measured on a GPU."""

import pytest
import torch

from benchmarks.clocks import DeviceClock, count_syncs
from benchmarks.figures import Case
from benchmarks.plan import LOOP
from benchmarks.rounds import Limits
from benchmarks.worker import measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'),
]
FEW = Limits(seconds=0, least=3)


def test_syncs_are_counted():
    """Two ``.item()`` make the host wait twice, a sum not at all."""
    values = torch.ones(8, device='cuda')

    assert count_syncs(lambda: values.sum()) == 0
    assert count_syncs(lambda: (values[0].item(), values[1].item())) == 2


def test_device_time_leaves_the_host_out():
    """A kernel of some ms keeps the device busy, not the host."""
    values = torch.ones(2**28, device='cuda')

    found = DeviceClock().measure(lambda: values.mul_(1.0))

    assert found['host'] < found['device']
    assert found['device'] <= found['wall'] * 1.5


def test_update_has_all_three_times_and_the_syncs():
    """Ours never makes the host wait."""
    case = Case('update', '300x3145728', ('floor', 'ours'), 'cuda', 1, 'cold')

    figures = measure(case, FEW)

    metrics = {'wall', 'host', 'device', 'syncs'}
    assert metrics == figures['ours'].samples.keys()
    assert figures['ours'].samples['syncs'] == [0]


def test_memory_is_that_of_the_device():
    """One copy of 16 MiB is kept; in host memory none."""
    size = 16 * 2**20
    case = Case('memory', f'4x{size}', ('ours', 'ours-host'), 'cuda')

    figures = measure(case, FEW)

    assert size <= figures['ours'].samples['kept'][0] < 1.2 * size
    assert figures['ours-host'].samples['kept'][0] < 0.5 * size


def test_plain_loop_is_measured_with_every_competitor():
    """All have a figure but those that are not installed."""
    figures = measure(Case('loop', 'retinanet-r50', LOOP, 'cuda'), FEW)

    for figure in figures.values():
        reason = figure.failed or 'not installed'
        assert reason.startswith('not installed')
