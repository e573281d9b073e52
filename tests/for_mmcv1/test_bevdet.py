"""``MEGVIIEMAHook``: BEVDet's numbers, its second file, its own class."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from mmcv.runner import HOOKS, Hook
from mmcv.utils import build_from_cfg

from mmdet_ema import CheckpointError, EMAHook, OptionError
from tests import oracle
from tests.for_mmcv1.toy import (
    Lines,
    Run,
    ToyModel,
    model_of,
    quiet,
    raw_of,
    same,
)

# float32 rounds each of 16 updates to 6e-8 of the magnitude, on both sides
TOLERANCE = 2e-6
NAME = 'MEGVIIEMAHook'
STEPS = 4  # of an epoch


class Peer:
    """What that hook does, from its formula: a copy of the whole model.

    Floats of the ``state_dict`` are averaged at every iteration; integers
    stay as they were in the copy.
    """

    def __init__(self, model, init_updates=0, decay=0.999):
        self.model = copy.deepcopy(model).eval()
        self.updates, self.decay = init_updates, decay

    @torch.no_grad()
    def update(self, weights):
        self.updates += 1
        d = self.decay * (1 - math.exp(-self.updates / 2000))
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                value.mul_(d).add_(weights[name], alpha=1 - d)

    def write(self, path, **moment):
        """Write its second file."""
        weights = self.model.state_dict()
        file = dict(moment, state_dict=weights, updates=self.updates)
        torch.save(file, path)


class Untied(ToyModel):
    """Without tied weights, which that hook averages twice a step."""

    def __init__(self):
        super().__init__()
        weight = self.tied.weight.detach().clone()
        self.tied.weight = torch.nn.Parameter(weight)


def run(folder, hook=None, epochs=2, handler=None, **options):
    hooks = [] if hook is None else [dict(dict(type=NAME), **hook)]
    return Run(
        folder,
        *hooks,
        model=Untied(),
        runner=dict(max_epochs=epochs),
        logger=quiet(handler),
        **options,
    )


def compare(saved, peer, records):
    """Compare a file of ours with the peer's average, and with the raw."""
    for name, expected in peer.model.state_dict().items():
        found = saved['state_dict'][name]
        if not expected.is_floating_point():
            assert torch.equal(records[-1][name], found), name
            assert not torch.equal(expected, found), name
        elif expected.dtype == torch.float32:
            error = oracle.relative_error(found, expected.numpy())
            assert error < TOLERANCE, name
    assert [] == same(raw_of(saved), records[-1])


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(init_updates=10560),
        dict(init_updates=10560, decay=0.99, resume=None, interval=-1),
        dict(decay=0.9990, priority='NORMAL'),
    ],
)
def test_numbers(options, tmp_path):
    """Its options have the numbers of that hook, integers aside."""
    words = {
        k: v for k, v in options.items() if k in ('init_updates', 'decay')
    }
    peer = Peer(Untied(), **words)
    done = run(tmp_path, options).train()
    for weights in done.records:
        peer.update(weights)
    assert 2 * STEPS == len(done.records)
    saved = done.load('epoch_2.pth')
    assert (
        2 * STEPS
        == saved['meta']['hook_msgs']['EMAHook']['ema_state_dict']['steps']
    )
    compare(saved, peer, done.records)


def test_schedule_is_said(tmp_path):
    """The report names the ramp's start; a schedule's option does the same."""
    lines = Lines()
    run(tmp_path / 'a', dict(init_updates=10560), handler=lines).train()
    ramp = 'exponential(decay=0.999, tau=2000.0, init_updates=10560)'
    assert f'INFO EMA: {ramp}, every step' in '\n'.join(lines.lines)
    schedule = dict(type='exponential', decay=0.999, init_updates=10560)
    other = dict(type='EMAHook', schedule=schedule)
    left = run(tmp_path / 'b', other).train().load('epoch_2.pth')
    right = run(tmp_path / 'a').load('epoch_2.pth')
    assert [] == same(left['state_dict'], right['state_dict'])


def test_evaluations_see_the_averages(tmp_path):
    """Validation is of the averages, and there is no second file."""
    done = run(tmp_path, dict(init_updates=10560)).train()
    (_, seen) = done.recorder.seen[-1]
    saved = done.load('epoch_2.pth')['state_dict']
    # the average of a bfloat16 tensor is float32, the model is not
    assert ['low'] == same(seen, saved)
    assert torch.equal(seen['low'], saved['low'].bfloat16())
    assert [] != same(seen, raw_of(done.load('epoch_2.pth')))
    names = {path.name for path in tmp_path.glob('*.pth')}
    assert {'epoch_1.pth', 'epoch_2.pth', 'latest.pth'} == names


def train_with_the_peer(folder, init_updates=10560, **moment):
    """Train without our hook; write the peer's second file at the end."""
    peer = Peer(Untied(), init_updates, 0.99)
    for weights in run(folder).train().records:
        peer.update(weights)
    path = folder / 'epoch_2_ema.pth'
    peer.write(path, **(moment or dict(epoch=2)))
    return peer, path


def resume(folder, name='epoch_2.pth', epochs=3, **hook):
    """Resume with our hook; return the run and what it logged."""
    lines = Lines()
    hook = dict(dict(init_updates=10560, decay=0.99), **hook)
    rest = run(folder, hook, epochs=epochs, handler=lines)
    return rest.train(resume=folder / name), lines.lines


def change(path, **parts):
    """Write a file once more, with other parts."""
    torch.save({**torch.load(path), **parts}, path)


def warnings(lines, word=''):
    return [x for x in lines if x.startswith('WARNING') and word in x]


@pytest.mark.parametrize(
    ('epoch', 'prefix'), [(1, ''), (2, ''), (2, 'module.')]
)
def test_second_file_is_resumed(epoch, prefix, tmp_path):
    """Averages and n come from the second file, the rest from the first.

    That of a model in DDP has the wrapper's name before all.
    """
    peer, path = train_with_the_peer(tmp_path, epoch=epoch)
    weights = peer.model.state_dict().items()
    change(path, state_dict={f'{prefix}{name}': x for name, x in weights})
    rest, lines = resume(tmp_path, epochs=4, resume=str(path))
    for weights in rest.records:
        peer.update(weights)
    saved = rest.load('epoch_4.pth')
    compare(saved, peer, rest.records)
    meta = saved['meta']['hook_msgs']['EMAHook']['ema_meta']
    assert 4 * STEPS == meta['steps']
    assert [] == warnings(lines, 'epoch_2')
    assert any(f'are those of {str(path)!r}' in x for x in lines)


def test_resumed_again_from_our_own_file(tmp_path):
    """``resume`` that stays in the config does not undo what was averaged."""
    _, path = train_with_the_peer(tmp_path)
    whole, _ = resume(tmp_path, epochs=4, resume=str(path))
    expected = whole.load('epoch_4.pth')['state_dict']
    rest, lines = resume(tmp_path, 'epoch_3.pth', 4, resume=str(path))
    assert [] == same(rest.load('epoch_4.pth')['state_dict'], expected)
    (line,) = warnings(lines, 'epoch_2')
    assert f'resume={str(path)!r} has no effect' in line


@pytest.mark.parametrize('name', ['epoch_2.pth', 'latest.pth'])
def test_second_file_that_was_forgotten_is_named(name, tmp_path):
    """A second file that lies beside the first is not passed over silently."""
    _, path = train_with_the_peer(tmp_path)
    (line,) = warnings(resume(tmp_path, name)[1], 'epoch_2_ema')
    assert f'give the hook resume={str(path)!r}' in line
    # and the file without one beside it is not mentioned
    assert [] == warnings(resume(tmp_path, 'epoch_1.pth')[1], '_ema.pth')


def test_file_of_another_epoch_is_named(tmp_path):
    """Averages and raw weights of different epochs are worth a warning."""
    _, path = train_with_the_peer(tmp_path)
    _, lines = resume(tmp_path, 'epoch_1.pth', 2, resume=str(path))
    (line,) = warnings(lines, 'different moments')
    assert 'was written at epoch 2, the checkpoint at epoch 1' in line


def test_tensors_that_are_missing_are_named(tmp_path):
    """What the second file lacks starts from the raw weights, and is said."""
    peer, path = train_with_the_peer(tmp_path)
    weights = dict(peer.model.state_dict())
    del weights['head.bias']
    change(path, state_dict=weights)
    rest, lines = resume(tmp_path, resume=str(path))
    (line,) = warnings(lines, 'are not in')
    assert '1 tensors' in line
    assert 'head.bias' in line
    before = rest.recorder.start['head.bias'].double().numpy()
    values = [r['head.bias'].double().numpy() for r in rest.records]
    n = 10560 + 2 * STEPS
    expected = oracle.average(
        before, values, lambda k: oracle.ramp(n + k, 0.99)
    )
    found = rest.load('epoch_3.pth')['state_dict']['head.bias']
    assert oracle.relative_error(found, expected) < TOLERANCE


def other_model(path):
    weights = torch.load(path)['state_dict'].items()
    change(path, state_dict={f'x.{name}': value for name, value in weights})


def other_shape(path):
    weights = torch.load(path)['state_dict']
    change(path, state_dict={**weights, 'head.bias': torch.zeros(5)})


def no_count(path):
    change(path, updates=None)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:500])


class Evil:
    def __reduce__(self):
        return print, ('this must not run',)


def evil(path):
    torch.save(dict(updates=Evil()), path)


@pytest.mark.parametrize(
    ('spoil', 'options', 'words'),
    [
        (other_model, {}, 'averages of .* x.first.weight.*the file beside it'),
        (other_shape, {}, 'does not fit: .*head.bias'),
        (no_count, {}, "no EMA file of BEVDet's .*epoch_N_ema.pth"),
        (cut_off, {}, 'cut off'),
        (evil, {}, 'which is not a part of weights'),
        (None, dict(init_updates=10569), 'init_updates=10569 is more than '),
        (None, dict(resume='nowhere.pth'), "no file 'nowhere.pth'"),
        (None, dict(resume='epoch_1.pth'), 'no EMA file of'),
    ],
)
def test_second_file_that_does_not_do(
    spoil, options, words, tmp_path, monkeypatch, capsys
):
    """It is refused in one line before anything is trained."""
    _, path = train_with_the_peer(tmp_path)
    if spoil is not None:
        spoil(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        resume(tmp_path, epochs=4, **{'resume': str(path), **options})
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'epoch_3.pth').exists()
    assert 'this must not run' not in capsys.readouterr().out


def test_second_file_needs_the_first(tmp_path):
    """Averages without the raw weights of their run are refused."""
    _, path = train_with_the_peer(tmp_path)
    fresh = run(tmp_path, dict(resume=str(path)))
    with pytest.raises(OptionError, match='--resume-from epoch_N'):
        fresh.train()
    assert [] == fresh.records


def test_second_file_in_place_of_the_first(tmp_path):
    """A run cannot resume from averages; the line says what to do."""
    _, path = train_with_the_peer(tmp_path)
    with pytest.raises(CheckpointError, match='give the hook resume='):
        resume(tmp_path, path.name, 4)
    # to start a new training from them is fine
    fresh = run(tmp_path, dict(init_updates=10560), epochs=1).train(load=path)
    start = fresh.recorder.start
    expected = torch.load(path)['state_dict']
    floats = [k for k, v in expected.items() if v.is_floating_point()]
    assert [k for k in floats if not torch.equal(start[k], expected[k])] == []


def test_interval_saves_nothing(tmp_path):
    """How often that hook saved is no interval of the updates."""
    lines = Lines()
    hook = dict(decay=0.99, interval=3)
    left = run(tmp_path / 'a', hook, handler=lines).train()
    right = run(tmp_path / 'b', dict(decay=0.99)).train()
    (line,) = [x for x in lines.lines if 'interval=3' in x]
    assert 'no second file is written' in line
    files = [x.load('epoch_2.pth')['state_dict'] for x in (left, right)]
    assert [] == same(*files)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(init_updates=-1), 'init_updates=-1'),
        (dict(init_updates=None), 'init_updates=None'),
        (dict(init_updates='10560'), "init_updates='10560'"),
        (dict(decay=1), 'decay=1 '),
        (dict(decay=0.9, momentum=0.1), 'momentum=0.1'),
        (dict(interval=0), 'interval=0 .*Or -1, for each epoch'),
        (dict(resume=3), 'resume=3 is no path'),
        (dict(resume=''), "resume='' is no path"),
        (dict(init_update=3), "MEGVIIEMAHook has no.*Did you mean 'init_upd"),
        (dict(warm_up=3), 'warm_up=3 has no meaning for MEGVIIEMAHook'),
        (dict(schedule='mean'), "dict\\(type='EMAHook', schedule="),
    ],
)
def test_wrong_options(options, words):
    """One line names the value, what is allowed and what to do."""
    with pytest.raises(OptionError, match=words) as error:
        build_from_cfg(dict(type=NAME, **options), HOOKS)
    assert '\n' not in str(error.value)


ORDER = """
import sys
from mmcv.runner import HOOKS, Hook

def bevdet(package):
    class MEGVIIEMAHook(Hook):
        def __init__(self, init_updates=0, decay=0.9990, resume=None,
                     interval=-1):
            pass
    MEGVIIEMAHook.__module__ = package
    HOOKS.register_module()(MEGVIIEMAHook)
    return MEGVIIEMAHook

if sys.argv[1] == 'before':
    theirs = bevdet('mmdet3d.core.hook.ema')
import mmdet_ema
if sys.argv[1] == 'after':
    theirs = bevdet('projects.mmdet3d_plugin.core.ema')
from mmdet_ema.for_mmcv1.registration import register
register()
assert HOOKS.get('MEGVIIEMAHook').__module__.startswith('mmdet_ema.')
assert HOOKS.get('BEVDetMEGVIIEMAHook') is theirs
print('fine')
"""


@pytest.mark.parametrize('order', ['before', 'after'])
def test_class_of_a_project_gets_another_name(order):
    """Ours is built, whenever a project registers its own of that name."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', ORDER, order],
        capture_output=True,
        text=True,
    )
    assert 'fine' == done.stdout.split()[-1], done.stderr


def test_both_hooks_are_refused(tmp_path):
    """Ours beside that of a project would average twice."""
    kind = type(NAME, (Hook,), {})
    assert not issubclass(kind, EMAHook)
    done = run(tmp_path, dict())
    done.runner.register_hook(kind())
    with pytest.raises(OptionError, match='there are 2 EMA hooks'):
        done.train()


class Rebuild(Hook):
    """Puts other BatchNorm layers around the same tensors, as SyncBN does."""

    def before_train_epoch(self, runner):
        model = model_of(runner)
        old, model.norm = model.norm, torch.nn.BatchNorm1d(4)
        for name, value in (*old._parameters.items(), *old._buffers.items()):
            setattr(model.norm, name, value)


def test_layers_that_are_rebuilt_each_epoch(tmp_path):
    """BEVDet's second hook exchanges BatchNorm layers, not their tensors."""
    peer = Peer(Untied(), 10560, 0.99)
    done = run(tmp_path, dict(init_updates=10560, decay=0.99))
    done.runner.register_hook(Rebuild())
    done.train()
    for weights in done.records:
        peer.update(weights)
    compare(done.load('epoch_2.pth'), peer, done.records)
