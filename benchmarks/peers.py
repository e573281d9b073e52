"""The averages that are compared, each as its own project advises to use it.

All average parameters and float buffers at every step, with a decay of 0.9998
or a ramp up to it.
"""

from __future__ import annotations

import functools
import itertools
import runpy
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, NamedTuple, Optional

import torch
from torch import Tensor, nn

from benchmarks.rounds import Call
from mmdet_ema import WeightAverager

DECAY = 0.9998
COUNTS = (1, 2, 4)
"""How many averages of one run are compared."""
CHUNK = 2**18
"""Elements that stay in a cache while averages are updated from them."""
# where `make bench` installs the peers of peers.txt
sys.path.append(str(Path(__file__).with_name('.peers')))


class Peer(NamedTuple):
    """An average of a model.

    Attributes:
        update: Updates it.
        named: Returns the averages by name.
        swap: Swaps them into the model and out again.
    """

    update: Call
    named: Callable[[], Dict[str, Tensor]]
    swap: Optional[Call] = None


def _floor(model: nn.Module) -> Peer:
    """Read and write as many bytes in one flat tensor: no average."""
    tensors = [*model.parameters(), *model.buffers()]
    floats = [t.detach() for t in tensors if t.is_floating_point()]
    raw = torch.cat([tensor.flatten() for tensor in floats])
    average = raw.clone()
    raw.mul_(1.01)

    def swap() -> None:
        raw.copy_(average)
        average.copy_(raw)

    return Peer(
        lambda: average.lerp_(raw, 1 - DECAY), lambda: {'': average}, swap
    )


def _several_floor(model: nn.Module, count: int) -> Peer:
    """Read flat raw weights once, and read and write so many averages."""
    floats = list(_floor(model).named().values())
    raws = torch.split(floats[0], CHUNK)
    averages = [torch.split(raw.clone(), CHUNK) for raw in floats * count]
    rows = list(zip(raws, *averages))

    def update() -> None:
        for raw, *row in rows:
            for average in row:
                average.lerp_(raw, 1 - DECAY)

    parts = itertools.chain(*averages)
    named = {str(i): part for i, part in enumerate(parts)}
    return Peer(update, lambda: named)


def _ours(model: nn.Module, **options: Any) -> Peer:
    averager = WeightAverager(model, 'constant', decay=DECAY, **options)

    def swap() -> None:
        with averager.applied():
            pass

    return Peer(averager.update, lambda: dict(averager.named_averages()), swap)


def _mmengine(model: nn.Module) -> Peer:
    # in the registry that name is ours
    from mmengine.hooks.ema_hook import EMAHook

    hook = EMAHook(momentum=1 - DECAY, update_buffers=True)
    runner: Any = SimpleNamespace(model=model)
    hook.before_run(runner)

    def swap() -> None:
        hook.before_val_epoch(runner)
        hook.after_val_epoch(runner)

    average = hook.ema_model
    peer = _module(average.update_parameters, model, average.module)
    return peer._replace(swap=swap)


def _mmdet(model: nn.Module) -> Peer:
    from mmdet.models.layers import ExpMomentumEMA

    # mmdet's configs have update_buffers=True
    average = ExpMomentumEMA(model, momentum=1 - DECAY, update_buffers=True)
    return _module(average.update_parameters, model, average.module)


def _torch(model: nn.Module) -> Peer:
    from torch.optim import swa_utils

    rule: Any = swa_utils.get_ema_multi_avg_fn
    average = swa_utils.AveragedModel(
        model, multi_avg_fn=rule(DECAY), use_buffers=True
    )
    return _module(average.update_parameters, model, average.module)


def _ema_pytorch(model: nn.Module) -> Peer:
    from ema_pytorch import EMA

    # by default it updates every tenth step
    average = EMA(
        model,
        beta=DECAY,
        update_after_step=0,
        update_every=1,
        use_foreach=True,
        include_online_model=False,
    )
    return _module(lambda _: average.update(), model, average.ema_model)


def _timm(model: nn.Module) -> Peer:
    # one file alone: timm itself needs torchvision
    file = 'timm/utils/model_ema.py'
    path = metadata.distribution('timm').locate_file(file)
    average = runpy.run_path(str(path))['ModelEmaV3'](model, decay=DECAY)
    return _module(average.update, model, average.module)


def _module(
    update: Callable[[nn.Module], object], model: nn.Module, average: nn.Module
) -> Peer:
    return Peer(
        lambda: update(model), lambda: average.state_dict(keep_vars=True)
    )


FLOOR = 'flat floor'
OURS = 'mmdet_ema'
MMENGINE = 'mmengine `EMAHook`'
PEERS: Dict[str, Callable[[nn.Module], Peer]] = {
    FLOOR: _floor,
    OURS: _ours,
    f"{OURS}, `nonfinite='ignore'`": lambda m: _ours(m, nonfinite='ignore'),
    MMENGINE: _mmengine,
    'mmdet `ExpMomentumEMA`': _mmdet,
    'torch `AveragedModel`': _torch,
    'ema-pytorch `EMA`': _ema_pytorch,
    'timm `ModelEmaV3`': _timm,
}
"""By name, what makes an average of a model."""
SEVERAL: Dict[str, Callable[[nn.Module], Peer]] = {}
"""The same for several averages, each floor before what does it."""
for _count in COUNTS:
    _more = {f'a{i}': dict(schedule='constant') for i in range(1, _count)}
    SEVERAL[f'{FLOOR} of {_count}'] = functools.partial(
        _several_floor, count=_count
    )
    SEVERAL[f'{OURS}, {_count}'] = functools.partial(_ours, averages=_more)
COMPARED = {
    'update': tuple(PEERS),
    'several': tuple(SEVERAL),
    'swap': (FLOOR, OURS, MMENGINE),
}
"""By what is timed, the names of those that can do it."""


def make(name: str, model: nn.Module) -> Peer:
    """Make an average of a model, of which the weights then move away.

    The first updates, where some only copy, are behind it.
    """
    peer = {**PEERS, **SEVERAL}[name](model)
    for _ in range(3):
        peer.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    return peer
