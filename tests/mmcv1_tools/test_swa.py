"""The configs of stochastic weight averaging, with the tools of mmdet 2."""

import pytest
from mmcv import Config
from mmcv.runner.hooks import HOOKS

from tests.e2e.conftest import assert_mean
from tests.mmcv1_tools.conftest import CONFIG, load

pytestmark = pytest.mark.e2e


def config_of(kind):
    return CONFIG.with_name(f'atss_digits_swa-{kind}_1xb8-16e.py')


@pytest.mark.parametrize('kind', ['constant', 'cyclic'])
def test_mean_of_the_last_epochs(tools, kind):
    """The file has the mean, and the statistics of the better metric."""
    (hook,) = Config.fromfile(config_of(kind)).custom_hooks
    assert hook['interval' if kind == 'cyclic' else 'recalibrate'] == 100
    hook.update(begin_epoch=3, recalibrate=2, priority='NORMAL')
    if kind == 'cyclic':
        hook['interval'] = 4
    extra = f'custom_hooks = [{dict(hook)!r}]\n'
    config = tools.config(f'swa_{kind}', extra, base=config_of(kind))
    work_dir = tools.folder / f'swa_{kind}'
    log = tools.train(config, work_dir)
    assert 'EMA: recalibrate=2: estimating the statistics of' in log
    kept = 'the new ones are kept' in log
    assert kept is not ('the old ones stay' in log)
    third, fourth = (load(work_dir / f'epoch_{n}.pth') for n in (3, 4))
    updates = {'constant': 8, 'cyclic': 2}[kind]
    assert fourth['ema_meta']['num_updates'] == updates
    if kind == 'constant':
        return
    assert_mean(fourth['state_dict'], third, fourth, kept=kept)


def test_learning_rate_of_the_cycles():
    """A cosine to the lowest, then a cycle an epoch from the highest."""
    settings = dict(Config.fromfile(config_of('cyclic')).lr_config)
    kind = f'{settings.pop("policy")}LrUpdaterHook'
    hook = HOOKS.build(dict(settings, type=kind))

    class Runner:
        iter = 0

    for start in range(1000, 1600, 100):
        for step, share in [(0, 1), (50, 0.505), (99, 0.0102)]:
            Runner.iter = start + step
            found = hook.get_lr(Runner, 1.0)
            assert found == pytest.approx(share, abs=1e-3)
