"""Evaluate weights that no run has had, with the evaluator of a config.

Model and data are built once; weights are copied into the model, and the
validation loop of the config runs again for each.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from typing import Any, Dict, Iterator, Mapping, Optional

from mmengine.config import Config
from mmengine.hooks import EMAHook as MMEngineEMAHook
from mmengine.hooks import LoggerHook
from mmengine.runner import Runner
from torch import Tensor

from mmdet_ema.errors import CheckpointError, OptionError, show
from mmdet_ema.for_mmengine.ema_hook import EMAHook
from mmdet_ema.for_mmengine.evaluation import evaluate_apart
from mmdet_ema.for_mmengine.runner import model_of, pass_forward
from mmdet_ema.training.recalibrate import (
    batch_statistics,
    first_batches,
    layers_to_estimate,
)

# averages in the model would be wrong here, lines in a log too many
_LEFT_OUT = (EMAHook, MMEngineEMAHook, LoggerHook)


@contextlib.contextmanager
def runner_of(
    config: str,
    launcher: str = 'none',
    cfg_options: Optional[Mapping[str, Any]] = None,
) -> Iterator[Any]:
    """Make a runner of a config that evaluates, and trains nothing.

    Its work folder is a temporary one: neither the config nor the logs of
    the training are touched.

    Args:
        config: Path of the config.
        launcher: ``'pytorch'`` for several ranks, as in mmengine's tools.
        cfg_options: Changes to the config, by dotted names.

    Yields:
        The runner; the weights of its model are not initialised.

    Raises:
        OptionError: If there is no such config, or it has no validation.
    """
    if not os.path.isfile(config):
        raise OptionError(f'there is no config file {config!r}.')
    cfg = Config.fromfile(config)
    if cfg_options:
        cfg.merge_from_dict(dict(cfg_options))
    missing = [
        name
        for name in ('val_cfg', 'val_dataloader', 'val_evaluator')
        if cfg.get(name) is None
    ]
    if missing:
        raise OptionError(
            f'{config!r} has no {" and ".join(missing)}: weights are compared '
            f'by the validation of the config; give it one.'
        )
    cfg.launcher, cfg.log_level = launcher, 'ERROR'
    cfg.load_from, cfg.resume = None, False
    if (cfg.get('randomness') or {}).get('seed') is None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=0)
    if cfg.get('visualizer'):
        # no run appears at a tracking service
        cfg.visualizer.vis_backends = []
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        with _quiet():
            runner = Runner.from_cfg(cfg)
        runner._hooks = [
            hook for hook in runner.hooks if not isinstance(hook, _LEFT_OUT)
        ]
        yield runner


def evaluate_weights(
    runner: Any, state: Mapping[str, Tensor]
) -> Dict[str, float]:
    """Return the metrics of weights, by the validation of a runner.

    Call it on all ranks, with the same weights.

    Args:
        runner: One that :func:`runner_of` made.
        state: Weights by the names of the model's ``state_dict``.

    Returns:
        Metrics by name; numbers only.

    Raises:
        CheckpointError: If the weights do not fit the model.
    """
    load(runner, state)
    with _quiet():
        found = evaluate_apart(runner, _as_it_is, '', 'tune')
    return {name: float(value) for name, value in found.items()}


def recalibrated(
    runner: Any, state: Mapping[str, Tensor], batches: int
) -> Dict[str, Tensor]:
    """Return weights with BatchNorm statistics of training data.

    Args:
        runner: One that :func:`runner_of` made.
        state: Weights by the names of the model's ``state_dict``.
        batches: Batches of training data, the same in every call.

    Raises:
        OptionError: If the config has no training data, or the model no
            BatchNorm layer in training mode.
    """
    if runner.cfg.get('train_dataloader') is None:
        raise OptionError(
            f'recalibrate={batches} needs the train_dataloader of the config; '
            f'it has none.'
        )
    load(runner, state)
    model = model_of(runner)
    model.train()
    if not layers_to_estimate(model):
        raise OptionError(
            f'recalibrate={batches} has no effect: the model has no BatchNorm '
            f'layer that is trained; leave it out.'
        )
    with _quiet():
        found = batch_statistics(
            model,
            first_batches(runner.train_dataloader, batches),
            lambda batch: pass_forward(runner, batch),
        )
    buffers = dict(model.named_buffers())
    for name, value in found.items():
        buffers[name].copy_(value)
    # read back: a layer may be there under several names
    live = model.state_dict()
    return {name: live[name].detach().cpu().clone() for name in state}


def load(runner: Any, state: Mapping[str, Tensor]) -> None:
    """Copy weights into the model of a runner.

    Raises:
        CheckpointError: If they do not fit it.
    """
    model = model_of(runner)
    present = model.state_dict()
    unlike = [
        name
        for name in {**present, **state}
        if name not in state
        or name not in present
        or getattr(present[name], 'shape', None)
        != getattr(state[name], 'shape', None)
    ]
    if unlike:
        raise CheckpointError(
            f'the weights do not fit the model of the config: {len(unlike)} '
            f'tensors are missing, unknown or of another shape '
            f'({show(", ".join(unlike[:3]))}); give the config of the run.'
        )
    model.load_state_dict(state)


@contextlib.contextmanager
def _as_it_is(weights: str) -> Iterator[None]:
    """Evaluate what is in the model."""
    yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what metrics and data sets print off the table."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
