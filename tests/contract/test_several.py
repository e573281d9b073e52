"""Several averages in one run: files, evaluations, and what is resumed."""

from itertools import zip_longest

import pytest
import torch

from mmdet_ema import OptionError
from tests import oracle
from tests.contract.toy import EMA, Run, ramp, same

FAST = dict(decay=0.5, tau=2)
MORE = dict(fast=FAST, flat=dict(schedule='constant', decay=0.75))
SEVERAL = dict(EMA, averages=MORE)


def fast(n):
    return oracle.ramp(n, 0.5, 2)


# beside the main one: eight in all
SEVEN = dict(
    MORE,
    slow=dict(decay=0.99, tau=4),
    mean=dict(schedule='mean'),
    tf=dict(schedule='inverse'),
    power=dict(schedule=dict(type='power', power=0.75)),
    half=dict(schedule=dict(type='half_life', half_life=2)),
)


def alone(folder, name, **options):
    """A run whose main average is the one of that name."""
    spec = EMA if name == 'ema' else dict(type='EMAHook', **SEVEN[name])
    return Run(folder, spec, **options).train()


def more_of(saved):
    """Further averages in a file, and what is said of them."""
    states = dict(saved.part['ema_averages'])
    return {name: dict(state) for name, state in states.items()}


def test_each_of_eight_is_what_a_run_alone_has(tmp_path):
    """Files and what is evaluated, bit for bit.

    The training is that of a run without an EMA hook.
    """
    spec = dict(EMA, averages=SEVEN, evaluate='all')
    run = Run(tmp_path / 'all', spec).train()
    plain = Run(tmp_path / 'plain').train()
    for left, right in zip_longest(plain.records, run.records):
        assert [] == same(left, right)
    saved, order = run.load(), ['raw', *SEVEN, 'ema']
    assert [steps for steps, _ in run.seen] == [4] * 9 + [8] * 9
    for name in ('ema', *SEVEN):
        other = alone(tmp_path / name, name)
        expected = other.load()
        assert [] == same(other.records[-1], run.records[-1])
        found = saved.averages
        if name != 'ema':
            state = more_of(saved)[name]
            found = state['state_dict']
            assert state['num_steps'] == 8
            assert state['schedule'] == expected.meta['schedule']
        names = found.keys()
        assert [] == same(found, {k: expected.averages[k] for k in names})
        for step, (_, seen) in enumerate(other.seen):
            mine = run.seen[9 * step + order.index(name)][1]
            assert [] == same(mine, seen)
    assert {} == run.wrong(saved, ramp)


def test_resume(tmp_path):
    """All averages go on bit for bit."""
    whole = Run(tmp_path / 'whole', SEVERAL, epochs=3).train().load()
    Run(tmp_path / 'part', SEVERAL, epochs=2).train()
    path = tmp_path / 'part' / 'epoch_2.pth'
    rest = Run(tmp_path / 'part', SEVERAL, epochs=3, resume=path).train()
    left, right = whole, rest.load()
    assert [] == same(left.raws, right.raws)
    assert [] == same(left.averages, right.averages)
    for name, state in more_of(left).items():
        other = more_of(right)[name]
        assert [] == same(state.pop('state_dict'), other.pop('state_dict'))
        assert state == other
    assert 'the checkpoint has the averages' not in rest.log


def test_resume_with_other_averages(tmp_path):
    """What is new starts from the raw weights, what is gone is dropped."""
    Run(tmp_path, SEVERAL, epochs=1).train()
    changed = dict(EMA, averages=dict(new=FAST, flat=MORE['flat']))
    path = tmp_path / 'epoch_1.pth'
    run = Run(tmp_path, changed, epochs=2, resume=path).train()
    assert (
        'WARNING EMA: the checkpoint has the averages ema, fast, flat; new '
        'starts from the raw weights, n = 0; fast is dropped.' in run.log
    )
    states = more_of(run.load())
    assert (4, 8) == (states['new']['num_steps'], states['flat']['num_steps'])
    start, values = run.trace('head.weight')
    expected = oracle.average(start, values, fast)
    found = states['new']['state_dict']['head.weight'].double()
    assert oracle.relative_error(found, expected) < 1e-6


def test_file_of_one_average(tmp_path):
    """A file without the others resumes; theirs start from the raw ones."""
    Run(tmp_path, EMA, epochs=1).train()
    path = tmp_path / 'epoch_1.pth'
    run = Run(tmp_path, SEVERAL, epochs=2, resume=path).train()
    assert 'flat starts from the raw weights' in run.log
    assert run.load().steps == 8


def test_deployed(tmp_path):
    """``deploy`` says which average is in ``state_dict``; resume is exact."""
    chosen = dict(SEVERAL, deploy='fast')
    one = alone(tmp_path / 'fast', 'fast', epochs=3).load()
    run = Run(tmp_path / 'chosen', chosen, epochs=2).train()
    short = alone(tmp_path, 'fast').load()
    assert [] == same(run.load().averages, short.averages)
    path = tmp_path / 'chosen' / 'epoch_2.pth'
    rest = Run(tmp_path / 'chosen', chosen, epochs=3, resume=path).train()
    saved = rest.load()
    assert saved.meta['deploy'] == 'fast'
    assert [] == same(saved.averages, one.averages)
    assert {'ema', 'flat'} == set(more_of(saved))
    assert 'changed since the checkpoint' not in rest.log


@pytest.mark.parametrize('damage', ['shape', 'name', 'counter', 'part'])
def test_damaged_file(tmp_path, damage):
    """One line that names what is wrong, before a weight is loaded."""
    saved = Run(tmp_path, SEVERAL, epochs=1).train().load()
    state = saved.part['ema_averages']['fast']
    if damage == 'shape':
        state['state_dict']['head.weight'] = torch.zeros(3)
    elif damage == 'name':
        state['state_dict'] = [1]
    elif damage == 'counter':
        state['num_steps'] = -1
    else:
        saved.part['ema_averages']['fast'] = 'lost'
    run = Run(tmp_path, SEVERAL, epochs=2, resume=saved.write())
    match = 'num_steps=-1' if damage == 'counter' else 'head.weight|fast'
    run.refuse(ValueError, match)


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        (dict(evaluate='fats'), "evaluate='fats' is not known.*'fast'"),
        (dict(evaluate=['ema', 'slow']), "evaluate='slow' is not known"),
        (dict(evaluate=[]), "is not allowed; use one of 'ema', 'raw', 'fast'"),
        (dict(deploy='raw'), "deploy='raw' is not known; choose one of 'ema'"),
        (dict(averages=dict(all={})), "the name 'all' is taken"),
    ],
)
def test_refused_at_the_start(tmp_path, options, match):
    """A name that is not there is found before the training."""
    with pytest.raises(OptionError, match=match):
        Run(tmp_path, dict(SEVERAL, **options))


def test_best_file_of_another_average(tmp_path):
    """The metric of any set may choose the best file."""
    ema = dict(SEVERAL, evaluate=['ema', 'fast'])
    Run(tmp_path, ema, best='score_fast').train()
    assert list(tmp_path.glob('best_score_fast_*.pth'))


def restarted(run, key, epoch_2_at=4):
    """Oracle of an average that starts again before the second epoch."""
    _, values = run.trace(key)
    return oracle.average(values[epoch_2_at - 1], values[epoch_2_at:], ramp)


@pytest.mark.parametrize('resumes', [False, True])
def test_restart(tmp_path, resumes):
    """The averages start again before an epoch, with n = 0, once."""
    ema = dict(SEVERAL, restart_epochs=[2])
    run = Run(tmp_path, ema, epochs=2)
    if resumes:
        whole = Run(tmp_path / 'whole', ema, epochs=2).train()
        path = tmp_path / 'whole' / 'epoch_1.pth'
        run = Run(tmp_path / 'rest', ema, epochs=2, resume=path)
    saved = run.train().load()
    assert saved.steps == 4
    assert saved.meta['restarted'] == 2
    assert {4} == {x['num_steps'] for x in more_of(saved).values()}
    assert 1 == run.log.count('epoch 2: the averages start again')
    if resumes:
        assert [] == same(saved.averages, whole.load().averages)
        return
    assert 'EMA: 8 steps averaged' in run.log
    for key in ('head.weight', 'norm.running_mean'):
        found = saved.averages[key].double()
        assert oracle.relative_error(found, restarted(run, key)) < 1e-6


def test_restart_of_an_epoch_is_done_once(tmp_path):
    """A run that resumes after the restart goes on."""
    ema = dict(EMA, restart_epochs=[2])
    whole = Run(tmp_path / 'whole', ema, epochs=3).train().load()
    Run(tmp_path / 'part', ema, epochs=2).train()
    path = tmp_path / 'part' / 'epoch_2.pth'
    rest = Run(tmp_path / 'part', ema, epochs=3, resume=path).train().load()
    assert whole.steps == rest.steps == 8
    assert [] == same(whole.averages, rest.averages)


@pytest.mark.parametrize(
    ('epochs', 'match'),
    [
        ([1], 'restart_epochs=1 is out of range; use a whole number of at'),
        ([2.5], r'restart_epochs=2\.5 is out of range'),
        (3, 'restart_epochs=3 is not allowed; use a list of epochs'),
        ([2, 9], r'restart_epochs=\[2, 9\]: epoch 9 is past the end: 2 epoch'),
    ],
)
def test_bad_restarts(tmp_path, epochs, match):
    """Refused before a step is done."""
    with pytest.raises(OptionError, match=match):
        Run(tmp_path, dict(EMA, restart_epochs=epochs)).train()
