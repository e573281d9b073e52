"""The share of a real training step that goes into the average.

On a CPU RTMDet-tiny through mmengine's own runner and hooks; on a GPU a
RetinaNet-R50 in a plain loop, which needs torch alone.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import torch

from benchmarks import models, peers, retinanet
from benchmarks.rounds import Call, Sample, seconds

NONE = 'without an average'
HOOKS: Dict[str, List[Dict[str, Any]]] = {
    NONE: [],
    peers.OURS: [dict(type='EMAHook')],
    "mmengine's hook, `mmdet.ExpMomentumEMA`": [
        dict(
            type='MMEngineEMAHook',
            ema_type='mmdet.ExpMomentumEMA',
            momentum=0.0002,
            update_buffers=True,
        )
    ],
}
"""By name, the hooks that a runner gets."""
LOOPS = (NONE, *(name for name in peers.PEERS if name != peers.FLOOR))
"""Names of the averages in a plain loop."""

_FOREVER = 10**6
_numbers = itertools.count()


class _BegunError(Exception):
    """The training has begun; its iterations are for others to take."""


def through_runner(name: str, folder: Path) -> Sample:
    """Begin a training of RTMDet-tiny through mmengine's Runner.

    Args:
        name: Whose hook: a name of ``HOOKS``.
        folder: Where the runner writes.

    Returns:
        What takes a step: seconds, and of these in the EMA hook.
    """
    from mmdet.testing import demo_mm_inputs
    from mmengine.registry import LOOPS as MMENGINE_LOOPS
    from mmengine.runner import IterBasedTrainLoop, Runner

    class SteppedTrainLoop(IterBasedTrainLoop):  # type: ignore[misc]
        """Begins as its parent does, and leaves the iterations to us."""

        def run(self) -> None:
            self.runner.call_hook('before_train')
            self.runner.call_hook('before_train_epoch')
            self.runner.model.train()
            raise _BegunError

    MMENGINE_LOOPS.register_module(module=SteppedTrainLoop, force=True)
    # two pictures of eight objects each
    batch = demo_mm_inputs(2, (3, 320, 320), [8, 8], num_classes=80)
    torch.manual_seed(0)
    sgd = dict(type='SGD', lr=1e-5, momentum=0.9)
    # runners of one name would share a logger
    number = f'benchmark{next(_numbers)}'
    runner = Runner(
        model=models.build_real('rtmdet-tiny'),
        work_dir=str(folder / number),
        train_dataloader=dict(
            dataset=[batch],
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
            batch_size=1,
            num_workers=0,
        ),
        train_cfg=dict(type='SteppedTrainLoop', max_iters=_FOREVER),
        optim_wrapper=dict(optimizer=sgd),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=_FOREVER)
        ),
        custom_hooks=[dict(hook) for hook in HOOKS[name]],
        experiment_name=number,
        default_scope='mmdet',
    )
    with contextlib.suppress(_BegunError):
        runner.train()

    spent: List[Tuple[Any, Any]] = []
    for hook in runner.hooks:
        if type(hook).__name__ == 'EMAHook':
            for moment in ('before_train_iter', 'after_train_iter'):
                timed = _timed(getattr(hook, moment), spent, 'cpu')
                setattr(hook, moment, timed)
    return _sampler(lambda: runner.train_loop.run_iter(batch), spent, 'cpu')


def in_plain_loop(name: str, device: str = 'cuda') -> Sample:
    """Begin a training of a RetinaNet-R50 in a plain PyTorch loop.

    Args:
        name: Whose average: a name of ``LOOPS``.
        device: Where; on 'cpu' one small picture, to try it out.

    Returns:
        What takes a step: seconds, and of these in the update. On a GPU that
        is how long it keeps the device: the host is ahead.
    """
    pictures, size = (1, 64) if device == 'cpu' else (2, 800)
    torch.manual_seed(0)
    model = models.build('retinanet-r50', device)
    tensors = model.state_dict(keep_vars=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-5, momentum=0.9)
    batch = torch.rand(pictures, 3, size, size, device=device)
    spent: List[Tuple[Any, Any]] = []
    update: Call = lambda: None  # noqa: E731
    if name != NONE:
        update = _timed(peers.make(name, model).update, spent, device)

    def step() -> None:
        optimizer.zero_grad()
        loss: Any = retinanet.forward(tensors, batch)
        loss.backward()
        optimizer.step()
        update()

    return _sampler(step, spent, device)


def _sampler(step: Call, spent: List[Tuple[Any, Any]], device: str) -> Sample:
    def sample() -> Tuple[float, float]:
        spent.clear()
        whole = seconds(step, device)
        if device == 'cpu':
            return whole, sum(end - begin for begin, end in spent)
        return whole, sum(a.elapsed_time(b) for a, b in spent) / 1000

    # the first steps allocate, choose convolutions and make the average
    sample()
    sample()
    return sample


def _timed(
    call: Callable[..., object], spent: List[Tuple[Any, Any]], device: str
) -> Callable[..., None]:
    """Return the call, which adds when it began and ended to a list."""

    def now() -> Any:
        if device == 'cpu':
            return time.perf_counter()
        # untyped in torch
        make_event: Any = torch.cuda.Event
        event = make_event(enable_timing=True)
        event.record()
        return event

    def timed(*args: Any, **options: Any) -> None:
        begin = now()
        call(*args, **options)
        spent.append((begin, now()))

    return timed
