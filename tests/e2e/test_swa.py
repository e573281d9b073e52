"""The configs of stochastic weight averaging, on the digits set."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS

from tests.e2e.conftest import CONFIG, assert_mean, load

pytestmark = pytest.mark.e2e

SHORT = """
_base_.custom_hooks[0].update(begin_epoch=3, recalibrate=2)
"""


def config_of(kind):
    return CONFIG.with_name(f'rtmdet_digits_swa-{kind}_1xb8-16e.py')


@pytest.mark.parametrize('kind', ['constant', 'cyclic'])
def test_mean_of_the_last_epochs(tools, kind):
    """The file has the mean, and the statistics of the better metric."""
    extra = SHORT
    if kind == 'cyclic':
        extra += '_base_.custom_hooks[0].update(interval=4)\n'
    config = tools.config(f'swa_{kind}', extra, config_of(kind))
    work_dir = tools.folder / f'swa_{kind}'
    log = tools.run('train', config, work_dir)
    assert 'EMA: recalibrate=2: estimating the statistics of' in log
    assert 'before, ' in log
    kept = 'the new ones are kept' in log
    assert kept is not ('the old ones stay' in log)
    third, fourth = (load(work_dir / f'epoch_{n}.pth') for n in (3, 4))
    assert (
        fourth['ema_meta']['num_updates'] == {'constant': 8, 'cyclic': 2}[kind]
    )
    if kind == 'constant':
        return
    assert_mean(fourth['state_dict'], third, fourth, kept=kept)
    metrics = tools.test(config, work_dir / 'epoch_4.pth', f'swa_{kind}')
    last = f'coco/bbox_mAP: {metrics["coco/bbox_mAP"]:.4f}'
    assert last in log.rpartition('Epoch(val)')[2]


def test_learning_rate_of_the_cycles():
    """A cosine to the lowest, then a cycle an epoch from the highest."""
    config = Config.fromfile(config_of('cyclic'))
    rate = config.optim_wrapper.optimizer.lr
    wrapper = build_optim_wrapper(
        torch.nn.Linear(1, 1),
        dict(optimizer=dict(type='SGD', lr=rate)),
    )
    schedulers = [
        PARAM_SCHEDULERS.build(dict(each, optimizer=wrapper))
        for each in config.param_scheduler
    ]
    rates = []
    for _ in range(1600):
        rates += [wrapper.param_groups[0]['lr'] / rate]
        wrapper.optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(0.01)
    assert rates[50] == pytest.approx(1)
    for start in range(1000, 1600, 100):
        assert rates[start] == pytest.approx(1)
        assert rates[start + 50] == pytest.approx(0.505)
        assert rates[start + 99] < 0.0103
