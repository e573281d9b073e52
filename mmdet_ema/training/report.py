"""What the hook says: what it will do, what looks wrong, what it skipped."""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, List, Mapping, Sequence

from mmdet_ema.averaging.averager import WeightAverager
from mmdet_ema.averaging.tensors import (
    Entry,
    count_roles,
    no_match,
    unmatched,
)
from mmdet_ema.schedules import Schedule, decay_over, initial_share, window
from mmdet_ema.training.plan import Plan

_LARGE_SHARE = 0.05
_SMALL_DECAY = 0.5
_ENDLESS = 1e7
_GOES_ON = 10
_REPORTED = ('schedule', 'interval', 'batch_size', 'world_size')


def report(plan: Plan, entries: List[Entry], log: Any) -> None:
    """Say at the start what the average will be, and what looks wrong."""
    options, facts, planned = plan.options, plan.facts, plan.planned
    counts, choice = count_roles(entries), options.choice
    found: List[str] = []
    if choice.rule is None:
        said = (plan.schedule, options.interval)
        log.info(describe(*said, plan.done, planned, counts, choice.phase))
        found += warnings(*said, planned, choice.phase)
    else:
        name = plan.schedule.name
        first = f'EMA: {name} by its own avg_func: slow, one call a tensor'
        log.info('\n'.join([first, *_tensors(counts)]))
    found += [f'EMA: {text}' for text in _without_effect(plan)]
    copied = [e.name for e in entries if e.parameters and e.holds_nonfinite]
    if copied:
        found.append(
            f'EMA: {", ".join(copied[:3])} ({len(copied)} parameters) held '
            f'NaN or Inf before training; they are copied, not averaged.'
        )
    found.append(changes(plan.before, plan.meta))
    missing = unmatched(entries, options.copied)
    found += [f'EMA: {no_match(pattern)}' for pattern in missing]
    if facts.world_size > 1:
        buffers = sum(not entry.parameters for entry in entries)
        log.info(_buffers_of_ranks(buffers, facts.agrees))
    if plan.kappa != 1 and choice.rule is None:
        found.append(_other_batch_size(plan))
    for line in filter(None, found):
        log.warning(line)


def describe(
    schedule: Schedule,
    interval: int,
    done: int,
    planned: int,
    counts: Mapping[str, int],
    phase: int = 0,
) -> str:
    """Say in a few lines what the average will be."""
    last = decay_over(schedule, max(planned, 1), max(planned, 1))
    averaged = _last_update(interval, phase, planned)
    every = 'step' if interval == 1 else f'{interval} steps'
    start = f', {done} of them done' if done else ''
    return '\n'.join(
        [
            f'EMA: {schedule}, every {every}',
            f'  steps: {planned} planned{start}',
            f'  at the last step: decay {last:.6g}, '
            f'effective window {_steps(window(last))}',
            f'  share of the initial weights left then: '
            f'{initial_share(schedule, averaged):.3g}',
            *_tensors(counts),
        ]
    )


def _tensors(counts: Mapping[str, int]) -> List[str]:
    return [
        f'  tensors: {counts["averaged"]} averaged, '
        f'{counts["copied"]} copied, {counts["shared"]} frozen',
        f'  memory of the averages: {counts["bytes"] / 2**20:.1f} MiB',
    ]


def warnings(
    schedule: Schedule, interval: int, planned: int, phase: int = 0
) -> List[str]:
    """List what makes the average other than the options promise."""
    averaged = _last_update(interval, phase, planned)
    found = [_mixed_up(schedule)]
    if planned > 0:
        found += [
            _unsuited(schedule, planned),
            _cold(schedule, planned, averaged),
        ]
        if interval > planned:
            taken = 'one' if averaged else 'none'
            found.append(
                f'EMA: interval={interval} is more than the {planned} steps '
                f'planned: the average takes in {taken} of them. Lower it.'
            )
    return [text for text in found if text]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in one line what changed since the checkpoint, if anything."""
    changed = [
        f'{name} {before[name]} -> {value}'
        for name, value in now.items()
        if name in _REPORTED
        and name in before
        and str(before[name]) != str(value)
    ]
    if not changed:
        return ''
    return f'EMA: changed since the checkpoint: {"; ".join(changed)}.'


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
    if found is None or count < _GOES_ON:
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
    more = f' and {len(names) - 1} more' if len(names) > 1 else ''
    return (
        f'EMA: {names[0]}{more} replaced in the model. The average goes on '
        f'with what has the same name and shape; the rest starts from its '
        f'present values.'
    )


def _without_effect(plan: Plan) -> List[str]:
    options = plan.options
    found = list(options.choice.no_effect)
    if plan.done and (options.begin_iter or options.begin_epoch):
        name = 'begin_iter' if options.begin_iter else 'begin_epoch'
        found.append(f'{name} has no effect: the average has begun already.')
    if options.evaluate == 'both' and not plan.facts.validates:
        found.append(
            "evaluate='both' has no effect: this run has no validation."
        )
    return found


def _buffers_of_ranks(count: int, agrees: bool) -> str:
    start = f'EMA: the averages of {count} buffers differ between the ranks'
    if agrees:
        return (
            f'{start}; they become the mean where the training loop '
            f'validates. A file written at another time holds those of rank 0.'
        )
    return (
        f'{start} and are never made equal, as no validation is sure to be '
        f'run on all of them: each evaluates its own, and files hold those '
        f'of rank 0.'
    )


def _other_batch_size(plan: Plan) -> str:
    limit, kappa = plan.unscaled.limit, plan.kappa
    numbers = f' ({limit:g} -> {limit**kappa:.6g})' if limit else ''
    scaled = plan.options.scale_decay
    done = 'it is used' if scaled else 'scale_decay=True uses it'
    return (
        f'EMA: a step takes {plan.facts.samples} samples, not '
        f'{plan.reference} as in the checkpoint; decay ** {kappa:.6g}'
        f'{numbers} keeps the averaging window in samples: {done}.'
    )


def _unsuited(schedule: Schedule, planned: int) -> str:
    """Warn of a ramp, or of a window, that is too long for the run."""
    if schedule.limit is None:
        return ''
    last = window(decay_over(schedule, planned, planned))
    if last < window(schedule.limit) / 2:
        text = (
            f'EMA: the ramp of {schedule} cannot saturate in {planned} steps: '
            f'the window at the last step is {_steps(last)}, not '
            f'{_steps(window(schedule.limit))}.'
        )
    elif schedule.name == 'exponential' and last > max(planned, 2):
        text = (
            f'EMA: the window of {schedule} at the last step, {_steps(last)}, '
            f'is longer than the run.'
        )
    else:
        return ''
    suited = max(planned // 10, 2)  # a window of a tenth of the run
    for_run = f'For {planned} steps take'
    window_of = f'(a window of {suited} steps).'
    if schedule.name == 'exponential':
        decay, tau = 1 - 1 / suited, max(suited // 2, 1)
        return f'{text} {for_run} decay={decay:.6g}, tau={tau} {window_of}'
    if schedule.name in _RAMPS:
        momentum, gamma = 1 / suited, _RAMPS[schedule.name](suited)
        return (
            f'{text} {for_run} momentum={momentum:.6g}, gamma={gamma} '
            f'{window_of}'
        )
    return (
        f'{text} If that is what you want, say decay={1 - 1 / last:.6g}; else '
        f'choose a faster ramp.'
    )


# OpenMMLab's ramps, and the gamma for a window in a run of ten times that:
# they reach most of it by the middle of the run
_RAMPS: Dict[str, Callable[[int], int]] = {
    'ExpMomentumEMA': lambda suited: max(suited // 2, 1),
    'MomentumAnnealingEMA': lambda suited: 5,
}


def _mixed_up(schedule: Schedule) -> str:
    limit = schedule.limit
    if limit is None or limit >= _SMALL_DECAY:
        return ''
    if limit == 0:
        return (
            'EMA: a decay of 0 keeps nothing of the old average: it is the '
            'weights of the last step. Raise decay.'
        )
    return (
        f'EMA: a decay of {limit:g} (momentum {1 - limit:g}) keeps almost '
        f'nothing of the old average. Decay weighs the OLD average, momentum '
        f'the NEW value: did you mean decay={1 - limit:g} '
        f'(momentum={limit:g})?'
    )


_WARMER = {
    'half_life': 'Lower half_life.',
    'momentum': "Raise momentum, or use a ramp (ema_type='ExpMomentumEMA').",
    'init_updates': 'Lower decay or init_updates.',
    'decay': "Lower decay, or use a ramp (schedule='exponential').",
}


def _cold(schedule: Schedule, planned: int, averaged: int) -> str:
    # a mean has no limit: it weighs all steps alike, as it should
    copies = schedule.limit is not None and decay_over(schedule, 1, 1) == 0
    share = initial_share(schedule, averaged, 2 if copies else 1)
    if averaged < 1 or share <= _LARGE_SHARE or schedule.limit == 0:
        return ''
    start = (
        'the weights of the first step' if copies else 'the initial weights'
    )
    options = schedule.options
    found = (text for option, text in _WARMER.items() if option in options)
    remedy = next(found, "Use a ramp (schedule='exponential').")
    return (
        f'EMA: {share:.0%} of the average will still be {start} after '
        f'{planned} steps of {schedule}. {remedy}'
    )


def _last_update(interval: int, phase: int, planned: int) -> int:
    """Return the last step up to ``planned`` that updates the average."""
    return max(planned - (planned - phase) % interval, 0)


def _steps(value: float) -> str:
    if value > _ENDLESS:
        return 'all steps'
    number = f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
    return f'{number} steps'
