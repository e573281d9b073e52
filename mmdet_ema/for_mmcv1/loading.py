"""What a runner of mmcv loads goes through our hook first.

A checkpoint is prepared after it was read and before anything is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from typing import Any, Callable, Iterator

import torch
from mmcv.runner import checkpoint as mmcv_checkpoint

from mmdet_ema.checkpoint.files import read_structure
from mmdet_ema.checkpoint.mmcv1 import take_message
from mmdet_ema.errors import CheckpointError
from mmdet_ema.for_mmcv1.runner import wrap_once


def watch_loading(runner: Any, ema: Any) -> None:
    """Let our hook prepare what a runner loads, and know what it resumes.

    The methods of the runner are wrapped once.
    """
    wrap_once(runner, 'resume', functools.partial(_resume, runner, ema))
    wrap_once(runner, 'load_checkpoint', functools.partial(_load, runner, ema))


def _resume(
    runner: Any, ema: Any, resume: Callable[..., Any], *args: Any, **kw: Any
) -> None:
    call = inspect.signature(resume).bind(*args, **kw)
    call.apply_defaults()
    location = call.arguments.get('map_location')
    if location == 'default' and not torch.cuda.is_available():
        call.arguments['map_location'] = 'cpu'  # IterBasedRunner wants a GPU
    ema.resumes = True
    try:
        resume(*call.args, **call.kwargs)
    finally:
        ema.resumes = False
    ema.after_resume(runner)


def _load(
    runner: Any,
    ema: Any,
    load: Callable[..., Any],
    filename: str,
    *args: Any,
    **kw: Any,
) -> Any:
    def prepare(checkpoint: Any) -> None:
        if isinstance(checkpoint, dict):
            take_message(checkpoint)
            ema.after_read_checkpoint(
                runner, checkpoint, str(filename), ema.resumes
            )

    path = os.path.expanduser(str(filename))
    if os.path.isfile(path):
        read_structure(path)  # mmcv would run what is in it
    with reading_through(prepare):
        return load(filename, *args, **kw)


@contextlib.contextmanager
def reading_through(prepare: Callable[[Any], None]) -> Iterator[None]:
    """Let ``prepare`` change every checkpoint that mmcv reads in the body."""
    read = mmcv_checkpoint._load_checkpoint

    def read_and_prepare(path: str, *args: Any, **kw: Any) -> Any:
        try:
            checkpoint = read(path, *args, **kw)
        except Exception as error:  # damaged bytes can raise anything
            if not os.path.isfile(path):
                raise
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f'{path!r} ({os.path.getsize(path)} bytes) is cut off or no '
                f'checkpoint ({cause}); give the path of a .pth file that a '
                f'training run wrote.'
            ) from None
        prepare(checkpoint)
        return checkpoint

    mmcv_checkpoint._load_checkpoint = read_and_prepare
    try:
        yield
    finally:
        mmcv_checkpoint._load_checkpoint = read
