"""What the hook says at the start: what it will do, and what looks wrong."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Sequence

from mmdet_ema.averaging.tensors import Entry
from mmdet_ema.schedules import Schedule, decay_over, initial_share, window

_LARGE_SHARE = 0.05
_SMALL_DECAY = 0.5
_ENDLESS = 1e7
_REPORTED = ('schedule', 'interval', 'batch_size', 'world_size')


def describe(
    schedule: Schedule,
    interval: int,
    done: int,
    planned: int,
    counts: Mapping[str, int],
    phase: int = 0,
) -> str:
    """Say what the average will be.

    Args:
        schedule: The schedule.
        interval: Steps between updates.
        done: Steps that the average has seen already (above 0 on resume).
        planned: Steps that it will have seen at the end of the run.
        counts: Tensors a role and bytes, as the averager counts them.
        phase: Which step of an interval updates. Defaults to 0.

    Returns:
        Lines of text.

    Raises:
        OptionError: If the schedule returns no decay in [0, 1].
    """
    last = decay_over(schedule, max(planned, 1), max(planned, 1))
    averaged = _last_update(interval, phase, planned)
    start = f', {done} of them done' if done else ''
    return '\n'.join(
        [
            f'EMA: {schedule}, every {_plural(interval, "step")}',
            f'  steps: {planned} planned{start}',
            f'  at the last step: decay {last:.6g}, '
            f'effective window {_steps(window(last))}',
            f'  share of the initial weights left then: '
            f'{initial_share(schedule, averaged):.3g}',
            *_tensors(counts),
        ]
    )


def describe_rule(name: str, counts: Mapping[str, int]) -> str:
    """Say what a user's averaging class will do.

    Args:
        name: Name of the class.
        counts: Tensors a role and bytes, as the averager counts them.

    Returns:
        Lines of text.
    """
    first = f'EMA: {name} by its own avg_func: slow, one call a tensor'
    return '\n'.join([first, *_tensors(counts)])


def _tensors(counts: Mapping[str, int]) -> List[str]:
    return [
        f'  tensors: {counts["averaged"]} averaged, '
        f'{counts["copied"]} copied, {counts["shared"]} frozen',
        f'  memory of the averages: {counts["bytes"] / 2**20:.1f} MiB',
    ]


def warnings(
    schedule: Schedule, interval: int, planned: int, phase: int = 0
) -> List[str]:
    """List what makes the average other than the options promise.

    Args:
        schedule: The schedule.
        interval: Steps between updates.
        planned: Steps that the average will have seen at the end.
        phase: Which step of an interval updates. Defaults to 0.

    Returns:
        A sentence each, with what to do; empty if all is well.
    """
    averaged = _last_update(interval, phase, planned)
    found = [
        _mixed_up(schedule),
        _unsaturated(schedule, planned),
        _too_long(schedule, planned),
        _cold(schedule, planned, averaged),
        _rare(interval, planned, averaged),
    ]
    return [text for text in found if text]


def copied_parameters(entries: Sequence[Entry]) -> str:
    """Name trainable parameters that cannot be averaged.

    Args:
        entries: The entries of a model.

    Returns:
        A sentence; empty if there are none.
    """
    names = [e.name for e in entries if e.parameters and e.holds_nonfinite]
    if not names:
        return ''
    return (
        f'EMA: {", ".join(names[:3])} ({len(names)} parameters) held NaN or '
        f'Inf before training; they are copied, not averaged.'
    )


def buffers_of_ranks(count: int, agrees: bool) -> str:
    """Say what becomes of buffers that are not equal on all ranks.

    Args:
        count: How many buffers there are.
        agrees: Whether the run has validations of all ranks at once.
    """
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


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in one line what changed since the checkpoint.

    Args:
        before: Values from the checkpoint by name.
        now: Present values by name.

    Returns:
        The line; empty if nothing changed that both know of.
    """
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


def comparable(
    schedule: Schedule, interval: int, batch_size: int, world_size: int
) -> Dict[str, Any]:
    """Return what is compared between a checkpoint and a resumed run."""
    return {
        'schedule': str(schedule),
        'interval': interval,
        'batch_size': batch_size,
        'world_size': world_size,
    }


def _unsaturated(schedule: Schedule, planned: int) -> str:
    if schedule.limit is None or planned < 1:
        return ''
    last = window(decay_over(schedule, planned, planned))
    if last >= window(schedule.limit) / 2:
        return ''
    return (
        f'EMA: the ramp of {schedule} cannot saturate in {planned} steps: '
        f'the window at the last step is {_steps(last)}, not '
        f'{_steps(window(schedule.limit))}. {_advice(schedule, planned, last)}'
    )


def _too_long(schedule: Schedule, planned: int) -> str:
    """Warn of a ramp whose window at the end is longer than the run."""
    if schedule.name != 'exponential' or planned < 1:
        return ''
    last = window(decay_over(schedule, planned, planned))
    if last <= max(planned, 2):
        return ''
    return (
        f'EMA: the window of {schedule} at the last step, {_steps(last)}, is '
        f'longer than the run. {_advice(schedule, planned, last)}'
    )


def _advice(schedule: Schedule, planned: int, last: float) -> str:
    """Advise options that suit the run: a window of a tenth of it."""
    suited = max(planned // 10, 2)
    for_run = f'For {planned} steps take'
    window_of = f'(a window of {suited} steps).'
    if schedule.name == 'exponential':
        decay, tau = 1 - 1 / suited, max(suited // 2, 1)
        return f'{for_run} decay={decay:.6g}, tau={tau} {window_of}'
    if schedule.name in _RAMPS:
        gamma = _RAMPS[schedule.name](suited)
        return (
            f'{for_run} momentum={1 / suited:.6g}, gamma={gamma} {window_of}'
        )
    return (
        f'If that is what you want, say decay={1 - 1 / last:.6g}; else choose '
        f'a faster ramp.'
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


def _cold(schedule: Schedule, planned: int, averaged: int) -> str:
    # a mean has no limit: it weighs all steps alike, as it should
    copies = schedule.limit is not None and decay_over(schedule, 1, 1) == 0
    share = initial_share(schedule, averaged, 2 if copies else 1)
    if averaged < 1 or share <= _LARGE_SHARE or schedule.limit == 0:
        return ''
    start = (
        'the weights of the first step' if copies else 'the initial weights'
    )
    return (
        f'EMA: {share:.0%} of the average will still be {start} after '
        f'{planned} steps of {schedule}. {_warmer(schedule)}'
    )


def _warmer(schedule: Schedule) -> str:
    if 'half_life' in schedule.options:
        return 'Lower half_life.'
    if 'momentum' in schedule.options:
        return "Raise momentum, or use a ramp (ema_type='ExpMomentumEMA')."
    if 'init_updates' in schedule.options:
        return 'Lower decay or init_updates.'
    if 'decay' in schedule.options:
        return "Lower decay, or use a ramp (schedule='exponential')."
    return "Use a ramp (schedule='exponential')."


def _last_update(interval: int, phase: int, planned: int) -> int:
    """Return the last step up to ``planned`` that updates the average."""
    return max(planned - (planned - phase) % interval, 0)


def _rare(interval: int, planned: int, averaged: int) -> str:
    if interval <= planned or planned < 1:
        return ''
    taken = 'one' if averaged else 'none'
    return (
        f'EMA: interval={interval} is more than the {planned} steps planned: '
        f'the average takes in {taken} of them. Lower it.'
    )


def _steps(value: float) -> str:
    if value > _ENDLESS:
        return 'all steps'
    number = f'{value:,.0f}' if value >= 100 else f'{value:.3g}'
    return f'{number} steps'


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f'{count} {noun}s'
