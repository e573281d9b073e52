"""Several averages of one training: each is what it would be alone."""

import copy

import pytest
import torch

from mmdet_ema import CheckpointError, OptionError, WeightAverager
from tests import oracle
from tests.averaging.models import Mixed, numpy64, perturb, state_of

MORE = {
    'fast': dict(decay=0.9, tau=5),
    'slow': dict(decay=0.999, tau=50),
    'flat': dict(schedule='constant', decay=0.5),
    'mean': dict(schedule='mean'),
    'zero': dict(decay=0.0),
    'half': dict(schedule='half_life', half_life=3),
    'host': dict(decay=0.99, device='cpu'),
}


def same(left, right):
    left, right = dict(left), dict(right)
    assert left.keys() == right.keys()
    return [k for k, v in left.items() if not torch.equal(v, right[k])]


def together_and_alone(model, **options):
    """Return one averager with eight averages, and eight with one each."""
    several = WeightAverager(model, averages=MORE, **options)
    alone = {'ema': WeightAverager(model, **options)}
    for name, spec in MORE.items():
        alone[name] = WeightAverager(model, **options, **spec)
    return several, alone


def train(model, averagers, steps=12, seed=0, bad=()):
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        perturb(model, generator)
        if step in bad:
            good = state_of(model)
            with torch.no_grad():
                model.first.weight[0, 0] = float('nan')
        for averager in averagers:
            averager.update()
        if step in bad:
            model.load_state_dict(good)


@pytest.mark.parametrize(
    'options',
    [{}, dict(interval=3), dict(update_buffers=False), dict(copied=['scale'])],
    ids=str,
)
def test_eight_in_one_run_equal_eight_runs(options):
    """Bit for bit, through skipped steps too; and in the model, each alone."""
    model = Mixed()
    several, alone = together_and_alone(model, **options)
    train(model, [several, *alone.values()], bad=(3, 4, 5))
    raw = state_of(model)
    assert several.names == tuple(alone)
    assert several.num_skipped == alone['ema'].num_skipped > 0
    for name, averager in alone.items():
        assert [] == same(
            several.named_averages(name=name), averager.named_averages()
        )
        assert several.progress(name) == averager.progress()
        assert several.distance(name) == averager.distance()
        with averager.applied():
            expected = state_of(model)
        with several.applied(name):
            assert [] == same(state_of(model), expected)
            assert [] == same(several.named_raws(), raw)
            # the others are there meanwhile
            for other in alone:
                assert [] == same(
                    several.named_averages(name=other),
                    alone[other].named_averages(),
                )
        assert [] == same(state_of(model), raw)


def test_state_goes_on():
    """A state that is loaded goes on as if it had not been saved."""
    model = Mixed()
    several, _ = together_and_alone(model)
    train(model, [several])
    state, weights = copy.deepcopy(several.state_dict()), state_of(model)
    other = Mixed(seed=1)
    other.load_state_dict(weights)
    resumed = WeightAverager(other, averages=MORE)
    resumed.load_state_dict(state)
    train(model, [several], seed=3)
    train(other, [resumed], seed=3)
    for name in several.names:
        assert several.progress(name) == resumed.progress(name)
        assert [] == same(
            several.named_averages(name=name),
            resumed.named_averages(name=name),
        )


def test_another_set_of_averages():
    """A new one starts from the weights, n = 0; one that is gone is not."""
    model = Mixed()
    first = WeightAverager(model, averages=dict(old=dict(decay=0.9)))
    train(model, [first])
    state = copy.deepcopy(first.state_dict())
    new = dict(new=dict(decay=0.9, tau=5))
    second = WeightAverager(model, averages=new)
    with pytest.raises(CheckpointError, match="no averages 'new'; it has"):
        second.load_state_dict(state)
    second.load_state_dict(state, strict=False)
    fresh = WeightAverager(model, decay=0.9, tau=5)
    train(model, [first, second, fresh], seed=2)
    assert [] == same(first.named_averages(), second.named_averages())
    assert [] == same(
        second.named_averages(name='new'), fresh.named_averages()
    )
    assert second.progress('new')['num_steps'] == 12
    assert second.progress()['num_steps'] == 24


def test_restart():
    """All start again from the weights as they are, and n from 0."""
    model = Mixed()
    several, _ = together_and_alone(model)
    train(model, [several])
    several.restart()
    fresh, _ = together_and_alone(model)
    for name in several.names:
        assert several.progress(name)['num_steps'] == 0
    train(model, [several, fresh], seed=4)
    for name in several.names:
        assert [] == same(
            several.named_averages(name=name), fresh.named_averages(name=name)
        )


def test_model_that_changes():
    """Each average follows a parameter that is replaced."""
    model = Mixed()
    several, alone = together_and_alone(model)
    everyone = [several, *alone.values()]
    train(model, everyone)
    model.scale = torch.nn.Parameter(model.scale.detach() + 1)
    model.frozen.requires_grad_(True)
    train(model, everyone, seed=5)
    for name, averager in alone.items():
        assert [] == same(
            several.named_averages(name=name), averager.named_averages()
        )


def test_one_at_a_time():
    """The model holds one set of averages; the other is refused by name."""
    model = Mixed()
    several, _ = together_and_alone(model)
    train(model, [several])
    raw = state_of(model)
    with several.applied('fast'):
        with several.applied('fast'):
            pass
        with pytest.raises(RuntimeError, match="averages 'fast': leave"):
            several.apply('slow')
        with pytest.raises(RuntimeError, match='leave it first'):
            several.restart()
        assert several.is_applied
    assert [] == same(state_of(model), raw)


@pytest.mark.parametrize(
    ('averages', 'match'),
    [
        (['fast'], 'averages=.* is not allowed; use a dict'),
        (dict(fast=0.9), 'averages=.* is not allowed; use a dict'),
        ({'a/b': dict(decay=0.9)}, 'averages=.* is not allowed'),
        (dict(raw=dict(decay=0.9)), "the name 'raw' is taken"),
        (dict(fast=dict(decay=2)), 'decay=2 is out of range'),
        (dict(fast=dict(dekay=0.9)), "no option 'dekay'"),
        (dict(fast=dict(decay=0.9, device='moon')), "device='moon'"),
    ],
)
def test_bad_averages(averages, match):
    """One clear line before anything is made."""
    with pytest.raises(OptionError, match=match):
        WeightAverager(Mixed(), averages=averages)
    # a rule of one's own updates one average alone
    with pytest.raises(OptionError, match='leave one of the two out'):
        WeightAverager(Mixed(), rule=print, averages=dict(a={}))


def test_posthoc():
    """A fast average in host memory, and the starting weights."""
    model = Mixed()
    start = state_of(model)
    averager = WeightAverager(model, decay=0.99, tau=8, posthoc=True)
    assert averager.names == ('ema', 'posthoc')
    values, generator = [], torch.Generator().manual_seed(0)
    for _ in range(12):
        perturb(model, generator)
        averager.update()
        values.append(numpy64(model.first.weight))
    expected = oracle.average(
        numpy64(start['first.weight']),
        values,
        lambda n: oracle.ramp(n, 0.9, 2),
    )
    averages = dict(averager.named_averages(name='posthoc'))
    found = numpy64(averages['first.weight'])
    assert oracle.relative_error(found, expected) < 1e-6
    assert {'cpu'} == {x.device.type for x in averages.values()}
    assert [] == same(start, averager.starting_weights())
    shared = averager.starting_weights()
    assert shared['first.weight'] is shared['tied.weight']

    averager.restart()
    assert [] == same(state_of(model), averager.starting_weights())


def test_starting_weights_after_a_resume():
    """They are not in the state, never wrong, and can be given back."""
    model = Mixed()
    first = WeightAverager(model, posthoc=True)
    start = first.starting_weights()
    train(model, [first])
    second = WeightAverager(model, posthoc=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with pytest.raises(RuntimeError, match='given back by set_starting'):
        second.starting_weights()
    less = {k: x for k, x in start.items() if k != 'scale'}
    with pytest.raises(CheckpointError, match='1 missing'):
        second.set_starting_weights(less)
    second.set_starting_weights(start)
    assert [] == same(start, second.starting_weights())
    alone = WeightAverager(model)
    with pytest.raises(RuntimeError, match='under posthoc=True alone'):
        alone.starting_weights()


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({}, 'exponential(decay=0.999, tau=500.0)'),
        (dict(decay=0.9998), 'exponential(decay=0.998, tau=500.0)'),
        (dict(decay=0.9, tau=4), 'exponential(decay=0.0, tau=1.0)'),
        (
            dict(schedule='constant', decay=0.999),
            'exponential(decay=0.99, tau=50.0)',
        ),
    ],
    ids=str,
)
def test_a_tenth_of_the_window(options, expected):
    """And a quarter of the ramp; of one that has none, half the window."""
    averager = WeightAverager(Mixed(), posthoc=True, **options)
    assert expected == str(averager.schedules['posthoc'])


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        (dict(decay=0.89), 'the limit 0.89; use one of 0.9 or more'),
        (dict(schedule='mean'), 'has no limit; use one of 0.9 or more'),
        (dict(posthoc='yes'), "posthoc='yes' is not allowed"),
        (dict(rule=lambda *a: None), 'leave one of the two out'),
        (dict(averages=dict(posthoc={})), "the name 'posthoc' is taken"),
        (dict(decay='auto'), "decay='auto' needs the planned steps of a run"),
        (
            dict(averages=dict(a=dict(decay='auto'))),
            "decay='auto' needs the planned steps of a run",
        ),
    ],
    ids=str,
)
def test_posthoc_refused(options, match):
    """One clear line."""
    with pytest.raises(OptionError, match=match) as error:
        WeightAverager(Mixed(), **{'posthoc': True, **options})
    assert '\n' not in str(error.value)


def test_unknown_name():
    """What there is, is listed."""
    averager = WeightAverager(Mixed(), averages=dict(fast=dict(decay=0.9)))
    with pytest.raises(OptionError, match="choose one of 'ema', 'fast'"):
        averager.apply('fats')
