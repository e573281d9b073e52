"""Checkpoints of mmengine: plain values, each file whole, read by any torch.

mmengine puts its ``HistoryBuffer`` and NumPy scalars into every file; torch
from 2.6 on reads them only in a process that has allow-listed these types. It
writes in place, and its ``CheckpointHook`` removes the oldest and the last
best file before it writes the next.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
from typing import Any, Dict, Iterator, List, MutableMapping, Optional

import numpy as np
import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, checkpoint_hook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import EpochBasedTrainLoop
from torch import nn

from mmdet_ema.averaging.fsdp1 import is_fsdp1, is_local
from mmdet_ema.checkpoint import folder as folders
from mmdet_ema.checkpoint import pickles, portable
from mmdet_ema.checkpoint.files import read_structure, write_whole
from mmdet_ema.checkpoint.format import check_names, plain_name
from mmdet_ema.checkpoint.portable import Codec
from mmdet_ema.errors import CheckpointError
from mmdet_ema.for_mmengine.runner import counts_epochs, has_stepped
from mmdet_ema.training import patches
from mmdet_ema.training.patches import replacing
from mmdet_ema.training.plan import batch_size_of
from mmdet_ema.training.sigterm import EPOCH_SAMPLES, Sigterm, skipped

Checkpoint = MutableMapping[str, Any]

_WEIGHTS = ('state_dict', 'ema_state_dict')
_DAMAGED = 'the file is damaged. Take another checkpoint.'


def allow_framework_types() -> None:
    """Allow-list what mmengine's own checkpoints hold, and nothing more.

    A ``HistoryBuffer`` is pickled with its statistics methods, as
    ``getattr(HistoryBuffer, 'mean')``. An older torch needs no list.
    """
    if not pickles.LOADS_SAFELY:
        return
    known: List[Any] = [HistoryBuffer, np.ndarray, np.dtype]
    known += {type(np.dtype(kind)) for kind in '?bBhHiIlLqQefdgFDGSU'}
    known.append((_statistics_method, 'builtins.getattr'))
    for value in (np.zeros(1), np.float64(0)):
        maker: Any = value.__reduce__()[0]
        # a file of NumPy 1 has other names for it than one of NumPy 2
        for core in ('core', '_core'):
            name = f'numpy.{core}.multiarray.{maker.__name__}'
            known.append((maker, name))
    torch.serialization.add_safe_globals(known)


def _statistics_method(owner: Any, name: str) -> Any:
    """Stand in for ``getattr`` while a file is read.

    The real one would hand a malicious file any attribute of what is
    allow-listed.
    """
    if owner is HistoryBuffer and name in pickles.STATISTICS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(
        f'the file asks for the attribute {name!r} of {owner!r}, which a '
        f'checkpoint of mmengine does not hold.'
    )


def save_safely(runner: Any) -> None:
    """Let a runner move its files into place, and remove old ones then."""
    hooks = [x for x in runner.hooks if isinstance(x, CheckpointHook)]
    backend = 'file_backend'
    patches.remove_later(hooks, backend)
    for hook in hooks:
        if hasattr(hook, backend):
            _name_last_when_whole(hook)

    def save_whole(save: Any, *args: Any, **kwargs: Any) -> None:
        with patches.moving_into_place(LocalBackend, runner.hooks, backend):
            save(*args, **kwargs)
            if is_fsdp1(runner.model) and is_local(runner.model):
                dist.barrier()  # last_checkpoint names what all have written

    patches.wrap_once(runner, 'save_checkpoint', save_whole)


def tidy(runner: Any, log: Any) -> None:
    """Tidy up after a run that was killed between two of its files."""
    hub, is_main = runner.message_hub, runner.rank == 0
    for hook in runner.hooks:
        if not isinstance(hook, CheckpointHook):
            continue
        folder = runner.work_dir
        if hook.out_dir not in (None, folder):
            name = os.path.basename(folder.rstrip(os.sep))
            folder = os.path.join(str(hook.out_dir), name)
        if not os.path.isdir(folder):
            continue  # of a server
        if is_main:
            folders.remove_leftovers([folder, runner.work_dir], log)
        if not (runner._resume and runner.iter):
            continue
        names = hook.key_indicators if hook.save_best else []
        for name in names:
            end = f'_{name}' if len(names) > 1 else ''
            keys = [f'best_ckpt{end}', f'best_score{end}']
            known = hub.runtime_info.get(keys[0])
            told = functools.partial(_info_of, keys=keys)
            newer = patches.take_newer_best(runner, folder, known, told, log)
            for key, value in zip(keys, newer or ()):
                hub.update_info(key, value)
        if hook.max_keep_ckpts > 0 and is_main:
            kept = hub.runtime_info.get('keep_ckpt_ids', [])
            _remove_unkept(folder, hook.filename_tmpl, kept, log)


def _remove_unkept(
    folder: str, template: str, kept: List[int], log: Any
) -> None:
    """Remove files that a run was killed before it could remove.

    One that a run wrote which keeps all of its files has no such list.
    """
    start, found, end = template.partition('{}')
    for name in os.listdir(folder) if found and kept else ():
        step = name[len(start) : len(name) - len(end)]
        path = os.path.join(folder, name)
        if template.format(step) != name or not step.isdigit():
            continue
        if int(step) < min(kept):
            with contextlib.suppress(CheckpointError, KeyError, TypeError):
                own = _info_of(read_structure(path), ['keep_ckpt_ids'])
                if int(step) in own[0]:
                    os.unlink(path)
                    log.info(f'EMA: {path}: removed; max_keep_ckpts is full.')


def _info_of(content: Any, keys: List[str]) -> List[Any]:
    info = content['message_hub']['runtime_info']
    return [info[key] for key in keys]


def watch_iterations(
    runner: Any, sigterm: Optional[Sigterm], samples: int, log: Any
) -> int:
    """Begin in the middle of an epoch, and stop there after SIGTERM.

    Batches of so many samples are left out: they are trained already.
    Returns how many iterations that is.
    """
    loop, loader = runner.train_loop, runner.train_dataloader
    batch = batch_size_of(loader) * runner.world_size
    own = EpochBasedTrainLoop.run_epoch
    can_skip = getattr(type(loop), 'run_epoch', None) is own
    skips = left = skipped(samples // batch, loop, can_skip, log)
    if not skips and not sigterm:
        return 0
    if sigterm:
        validation = getattr(runner.val_loop, 'dataloader', None)
        sigterm.listen([loader, validation])
    # one of an earlier training in this process
    vars(loop).pop('run_iter', None)
    run = loop.run_iter

    @functools.wraps(run)
    def run_iter(*args: Any) -> None:
        nonlocal left
        if left:
            left -= 1
            return
        run(*args)
        # every rank asks in every iteration
        if sigterm and sigterm.has_come() and has_stepped(runner):
            done = args[0] + 1 if counts_epochs(loop) else 0
            _save_and_stop(runner, sigterm, done * batch)

    loop.run_iter = run_iter
    return skips


def _save_and_stop(runner: Any, sigterm: Sigterm, samples: int) -> None:
    """Write a file now, name it the last one, and end the process.

    All ranks come here between two iterations, with ``samples`` of the epoch
    trained.
    """
    hooks = [x for x in runner.hooks if isinstance(x, CheckpointHook)]
    hook = hooks[0] if hooks else CheckpointHook()
    folder = hook.out_dir or runner.work_dir
    name = folders.STOPPED.format(runner.iter)
    meta = dict(epoch=runner.epoch, iter=runner.iter)
    if samples:
        meta[EPOCH_SAMPLES] = samples
    runner.save_checkpoint(
        folder,
        name,
        file_client_args=hook.file_client_args,
        save_param_scheduler=hook.save_param_scheduler,
        meta=meta,
        by_epoch=False,
        backend_args=hook.backend_args,
    )
    path = os.path.join(folder, name)
    if is_main_process():
        last = os.path.join(runner.work_dir, 'last_checkpoint')
        write_whole(last, path.encode())
    sigterm.stop(path)


def _name_last_when_whole(hook: Any) -> None:
    """Move ``last_checkpoint`` into place, and remove old files after that.

    The hook truncates it before it writes the name.
    """

    def save_and_name(save: Any, *args: Any, **kwargs: Any) -> None:
        opening = replacing(checkpoint_hook, 'open', _open_whole)
        with opening, hook.file_backend.held():
            save(*args, **kwargs)
        if is_main_process() and os.path.isdir(hook.out_dir):
            folders.remove_stopped(hook.out_dir)

    patches.wrap_once(hook, '_save_checkpoint_with_step', save_and_name)


@contextlib.contextmanager
def _open_whole(path: str, mode: str = 'r', **named: Any) -> Iterator[Any]:
    """Open a text file; one to write is moved into place when it is whole."""
    if mode != 'w':
        with open(path, mode, **named) as file:
            yield file
    else:
        text = io.StringIO()
        yield text
        write_whole(path, text.getvalue().encode())


def deploy_config(
    checkpoint: Checkpoint, config: Any, known: Dict[str, str]
) -> None:
    """Let a file hold the config of the deployed model, in place.

    ``known`` has the texts that were made before: making one takes seconds.
    """
    text = checkpoint.get('meta', {}).get('cfg')
    if not isinstance(text, str) or not isinstance(config, Config):
        return
    if text not in known:
        known[text] = portable.without_package(config).pretty_text
    deployed = {portable.TRAINING_CONFIG: text, 'cfg': known[text]}
    checkpoint['meta'] = {**checkpoint['meta'], **deployed}
    info = checkpoint.get('message_hub', {}).get('runtime_info', {})
    if 'cfg' in info:  # tools look here first
        info['cfg'] = known[text]


def make_plain(checkpoint: Checkpoint, log: Any) -> None:
    """Make everything in a checkpoint plain; warn of what cannot be so."""
    meta = checkpoint.get('meta', {})
    data_set = portable.to_plain(meta.get('dataset_meta'), [])
    for key, value in checkpoint.items():
        if key not in _WEIGHTS:
            checkpoint[key] = portable.to_plain(value, _CODECS)
    if 'dataset_meta' in meta:
        # tools read it without our hook, and need what the data set gave
        checkpoint['meta']['dataset_meta'] = data_set
    left = portable.foreign(dict(checkpoint))
    if left:
        log.warning(
            f'EMA: the checkpoint holds {", ".join(left)}; to read it with '
            f'weights_only=True, import mmdet_ema or allow-list these types '
            f'(torch.serialization.add_safe_globals).'
        )


def unmake(checkpoint: Checkpoint) -> None:
    """Make a checkpoint again what mmengine expects, in place."""
    for key in [x for x in checkpoint if x not in _WEIGHTS]:
        try:
            plain = checkpoint[key]
            checkpoint[key] = portable.from_plain(plain, _CODECS)
        except Exception as error:  # damaged values can raise anything
            raise CheckpointError(
                f'{key!r} of the checkpoint is damaged '
                f'({type(error).__name__}). Take another checkpoint.'
            ) from None
    meta, hub = checkpoint.get('meta'), checkpoint.get('message_hub')
    info = hub.get('runtime_info') if isinstance(hub, dict) else None
    key = portable.TRAINING_CONFIG
    text = meta.get(key) if isinstance(meta, dict) else None
    if isinstance(info, dict) and isinstance(text, str):
        info['cfg'] = text  # a run that goes on is not of the deployed model


def refuse_foreign(checkpoint: Checkpoint, log: Any) -> None:
    """Refuse to resume from what mmengine's runner did not write.

    mmengine would stop later, with the weights loaded.
    """
    meta = checkpoint.get('meta')
    if isinstance(meta, dict) and 'hook_msgs' in meta:
        raise CheckpointError(
            'the checkpoint was written by mmcv 1.x, which mmengine cannot '
            'resume; use load_from without resume to start from its weights.'
        )
    if isinstance(meta, dict) and meta.pop('config', None) is not None:
        log.warning(
            "EMA: meta['config'] of the checkpoint is left out; mmengine "
            'writes none, and would run it as a program.'
        )
    hub: Any = checkpoint.get('message_hub')
    if not isinstance(hub, MessageHub):
        check_names(hub, "'message_hub'")
        for key in ('log_scalars', 'runtime_info', 'resumed_keys'):
            check_names(hub.get(key), f"{key!r} in 'message_hub'")
        if not all(isinstance(x, bool) for x in hub['resumed_keys'].values()):
            raise CheckpointError(
                f"'resumed_keys' in 'message_hub' of the checkpoint are not "
                f'true or false; {_DAMAGED}'
            )
    found = checkpoint.get('param_schedulers', [])
    for states in found.values() if isinstance(found, dict) else [found]:
        listed = isinstance(states, list)
        if not listed or not all(isinstance(x, dict) for x in states):
            raise CheckpointError(
                f"'param_schedulers' of the checkpoint is no list of states; "
                f'{_DAMAGED}'
            )


def strip_wrapper(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Name the weights as the unwrapped model does, in place.

    ``DDPStrategy`` writes the names of its wrapper, ``module.<name>``.
    """
    weights, names = checkpoint['state_dict'], model.state_dict()
    if not names.keys() >= weights.keys():
        for name in list(weights):
            weights[plain_name(name, names)] = weights.pop(name)


def _encode_history(history: HistoryBuffer) -> Dict[str, Any]:
    values, counts = (torch.from_numpy(x.copy()) for x in history.data)
    return dict(values=values, counts=counts, max_length=history.max_length)


def _decode_history(plain: Dict[str, Any]) -> HistoryBuffer:
    values, counts = (plain[k].cpu().numpy() for k in ('values', 'counts'))
    return HistoryBuffer(values, counts, plain['max_length'])


def _encode_array(array: Any) -> Dict[str, Any]:
    if array.dtype.kind in 'biufc':
        return {'tensor': torch.from_numpy(np.ascontiguousarray(array))}
    return {'list': array.tolist()}


def _decode_array(plain: Dict[str, Any]) -> Any:
    if 'list' in plain:
        return np.array(plain['list'])
    return plain['tensor'].cpu().numpy()


_CODECS = [
    Codec(HistoryBuffer, _encode_history, _decode_history),
    Codec(np.ndarray, _encode_array, _decode_array),
    Codec(ConfigDict, lambda c: {'dict': c.to_dict()}, lambda p: p['dict']),
]
