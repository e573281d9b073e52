"""What the hook says: what it will do, what looks wrong, what it skipped."""

from __future__ import annotations

import logging
import math
import os
from typing import Any, Iterator, List, Sequence

import torch
from torch import nn

from mmdet_ema import schedules
from mmdet_ema.averaging.averager import WeightAverager
from mmdet_ema.averaging.averages import POSTHOC
from mmdet_ema.averaging.tensors import Entry, Role, count_roles
from mmdet_ema.errors import show
from mmdet_ema.schedules import Schedule, decay_over, initial_share, window
from mmdet_ema.training.passes import sets_of_weights
from mmdet_ema.training.plan import Plan
from mmdet_ema.training.steps import TELLS_OF_STEPS
from mmdet_ema.version import __version__


def report(plan: Plan, entries: Sequence[Entry], log: Any) -> None:
    """Say at the start what the average will be, and what looks wrong."""
    options, facts = plan.options, plan.facts
    counts = count_roles(entries)
    size = f'{len(plan.schedules) * counts["bytes"] / 2**20:.1f} MiB'
    tensors = f'{counts["averaged"]} tensors averaged in {size}'
    evaluated = f'evaluated: {sets_of_weights(options.passes)}'
    if options.choice.rule is None:
        lines, doubts = _numbers(plan), [*_doubts_on_schedule(plan)]
    else:
        name, doubts = plan.schedule.name, []
        lines = [f'{name} by its own avg_func: slow, one call a tensor']
    lines[0] = f'{lines[0]}; {tensors}; {evaluated}'
    lines += [
        f'tensors: {counts["averaged"]} averaged, {counts["copied"]} copied, '
        f'{counts["shared"]} frozen',
        f'memory of the averages: {size}',
    ]
    for name, schedule in plan.more.items():
        last = max(plan.planned, 1)
        end = _steps(window(decay_over(schedule, last, last)))
        where = ', in host memory' if name == POSTHOC else ''
        lines.append(
            f'averages {name!r}: {schedule}, a window of {end}{where}'
        )
    if plan.more:
        lines.append(f'in state_dict of the files: {options.deploy}')
    if options.recalibrate and facts.recalibrates:
        lines.append(
            f'recalibrate: at the end, BatchNorm statistics from '
            f'{options.recalibrate} batches, kept if they are better'
        )
    log.info('\n'.join(f'EMA: {line}' for line in lines))
    if facts.world_size > 1:
        buffers = sum(not entry.parameters for entry in entries)
        then = (
            '; they become the mean where the training loop validates. A '
            'file written at another time holds those of rank 0.'
            if facts.agrees
            else ' and are never made equal, as no validation is sure to be '
            'run on all of them: each evaluates its own, and files hold '
            'those of rank 0.'
        )
        log.info(
            f'EMA: the averages of {buffers} buffers differ between the '
            f'ranks{then}'
        )
    for doubt in (*doubts, *_doubts(plan, entries)):
        log.warning(f'EMA: {doubt}')


def report_unsaved(
    model: nn.Module, entries: Sequence[Entry], log: Any
) -> None:
    """Warn of averages whose place in files something else takes."""
    unsaved = {
        name
        for entry in entries
        if entry.role is Role.AVERAGED and not entry.saved
        for name in entry.names
    }
    other = [x for x in model.state_dict() if x in unsaved] if unsaved else []
    if other:
        log.warning(
            f'EMA: the state_dict of the model has values of its own for '
            f'{first_of(other)}, made of the raw weights: evaluations use the '
            f'averages, but files hold these values and no average. Let it '
            f'give the tensors as they are.'
        )


def _numbers(plan: Plan) -> List[str]:
    schedule, planned = plan.schedule, plan.planned
    interval = plan.options.interval
    every = 'step' if interval == 1 else f'{interval} steps'
    start = f', {plan.done} of them done' if plan.done else ''
    last = decay_over(schedule, max(planned, 1), max(planned, 1))
    end = _steps(window(last))
    left = initial_share(schedule, plan.last_update)
    return [
        f'{schedule}, every {every}: a window of {end} at the end of '
        f'{planned}',
        f'steps: {planned} planned{start}',
        f'at the last step: decay {last:.6g}, effective window {end}',
        f'share of the initial weights left then: {left:.3g}',
    ]


def _doubts(plan: Plan, entries: Sequence[Entry]) -> Iterator[str]:
    """List what makes the average other than the options promise."""
    options, facts = plan.options, plan.facts
    yield from facts.doubts
    yield from options.choice.no_effect
    if plan.done and (options.begin_iter or options.begin_epoch):
        name = 'begin_iter' if options.begin_iter else 'begin_epoch'
        yield f'{name} has no effect: the average has begun already.'
    if len(options.passes) > 1 and not facts.validates:
        yield (
            f'evaluate={show(options.evaluate)} has no effect: this run has '
            f'no validation.'
        )
    if options.recalibrate and not facts.recalibrates:
        lack = (
            'no validation is sure to be run on all ranks'
            if facts.validates
            else 'this run has no validation'
        )
        yield (
            f'recalibrate={options.recalibrate} has no effect: {lack}, so '
            f'that nothing tells which statistics are better.'
        )
    copied = [e.name for e in entries if e.parameters and e.holds_nonfinite]
    if copied:
        yield (
            f'{", ".join(copied[:3])} ({len(copied)} parameters) held NaN or '
            f'Inf before training; they are copied, not averaged.'
        )
    before, now = plan.before, plan.meta
    changed = [
        f'{name} {before[name]} -> {now[name]}'
        for name in ('schedule', 'interval', 'batch_size', 'world_size')
        if name in before and str(before[name]) != str(now[name])
    ]
    if changed:
        yield f'changed since the checkpoint: {"; ".join(changed)}.'
    fixed = options.choice.rule is None and not options.fits_the_run
    if plan.kappa != 1 and fixed:
        limit, kappa = plan.unscaled.limit, plan.kappa
        numbers = f' ({limit:g} -> {limit**kappa:.6g})' if limit else ''
        used = (
            'it is used' if options.scale_decay else 'scale_decay=True uses it'
        )
        yield (
            f'a step takes {facts.samples} samples, not {plan.reference} as '
            f'in the checkpoint; decay ** {kappa:.6g}{numbers} keeps the '
            f'averaging window in samples: {used}.'
        )
    if options.overlap and not TELLS_OF_STEPS:
        yield (
            f'overlap=True has no effect: torch {torch.__version__} does not '
            f'tell of the steps of optimizers, 2.0 does.'
        )
    elif options.overlap and not any(
        p.is_cuda for entry in entries for p in entry.parameters
    ):
        yield (
            'overlap=True has no effect on a CPU, where an update takes its '
            'time from the training wherever it runs.'
        )


def _doubts_on_schedule(plan: Plan) -> Iterator[str]:
    schedule, planned, limit = plan.schedule, plan.planned, plan.schedule.limit
    if limit == 0:
        yield (
            'a decay of 0 keeps nothing of the old average: it is the weights '
            'of the last step. Raise decay.'
        )
    elif limit is not None and limit < 0.5:
        yield (
            f'a decay of {limit:g} (momentum {1 - limit:g}) keeps almost '
            f'nothing of the old average. Decay weighs the OLD average, '
            f'momentum the NEW value: did you mean decay={1 - limit:g} '
            f'(momentum={limit:g})?'
        )
    if planned < 1:
        return
    if limit is not None:
        last = window(decay_over(schedule, planned, planned))
        if last < window(limit) / 2:
            yield (
                f'the ramp of {schedule} cannot saturate in {planned} steps: '
                f'the window at the last step is {_steps(last)}, not '
                f'{_steps(window(limit))}. {_advice(schedule, planned, last)}'
            )
        elif schedule.name == 'exponential' and last > max(planned, 2):
            yield (
                f'the window of {schedule} at the last step, {_steps(last)}, '
                f'is longer than the run. {_advice(schedule, planned, last)}'
            )
    # a mean has no limit: it weighs all steps alike, as it should
    copies = limit is not None and decay_over(schedule, 1, 1) == 0
    share = initial_share(schedule, plan.last_update, 2 if copies else 1)
    if plan.last_update and share > 0.05 and limit != 0:
        start = 'weights of the first step' if copies else 'initial weights'
        remedies = (_WARMER[o] for o in _WARMER if o in schedule.options)
        remedy = next(remedies, "Use a ramp (schedule='exponential').")
        yield (
            f'{share:.0%} of the average will still be the {start} after '
            f'{planned} steps of {schedule}. {remedy}'
        )
    interval = plan.options.interval
    if interval > planned:
        taken = 'one' if plan.last_update else 'none'
        yield (
            f'interval={interval} is more than the {planned} steps planned: '
            f'the average takes in {taken} of them. Lower it.'
        )


_WARMER = {
    'half_life': 'Lower half_life.',
    'momentum': "Raise momentum, or use a ramp (ema_type='ExpMomentumEMA').",
    'init_updates': 'Lower decay or init_updates.',
    'decay': "Lower decay, or use a ramp (schedule='exponential').",
}


def _advice(schedule: Schedule, planned: int, last: float) -> str:
    """Say which options suit a run; ``last`` is its window at the end."""
    suited = schedules.suited_window(planned)
    half = schedules.suited_ramp(suited)
    options = {
        'exponential': f'decay={1 - 1 / suited:.6g}, tau={half}',
        'ExpMomentumEMA': f'momentum={1 / suited:.6g}, gamma={half}',
        'MomentumAnnealingEMA': f'momentum={1 / suited:.6g}, gamma=5',
    }
    if schedule.name not in options:
        return (
            f'If that is what you want, say decay={1 - 1 / last:.6g}; else '
            f'choose a faster ramp.'
        )
    return (
        f'For {planned} steps take {options[schedule.name]} (a window of '
        f'{suited} steps).'
    )


def _steps(value: float) -> str:
    if value > 1e7:
        return 'all steps'
    number = f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
    return f'{number} steps'


def describe_skip(averager: WeightAverager, iteration: int) -> str:
    """Say that a step was skipped; nothing but at the 1st, 10th, ... one."""
    count = averager.known_skipped
    if not math.log10(count).is_integer():
        return ''
    # found later, the weight may have recovered
    found = averager.first_nonfinite()
    line = (
        f'EMA: iteration {iteration} left NaN or Inf in '
        f'{found or "the weights"}; the step was not averaged ({count} '
        f'skipped so far).'
    )
    if found is None or count < 10:
        return line
    return (
        f'{line} As long as it holds some no step is averaged, and weights do '
        f'not recover from NaN by themselves: resume from a file from before '
        f'it, with a lower learning rate or clipped gradients '
        f'(clip_grad). If {found} is meant to hold Inf, '
        f'copied=[{found!r}] copies it and lets the others be averaged.'
    )


def describe_idle(iterations: int) -> str:
    """Say that the weights stood still for so many iterations."""
    return (
        f'EMA: {iterations} iterations in a row did not change the weights, '
        f'so the average stands still. Unless gradients are accumulated for '
        f'longer than that, look at the learning rate, at whether the '
        f'optimizer has the parameters of this model, and at whether a '
        f'gradient scaler skips every step.'
    )


def describe_replaced(names: Sequence[str]) -> str:
    """Say that parameters of the model are other objects now."""
    return (
        f'EMA: {first_of(names)} replaced in the model. The average goes on '
        f'with what has the same name and shape; the rest starts from its '
        f'present values.'
    )


def first_of(names: Sequence[str]) -> str:
    """Return the first name, and how many more there are."""
    more = f' and {len(names) - 1} more' if len(names) > 1 else ''
    return f'{names[0]}{more}'


def announce(hook: str, theirs: str) -> None:
    """Say whose hook was built, on the first rank, in no run's log.

    Args:
        hook: The type that the config names.
        theirs: The type that builds the framework's own.
    """
    if os.environ.get('RANK', '0') == '0':
        own_logger().info(
            f'EMA: mmdet_ema {__version__}: dict(type={hook!r}) builds its '
            f"own hook; the framework's is {theirs!r}."
        )


def own_logger() -> logging.Logger:
    """Return the logger for lines that belong to no run.

    The frameworks know nothing of it: mmcv takes the first logger that it
    made for the run's, and writes to it what ``init_weights`` did; mmengine
    would make one without a file, and give it to whoever asks for one later.
    """
    logger = logging.getLogger('mmdet_ema')
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(
            logging.Formatter('%(asctime)s - %(levelname)s - %(message)s')
        )
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    return logger
