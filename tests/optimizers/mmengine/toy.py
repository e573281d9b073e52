"""mmengine's builder and Runner; every optimizer step is recorded."""

import itertools

import torch
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from mmengine.runner import Runner

from tests.for_mmengine.toy import ToyModel, loader, state_of
from tests.optimizers.logs import Lines
from tests.optimizers.steps import SGD, SeenAdamW, SeenSGD

DEFAULT = 'DefaultOptimWrapperConstructor'
MORE = ('flat_decay_mult',)  # what only this default constructor has
SPECIAL_BIASES = 1  # bias_decay_mult is about them
SCHEDULES = dict(
    none=None,
    cosine=[
        dict(type='CosineAnnealingLR', T_max=16, eta_min=1e-4, by_epoch=False),
        dict(
            type='CosineAnnealingMomentum',
            T_max=16,
            eta_min=0.85,
            by_epoch=False,
        ),
    ],
    steps=[
        dict(type='MultiStepLR', milestones=[3, 6, 12], by_epoch=False),
        dict(type='MultiStepLR', milestones=[2], by_epoch=True),
    ],
    warm_lr=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5)],
    warm_momentum=[
        dict(type='LinearMomentum', start_factor=0.5, by_epoch=False, end=5)
    ],
)
WARM = dict(lr='LinearLR(end=5)', momentum='LinearMomentum(end=5)')
UNSAFE = dict(weights_only=False)  # a file of our own
_count = itertools.count()


for _kind in (SeenSGD, SeenAdamW):
    OPTIMIZERS.register_module(module=_kind, force=True)


@OPTIM_WRAPPERS.register_module(force=True)
class ScaledWrapper(OptimWrapper):
    """mmengine's ``AmpOptimWrapper`` with a scaler that runs on CPU."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=4.0)

    def backward(self, loss, **kwargs):
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs):
        self.loss_scaler.unscale_(self.optimizer)
        self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()


def build(model, optimizer, constructor='EMAOptimizerConstructor', **wrapper):
    """Build an optimizer as the runner does."""
    cfg = dict(optimizer=dict(optimizer), constructor=constructor, **wrapper)
    return build_optim_wrapper(model, cfg).optimizer


def logger():
    """Return the logger that the constructor writes to."""
    return MMLogger.get_current_instance()


class Interrupt(Hook):
    """Stops the training in its third iteration, once."""

    stopped = False

    def after_train_iter(self, runner, batch_idx, **_):
        if batch_idx == 2 and not self.stopped:
            self.stopped = True
            raise KeyboardInterrupt


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
        **wrapper,
    ):
        torch.manual_seed(0)
        loop = (
            dict(max_epochs=epochs) if by_epoch else dict(max_iters=4 * epochs)
        )
        self.runner = Runner(
            ToyModel(),
            str(work_dir),
            loader(),
            train_cfg=dict(by_epoch=by_epoch, **loop),
            optim_wrapper=dict(
                wrapper,
                constructor='EMAOptimizerConstructor',
                optimizer=dict(optimizer),
                clip_grad=dict(max_norm=0.1),  # biases move far at 0.1
                accumulative_counts=accumulate,
            ),
            param_scheduler=SCHEDULES[schedule],
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=1),
                checkpoint=dict(
                    type='CheckpointHook', interval=2, by_epoch=by_epoch
                ),
            ),
            custom_hooks=list(hooks),
            experiment_name=f'optimizer{next(_count)}',
            load_from=resume and str(resume),
            resume=resume is not None,
            default_scope=None,
        )
        self.lines = Lines()
        self.runner.logger.addHandler(self.lines)

    def train(self):
        """Train; return this."""
        self.runner.train()
        return self

    @property
    def optimizer(self):
        """The optimizer."""
        return self.runner.optim_wrapper.optimizer

    @property
    def state(self):
        """A copy of the weights."""
        return state_of(self.runner.model)

    def recorded(self, name):
        """Return what the log shows of a value, at each iteration."""
        return list(
            self.runner.message_hub.get_scalar(f'train/{name}').data[0]
        )
