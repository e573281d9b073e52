"""A small model that mmcv's own runners train in a blink."""

import logging
import os

import numpy as np
import torch
from mmcv.runner import EvalHook, Hook, build_runner
from torch import nn
from torch.utils.data import DataLoader

from tests.toy import (  # noqa: F401  same, for all that import the toy
    RecordingSGD,
    Samples,
    TracedRun,
    add_layers,
    loss_of,
    outputs,
    same,
    set_weights,
    state_of,
)

if 'WITHOUT_EMA' not in os.environ:  # a run that shows what this changes
    import mmdet_ema  # noqa: F401  registers the hook

EMA = dict(type='EMAHook', decay=0.9, tau=3)


class ToyData(Samples):
    """The score tells which weights were evaluated."""

    def evaluate(self, results, logger=None, **kwargs):
        return dict(score=float(np.sum(results)), mAP=float(np.max(results)))


class ToyModel(nn.Module):
    """All kinds of tensors."""

    def __init__(self, classes=2):
        super().__init__()
        add_layers(self, classes)
        set_weights(self)

    def forward(self, inputs, return_loss=True, **kwargs):
        out = outputs(self, inputs)
        if return_loss:
            return loss_of(out)
        return [float(row.double().sum()) for row in out]

    def train_step(self, data, optimizer=None, **kwargs):
        loss = self(**data)
        seen = dict(loss=float(loss))
        return dict(loss=loss, log_vars=seen, num_samples=len(data['inputs']))

    val_step = train_step


class Recorder(Hook):
    """Records the weights when training starts, and at evaluations."""

    def __init__(self):
        self.start, self.seen, self.vals = None, [], []

    def before_train_iter(self, runner):
        if self.start is None:
            self.start = state_of(model_of(runner))

    def before_val_iter(self, runner):
        if runner.inner_iter == 0:
            self.vals.append((runner.iter, state_of(model_of(runner))))

    def test(self, model, loader, **kwargs):
        """Be mmcv's ``test_fn``: it gets the model as it is evaluated."""
        bare = getattr(model, 'module', model)
        steps = len(self.optimizer.records)
        self.seen.append((steps, state_of(bare)))
        bare.eval()
        with torch.no_grad():
            return [x for d in loader for x in bare(return_loss=False, **d)]


class Run(TracedRun):
    """A runner with its hooks, as mmdet 2's ``train_detector`` makes it."""

    def __init__(self, work_dir, *hooks, model=None, **options):
        self.model = ToyModel() if model is None else model
        self.work_dir = work_dir
        self.optimizer = options.pop('optimizer', RecordingSGD)(
            self.model.parameters(), lr=0.002, momentum=0.5
        )
        if isinstance(self.optimizer, RecordingSGD):
            self.optimizer.watch(self.model)
        self.recorder = Recorder()
        self.recorder.optimizer = self.optimizer
        self.workflow = options.pop('workflow', [('train', 1)])
        self.train_loader = options.pop('loader', None) or loader()
        runner = options.pop('runner', dict(max_epochs=2))
        self.runner = build_runner(
            dict(dict(type='EpochBasedRunner'), **runner),
            default_args=dict(
                model=options.pop('wrapped', self.model),
                optimizer=options.pop('optimizers', self.optimizer),
                work_dir=str(work_dir),
                logger=options.pop('logger', None) or quiet(),
                meta=options.pop('meta', {}),
            ),
        )
        self._register(hooks, options)
        assert not options, options

    def _register(self, hooks, options):
        evaluation = options.pop('evaluation', dict())
        checkpoint = options.pop('checkpoint', dict(interval=1))
        log = options.pop('log', dict(interval=1, hooks=[]))
        self.runner.register_training_hooks(
            options.pop('lr', None),
            options.pop('optimizer_config', dict(grad_clip=None)),
            checkpoint and dict(checkpoint),
            log,
            options.pop('momentum', None),
            custom_hooks_config=[*hooks, self.recorder],
        )
        if evaluation is not None:
            kind = evaluation.pop('kind', EvalHook)
            evaluation.setdefault('by_epoch', bool(self.runner.max_epochs))
            evaluation.setdefault('test_fn', self.recorder.test)
            hook = kind(loader(4, seed=1), **evaluation)
            self.runner.register_hook(hook, priority='LOW')
            self.evaluator = hook

    def train(self, resume=None, load=None):
        """Train; return this run."""
        if resume is not None:
            self.runner.resume(str(resume))
        if load is not None:
            self.runner.load_checkpoint(str(load))
        loaders = [self.train_loader for _ in self.workflow]
        self.runner.run(loaders, self.workflow)
        return self

    def load(self, name):
        """Read a checkpoint of the run, as any process could."""
        return torch.load(self.work_dir / name, map_location='cpu')


def raw_of(checkpoint):
    """Raw weights in a checkpoint of ours."""
    part = checkpoint['meta']['hook_msgs']['EMAHook']['ema_state_dict']
    return {k[7:]: v for k, v in part.items() if k != 'steps'}


def model_of(runner):
    """Model of a runner, unwrapped."""
    return getattr(runner.model, 'module', runner.model)


def loader(size=16, batch=4, seed=0):
    """A data loader over the toy data; drops nothing, no shuffle."""
    return DataLoader(ToyData(size, seed), batch_size=batch)


class Lines(logging.Handler):
    """Keeps the lines that were logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(f'{record.levelname} {record.getMessage()}')


def quiet(handler=None):
    """A logger that writes nowhere but to a handler."""
    logger = logging.Logger('toy', logging.INFO)
    logger.addHandler(handler or logging.NullHandler())
    return logger
