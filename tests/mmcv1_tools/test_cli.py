"""``mmdet-ema train`` and ``test`` with the tools of mmdet 2."""

import json

import pytest
import torch
from mmcv import Config

from mmdet_ema.cli.commands import add_ema
from tests.mmcv1_tools.conftest import EPOCHS, RECORD, differing, load
from tests.mmcv1_tools.test_mmdet2_tools import NO_HOOK, validation

pytestmark = pytest.mark.e2e


def test_untouched_config_equals_one_with_the_hook(tools, trained):
    """EMA from the command line is EMA from the config, bit for bit."""
    config, work_dir = tools.config('untouched', NO_HOOK), tools.folder / 'cli'
    words = ('--decay', 0.9, '--tau', 5, '--work-dir', work_dir)
    words += ('--seed', 0, '--gpu-ids', 0)
    log = tools.cli('train', config, *words)
    assert 'EMA: exponential(decay=0.9, tau=5' in log
    name = f'epoch_{EPOCHS}.pth'
    assert [] == differing(load(work_dir / name), load(trained[1] / name))


@pytest.mark.parametrize('weights', ['ema', 'raw', 'fast'])
def test_weights_are_chosen(tools, trained, weights):
    """``--weights`` gives the metrics that the training saw."""
    _, work_dir, _ = trained
    config, out = tools.config('plain', NO_HOOK), tools.folder / weights
    file = work_dir / f'epoch_{EPOCHS}.pth'
    words = ('--weights', weights, '--eval', 'bbox', '--work-dir', out)
    printed = tools.cli('test', config, file, *words)
    assert 'unexpected key' not in printed
    (path,) = out.glob('eval_*.json')
    metrics = json.loads(path.read_text())['metric']
    end = '' if weights == 'ema' else f'_{weights}'
    expected = validation(work_dir, end)
    assert expected == {name: metrics[name] for name in expected}


def test_both_weights(tools, trained):
    """``--weights both`` tests the raw weights, then the averages."""
    _, work_dir, _ = trained
    config = tools.config('plain', NO_HOOK)
    file = work_dir / f'epoch_{EPOCHS}.pth'
    words = ('--weights', 'both', '--eval', 'bbox')
    printed = tools.cli('test', config, file, *words)
    raw, ema = (printed.index(f'testing the {x} w') for x in ('raw', 'EMA'))
    assert raw < printed.index('bbox_mAP') < ema
    assert 2 == printed.count("OrderedDict([('bbox_mAP'")


def test_missing_checkpoint(tools):
    """A checkpoint that is not there is refused in one line."""
    config = tools.config('plain', NO_HOOK)
    printed = tools.cli('test', config, 'nowhere.pth', status=2)
    assert "there is no checkpoint 'nowhere.pth'" in printed


def test_file_of_another_architecture_is_refused(tools, trained):
    """It is counted what is there, in the weights that are to be tested."""
    _, work_dir, _ = trained
    config = tools.config('plain', NO_HOOK)
    file = torch.load(work_dir / f'epoch_{EPOCHS}.pth')
    names = [k for k, x in file['state_dict'].items() if x.is_floating_point()]
    for kept, status in ((-2, 0), (0, 2)):
        weights = file['state_dict']
        for name in names[kept:]:
            if name in weights:
                weights[f'other.{name}'] = weights.pop(name)
        torch.save(file, tools.folder / 'other.pth')
        words = (tools.folder / 'other.pth', '--eval', 'bbox')
        log = tools.cli('test', config, *words, status=status)
        found = len(names[:kept])
        text = f'mmdet-ema: {"error: " if status else ""}the file has {found}'
        assert f'{text} of the {len(names)} weights of the model' in log
        assert ("OrderedDict([('bbox_mAP'" in log) == (status == 0)


def test_run_is_drawn(tools, trained):
    """The picture's path is all that is printed."""
    pytest.importorskip('matplotlib')
    _, work_dir, _ = trained
    picture = work_dir / 'ema.png'
    assert tools.cli('plot', work_dir) == f'{picture}\n'
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_resume_without_an_average(tools, trained):
    """``--no-ema`` goes on from the raw weights, and writes them alone."""
    config = tools.config('longer', RECORD, epochs=EPOCHS + 1)
    work_dir, file = tools.folder / 'off', trained[1] / f'epoch_{EPOCHS}.pth'
    words = ('--work-dir', work_dir, '--resume-from', file, '--gpu-ids', 0)
    log = tools.cli('train', config, '--no-ema', *words)
    assert 'mmdet-ema: --no-ema for the EMA hook of the config' in log
    assert 'training goes on from the raw weights' in log
    saved = torch.load(work_dir / f'epoch_{EPOCHS + 1}.pth')
    recorded = torch.load(work_dir / f'recorded_{EPOCHS * 4}.pt')
    for name, rows in recorded.items():
        assert torch.equal(saved['state_dict'][name], rows[-1])
        raw = load(file)['ema_state_dict'][f'module.{name}']
        assert torch.equal(raw, rows[0])


@pytest.mark.parametrize(
    ('hook', 'given', 'expected'),
    [
        (
            dict(type='EMAHook', momentum=0.1, warm_up=9),
            dict(decay=0.8),
            dict(decay=0.8, warm_up=9, update_buffers=False),
        ),
        (
            dict(type='EMAHook', momentum=0.1),
            dict(decay=0.8),
            dict(decay=0.8, warm_up=100, update_buffers=False),
        ),
        (
            dict(type='ExpMomentumEMAHook', total_iter=9, skip_buffers=True),
            dict(decay=0.8),
            dict(decay=0.8, tau=9, update_buffers=False),
        ),
        (
            dict(type='LinearMomentumEMAHook', momentum=0.1, priority=49),
            dict(schedule='inverse'),
            dict(
                decay=0.9,
                schedule='inverse',
                update_buffers=True,
                priority=49,
            ),
        ),
        (
            dict(type='MEGVIIEMAHook', init_updates=7, momentum=0.1),
            dict(decay=0.8),
            dict(
                type='MEGVIIEMAHook',
                init_updates=7,
                decay=0.8,
                tau=2000,
                update_buffers=True,
            ),
        ),
    ],
)
def test_options_replace_those_of_mmcvs_hooks(hook, given, expected):
    """What followed from the name and the words of a hook is kept."""
    cfg = Config(dict(custom_hooks=[hook]))
    add_ema(cfg, given)
    assert cfg.custom_hooks == [{'type': 'EMAHook', **expected}]
