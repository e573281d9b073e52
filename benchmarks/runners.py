"""Real mmengine runners whose iterations are taken one by one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Callable, Dict, List

from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

import mmdet_ema  # noqa: F401  registers the hook

HOOKS: Dict[str, List[Dict[str, Any]]] = {
    'none': [],
    'ours': [dict(type='EMAHook')],
    'mmengine-buffers': [dict(type='MMEngineEMAHook', update_buffers=True)],
    'mmdet-buffers': [
        dict(
            type='MMEngineEMAHook',
            ema_type='mmdet.ExpMomentumEMA',
            momentum=0.0002,
            update_buffers=True,
        )
    ],
}
_FOREVER = 10**6
_names = itertools.count()


class _Begun(Exception):  # noqa: N818
    """The training has begun; its iterations are for others to take."""


@LOOPS.register_module()
class SteppedTrainLoop(IterBasedTrainLoop):  # type: ignore[misc]
    """A train loop that begins and leaves the iterations to its owner."""

    def run(self) -> None:
        """Begin as the parent does, then give control back."""
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        raise _Begun


def begin(
    name: str, model: nn.Module, batch: Any, folder: Path, **options: Any
) -> Runner:
    """Begin a training of a model through mmengine's Runner.

    Args:
        name: Whose EMA hook: a name of ``HOOKS``.
        model: The model.
        batch: What its ``train_step`` takes.
        folder: Where the runner writes.
        **options: More options of the runner.

    Returns:
        The runner; its ``train_loop`` has a ``run_iter``.
    """
    settings: Dict[str, Any] = dict(
        model=model,
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=[batch],
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
            batch_size=1,
            num_workers=0,
        ),
        train_cfg=dict(type='SteppedTrainLoop', max_iters=_FOREVER),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-5, momentum=0.9)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=_FOREVER)
        ),
        custom_hooks=[dict(hook) for hook in HOOKS[name]],
        experiment_name=f'bench{next(_names)}',
        default_scope=None,
    )
    runner = Runner(**{**settings, **options})
    try:
        runner.train()
    except _Begun:
        return runner
    raise AssertionError('the training ended')


def stepper(runner: Runner, batch: Any) -> Callable[[], None]:
    """Return what takes one iteration of a runner."""
    loop = runner.train_loop
    return lambda: loop.run_iter(batch)
