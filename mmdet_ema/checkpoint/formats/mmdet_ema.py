"""Files of this package, of either generation, and of mmengine's own hook."""

from __future__ import annotations

from typing import Any, Dict, Mapping

from mmdet_ema.averaging.averages import MAIN
from mmdet_ema.averaging.state import read_progress
from mmdet_ema.checkpoint.contents import (
    AVERAGE,
    RAW,
    Content,
    Contents,
    Format,
    Weights,
    Written,
    as_count,
    meta_of,
    rest_of,
    weights_of,
)
from mmdet_ema.checkpoint.format import (
    EMA,
    META,
    MORE,
    PREFIX,
    REFERENCE,
    STEPS,
    WEIGHTS,
    pack,
    unpack,
)
from mmdet_ema.checkpoint.mmcv1 import MESSAGE, put_message, take_message

MESSAGES = 'hook_msgs'
_LONGEST = 1000  # text of a schedule


def _has_message(content: Content) -> bool:
    messages = meta_of(content).get(MESSAGES)
    return isinstance(messages, dict) and MESSAGE in messages


def _recognise(content: Content, path: str) -> bool:
    return META in content or _has_message(content)


def _is_of_mmengine(content: Content, path: str) -> bool:
    if EMA not in content:
        return False
    part = content[EMA]
    if not isinstance(part, dict) or not part:
        return True  # which is refused when it is read
    # other projects have averages in a key of that name
    return STEPS in part or any(str(x).startswith(PREFIX) for x in part)


def _read(content: Content, path: str) -> Contents:
    whole, name, said = dict(content), FORMAT.name, f'{META} says so'
    generation, meta = 'mmengine', meta_of(content)
    if _has_message(content):
        generation = 'mmcv 1.x'
        whole['meta'] = {**meta, MESSAGES: dict(meta[MESSAGES])}
        take_message(whole)
        meta = whole['meta']
    part = unpack(whole)
    if part is None:
        raise ValueError(f'{MESSAGES} has an empty part of EMAHook')
    writer = f'{part.meta.get("writer", "mmdet_ema")} on {generation}'
    if META not in whole:
        name, version = MMENGINE.name, meta.get('mmengine_version')
        writer = f'mmengine {version if isinstance(version, str) else ""}'
        said = (
            f"mmengine's hook saves swapped: {WEIGHTS} holds the averages, "
            f'{EMA} {PREFIX}* the raw weights'
        )
    sets = {'raw': weights_of(part.raws, what=EMA, role=RAW, evidence=said)}
    for key, state in part.states().items():
        progress = read_progress(state)
        schedule = str(state.get('schedule', ''))[:_LONGEST]
        skipped = state.get('num_skipped', part.meta.get('num_skipped'))
        if key == part.deployed:
            schedule = _scaled(schedule, part.meta)
        sets[key] = weights_of(
            # an average that is not stored is that of the deployed set
            {**part.averages, **state['averages']},
            what=f'{key} of the checkpoint',
            role=AVERAGE,
            evidence=said,
            updates=progress.updates,
            steps=progress.steps,
            averaged_steps=progress.averaged,
            interval=as_count(part.meta.get('interval')) or 1,
            skipped=as_count(skipped) or 0,
            schedule=schedule,
        )
    for weights in sets.values():
        weights.metadata = getattr(content[WEIGHTS], '_metadata', None)
    rest = rest_of(whole, WEIGHTS, EMA, MORE, 'meta')
    return Contents(
        *(path, name, writer.strip(), sets, part.deployed, meta, rest)
    )


def _scaled(schedule: str, meta: Mapping[str, Any]) -> str:
    """Add the power that ``scale_decay`` raises the decay to."""
    keys = ('batch_size', 'world_size', REFERENCE)
    numbers: Any = [meta.get(key) for key in keys]
    told = all(isinstance(x, int) and x > 0 for x in numbers)
    if not told or 'kappa=' in schedule or not schedule.endswith(')'):
        return schedule
    batch, ranks, reference = numbers
    kappa = batch * ranks / reference
    return schedule if kappa == 1 else f'{schedule[:-1]}, kappa={kappa!r})'


def _write(contents: Contents, out: str) -> Written:
    checkpoint = _packed(contents)
    if isinstance(contents.meta.get(MESSAGES), dict):  # of mmcv 1.x
        messages = checkpoint['meta'][MESSAGES] = dict(contents.meta[MESSAGES])
        put_message(messages, checkpoint)
    return checkpoint, []


def _write_mmengine(contents: Contents, out: str) -> Written:
    checkpoint = _packed(contents)
    for key in (META, MORE):
        checkpoint.pop(key, None)
    return checkpoint, []


def _packed(contents: Contents) -> Dict[str, Any]:
    raw, main = contents.both()
    deployed = contents.average or MAIN
    before = contents.rest.get(META)
    meta: Dict[str, Any] = dict(before) if isinstance(before, dict) else {}
    # pack() writes these
    for key in ('steps', 'roles', 'format_version', 'deploy'):
        meta.pop(key, None)
    # the text in a file has no kappa, which follows from its batch size
    schedule = meta.get('schedule')
    meta.update(_state(main), interval=main.interval)
    if schedule:
        meta['schedule'] = schedule
    more = {
        name: {**_state(weights), WEIGHTS: dict(weights.tensors)}
        for name, weights in contents.sets.items()
        if name not in ('raw', deployed)
    }
    if more or deployed != MAIN:
        meta['deploy'] = deployed
    meta.setdefault('writer', f'mmdet_ema, from a file of {contents.writer}')
    live = Weights({**main.tensors, **raw.tensors}, metadata=raw.metadata)
    checkpoint: Dict[str, Any] = {
        'meta': dict(contents.meta),
        WEIGHTS: live.state_dict(),
        **{k: x for k, x in contents.rest.items() if k != META},
    }
    steps = meta['num_steps']
    pack(checkpoint, main.tensors, raw.tensors, steps, meta, more)
    return checkpoint


def _state(weights: Weights) -> Dict[str, Any]:
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
    if weights.schedule:
        state['schedule'] = weights.schedule
    return state


FORMAT = Format(
    'mmdet_ema',
    'EMAHook of this package',
    _recognise,
    _read,
    _write,
    holds='all',
    has_schedule=True,
)
MMENGINE = Format(
    'mmengine',
    "mmengine's or mmpretrain's EMAHook",
    _is_of_mmengine,
    _read,
    _write_mmengine,
)
