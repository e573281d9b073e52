"""mmcv's builder and runners; every optimizer step is recorded."""

import torch
from mmcv.runner import Hook, build_optimizer
from mmcv.runner.optimizer import OPTIMIZERS
from mmcv.utils import get_logger

from tests.for_mmcv1.toy import Run, ToyModel, quiet, state_of
from tests.optimizers.logs import Lines, logged
from tests.optimizers.steps import SGD, SeenAdamW, SeenSGD

DEFAULT = 'DefaultOptimizerConstructor'
MORE = ()  # what only this default constructor has
SPECIAL_BIASES = 0  # bias_decay_mult is not about them
SCHEDULES = dict(
    none={},
    cosine=dict(
        lr=dict(policy='CosineAnnealing', min_lr=1e-4, by_epoch=False),
        momentum=dict(
            policy='CosineAnnealing', min_momentum=0.85, by_epoch=False
        ),
    ),
    cyclic=dict(
        lr=dict(policy='cyclic', target_ratio=(10, 1e-4), step_ratio_up=0.4),
        momentum=dict(
            policy='cyclic', target_ratio=(0.85 / 0.95, 1), step_ratio_up=0.4
        ),
    ),
    steps=dict(lr=dict(policy='step', step=[1, 3])),
    warm_lr=dict(lr=dict(policy='fixed', warmup='linear', warmup_iters=5)),
    warm_momentum=dict(
        momentum=dict(policy='step', step=[1], warmup='linear', warmup_iters=5)
    ),
)
WARM = dict(
    lr="lr_config(warmup='linear')",
    momentum="momentum_config(warmup='linear')",
)
UNSAFE = {}  # this torch knows no other way


for _kind in (SeenSGD, SeenAdamW):
    OPTIMIZERS.register_module(module=_kind, force=True)


def build(model, optimizer, constructor='EMAOptimizerConstructor', **more):
    """Build an optimizer as mmdet 2 does."""
    return build_optimizer(
        model, dict(optimizer, constructor=constructor, **more)
    )


def logger():
    """Return the logger that the constructor writes to."""
    return get_logger('mmdet_ema')


class Interrupt(Hook):
    """Stops the training in its third iteration, once."""

    stopped = False

    def after_train_iter(self, runner):
        if runner.inner_iter == 2 and not self.stopped:
            self.stopped = True
            raise KeyboardInterrupt


class Reader(Hook):
    """Reads what the log will show."""

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
        model, self.lines, self._reader = ToyModel(), Lines(), Reader()
        self._resume = resume
        runner = dict(type='IterBasedRunner', max_iters=4 * epochs)
        many = dict(
            type='GradientCumulativeOptimizerHook', cumulative_iters=accumulate
        )
        # mmcv takes things out of the dicts that it is given
        schedule = {k: dict(v) for k, v in SCHEDULES[schedule].items()}
        with logged(logger()) as self._built:
            self._run = Run(
                work_dir,
                *(dict(h) if isinstance(h, dict) else h for h in hooks),
                self._reader,
                model=model,
                optimizer=lambda parameters, **_: build(
                    model, optimizer, **options
                ),
                runner=dict(max_epochs=epochs) if by_epoch else runner,
                optimizer_config=dict(
                    many if accumulate > 1 else {},
                    grad_clip=dict(max_norm=0.1),  # biases move far at 0.1
                ),
                checkpoint=dict(interval=2, by_epoch=by_epoch),
                evaluation=None,
                logger=quiet(self.lines),
                **schedule,
            )
        self.lines.infos += self._built.infos
        self.runner = self._run.runner

    def train(self):
        """Train; return this."""
        with logged(logger()) as lines:
            self._run.train(resume=self._resume)
        self.lines.infos += lines.infos
        self.lines.warnings += lines.warnings
        return self

    @property
    def optimizer(self):
        """The optimizer."""
        return self._run.optimizer

    @property
    def state(self):
        """A copy of the weights."""
        return state_of(self._run.model)

    def recorded(self, name):
        """Return what the log shows of a value, at each iteration."""
        return self._reader.seen[name]
