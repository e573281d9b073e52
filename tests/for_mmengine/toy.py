"""A small model that mmengine's own Runner trains in a second."""

import itertools
import os

import numpy as np
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import FlexibleRunner, Runner

from tests.needs import SAFELY
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
    untied,
)

if 'WITHOUT_EMA' not in os.environ:  # a run that shows what this changes
    import mmdet_ema  # noqa: F401  registers the hook

_names = itertools.count()


class ToyData(Samples):
    """Has the ``metainfo`` of a data set of detection."""

    def __init__(self, size, seed):
        super().__init__(size, seed)
        palette = [(1, 2, 3), (4, 5, 6)]
        self.metainfo = dict(classes=('a', 'b'), palette=palette)


class ToyModel(BaseModel):
    """All kinds of tensors."""

    def __init__(self, classes=2):
        super().__init__()
        add_layers(self, classes)

    def init_weights(self):
        """Set weights that the constructor did not: a hook must wait."""
        set_weights(self)

    def forward(self, inputs, mode='tensor'):
        out = outputs(self, inputs)
        if mode == 'loss':
            return dict(loss=loss_of(out))
        return [dict(out=row) for row in out]


class Score(BaseMetric):
    """Sum of the outputs; its value tells which weights were evaluated."""

    def process(self, data_batch, data_samples):
        self.results += [float(d['out'].double().sum()) for d in data_samples]

    def compute_metrics(self, results):
        return dict(score=float(np.sum(results)))


class Recorder(Hook):
    """Records the state of the model when training starts."""

    priority = 'VERY_LOW'

    def before_train(self, runner):
        self.start = state_of(runner.model)


class Run(TracedRun):
    """A runner, with what happened in it."""

    def __init__(self, work_dir, *hooks, model=None, **options):
        self.model = ToyModel() if model is None else model
        self.work_dir = work_dir
        self.optimizer = RecordingSGD(
            self.model.parameters(), lr=0.002, momentum=0.5
        ).watch(self.model)
        self.recorder = Recorder()
        options = {**_settings(self, options), **options}
        options['custom_hooks'] = [*hooks, self.recorder]
        kind = options.pop('kind', Runner)
        if kind is FlexibleRunner:
            options['optim_wrapper'] = dict(optimizer=self.optimizer)
        self.runner = kind(**options)

    def train(self):
        """Train; return this run."""
        self.runner.train()
        return self

    @property
    def hook(self):
        """The EMA hook of the runner."""
        return next(h for h in self.runner.hooks if 'EMA' in type(h).__name__)

    @property
    def log(self):
        """The newest log in one line, levels included."""
        return ' '.join(max(self.work_dir.glob('*/*.log')).read_text().split())

    def load(self, name):
        """Read a checkpoint of the run, as any process could."""
        return torch.load(self.work_dir / name, weights_only=SAFELY)

    def scalar(self, name):
        """History of a scalar in the message hub."""
        return self.runner.message_hub.get_scalar(name).data[0]


def loader(size=16, batch=4, seed=0):
    """A data loader config over the toy data; drops nothing, no shuffle."""
    return dict(
        dataset=ToyData(size, seed),
        batch_size=batch,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
        num_workers=0,
    )


def _settings(run, options):
    counts = options.pop('accumulative_counts', 1)
    epochs = options.pop('max_epochs', 2)
    metric = options.pop('metric', None) or Score()
    hooks = dict(logger=dict(type='LoggerHook', interval=1))
    return dict(
        model=run.model,
        work_dir=str(run.work_dir),
        train_dataloader=loader(),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=OptimWrapper(run.optimizer, counts),
        val_dataloader=loader(4, seed=1),
        val_cfg=dict(),
        val_evaluator=Evaluator([metric]),
        default_hooks={**hooks, **options.pop('hooks', {})},
        experiment_name=f'toy{next(_names)}',
        log_level='INFO',
        default_scope=None,
    )
