"""Build and train with whichever framework there is; steps are recorded."""

import itertools

import torch

from tests.conftest import MMCV1
from tests.optimizers.logs import Lines, logged
from tests.optimizers.steps import SGD, SeenAdamW, SeenSGD

if MMCV1:
    from mmcv.runner import Hook, build_optimizer
    from mmcv.runner.optimizer import OPTIMIZERS
    from mmcv.utils import get_logger

    from tests.for_mmcv1.toy import Run, ToyModel, quiet, state_of

    DEFAULT = 'DefaultOptimizerConstructor'
    MORE = ()  # what only this default constructor has
    SPECIAL_BIASES = 0  # bias_decay_mult is not about them
    UNSAFE = {}  # this torch knows no other way
    SCHEDULES = dict(
        none={},
        cosine=dict(
            lr=dict(policy='CosineAnnealing', min_lr=1e-4, by_epoch=False),
            momentum=dict(
                policy='CosineAnnealing', min_momentum=0.85, by_epoch=False
            ),
        ),
        cyclic=dict(
            lr=dict(
                policy='cyclic', target_ratio=(10, 1e-4), step_ratio_up=0.4
            ),
            momentum=dict(
                policy='cyclic',
                target_ratio=(0.85 / 0.95, 1),
                step_ratio_up=0.4,
            ),
        ),
        steps=dict(lr=dict(policy='step', step=[1, 3])),
        warm_lr=dict(lr=dict(policy='fixed', warmup='linear', warmup_iters=5)),
        warm_momentum=dict(
            momentum=dict(
                policy='step', step=[1], warmup='linear', warmup_iters=5
            )
        ),
    )
    WARM = dict(
        lr="lr_config(warmup='linear')",
        momentum="momentum_config(warmup='linear')",
    )
else:
    from mmengine.hooks import Hook
    from mmengine.logging import MMLogger
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import OPTIMIZERS
    from mmengine.runner import Runner

    from tests.for_mmengine.toy import ToyModel, loader, state_of

    DEFAULT = 'DefaultOptimWrapperConstructor'
    MORE = ('flat_decay_mult',)
    SPECIAL_BIASES = 1
    UNSAFE = dict(weights_only=False)  # a file of our own
    SCHEDULES = dict(
        none=None,
        cosine=[
            dict(
                type=f'CosineAnnealing{kind}',
                T_max=16,
                eta_min=eta_min,
                by_epoch=False,
            )
            for kind, eta_min in (('LR', 1e-4), ('Momentum', 0.85))
        ],
        steps=[
            dict(type='MultiStepLR', milestones=[3, 6, 12], by_epoch=False),
            dict(type='MultiStepLR', milestones=[2], by_epoch=True),
        ],
        warm_lr=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5)
        ],
        warm_momentum=[
            dict(
                type='LinearMomentum', start_factor=0.5, by_epoch=False, end=5
            )
        ],
    )
    WARM = dict(lr='LinearLR(end=5)', momentum='LinearMomentum(end=5)')

_count = itertools.count()
for _kind in (SeenSGD, SeenAdamW):
    OPTIMIZERS.register_module(module=_kind, force=True)


def build(model, optimizer, constructor='EMAOptimizerConstructor', **more):
    """Build an optimizer as the framework does."""
    if MMCV1:
        cfg = dict(optimizer, constructor=constructor, **more)
        return build_optimizer(model, cfg)
    cfg = dict(optimizer=dict(optimizer), constructor=constructor, **more)
    return build_optim_wrapper(model, cfg).optimizer


def logger():
    """Return the logger that the constructor writes to."""
    return (
        get_logger('mmdet_ema') if MMCV1 else MMLogger.get_current_instance()
    )


class Interrupt(Hook):
    """Stops the training in its third iteration, once."""

    calls = 0

    def after_train_iter(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt


class Reader(Hook):
    """Reads what the log of mmcv 1.x will show."""

    def __init__(self):
        self.seen = {}

    def after_train_iter(self, runner):
        for name, values in runner.log_buffer.val_history.items():
            self.seen.setdefault(name, []).append(values[-1])


class Training:
    """A training of a toy, 4 iterations an epoch, and what is seen of it."""

    def __init__(
        self,
        work_dir,
        *hooks,
        schedule='none',
        epochs=2,
        by_epoch=True,
        accumulate=1,
        resume=None,
        optimizer=SGD,
        **options,
    ):
        torch.manual_seed(0)
        self.model, self.lines = ToyModel(), Lines()
        length = dict(max_epochs=epochs)
        if not by_epoch:
            length = dict(max_iters=4 * epochs)
        schedule = SCHEDULES[schedule]
        clip = dict(grad_clip=dict(max_norm=0.1))  # biases move far at 0.1
        files = dict(interval=2, by_epoch=by_epoch)
        if not MMCV1:
            self.runner = Runner(
                self.model,
                str(work_dir),
                loader(),
                train_cfg=dict(by_epoch=by_epoch, **length),
                optim_wrapper=dict(
                    options,
                    constructor='EMAOptimizerConstructor',
                    optimizer=dict(optimizer),
                    clip_grad=clip['grad_clip'],
                    accumulative_counts=accumulate,
                ),
                param_scheduler=schedule,
                default_hooks=dict(
                    logger=dict(type='LoggerHook', interval=1),
                    checkpoint=dict(type='CheckpointHook', **files),
                ),
                custom_hooks=list(hooks),
                experiment_name=f'optimizer{next(_count)}',
                load_from=resume and str(resume),
                resume=resume is not None,
                default_scope=None,
            )
            self._train = self.runner.train
            return
        if not by_epoch:
            length['type'] = 'IterBasedRunner'
        if accumulate > 1:
            clip['type'] = 'GradientCumulativeOptimizerHook'
            clip['cumulative_iters'] = accumulate
        self._reader = Reader()
        with logged(logger(), self.lines):
            run = Run(
                work_dir,
                # mmcv takes things out of the dicts that it is given
                *(dict(h) if isinstance(h, dict) else h for h in hooks),
                self._reader,
                model=self.model,
                optimizer=lambda *_, **__: build(
                    self.model, optimizer, **options
                ),
                runner=length,
                optimizer_config=clip,
                checkpoint=files,
                evaluation=None,
                logger=quiet(self.lines),
                **{name: dict(cfg) for name, cfg in schedule.items()},
            )
        self.runner = run.runner
        self._train = lambda: run.train(resume=resume)

    def train(self):
        """Train; return this."""
        with logged(logger(), self.lines):
            self._train()
        return self

    @property
    def optimizer(self):
        """The optimizer."""
        runner = self.runner
        return runner.optimizer if MMCV1 else runner.optim_wrapper.optimizer

    @property
    def state(self):
        """A copy of the weights."""
        return state_of(self.model)

    def recorded(self, name):
        """Return what the log shows of a value, at each iteration."""
        if MMCV1:
            return self._reader.seen[name]
        history = self.runner.message_hub.get_scalar(f'train/{name}')
        return list(history.data[0])
