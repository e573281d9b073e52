"""``mmdet-ema train`` and ``test`` with the tools of mmdet 2."""

import json

import pytest

from tests.e2e.conftest import cli
from tests.mmcv1_tools.conftest import EPOCHS, differing, load
from tests.mmcv1_tools.test_mmdet2_tools import NO_HOOK, validation

pytestmark = pytest.mark.e2e


def test_untouched_config_equals_one_with_the_hook(tools, trained):
    """EMA from the command line is EMA from the config, bit for bit."""
    config, work_dir = tools.config('untouched', NO_HOOK), tools.folder / 'cli'
    words = ('--decay', 0.9, '--tau', 5, '--work-dir', work_dir)
    words += ('--seed', 0, '--gpu-ids', 0)
    log = cli(tools, 'train', config, *words)
    assert 'EMA: exponential(decay=0.9, tau=5' in log
    name = f'epoch_{EPOCHS}.pth'
    assert [] == differing(load(work_dir / name), load(trained[1] / name))


@pytest.mark.parametrize(('weights', 'prefix'), [('ema', ''), ('raw', 'raw/')])
def test_weights_are_chosen(tools, trained, weights, prefix):
    """``--weights`` gives the metrics that the training saw."""
    _, work_dir, _ = trained
    config, out = tools.config('plain', NO_HOOK), tools.folder / weights
    file = work_dir / f'epoch_{EPOCHS}.pth'
    words = ('--weights', weights, '--eval', 'bbox', '--work-dir', out)
    printed = cli(tools, 'test', config, file, *words)
    assert 'unexpected key' not in printed
    (path,) = out.glob('eval_*.json')
    metrics = json.loads(path.read_text())['metric']
    expected = validation(work_dir, prefix)
    assert expected == {name: metrics[name] for name in expected}


def test_both_weights(tools, trained):
    """``--weights both`` tests the raw weights, then the averages."""
    _, work_dir, _ = trained
    config = tools.config('plain', NO_HOOK)
    file = work_dir / f'epoch_{EPOCHS}.pth'
    words = ('--weights', 'both', '--eval', 'bbox')
    printed = cli(tools, 'test', config, file, *words)
    raw, ema = (printed.index(f'testing the {x} w') for x in ('raw', 'EMA'))
    assert raw < printed.index('bbox_mAP') < ema
    assert 2 == printed.count("OrderedDict([('bbox_mAP'")


def test_missing_checkpoint(tools):
    """A checkpoint that is not there is refused in one line."""
    config = tools.config('plain', NO_HOOK)
    printed = cli(tools, 'test', config, 'nowhere.pth', status=2)
    assert "there is no checkpoint 'nowhere.pth'" in printed
