"""Words of mmcv's and mmdet 2's hooks: their numbers, and wrong ones."""

import subprocess
import sys

import pytest
from mmcv.runner import HOOKS
from mmcv.utils import build_from_cfg

from mmdet_ema import EMAHook, OptionError
from tests import oracle
from tests.for_mmcv1.toy import Run

# float32 rounds each of 8 updates to 6e-8 of the magnitude
TOLERANCE = 1e-6
LINEAR, EXP = 'LinearMomentumEMAHook', 'ExpMomentumEMAHook'


def build(**config):
    return build_from_cfg(dict(dict(type='EMAHook'), **config), HOOKS)


def warm_up(momentum=0.0002, warm_up=100):
    """The warm-up that mmcv meant: on the decay, with i = n - 1."""
    return lambda n: min(1 - momentum, (1 + (n - 1)) / (warm_up + (n - 1)))


def exponential(momentum=0.0002, total_iter=2000):
    """The formula of mmdet 2, as it writes it: of the momentum, x = n - 1."""

    def decay(n):
        import math

        part = (1 - momentum) * math.exp(-(1 + (n - 1)) / total_iter)
        return 1 - (part + momentum)

    return decay


@pytest.mark.parametrize(
    ('config', 'decay', 'buffers'),
    [
        (dict(), lambda n: oracle.ramp(n), True),
        (dict(momentum=0.0002), warm_up(), False),
        (dict(momentum=0.5), warm_up(0.5), False),
        (dict(momentum=0.5, warm_up=3), warm_up(0.5, 3), False),
        (dict(warm_up=3), warm_up(warm_up=3), False),
        (dict(warm_up=3, decay=0.5), warm_up(0.5, 3), False),
        (dict(momentum=0.5, skip_buffers=False), warm_up(0.5), True),
        (dict(skip_buffers=True), warm_up(), False),
        (dict(total_iter=5), exponential(total_iter=5), True),
        (dict(type=EXP), exponential(), True),
        (dict(type=EXP, momentum=0.1), exponential(0.1), True),
        (dict(type=EXP, total_iter=5), exponential(total_iter=5), True),
        (dict(type=EXP, decay=0.9, tau=5), exponential(0.1, 5), True),
        (dict(type=EXP, skip_buffers=True), exponential(), False),
        (dict(type=EXP, update_buffers=False), exponential(), False),
        (dict(type=LINEAR), warm_up(), True),
        (dict(type=LINEAR, momentum=0.5, warm_up=3), warm_up(0.5, 3), True),
        (dict(type=LINEAR, warm_up=1, momentum=0.5), lambda n: 0.5, True),
        (
            dict(decay=0.9, skip_buffers=True),
            lambda n: oracle.ramp(n, 0.9),
            False,
        ),
        (dict(schedule='constant', momentum=0.5), lambda n: 0.5, False),
        (
            dict(ema_type='ExponentialMovingAverage', momentum=0.5),
            lambda n: 0.5 if n > 1 else 0.0,
            False,
        ),
    ],
)
def test_numbers(config, decay, buffers, tmp_path):
    """Eight steps with the words of a config follow the formula."""
    run = Run(tmp_path, dict(dict(type='EMAHook'), **config)).train()
    weights = run.load('epoch_2.pth')['state_dict']
    keys = ['head.weight', 'norm.running_mean', 'norm.running_var']
    for key in keys:
        start, values = run.trace(key)
        expected = oracle.average(start, values, decay)
        if 'running' in key and not buffers:
            expected = values[-1]
        error = oracle.relative_error(weights[key].double(), expected)
        assert error < TOLERANCE, key


@pytest.mark.parametrize(
    ('kind', 'phase'), [('EMAHook', 1), (LINEAR, 0), (EXP, 0)]
)
def test_interval_keeps_the_window(kind, phase, tmp_path):
    """An update has the product of its steps' decays.

    mmcv's hook updates at the first of ``interval`` iterations, mmdet's at
    the last one.
    """
    words = dict(momentum=0.5, interval=3)
    words.update(dict(total_iter=4) if kind == EXP else dict(warm_up=4))
    run = Run(tmp_path, dict(type=kind, **words)).train()
    decay = exponential(0.5, 4) if kind == EXP else warm_up(0.5, 4)
    start, values = run.trace('head.weight')
    mean, product = start, 1.0
    for n, value in enumerate(values, start=1):
        product *= decay(n)
        if n % 3 == phase:
            mean, product = product * mean + (1 - product) * value, 1.0
    found = run.load('epoch_2.pth')['state_dict']['head.weight'].double()
    assert oracle.relative_error(found, mean) < TOLERANCE


@pytest.mark.parametrize(
    ('config', 'words'),
    [
        (dict(momentum=0), 'momentum=0 .*momentum = 1 - decay'),
        (dict(momentum=1.5), 'momentum=1.5'),
        (dict(momentum='x'), "momentum='x' is not a number"),
        (dict(warm_up=0), 'warm_up=0 .*at least 1.*1 is no warm-up'),
        (dict(warm_up=1.5), 'warm_up=1.5'),
        (dict(total_iter=0), 'total_iter=0'),
        (dict(type=EXP, tau=-1), '-1'),
        (dict(interval=0), 'interval=0'),
        (dict(resume_from=''), "resume_from='' is no path"),
        (dict(resume_from=5), 'resume_from=5 is no path'),
        (dict(skip_buffers=1), 'skip_buffers=1 is not allowed'),
        (dict(decay=0.9, momentum=0.1), 'decay=0.9 and momentum=0.1'),
        (dict(warm_up=3, decay=0.9, momentum=0.1), 'one option'),
        (dict(warm_up=3, total_iter=3), 'warm_up=3 and total_iter=3'),
        (dict(warm_up=3, tau=3), 'warm_up=3 and tau=3 .*give one'),
        (
            dict(total_iter=3, schedule='mean'),
            "total_iter=3 and schedule='mean'",
        ),
        (dict(warm_up=3, ema_type='ExpMomentumEMA'), 'give one of them'),
        (dict(skip_buffers=True, update_buffers=True), 'contradict'),
        (
            dict(type=EXP, warm_up=3),
            'warm_up=3 has no meaning for Exp.*total_iter',
        ),
        (dict(type=EXP, total_iter=3, tau=3), 'total_iter=3 and tau=3'),
        (dict(type=EXP, schedule='mean'), "dict\\(type='EMAHook', schedule"),
        (dict(type=LINEAR, total_iter=3), 'no meaning for Linear.*warm_up'),
        (dict(type=LINEAR, gamma=3), 'gamma=3 has no meaning'),
        (dict(momentun=0.1), "no option 'momentun'.*Did you mean 'momentum'"),
        (dict(warmup=3), "Did you mean 'warm_up'"),
        (
            dict(type=EXP, totaliter=3),
            "ExpMomentumEMAHook has no option.*'total_iter'",
        ),
        (dict(momentum_fun=abs), "no option 'momentum_fun'"),
        (dict(evaluate='rw'), "evaluate='rw'.*Did you mean 'raw'"),
    ],
)
def test_wrong_words(config, words):
    """One line names the value, what is allowed and what to do."""
    with pytest.raises(OptionError, match=words) as error:
        build(**config)
    assert '\n' not in str(error.value)


def test_public_hook_is_the_one_that_is_built():
    """``mmdet_ema.EMAHook`` is the hook of mmcv 1.x where that is there."""
    assert type(build()) is EMAHook
    assert 'for_mmcv1' in EMAHook.__module__


ORDER = """
import sys
for name in sys.argv[1:]:
    __import__(name)
from mmcv.runner import HOOKS
from mmcv.runner.hooks import ema as mmcvs
from mmdet.core.hook import ema as mmdets
names = ['EMAHook', 'ExpMomentumEMAHook', 'LinearMomentumEMAHook']
ours = [HOOKS.get(name).__module__ for name in names]
assert all('mmdet_ema.for_mmcv1' in name for name in ours), ours
assert HOOKS.get('MMCVEMAHook') is mmcvs.EMAHook
assert HOOKS.get('MMDetExpMomentumEMAHook') is mmdets.ExpMomentumEMAHook
assert HOOKS.get('MMDetLinearMomentumEMAHook') is mmdets.LinearMomentumEMAHook
print('fine')
"""


@pytest.mark.parametrize(
    'order', [['mmdet_ema', 'mmdet.core'], ['mmdet.core', 'mmdet_ema']]
)
def test_either_order_of_imports(order):
    """Ours are registered, theirs have other names."""
    pytest.importorskip('mmdet.core.hook')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', ORDER, *order],
        capture_output=True,
        text=True,
    )
    assert 'fine' == done.stdout.split()[-1], done.stderr


def test_other_hooks_are_registered_as_ever():
    """A name that is not ours and is taken is refused, as mmcv does it."""

    class OptimizerHook:
        pass

    with pytest.raises(KeyError, match='already registered'):
        HOOKS.register_module(module=OptimizerHook)

    class EMAHook:
        pass

    with pytest.raises(KeyError, match='already registered'):
        HOOKS.register_module(module=EMAHook)
