"""Toy runs of mmengine's Runner that record every step."""

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from mmengine.runner import Runner

from tests.for_mmengine import toy

SGD = dict(type='SeenSGD', lr=0.01, momentum=0.9, weight_decay=0.064)
SEEN = ('lr', 'momentum', 'weight_decay')


@OPTIMIZERS.register_module(force=True)
class SeenSGD(torch.optim.SGD):
    """Records group -> (lr, momentum, weight decay) in every step."""

    def step(self, closure=None):
        self.__dict__.setdefault('seen', []).append(settings(self))
        return super().step(closure)


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


def settings(optimizer):
    """Return group -> (lr, momentum, weight decay)."""
    return {
        g['name']: tuple(g[name] for name in SEEN)
        for g in optimizer.param_groups
    }


def run(work_dir, *hooks, resume=False, **options):
    """Train the toy model by a config of the optimizer; return the runner."""
    runner = make(work_dir, *hooks, resume=resume, **options)
    runner.train()
    return runner


def make(work_dir, *hooks, resume=False, **options):
    """Make the runner of a toy run: 4 iterations an epoch."""
    torch.manual_seed(0)
    wrapper = dict(
        constructor='EMAOptimizerConstructor',
        optimizer=dict(SGD),
        clip_grad=dict(max_norm=0.1),  # biases move far at a rate of 0.1
    )
    wrapper.update(options.pop('wrapper', {}))
    owner = toy.Run.__new__(toy.Run)
    owner.model = toy.ToyModel()
    owner.work_dir = work_dir
    owner.optimizer = torch.optim.SGD(owner.model.parameters(), lr=1)
    config = {**toy._settings(owner, options), **options}
    config.update(optim_wrapper=wrapper, resume=resume)
    return Runner(**config, custom_hooks=list(hooks))


def seen(runner, column):
    """Return group -> values of the steps, of 'lr', 'momentum', ..."""
    index = SEEN.index(column)
    steps = runner.optim_wrapper.optimizer.seen
    return {name: [s[name][index] for s in steps] for name in steps[0]}
