"""A file of mmengine is whole, and an old one goes when the new one is.

mmengine writes in place, and its ``CheckpointHook`` removes the oldest and the
last best file before it writes the next.
"""

from __future__ import annotations

import functools
from typing import Any, Callable
from unittest import mock

from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook

from mmdet_ema.checkpoint.files import RemovesLater, write_whole


def keep_files_whole(runner: Any) -> None:
    """Let a runner and its checkpoint hooks, once they are ready, do so."""
    for hook in runner.hooks:
        backend = getattr(hook, 'file_backend', None)
        ready = isinstance(hook, CheckpointHook) and backend is not None
        if ready and not isinstance(backend, RemovesLater):
            hook.file_backend = RemovesLater(backend)
    if 'save_checkpoint' not in vars(runner):
        save = functools.partial(_save, runner, runner.save_checkpoint)
        runner.save_checkpoint = save


def _save(
    runner: Any, save: Callable[..., None], *args: Any, **kw: Any
) -> None:
    with mock.patch.object(LocalBackend, 'put', _put):
        save(*args, **kw)
    for hook in runner.hooks:
        backend = getattr(hook, 'file_backend', None)
        if isinstance(backend, RemovesLater):
            backend.finish()


def _put(backend: Any, content: bytes, path: Any) -> None:
    write_whole(str(path), content)
