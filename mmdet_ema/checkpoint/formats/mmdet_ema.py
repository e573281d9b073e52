"""Files of this package, of either generation."""

from __future__ import annotations

from typing import Any, Dict, Mapping

from mmdet_ema.averaging.averages import MAIN, read_progress
from mmdet_ema.checkpoint.contents import (
    AVERAGE,
    KAPPA,
    RAW,
    Contents,
    Weights,
    parse_schedule,
    weights_of,
)
from mmdet_ema.checkpoint.format import EMA, META, MORE, WEIGHTS, pack, unpack
from mmdet_ema.checkpoint.formats.base import (
    Content,
    Format,
    Written,
    both,
    meta_of,
    rest_of,
    state_dict,
)
from mmdet_ema.checkpoint.mmcv1 import MESSAGE, put_message, take_message

MESSAGES = 'hook_msgs'
# what plan.py notes: samples a step that the decay was chosen for
_REFERENCE = 'reference_samples'


def _has_message(content: Content) -> bool:
    messages = meta_of(content).get(MESSAGES)
    return isinstance(messages, dict) and MESSAGE in messages


def _recognise(content: Content, path: str) -> bool:
    return META in content or _has_message(content)


def _read(content: Content, path: str) -> Contents:
    whole, generation = dict(content), 'mmengine'
    if _has_message(content):
        generation = 'mmcv 1.x'
        meta = whole['meta'] = meta_of(content)
        meta[MESSAGES] = dict(meta[MESSAGES])
        take_message(whole)
    part = unpack(whole)
    if part is None:
        raise ValueError(f'{MESSAGES} has an empty part of EMAHook')
    said = f'{META} says so'
    metadata = getattr(content[WEIGHTS], '_metadata', None)
    sets = {
        'raw': weights_of(part.raws, what=EMA, role=RAW, evidence=said),
    }
    for name, state in part.states().items():
        progress = read_progress(state)
        schedule = parse_schedule(state.get('schedule'))
        if name == part.deployed and KAPPA not in schedule:
            schedule.update(_kappa(part.meta))
        sets[name] = weights_of(
            # an average that is not stored is that of the deployed set
            {**part.averages, **state['averages']},
            what=f'{name} of the checkpoint',
            role=AVERAGE,
            evidence=said,
            updates=progress.updates,
            steps=progress.steps,
            averaged_steps=progress.averaged,
            interval=part.meta.get('interval', 1),
            skipped=state.get('num_skipped', part.meta.get('num_skipped', 0)),
            schedule=schedule,
        )
    for weights in sets.values():
        weights.metadata = metadata
    return Contents(
        path,
        FORMAT.name,
        f'{part.meta.get("writer", "mmdet_ema")} on {generation}',
        sets,
        part.deployed,
        meta_of(whole),
        rest_of(whole, WEIGHTS, EMA, MORE, 'meta'),
    )


def _kappa(meta: Mapping[str, Any]) -> Dict[str, float]:
    """Return the power that ``scale_decay`` raises the decay to."""
    keys = ('batch_size', 'world_size', _REFERENCE)
    numbers: Any = [meta.get(key) for key in keys]
    if not all(isinstance(x, int) and x > 0 for x in numbers):
        return {}
    batch, ranks, reference = numbers
    kappa = batch * ranks / reference
    return {} if kappa == 1 else {KAPPA: kappa}


def _write(contents: Contents, out: str) -> Written:
    raw, main = both(contents)
    deployed = contents.average or MAIN
    before = contents.rest.get(META)
    meta: Dict[str, Any] = dict(before) if isinstance(before, dict) else {}
    # pack() writes these
    for key in ('steps', 'roles', 'format_version', 'deploy'):
        meta.pop(key, None)
    meta.update(_state(main, meta.get('schedule')), interval=main.interval)
    more = {
        name: {**_state(weights, None), WEIGHTS: dict(weights.tensors)}
        for name, weights in contents.sets.items()
        if name not in ('raw', deployed)
    }
    if more or deployed != MAIN:
        meta['deploy'] = deployed
    meta.setdefault('writer', f'mmdet_ema, from a file of {contents.writer}')
    live = Weights({**main.tensors, **raw.tensors}, metadata=raw.metadata)
    checkpoint: Dict[str, Any] = {
        'meta': dict(contents.meta),
        WEIGHTS: state_dict(live),
        **{k: x for k, x in contents.rest.items() if k != META},
    }
    steps = meta['num_steps']
    pack(checkpoint, main.tensors, raw.tensors, steps, meta, more)
    if isinstance(contents.meta.get(MESSAGES), dict):  # of mmcv 1.x
        messages = checkpoint['meta'][MESSAGES] = dict(contents.meta[MESSAGES])
        put_message(messages, checkpoint)
    known = main.updates is not None
    return checkpoint, [] if known else ['n, which is written as 0']


def _state(weights: Weights, schedule: Any) -> Dict[str, Any]:
    """Return what a file says of an average besides its tensors."""
    updates = weights.updates or 0
    steps = updates if weights.steps is None else weights.steps
    averaged = weights.averaged_steps
    state: Dict[str, Any] = {
        'num_steps': steps,
        'num_updates': updates,
        'num_skipped': weights.skipped,
        'averaged_steps': steps if averaged is None else averaged,
    }
    built = weights.build_schedule()
    # the text in a file has no kappa, which follows from its batch size
    if schedule or built:
        state['schedule'] = schedule or str(built)
    return state


FORMAT = Format(
    'mmdet_ema', 'EMAHook of this package', _recognise, _read, _write
)
