"""Which weights of a checkpoint go where when it is loaded.

A checkpoint with an EMA part holds two sets of weights, and the framework
loads one, ``state_dict``. Each function here prepares a checkpoint for one
purpose, in place, before the framework loads it. Of the model only names,
shapes and kinds of tensors are looked at. What does not fit, or is damaged,
raises a :class:`CheckpointError`.
"""

from __future__ import annotations

from typing import Any, List, Mapping, MutableMapping, Optional, Sequence

import torch
from torch import nn

from mmdet_ema.averaging.averages import MAIN
from mmdet_ema.averaging.shards import layout
from mmdet_ema.averaging.tensors import is_finite
from mmdet_ema.checkpoint import format as ema_format
from mmdet_ema.checkpoint.format import WEIGHTS, EMAPart, put_raw, unpack
from mmdet_ema.errors import CheckpointError
from mmdet_ema.schedules import Schedule
from mmdet_ema.training.options import RAW, Options
from mmdet_ema.training.passes import sets_of_weights
from mmdet_ema.training.report import first_of

Checkpoint = MutableMapping[str, Any]


def for_resume(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizers: Sequence[Any],
    options: Options,
    log: Any,
) -> Optional[EMAPart]:
    """Prepare a checkpoint that training resumes from: raw weights load.

    Returns the EMA part to go on from, None to start from those weights.
    """
    part = unpack(checkpoint)
    if part is not None:
        part.check(model, options.strict_load and options.enabled, log)
        _restart_nonfinite(part, log)
        put_raw(checkpoint, part)
    elif options.strict_load and options.enabled:
        raise CheckpointError(
            'strict_load=True, but the checkpoint has no EMA part. With '
            'strict_load=False the average starts from its weights.'
        )
    else:
        weights = _weights_of(checkpoint, model)
        goes_on = 'the average starts'
        if not options.enabled:
            goes_on = 'training goes on'
        log.warning(
            f'EMA: the checkpoint has no EMA part; {goes_on} from its weights.'
        )
        _name_nonfinite(weights, model, log)
    ema_format.check_training_state(checkpoint, optimizers, log)
    if not options.enabled:
        log.warning(
            'EMA: enabled=False: training goes on from the raw weights, '
            'without an average.'
        )
        return None
    begun = part and (part.steps > 0 or 'num_steps' in part.meta)
    return part if begun else None


def for_fine_tuning(
    checkpoint: Checkpoint, model: nn.Module, options: Options, log: Any
) -> None:
    """Say what a new training starts from; ``state_dict`` loads as it is."""
    weights = _weights_of(checkpoint, model)
    part = _if_readable(checkpoint, log)
    _name_nonfinite(weights, model, log)
    origin = 'weights' if part is None else f'averages ({part.steps} steps)'
    starts = 'the average starts anew (n = 0),'
    if not options.enabled:
        starts = 'enabled=False: without an average, training starts'
    log.info(f'EMA: {starts} from the {origin} of the checkpoint.')


def for_evaluation(
    checkpoint: Checkpoint, model: nn.Module, options: Options, log: Any
) -> Optional[EMAPart]:
    """Prepare a checkpoint that is only evaluated.

    Returns the EMA part if averages have to be put in for an evaluation: then
    the raw weights load. None if what loads is evaluated.
    """
    part = check_evaluated(checkpoint, model, options, log)
    if part is None:
        return None
    passes = _passes(options)
    log.info(f'EMA: evaluating {sets_of_weights(passes)} (n={part.steps}).')
    if passes == [part.deployed]:
        return None
    put_raw(checkpoint, part)
    if passes == [RAW]:
        return None
    part.check(model, False, log)
    return part


def check_evaluated(
    checkpoint: Checkpoint, model: nn.Module, options: Options, log: Any
) -> Optional[EMAPart]:
    """Refuse a checkpoint that has not the weights to evaluate.

    Returns its EMA part; None if there is none, and what loads is evaluated.
    """
    lacking = check_architecture(checkpoint, model)
    if lacking:
        log.warning(f'EMA: {lacking}')
    passes = _passes(options)
    if passes == [MAIN]:
        # state_dict is all that is needed, even if the rest is damaged
        part = _if_readable(checkpoint, log)
        if part is None:
            log.info(
                'EMA: the checkpoint has no EMA part; evaluating its weights.'
            )
            return None
    else:
        part = unpack(checkpoint)
    # as the option says it
    both = set(passes) == {MAIN, RAW}
    shown = 'both' if both else passes[0] if len(passes) == 1 else passes
    if part is None:
        raise CheckpointError(
            f'evaluate={shown!r} needs raw weights, but the checkpoint '
            f'holds one set of weights and no EMA part; use '
            f"evaluate='ema' to evaluate what it holds."
        )
    there = (RAW, *part.states())
    lost = [name for name in passes if name not in there]
    if lost:
        raise CheckpointError(
            f'evaluate={shown!r}: the checkpoint has no averages '
            f'{", ".join(lost)}; it has {", ".join(there)}.'
        )
    return part


def _passes(options: Options) -> List[str]:
    # a hook that is off adds no second pass
    return [*options.passes] if options.enabled else [options.passes[-1]]


def tell_sets(
    states: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
    more: Mapping[str, Schedule],
    log: Any,
) -> bool:
    """Say which averages of a file go on; tell if one has another schedule.

    ``names`` are those of this run. Of ``more``, all but the main one, the
    schedules are compared: the report has the main one.
    """
    said = [f'the checkpoint has the averages {", ".join(states)}']
    said += [
        f'{name} starts from the raw weights, n = 0'
        for name in names
        if name not in states
    ]
    said += [f'{name} is dropped' for name in states if name not in names]
    changed = [
        f'{name} goes on with {schedule}, not {states[name].get("schedule")}'
        for name, schedule in more.items()
        if name in states and states[name].get('schedule') != str(schedule)
    ]
    if len(said + changed) > 1:
        log.warning(f'EMA: {"; ".join(said + changed)}.')
    return bool(changed)


def check_architecture(checkpoint: Checkpoint, model: nn.Module) -> str:
    """Refuse a file of another architecture; say what weights it lacks.

    A framework leaves out what does not fit, and would evaluate weights that
    are random.
    """
    state = layout(model)
    own = {name: x for name, x in state.items() if x.is_floating_point()}
    shapes = {
        ema_format.plain_name(name, own): getattr(value, 'shape', None)
        for name, value in _weights_of(checkpoint, model).items()
    }
    lacking = [name for name, x in own.items() if shapes.get(name) != x.shape]
    found = len(own) - len(lacking)
    text = f'the file has {found} of the {len(own)} weights of the model'
    if 2 * found < len(own):
        raise CheckpointError(
            f'{text}: it belongs to another architecture; take a file of the '
            f"config's model, or the config of the file."
        )
    if not lacking:
        return ''
    return (
        f'{text} with their shape; the others stay as they were initialised: '
        f'{first_of(lacking)}.'
    )


def _if_readable(checkpoint: Checkpoint, log: Any) -> Optional[EMAPart]:
    """Return the EMA part where ``state_dict`` is all that is needed."""
    try:
        return unpack(checkpoint)
    except CheckpointError as error:
        log.warning(f'EMA: the EMA part is left out: {error}')
        return None


def _weights_of(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """Return the weights that a framework loads, which may be the file."""
    weights: Checkpoint = checkpoint.get(WEIGHTS, checkpoint)
    ema_format.check_names(weights, WEIGHTS)
    if not weights:
        raise CheckpointError(
            'the checkpoint holds no weights; take another checkpoint.'
        )
    ema_format.check_weights(layout(model), weights)
    return weights


def _name_nonfinite(weights: Checkpoint, model: nn.Module, log: Any) -> None:
    # a buffer may be a mask
    masks = {k for k, v in model.named_buffers() if _nonfinite(v)}
    own = layout(model).keys() - masks
    bad = [k for k, v in weights.items() if k in own and _nonfinite(v)]
    if bad:
        log.warning(
            f'EMA: the weights of the checkpoint hold NaN or Inf in '
            f'{first_of(bad)}; training starts from them as they are. Take '
            f'an earlier checkpoint.'
        )


def _restart_nonfinite(part: EMAPart, log: Any) -> None:
    """Let averages that are not finite start again from the raw weights."""
    bad, lost = [], []
    for name, raw in part.raws.items():
        average = part.averages.get(name)
        if _nonfinite(raw):
            # what never moved may be meant so, as a mask of infinity is
            same = isinstance(average, torch.Tensor) and bool(
                average.shape == raw.shape and (average == raw).all()
            )
            if not same:
                bad.append(name)
        elif _nonfinite(average):
            lost.append(name)
            part.averages[name] = raw
    if lost:
        log.warning(
            f'EMA: the averages of the checkpoint hold NaN or Inf in '
            f'{first_of(lost)}; these averages start again from the raw '
            f'weights, which are finite.'
        )
    if bad:
        log.warning(
            f'EMA: the raw weights of the checkpoint hold NaN or Inf in '
            f'{first_of(bad)}; training goes on from them as they are. Take '
            f'an earlier checkpoint, or load_from this one to start from its '
            f'averages.'
        )


def _nonfinite(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and (value.is_floating_point() or value.is_complex())
        and not is_finite(value)
    )
