"""Checkpoints of mmcv with the averages in them.

mmcv writes ``meta``, ``state_dict`` and ``optimizer``, and nothing else: what
a hook wants to find again goes into ``meta['hook_msgs']``.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, Iterator

from mmcv.fileio.file_client import HardDiskBackend
from mmcv.runner.checkpoint import get_state_dict

from mmdet_ema.checkpoint.files import RemovesLater, write_whole
from mmdet_ema.checkpoint.mmcv1 import MESSAGE, put_message


@contextlib.contextmanager
def with_ema_part(
    runner: Any, model: Any, save: Callable[[Dict[str, Any]], None]
) -> Iterator[None]:
    """Make what the runner saves in the body hold the averages.

    ``state_dict`` gets the averages without a swap, so it does not matter
    which weights the model holds; the EMA part goes into the runner's meta
    and out again.

    Args:
        runner: The runner.
        model: Its model, unwrapped.
        save: Gives a checkpoint its EMA part, in place.
    """
    checkpoint = {'state_dict': get_state_dict(model)}
    save(checkpoint)
    weights, before = checkpoint['state_dict'], runner.meta
    if before is None:
        runner.meta = {}
    messages = runner.meta.setdefault('hook_msgs', {})
    handle = model._register_state_dict_hook(_replace_by(weights))
    put = HardDiskBackend.put
    HardDiskBackend.put = _put_whole
    try:
        put_message(messages, checkpoint)
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


def _replace_by(weights: Dict[str, Any]) -> Callable[..., None]:
    def replace(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        # a wrapped model saves its names with the wrapper's before them
        for name in state:
            plain = name[len(prefix) :]
            if name.startswith(prefix) and plain in weights:
                state[name] = weights[plain]

    return replace


def remove_later(runner: Any) -> None:
    """Let hooks remove a file only when the next one is written."""
    for hook in runner.hooks:
        client = getattr(hook, 'file_client', None)
        if client is not None and not isinstance(client, RemovesLater):
            hook.file_client = RemovesLater(client)


def _put_whole(backend: Any, content: bytes, path: Any) -> None:
    write_whole(str(path), content)
