"""What the hook says: every line, every warning, and that advice helps."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmdet_ema.averaging import OptionError
from mmdet_ema.averaging.tensors import select
from mmdet_ema.training.options import parse_options
from mmdet_ema.training.passes import compare
from mmdet_ema.training.plan import Plan, RunFacts
from mmdet_ema.training.report import report
from tests import oracle
from tests.optimizers.logs import Lines


def said(planned, done=0, before=None, model=None, **options):
    """Return what is logged at the start of a run of so many steps."""
    log, checked = Lines(), parse_options(**options)
    plan = Plan(checked, RunFacts(done, planned, 1), done, before)
    model = model or nn.Linear(2, 1)
    entries = select(model, checked.update_buffers, checked.copied)
    report(plan, entries, log)
    return log


def described(planned, **options):
    """Return the lines that say what the average will be."""
    (text,) = said(planned, **options).infos
    return text.splitlines()


def warned(planned, **options):
    """Return the warnings."""
    return said(planned, **options).warnings


def test_lines():
    """The text says schedule, steps, window, share, tensors, memory."""
    model = nn.Sequential(
        nn.Linear(1024, 1024),  # 4 MiB and 4 KiB
        nn.BatchNorm1d(4),
        nn.Linear(2, 2).requires_grad_(False),
    )
    decay = oracle.ramp(5000)
    share = np.prod(oracle.ramp(np.arange(1, 5001)))
    assert share < 1e-12
    assert described(5000, model=model) == [
        f'EMA: exponential(decay=0.9999, tau=2000.0), every step: a window '
        f'of {1 / (1 - decay):.3g} steps at the end of 5000; 6 tensors '
        f'averaged in 4.0 MiB; evaluated: the averages',
        'EMA: steps: 5000 planned',
        f'EMA: at the last step: decay {decay:.6g}, effective window '
        f'{1 / (1 - decay):.3g} steps',
        'EMA: share of the initial weights left then: 0',
        'EMA: tensors: 6 averaged, 1 copied, 2 frozen',
        'EMA: memory of the averages: 4.0 MiB',
    ]


@pytest.mark.parametrize(
    ('planned', 'options', 'expected'),
    [
        (10_000, dict(schedule='constant'), 'left then: 0.368'),
        (10_000, dict(schedule='constant'), 'effective window 10,000 steps'),
        (100, dict(schedule='mean', done=60), '100 planned, 60 of them done'),
        (100, dict(schedule='mean'), 'decay 0.99, effective window 100 steps'),
        (10, dict(schedule=dict(type='cosine', total_steps=9)), 'all steps'),
        (10, dict(schedule='constant', decay=0.5), 'window 2 steps'),
        # steps after the last update of an interval take nothing in
        (8, dict(schedule='constant', decay=0.5, interval=5), ' then: 0.0312'),
        (16, dict(schedule='cosine'), 'cosine(total_steps=16'),
        (10, dict(schedule='constant', decay=1 - 1 / 123456), ' 123,456 '),
        (0, {}, 'EMA: steps: 0 planned'),
    ],
    ids=str,
)
def test_numbers(planned, options, expected):
    """Shares, windows and steps are those of the formula, and readable."""
    assert expected in '\n'.join(described(planned, **options))


def test_interval():
    """An interval is said, and does not change window or share."""
    once = described(100, schedule='constant', decay=0.999)
    text = described(100, schedule='constant', decay=0.999, interval=4)
    assert ', every 4 steps: a window' in text[0]
    assert once[1:] == text[1:]


@pytest.mark.parametrize(
    ('evaluate', 'sets'),
    [
        ('ema', 'the averages'),
        ('raw', 'the raw weights'),
        ('both', 'the averages and the raw weights'),
    ],
)
def test_what_is_evaluated(evaluate, sets):
    """The first line says whose the metrics will be."""
    facts = said(5000, evaluate=evaluate).infos[0].splitlines()
    assert facts[0].endswith(f'; evaluated: {sets}')


def test_metrics_side_by_side():
    """A row for each number that both sets have, with the difference."""
    metrics = {'coco/mAP': 0.5, 'coco/mAP_raw': 0.25, 'n': 3, 'n_raw': 4}
    metrics.update({'text': 'a', 'text_raw': 'b', 'alone': 1.0})
    assert compare(metrics, ('raw', 'ema')).splitlines() == [
        'EMA: metric         ema       raw     - raw',
        'EMA: coco/mAP    0.5000    0.2500   +0.2500',
        'EMA: n           3.0000    4.0000   -1.0000',
    ]
    metrics = {'mAP': 0.5, 'mAP_raw': 0.25, 'mAP_fast': 0.75}
    assert compare(metrics, ('raw', 'fast', 'ema')).splitlines() == [
        'EMA: metric       ema       raw      fast     - raw    - fast',
        'EMA: mAP       0.5000    0.2500    0.7500   +0.2500   -0.2500',
    ]
    assert compare({'mAP': 0.5}, ('ema',)) == ''


def test_bad_callable():
    """A schedule that is bad at the last step is found at the start."""
    with pytest.raises(OptionError, match='n = 100'):
        said(100, schedule=lambda n: 0.5 if n < 100 else 3.0)


@pytest.mark.parametrize(
    ('planned', 'options'),
    [
        (30_000, {}),
        (10_000, dict(schedule='constant', decay=0.999)),
        (5, dict(schedule='mean')),
        (50_000, dict(schedule='cosine')),
        (10, dict(schedule=lambda n: 0.5)),
        (200_000, dict(schedule='inverse')),
        (0, {}),
        (0, dict(schedule='constant', interval=5)),
    ],
    ids=str,
)
def test_no_warnings(planned, options):
    """Where all is well, or no step is planned, nothing is said."""
    assert [] == warned(planned, **options)


def test_unsaturated():
    """A ramp that cannot saturate is named, with numbers and advice."""
    (text,) = warned(2000)
    window = 1 / (1 - oracle.ramp(2000))
    assert (
        'EMA: the ramp of exponential(decay=0.9999, tau=2000.0) cannot '
        f'saturate in 2000 steps: the window at the last step is '
        f'{window:.3g} steps, not 10,000 steps.'
    ) in text
    assert 'For 2000 steps take decay=0.995, tau=100' in text
    # what the guide says
    (text,) = warned(1000)
    assert 'For 1000 steps take decay=0.99, tau=50 (a window of 100' in text


@pytest.mark.parametrize('name', ['inverse', 'annealing', 'power'])
def test_unsaturated_ramps(name):
    """Every ramp with a limit is looked at."""
    found = warned(2000, schedule=name)
    assert any('cannot saturate in 2000 steps' in text for text in found)
    assert any('faster ramp' in text for text in found)


@settings(deadline=None)
@given(
    planned=st.integers(10, 100_000),
    decay=st.sampled_from([0.9, 0.99, 0.999, 0.9998, 0.9999]),
    tau=st.sampled_from([1, 100, 2000, 1e6]),
)
def test_advice_helps(planned, decay, tau):
    """Whoever takes the pair that is advised is not warned again."""
    for text in warned(planned, decay=decay, tau=tau):
        found = re.search(r'take decay=([\d.]+), tau=(\d+) \(', text)
        if found is not None:
            decay, tau = map(float, found.groups())
            assert [] == warned(planned, decay=decay, tau=tau)


@settings(deadline=None)
@given(
    planned=st.integers(10, 100_000),
    momentum=st.sampled_from([0.1, 0.01, 0.001, 0.0002, 0.0001]),
    gamma=st.sampled_from([1, 100, 2000, 1e6]),
    name=st.sampled_from(['ExpMomentumEMA', 'MomentumAnnealingEMA']),
)
def test_advice_under_openmmlab_words_helps(planned, momentum, gamma, name):
    """It is given in the words of the config, and helps there."""
    for text in warned(planned, ema_type=name, momentum=momentum, gamma=gamma):
        found = re.search(r'take momentum=([\d.e-]+), gamma=(\d+) \(', text)
        if found is None:
            assert 'cannot saturate' not in text
        else:
            momentum, gamma = map(float, found.groups())
            words = dict(ema_type=name, momentum=momentum, gamma=gamma)
            assert [] == warned(planned, **words)


def test_window_longer_than_the_run():
    """A fast ramp to a decay for longer runs is named, with advice."""
    (text,) = warned(1000, tau=50)
    assert '10,000 steps, is longer than the run' in text
    assert 'take decay=0.99, tau=50' in text


@pytest.mark.parametrize(
    'options',
    [dict(decay=0.0002), dict(momentum=0.9998), dict(decay=0.0001, tau=1)],
)
def test_decay_and_momentum_mixed_up(options):
    """A decay that keeps nothing is asked about, both words named."""
    text = ' '.join(warned(1000, **options))
    assert 'did you mean decay=0.999' in text
    assert 'Decay weighs the OLD average' in text


def test_decay_of_zero():
    """It is not asked whether a decay of 1 was meant, which is refused."""
    (text,) = warned(1000, schedule='constant', decay=0)
    assert 'keeps nothing of the old average' in text
    assert 'did you mean' not in text


def test_first_step_that_stays():
    """A constant decay whose first update is a copy starts cold as well."""
    (text,) = warned(24, momentum=0.0002)
    share = 0.9998**23
    assert f'{share:.0%} of the average will still be the weights' in text
    assert 'of the first step' in text
    assert "ema_type='ExpMomentumEMA'" in text
    assert [] == warned(20_000, momentum=0.0002)


def test_saturated_from_half_the_window():
    """The line is half of the final window."""
    half = next(
        n
        for n in range(1, 10_000)
        if 1 / (1 - oracle.ramp(n, 0.99, 100)) >= 50
    )
    assert [] == warned(half, decay=0.99, tau=100)
    (text,) = warned(half - 1, decay=0.99, tau=100)
    assert 'cannot saturate' in text


def test_cold():
    """Initial weights that would stay are named with their share."""
    (text,) = warned(10_000, schedule='constant')
    assert (
        'EMA: 37% of the average will still be the initial weights after '
        '10000 steps of constant(decay=0.9999).'
    ) in text
    assert "schedule='exponential'" in text


def test_cold_behind_the_ramp():
    """A ramp that starts at its end is no remedy for initial weights."""
    ramp = dict(type='exponential', decay=0.99, init_updates=20_000)
    (text,) = warned(200, schedule=ramp)
    assert '13% of the average will still be the initial weights' in text
    assert text.endswith('Lower decay or init_updates.')


@pytest.mark.parametrize(('steps', 'expected'), [(298, 1), (299, 0)])
def test_cold_from_five_percent(steps, expected):
    """More than 5 % of initial weights is worth a word."""
    assert (0.99**steps > 0.05) is bool(expected)
    assert expected == len(warned(steps, schedule='constant', decay=0.99))


@pytest.mark.parametrize(
    ('options', 'taken'),
    [
        (dict(schedule='mean'), 'none'),
        # under OpenMMLab's words the first step does update
        (dict(ema_type='StochasticWeightAverage'), 'one'),
    ],
)
def test_rare(options, taken):
    """An interval longer than the run is named."""
    (text,) = warned(100, interval=101, **options)
    assert 'interval=101 is more than the 100 steps planned' in text
    assert f'takes in {taken} of them. Lower it.' in text
    assert [] == warned(100, interval=100, **options)


def test_changes():
    """What changed since the checkpoint is one line, old -> new."""
    before = dict(schedule='a', interval=1, batch_size=16, steps=99)
    assert [
        'EMA: changed since the checkpoint: schedule a -> mean(); '
        'batch_size 16 -> 1.'
    ] == warned(100, schedule='mean', before=before)


def test_nothing_changed():
    """Nothing is said where nothing changed, or nothing is known."""
    facts = RunFacts(0, 100, 1, accumulation=2, batch_size=8, world_size=4)
    spec = dict(type='constant', decay=0.5)
    plan = Plan(parse_options(schedule=spec, interval=2), facts)
    assert plan.meta == dict(
        schedule='constant(decay=0.5)',
        interval=2,
        batch_size=16,
        world_size=4,
        reference_samples=64,
    )
    for before in (plan.meta, {}, dict(writer='x')):
        log = Lines()
        report(Plan(plan.options, facts, 0, before), [], log)
        assert [] == log.warnings


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (dict(done=9, begin_iter=5), 'begin_iter has no effect: the average'),
        (dict(done=9, begin_epoch=1), 'begin_epoch has no effect: the av'),
    ],
)
def test_other_warnings(options, expected):
    """Options that do nothing are named."""
    (text,) = warned(100, schedule='mean', **options)
    assert text.startswith(f'EMA: {expected}')


def test_parameters_that_were_not_finite():
    """They are named: their average would hold nothing else."""
    model = nn.Linear(2, 1)
    nn.init.constant_(model.bias, float('inf'))
    (text,) = warned(100, schedule='mean', model=model)
    assert 'EMA: bias (1 parameters) held NaN or Inf before' in text
    assert torch.isinf(model.bias).all()


def test_posthoc():
    """Its window, where it is, and what all averages take together."""
    lines = described(100_000, posthoc=True, model=nn.Linear(2**18, 1))
    assert 'EMA: memory of the averages: 2.0 MiB' in lines
    assert (
        "EMA: averages 'posthoc': exponential(decay=0.999, tau=500.0), a "
        'window of 1,000 steps, in host memory'
    ) in lines


@given(st.integers(20, 10**6), st.sampled_from(['exponential', 'inverse']))
@settings(max_examples=30, deadline=None)
def test_auto_leaves_no_doubt(planned, schedule):
    """The decay that is chosen for a run is none that is warned of."""
    log = said(planned, decay='auto', schedule=schedule)
    assert [] == log.warnings
    decay = 1 - 1 / (planned // 10)
    assert f'{schedule}(decay={decay!r}' in log.infos[0]
    # its window is one of steps, whatever a step takes
    before = dict(batch_size=4, world_size=1, reference_samples=4)
    log = said(planned, 7, before, decay='auto', schedule=schedule)
    assert ['EMA: changed since the checkpoint: batch_size 4 -> 1.'] == (
        log.warnings
    )


@pytest.mark.parametrize(
    ('agrees', 'expected'),
    [(True, 'become the mean where the'), (False, 'are never made equal')],
)
def test_buffers_of_several_ranks(agrees, expected):
    """It is said whose buffers are evaluated and saved."""
    facts = RunFacts(0, 100, 1, world_size=2, agrees=agrees)
    log = Lines()
    plan = Plan(parse_options(schedule='mean'), facts)
    report(plan, select(nn.BatchNorm1d(2)), log)
    assert 'EMA: the averages of 3 buffers differ between' in log.infos[1]
    assert expected in log.infos[1]


@pytest.mark.parametrize('evaluate', ['both', 'all', ['ema', 'raw']])
def test_several_sets_without_a_validation(evaluate):
    """Passes that nobody runs are said at the start."""
    log, options = Lines(), parse_options(evaluate=evaluate)
    facts = RunFacts(0, 30_000, 1, validates=False)
    report(Plan(options, facts), select(nn.Linear(2, 1)), log)
    (warning,) = log.warnings
    assert f'evaluate={evaluate!r} has no effect: this run has no' in warning
