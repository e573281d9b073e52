"""Toy runs of mmcv's runners that record every step."""

import torch
from mmcv.runner import build_optimizer
from mmcv.runner.optimizer import OPTIMIZERS

from tests.for_mmcv1.toy import Run, ToyModel

SEEN = ('lr', 'momentum', 'weight_decay')
SGD = dict(type='SeenSGD', lr=0.01, momentum=0.9, weight_decay=0.064)
CLIP = dict(grad_clip=dict(max_norm=0.1))  # biases move far at a rate of 0.1


@OPTIMIZERS.register_module(force=True)
class SeenSGD(torch.optim.SGD):
    """Records group -> (lr, momentum, weight decay) in every step."""

    def step(self, closure=None):
        self.__dict__.setdefault('seen', []).append(settings(self))
        return super().step(closure)


@OPTIMIZERS.register_module(force=True)
class SeenAdamW(torch.optim.AdamW):
    """Records group -> (lr, betas) in every step."""

    def step(self, closure=None):
        self.__dict__.setdefault('seen', []).append(
            settings(self, ('lr', 'betas'))
        )
        return super().step(closure)


def settings(optimizer, names=SEEN):
    """Return group -> (lr, momentum, weight decay)."""
    return {
        g['name']: tuple(g[name] for name in names)
        for g in optimizer.param_groups
    }


def make(work_dir, *hooks, **options):
    """Make a toy run by a config of the optimizer: 4 iterations an epoch."""
    torch.manual_seed(0)
    model = ToyModel()
    cfg = dict(options.pop('optim', SGD), **options.pop('cfg', {}))
    cfg['constructor'] = 'EMAOptimizerConstructor'
    options.setdefault('optimizer_config', dict(CLIP))
    options['evaluation'] = None
    return Run(
        work_dir,
        *map(dict, hooks),
        model=model,
        optimizer=lambda parameters, **_: build_optimizer(model, cfg),
        **{
            k: dict(v) if isinstance(v, dict) else v
            for k, v in options.items()
        },
    )


def run(work_dir, *hooks, resume=None, **options):
    """Train the toy model; return the run."""
    return make(work_dir, *hooks, **options).train(resume=resume)


def seen(trained, column):
    """Return group -> values of the steps, of 'lr', 'momentum', ..."""
    index = SEEN.index(column)
    steps = trained.optimizer.seen
    return {name: [s[name][index] for s in steps] for name in steps[0]}
