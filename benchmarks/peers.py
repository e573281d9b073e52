"""The averages that are compared, each as its own project advises to use it.

All keep parameters and float buffers with decay 0.9998, every step; classes
of OpenMMLab also the way they are by default, where buffers are copied.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Callable, Dict, Iterator

import torch
from torch import Tensor, nn

from benchmarks.loading import load, load_file

DECAY = 0.9998
RAMP = 0.9


class Peer:
    """An average of a module.

    Args:
        update: Takes in the module's weights as they are now.
        average: The averaged module, or what else holds the averages.
        named: Returns the averages by name.
    """

    def __init__(
        self,
        update: Callable[[], object],
        average: Any,
        named: Callable[[], Dict[str, Tensor]],
    ):
        self.update, self.average, self.named = update, average, named

    def before_step(self) -> None:
        """Let an optimizer change the weights."""

    def settle(self) -> None:
        """Wait for an update that runs beside something else."""


class _Ours(Peer):
    """Ours, whose updates may run beside the training."""

    def before_step(self) -> None:
        self.average.before_step()

    def settle(self) -> None:
        self.average.settle()


def ours(model: nn.Module, **options: Any) -> Peer:
    """``mmdet_ema.WeightAverager``, by default where its ramp has ended."""
    from mmdet_ema import WeightAverager

    options = {'decay': DECAY, **options}
    averager = WeightAverager(model, 'constant', **options)
    return _Ours(
        averager.update, averager, lambda: dict(averager.named_averages())
    )


def mmengine(model: nn.Module, **options: Any) -> Peer:
    """``ExponentialMovingAverage`` of mmengine."""
    kind = load('mmengine.model').ExponentialMovingAverage
    average = kind(model, momentum=1 - DECAY, **options)
    return _of_module(
        lambda: average.update_parameters(model), average, average.module
    )


def mmdet(model: nn.Module, **options: Any) -> Peer:
    """``ExpMomentumEMA`` of mmdet."""
    kind = load_file('mmdet', 'models/layers/ema.py').ExpMomentumEMA
    average = kind(model, momentum=1 - DECAY, **options)
    return _of_module(
        lambda: average.update_parameters(model), average, average.module
    )


def averaged_model(model: nn.Module) -> Peer:
    """``AveragedModel`` of torch with its multi-tensor EMA."""
    from torch.optim import swa_utils

    rule: Any = swa_utils.get_ema_multi_avg_fn
    average = swa_utils.AveragedModel(
        model,
        multi_avg_fn=rule(DECAY),
        use_buffers=True,
    )
    return _of_module(
        lambda: average.update_parameters(model), average, average.module
    )


def ema_pytorch(model: nn.Module) -> Peer:
    """``EMA`` of ema-pytorch, every step and with multi-tensor calls."""
    average = load('ema_pytorch').EMA(
        model,
        beta=DECAY,
        update_after_step=0,
        update_every=1,
        use_foreach=True,
        include_online_model=False,
    )
    return _of_module(average.update, average, average.ema_model)


def timm(model: nn.Module) -> Peer:
    """``ModelEmaV3`` of timm."""
    kind = load_file('timm', 'utils/model_ema.py').ModelEmaV3
    average = kind(model, decay=DECAY)
    return _of_module(lambda: average.update(model), average, average.module)


def floor(model: nn.Module) -> Peer:
    """One ``lerp_`` over one flat tensor of as many bytes: no average."""
    floats = [
        tensor.detach().reshape(-1)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point()
    ]
    raw = torch.cat(floats)
    average = raw.clone()
    raw.mul_(1.01)
    return Peer(
        lambda: average.lerp_(raw, 1 - DECAY), average, lambda: {'': average}
    )


PEERS: Dict[str, Callable[[nn.Module], Peer]] = {
    'floor': floor,
    'ours': ours,
    'ours-ramp': lambda m: ours(m, decay=RAMP),
    'ours-ignore': lambda m: ours(m, nonfinite='ignore'),
    'ours-host': lambda m: ours(m, device='cpu'),
    'ours-overlap': lambda m: ours(m, overlap=True),
    'mmengine': mmengine,
    'mmengine-buffers': lambda m: mmengine(m, update_buffers=True),
    'mmdet': mmdet,
    'mmdet-buffers': lambda m: mmdet(m, update_buffers=True),
    'torch': averaged_model,
    'ema-pytorch': ema_pytorch,
    'timm': timm,
}

LABELS = {
    'none': 'without an average',
    'update': '`WeightAverager.update()` alone',
    'floor': 'floor: flat tensors',
    'ours': 'mmdet_ema',
    'ours-ramp': 'mmdet_ema, on the ramp (d = 0.9)',
    'ours-ignore': "mmdet_ema, `nonfinite='ignore'`",
    'ours-host': "mmdet_ema, `device='cpu'`",
    'ours-overlap': 'mmdet_ema, `overlap=True`: what the training waits for',
    'mmengine': 'mmengine `ExponentialMovingAverage`',
    'mmengine-buffers': 'mmengine, `update_buffers=True`',
    'mmdet': 'mmdet `ExpMomentumEMA`',
    'mmdet-buffers': 'mmdet, `update_buffers=True`',
    'torch': 'torch `AveragedModel`, EMA, multi-tensor',
    'ema-pytorch': 'ema-pytorch `EMA`, foreach',
    'timm': 'timm `ModelEmaV3`',
}


def make(name: str, model: nn.Module) -> Peer:
    """Make an average of a model.

    Args:
        name: A name of ``PEERS``.
        model: The model.

    Returns:
        The average, with its first updates, where peers copy, behind it.
    """
    with _quiet():
        peer = PEERS[name](model)
    for _ in range(3):
        peer.before_step()
        peer.update()
    peer.settle()
    return peer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what mmengine reports of every registration."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _of_module(
    update: Callable[[], object], average: Any, module: nn.Module
) -> Peer:
    return Peer(
        update, average, lambda: dict(module.state_dict(keep_vars=True))
    )
