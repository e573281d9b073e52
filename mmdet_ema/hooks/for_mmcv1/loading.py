"""What a runner of mmcv loads goes through our hook first.

A runner loads before it calls any hook, so it is wrapped when it is made: a
checkpoint is prepared after it was read and before anything is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from typing import Any, Callable, Iterator

import torch
from mmcv.runner import BaseRunner
from mmcv.runner import checkpoint as mmcv_checkpoint

from mmdet_ema.checkpoint.files import read_structure
from mmdet_ema.checkpoint.layout import put_raw, unpack
from mmdet_ema.checkpoint.mmcv1 import take_message
from mmdet_ema.core.errors import CheckpointError
from mmdet_ema.hooks.for_mmcv1.ema_hook import EMAHook
from mmdet_ema.hooks.for_mmcv1.runner_facts import ema_hook_of, note_loader
from mmdet_ema.hooks.for_mmcv1.wrapping import wrap_once

_RESUMES = '_mmdet_ema_resumes'


def watch_loading() -> None:
    """Wrap ``load_checkpoint`` and ``resume`` of every runner to come."""
    wrap_once(BaseRunner, '__init__', _init)


def _init(
    init: Callable[..., None], runner: Any, *args: Any, **kwargs: Any
) -> None:
    init(runner, *args, **kwargs)
    wrap_once(runner, 'load_checkpoint', functools.partial(_load, runner))
    wrap_once(runner, 'resume', functools.partial(_resume, runner))
    wrap_once(runner, 'run', functools.partial(_run, runner))


def _run(
    runner: Any,
    run: Callable[..., Any],
    loaders: Any,
    workflow: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    note_loader(runner, loaders, workflow)
    return run(loaders, workflow, *args, **kwargs)


def _resume(
    runner: Any, resume: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    call = inspect.signature(resume).bind(*args, **kwargs)
    call.apply_defaults()
    location = call.arguments.get('map_location')
    if location == 'default' and not torch.cuda.is_available():
        call.arguments['map_location'] = 'cpu'  # IterBasedRunner wants a GPU
    setattr(runner, _RESUMES, True)
    try:
        resume(*call.args, **call.kwargs)
    finally:
        setattr(runner, _RESUMES, False)
    hook = ema_hook_of(runner, EMAHook)
    if hook is not None:
        hook.after_resume(runner)


def _load(
    runner: Any, load: Callable[..., Any], filename: str, *args: Any, **kw: Any
) -> Any:
    def prepare(checkpoint: Any) -> None:
        resumes = getattr(runner, _RESUMES, False)
        _prepare(runner, checkpoint, str(filename), resumes)

    path = os.path.expanduser(str(filename))
    if ema_hook_of(runner, EMAHook) is not None and os.path.isfile(path):
        read_structure(path)  # mmcv would run what is in it
    with reading_through(prepare):
        return load(filename, *args, **kw)


@contextlib.contextmanager
def reading_through(prepare: Callable[[Any], None]) -> Iterator[None]:
    """Show every checkpoint that mmcv reads in the body to ``prepare`` first.

    Args:
        prepare: Changes the checkpoint in place.
    """
    read = mmcv_checkpoint._load_checkpoint

    def read_and_prepare(filename: str, *args: Any, **kwargs: Any) -> Any:
        checkpoint = _read(read, filename, *args, **kwargs)
        prepare(checkpoint)
        return checkpoint

    mmcv_checkpoint._load_checkpoint = read_and_prepare
    try:
        yield
    finally:
        mmcv_checkpoint._load_checkpoint = read


def _read(read: Callable[..., Any], path: str, *args: Any, **kw: Any) -> Any:
    try:
        return read(path, *args, **kw)
    except Exception as error:  # damaged bytes can raise anything
        if not os.path.isfile(path):
            raise
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f'{path!r} ({os.path.getsize(path)} bytes) is cut off or no '
            f'checkpoint ({cause}); give the path of a .pth file that a '
            f'training run wrote.'
        ) from None


def _prepare(
    runner: Any, checkpoint: Any, filename: str, resumes: bool
) -> None:
    """Let our hook prepare a checkpoint; without one, leave nothing of it."""
    if not isinstance(checkpoint, dict):
        return
    take_message(checkpoint)
    hook = ema_hook_of(runner, EMAHook)
    if hook is not None:
        hook.after_read_checkpoint(runner, checkpoint, filename, resumes)
    elif resumes and (part := unpack(checkpoint)) is not None:
        put_raw(checkpoint, part)
        runner.logger.warning(
            'EMA: the checkpoint has an EMA part and the run no EMAHook; '
            'training goes on from the raw weights, without an average.'
        )
