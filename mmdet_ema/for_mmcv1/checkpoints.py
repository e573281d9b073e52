"""Checkpoints of mmcv go through our hook: both what is loaded and saved.

mmcv writes ``meta``, ``state_dict`` and ``optimizer``, and nothing else: what
a hook wants to find again goes into ``meta['hook_msgs']``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import mmcv
import torch
from mmcv import Config
from mmcv.fileio.file_client import HardDiskBackend
from mmcv.runner import CheckpointHook, EvalHook
from mmcv.runner import checkpoint as mmcv_checkpoint

from mmdet_ema.checkpoint import folder, portable
from mmdet_ema.checkpoint.files import read_structure
from mmdet_ema.checkpoint.mmcv1 import MESSAGE, put_message, take_message
from mmdet_ema.training import patches
from mmdet_ema.training.patches import replacing, wrap_once
from mmdet_ema.training.sigterm import EPOCH_SAMPLES, Sigterm

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
        path = call.arguments.get('checkpoint')
        if isinstance(path, str) and '://' not in path:
            path = os.path.expanduser(path)
            chosen = not _is_automatic(runner, path)
            call.arguments['checkpoint'] = folder.readable(
                path, runner.work_dir or '', chosen, ema.log
            )
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


def _is_automatic(runner: Any, path: str) -> bool:
    """Return whether the newest file was asked for, not one by its name."""
    # mmdet 2 takes another one where there is no such link
    config = str((runner.meta or {}).get('config', ''))
    return os.path.basename(path) == 'latest.pth' or bool(
        re.search(r'^auto_resume *= *True', config, re.MULTILINE)
        and not re.search(r'^resume_from *= *[^N]', config, re.MULTILINE)
    )


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

    with replacing(mmcv_checkpoint, '_load_checkpoint', read_and_prepare):
        yield


@contextlib.contextmanager
def with_ema_part(
    runner: Any,
    model: Any,
    save: Callable[[Dict[str, Any]], None],
    resumed: Optional[str],
) -> Iterator[None]:
    """Make what the runner saves in the body hold the averages.

    ``state_dict`` gets the averages without a swap, so it does not matter
    which weights the model holds; the EMA part, which ``save`` gives to a
    checkpoint, goes into the runner's meta and out again. ``resumed`` is the
    config in the file that the run was resumed from.
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

    meta = runner.meta = dict(before or {})
    messages = meta.setdefault('hook_msgs', {})
    text = meta.get('config')
    # one that came from a file is not run, and was edited when it was written
    if isinstance(text, str) and text != resumed:
        meta[portable.TRAINING_CONFIG] = text
        meta['config'] = _deployed(text)
    handle = model._register_state_dict_hook(replace)
    try:
        put_message(messages, checkpoint)
        yield
    finally:
        handle.remove()
        messages.pop(MESSAGE, None)
        runner.meta = before


@functools.lru_cache(maxsize=1)
def _deployed(text: str) -> str:
    """Return a config's text without this package."""
    try:
        config = Config.fromstring(text, '.py')
        return str(portable.without_package(config).pretty_text)
    except Exception:  # what a user wrote there, which nobody has to read
        return text


def save_whole(runner: Any, method: Method, *args: Any, **kwargs: Any) -> None:
    """Call a runner's ``save_checkpoint``; move its files into place.

    Old files, and the link to the newest one, go when the new one is there.
    """

    def link(target: str, path: Any, *args: Any, **kwargs: Any) -> None:
        folder.link_whole(target, str(path))

    # not by the name that was written: some runners write files themselves
    with patches.moving_into_place(
        HardDiskBackend, runner.hooks, 'file_client'
    ), replacing(mmcv, 'symlink', link):
        method(*args, **kwargs)


def save_and_stop(runner: Any, sigterm: Sigterm, samples: int) -> None:
    """Write a file now, name it the latest one, and end the process.

    All ranks come here at the end of an iteration, with ``samples`` of the
    epoch trained.
    """
    hooks = [x for x in runner.hooks if isinstance(x, CheckpointHook)]
    place = (hooks[0].out_dir if hooks else None) or runner.work_dir
    name, meta = folder.STOPPED.format(runner.iter + 1), {}
    if samples:
        # the runner takes the epoch for done, and the iteration for not
        runner._epoch, runner._iter = runner.epoch - 1, runner.iter + 1
        meta[EPOCH_SAMPLES] = samples
    if runner.rank == 0:
        runner.save_checkpoint(place, filename_tmpl=name, meta=meta)
    sigterm.stop(os.path.join(place, name))


def tidy(runner: Any, log: Any) -> None:
    """Tidy up after a run that was killed between two of its files."""
    places = {getattr(hook, 'out_dir', None) for hook in runner.hooks}
    if runner.rank == 0:
        own = filter(None, {*places, runner.work_dir})
        folder.remove_leftovers(own, log)
    told = (runner.meta or {}).get('hook_msgs', {})
    for hook in runner.hooks:
        if not isinstance(hook, EvalHook) or not hook.save_best:
            continue
        known = told.get('best_ckpt')
        place = hook.out_dir or runner.work_dir
        if not place or not os.path.isdir(place):
            continue
        newer = patches.take_newer_best(runner, place, known, _best_of, log)
        if newer is not None:
            told.update(best_ckpt=newer[0], best_score=newer[1])
            hook.best_ckpt_path = newer[0]


def _best_of(content: Any) -> Tuple[str, float]:
    told = content['meta']['hook_msgs']
    return told['best_ckpt'], told['best_score']
