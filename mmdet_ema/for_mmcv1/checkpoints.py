"""Checkpoints of mmcv go through our hook: both what is loaded and saved.

mmcv writes ``meta``, ``state_dict`` and ``optimizer``, and nothing else: what
a hook wants to find again goes into ``meta['hook_msgs']``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from typing import Any, Callable, Dict, Iterator, Optional

import torch
from mmcv import Config
from mmcv.fileio.file_client import HardDiskBackend
from mmcv.runner import checkpoint as mmcv_checkpoint

from mmdet_ema.checkpoint.deployed_config import (
    TRAINING_CONFIG,
    without_package,
)
from mmdet_ema.checkpoint.files import (
    RemovesLater,
    read_structure,
    write_whole,
)
from mmdet_ema.checkpoint.mmcv1 import MESSAGE, put_message, take_message
from mmdet_ema.for_mmcv1.runner import wrap_once

Method = Callable[..., Any]


def watch_loading(runner: Any, ema: Any) -> None:
    """Let our hook prepare what a runner loads, and know what it resumes."""
    resumes = False

    def resume(method: Method, *args: Any, **kwargs: Any) -> None:
        nonlocal resumes
        call = inspect.signature(method).bind(*args, **kwargs)
        call.apply_defaults()
        location = call.arguments.get('map_location')
        if location == 'default' and not torch.cuda.is_available():
            # IterBasedRunner wants a GPU
            call.arguments['map_location'] = 'cpu'
        resumes = True
        try:
            method(*call.args, **call.kwargs)
        finally:
            resumes = False
        ema.after_resume(runner)

    def load(method: Method, filename: str, *args: Any, **kwargs: Any) -> Any:
        def prepare(checkpoint: Any) -> None:
            if isinstance(checkpoint, dict):
                take_message(checkpoint)
                ema.after_read_checkpoint(
                    runner, checkpoint, str(filename), resumes
                )

        with reading_through(prepare):
            return method(filename, *args, **kwargs)

    wrap_once(runner, 'resume', resume)
    wrap_once(runner, 'load_checkpoint', load)


@contextlib.contextmanager
def reading_through(prepare: Callable[[Any], None]) -> Iterator[None]:
    """Let ``prepare`` change every checkpoint that mmcv reads in the body."""
    read = mmcv_checkpoint._load_checkpoint

    def read_and_prepare(path: str, *args: Any, **kwargs: Any) -> Any:
        if os.path.isfile(os.path.expanduser(path)):
            read_structure(path)  # mmcv would run what is in it
        checkpoint = read(path, *args, **kwargs)
        prepare(checkpoint)
        return checkpoint

    mmcv_checkpoint._load_checkpoint = read_and_prepare
    try:
        yield
    finally:
        mmcv_checkpoint._load_checkpoint = read


@contextlib.contextmanager
def with_ema_part(
    runner: Any,
    model: Any,
    save: Callable[[Dict[str, Any]], None],
    resumed: Optional[str],
) -> Iterator[None]:
    """Make what the runner saves in the body hold the averages.

    ``state_dict`` gets the averages without a swap, so it does not matter
    which weights the model holds; the EMA part goes into the runner's meta
    and out again.

    Args:
        runner: The runner.
        model: Its model, unwrapped.
        save: Gives a checkpoint its EMA part, in place.
        resumed: The config in the file that the run was resumed from.
    """
    checkpoint = {'state_dict': mmcv_checkpoint.get_state_dict(model)}
    save(checkpoint)
    weights, before = checkpoint['state_dict'], runner.meta

    def replace(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        # a wrapped model saves its names with the wrapper's before them
        for name in state:
            plain = name[len(prefix) :]
            if name.startswith(prefix) and plain in weights:
                state[name] = weights[plain]

    def put_whole(backend: Any, content: bytes, path: Any) -> None:
        write_whole(str(path), content)

    meta = runner.meta = dict(before or {})
    messages = meta.setdefault('hook_msgs', {})
    text = meta.get('config')
    # one that came from a file is not run, and was edited when it was written
    if isinstance(text, str) and text != resumed:
        meta.update({TRAINING_CONFIG: text, 'config': _deployed(text)})
    handle = model._register_state_dict_hook(replace)
    put = HardDiskBackend.put
    try:
        put_message(messages, checkpoint)
        HardDiskBackend.put = put_whole
        yield
        for hook in runner.hooks:
            client = getattr(hook, 'file_client', None)
            if isinstance(client, RemovesLater):
                client.finish()
    finally:
        HardDiskBackend.put = put
        handle.remove()
        messages.pop(MESSAGE, None)
        runner.meta = before


@functools.lru_cache(maxsize=1)
def _deployed(text: str) -> str:
    """Return a config's text without this package."""
    try:
        config = Config.fromstring(text, '.py')
        return str(without_package(config).pretty_text)
    except Exception:  # what a user wrote there, which nobody has to read
        return text


def remove_later(runner: Any) -> None:
    """Let hooks remove a file only when the next one is written."""
    for hook in runner.hooks:
        client = getattr(hook, 'file_client', None)
        if client is not None and not isinstance(client, RemovesLater):
            hook.file_client = RemovesLater(client)
