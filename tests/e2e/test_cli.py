"""``mmdet-ema train`` and ``test``, on a real detector."""

import json

import pytest
import torch

pytestmark = pytest.mark.e2e


def without_hook(tools, name, epochs=1):
    """Write the small config with neither the import nor the hook."""
    extra = (
        'del _base_.custom_hooks[0]\n'
        '_base_.custom_hooks[0].update(switch_epoch=1)\n'
        "custom_imports = dict(imports=['math'], _delete_=True)\n"
        f'train_cfg = dict(max_epochs={epochs})\n'
    )
    text = tools.config(name, '').read_text()
    text = text.replace('_base_.custom_hooks[1].update(switch_epoch=2)\n', '')
    path = tools.folder / f'{name}.py'
    path.write_text(text + extra)
    return path


@pytest.fixture(scope='module')
def trained(tools):
    """Train an untouched config by the command line."""
    config = without_hook(tools, 'untouched')
    work_dir = tools.folder / 'cli'
    words = ('--decay', 0.99, '--tau', 50, '--work-dir', work_dir)
    log = tools.cli('train', config, *words)
    return config, work_dir, log


def test_untouched_config_equals_one_with_the_hook(tools, trained):
    """EMA from the command line is EMA from the config, bit for bit."""
    _, work_dir, _ = trained
    hook = (
        '_base_.custom_hooks.append('
        "dict(type='EMAHook', decay=0.99, tau=50))\n"
        "custom_imports = dict(imports=['mmdet_ema'], _delete_=True)\n"
    )
    config = without_hook(tools, 'with_hook')
    config.write_text(config.read_text() + hook)
    tools.run('train', config, tools.folder / 'with_hook')
    left, right = (
        torch.load(folder / 'epoch_1.pth', weights_only=True)
        for folder in (work_dir, tools.folder / 'with_hook')
    )
    for part in ('state_dict', 'ema_state_dict'):
        assert left[part].keys() == right[part].keys()
        for name, value in left[part].items():
            assert torch.equal(value, right[part][name])


def test_other_hooks_are_kept(trained):
    """The config's own hooks still run."""
    _, _, log = trained
    assert 'PipelineSwitchHook' in log
    assert 'EMA: exponential(decay=0.99, tau=50.0)' in log


def test_dumped_config_is_tested_by_the_framework_alone(tools, trained):
    """The config in the work folder imports the package by itself."""
    _, work_dir, _ = trained
    metrics = tools.test(
        work_dir / 'untouched.py', work_dir / 'epoch_1.pth', 'dumped'
    )
    assert 'coco/bbox_mAP' in metrics


@pytest.mark.parametrize('weights', ['raw', 'raw,ema'])
def test_weights_are_chosen(tools, trained, weights):
    """``--weights`` tests what it says, on an untouched config."""
    config, work_dir, _ = trained
    out = tools.folder / f'cli_{weights}'
    file = work_dir / 'epoch_1.pth'
    words = ('--weights', weights, '--work-dir', out)
    log = tools.cli('test', config, file, *words)
    sets = {
        'raw': 'evaluating the raw weights (n=4)',
        'raw,ema': 'evaluating the averages and the raw weights (n=4)',
    }
    assert sets[weights] in log
    (path,) = out.glob('*/*.json')
    names = set(json.loads(path.read_text()))
    assert ('coco/bbox_mAP_raw' in names) == (weights == 'raw,ema')


def test_file_without_raw_weights_is_one_clear_line(tools, trained):
    """``--weights raw`` on a file with one set of weights says so."""
    config, work_dir, _ = trained
    weights = torch.load(work_dir / 'epoch_1.pth', weights_only=True)
    plain = tools.folder / 'plain.pth'
    torch.save(dict(state_dict=weights['state_dict'], meta={}), plain)
    log = tools.cli('test', config, plain, '--weights', 'raw', status=2)
    last = log.strip().splitlines()[-1]
    assert last.startswith("mmdet-ema: error: evaluate='raw' needs raw")


@pytest.mark.parametrize('kept', [0, -2])
def test_file_of_another_architecture_is_refused(tools, trained, kept):
    """It is counted what is there; a few that miss are a warning."""
    config, work_dir, _ = trained
    file = torch.load(work_dir / 'epoch_1.pth', weights_only=True)
    names = [k for k, x in file['state_dict'].items() if x.is_floating_point()]
    for name in names[kept:]:
        file['state_dict'][f'other.{name}'] = file['state_dict'].pop(name)
    torch.save(file, tools.folder / 'other.pth')
    words = ('test', config, tools.folder / 'other.pth')
    log = tools.cli(*words, status=0 if kept else 2)
    found = len(names[:kept])
    text = f'the file has {found} of the {len(names)} weights of the model'
    if kept:
        assert f'EMA: {text} with their shape; the others stay' in log
        assert f'initialised: {names[-2]} and 1 more.' in log
    else:
        last = log.strip().splitlines()[-1]
        assert last.startswith(f'mmdet-ema: error: {text}: it belongs to')


def test_options_replace_those_of_the_config(tools):
    """One line says so; ``--no-ema`` goes on from the raw weights alone."""
    config = tools.config('own_hook', 'train_cfg = dict(max_epochs=1)\n')
    words = ('train', config, '--work-dir', tools.folder / 'own_hook')
    log = tools.cli(*words, '--decay', 0.9, '--device', 'cpu')
    (line,) = [x for x in log.splitlines() if x.startswith('mmdet-ema:')]
    assert line == (
        'mmdet-ema: --decay 0.9 --device cpu instead of decay=0.99 of the '
        'config'
    )
    assert 'EMA: exponential(decay=0.9, tau=50' in log
    more = ('--cfg-options', 'train_cfg.max_epochs=2')
    log = tools.cli(*words, '--no-ema', '--resume', *more)
    assert 'mmdet-ema: --no-ema for the EMA hook of the config' in log
    assert 'training goes on from the raw weights' in log
    path = tools.folder / 'own_hook' / 'epoch_2.pth'
    assert 'ema_state_dict' not in torch.load(path, weights_only=False)


def test_wrong_value_is_refused_before_the_tool_starts(tools, trained):
    """By the option's own check, in one line."""
    log = tools.cli('train', trained[0], '--decay', 1, status=2)
    last = log.strip().splitlines()[-1]
    assert last.startswith('mmdet-ema: error: decay=1.0 is out of range')
    assert 'System environment' not in log


def test_run_is_drawn(tools, trained):
    """The picture's path is all that is printed."""
    pytest.importorskip('matplotlib')
    _, work_dir, _ = trained
    picture = tools.folder / 'run.png'
    assert tools.cli('plot', work_dir, '--out', picture) == f'{picture}\n'
    assert picture.read_bytes().startswith(b'\x89PNG')
    log = tools.cli('plot', work_dir, '--metric', 'coco/bbox_mPA', status=2)
    assert log.startswith('mmdet-ema: error: --metric coco/bbox_mPA: the logs')
    assert "Did you mean 'coco/bbox_mAP'" in log


def test_unknown_scope_is_refused(tools):
    """A config of another framework is one clear line."""
    config = tools.folder / 'scope.py'
    config.write_text("default_scope = 'mmdte'\n")
    log = tools.cli('train', config, status=2)
    last = log.strip().splitlines()[-1]
    assert "has default_scope='mmdte'" in last
    assert "Did you mean 'mmdet'" in last


def test_missing_config_is_refused(tools):
    """A config that is not there is named."""
    log = tools.cli('train', 'nothing.py', status=2)
    assert "there is no config file 'nothing.py'" in log


@pytest.mark.parametrize('command', [(), ('train',), ('test',)])
def test_help_has_examples(tools, command):
    """Help says what there is, and shows how."""
    text = tools.cli(*command, '--help')
    assert 'usage: mmdet-ema' in text
    assert ('examples:' in text) == bool(command)
