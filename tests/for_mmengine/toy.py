"""A small model that mmengine's own Runner trains in a second."""

import itertools

import numpy as np
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

import mmdet_ema  # noqa: F401  registers the hook
from tests.needs import SAFELY

_names = itertools.count()


class ToyData(Dataset):
    """Deterministic regression data: two runs see the same batches."""

    def __init__(self, size, seed):
        palette = [(1, 2, 3), (4, 5, 6)]
        self.metainfo = dict(classes=('a', 'b'), palette=palette)
        draw = np.random.RandomState(seed)
        self.inputs = draw.randn(size, 4).astype('float32')

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return dict(inputs=torch.from_numpy(self.inputs[index]))


class ToyModel(BaseModel):
    """BatchNorm, tied weights, a bfloat16 and a frozen parameter."""

    def __init__(self, classes=2):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.head = nn.Linear(4, classes)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.low = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    def init_weights(self):
        """Set weights that the constructor did not: a hook must wait."""
        with torch.no_grad():
            for parameter in self.parameters():
                values = torch.linspace(-1, 1, parameter.numel())
                parameter.copy_(values.view_as(parameter) + 0.3)

    def forward(self, inputs, mode='tensor'):
        out = self.tied(self.norm(self.first(inputs))) + self.frozen(inputs)
        out = self.head(out * self.low.float())
        if mode == 'loss':
            return dict(loss=(out**2).mean() + out.sin().mean())
        return [dict(out=row) for row in out]


class Score(BaseMetric):
    """Sum of the outputs; its value tells which weights were evaluated."""

    def process(self, data_batch, data_samples):
        self.results += [float(d['out'].double().sum()) for d in data_samples]

    def compute_metrics(self, results):
        return dict(score=float(np.sum(results)))


class RecordingSGD(torch.optim.SGD):
    """Records the whole state of the model after every real step."""

    def watch(self, model):
        self.model, self.records = model, []
        return self

    def step(self, closure=None):
        loss = super().step(closure)
        self.records.append(state_of(self.model))
        return loss


class Recorder(Hook):
    """Records the state of the model when training starts."""

    priority = 'VERY_LOW'

    def before_train(self, runner):
        self.start = state_of(runner.model)


class Run:
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
        self.runner = Runner(**options)

    def train(self):
        """Train; return this run."""
        self.runner.train()
        return self

    @property
    def records(self):
        """States of the model after every optimizer step."""
        return self.optimizer.records

    @property
    def hook(self):
        """The EMA hook of the runner."""
        return next(h for h in self.runner.hooks if 'EMA' in type(h).__name__)

    def load(self, name):
        """Read a checkpoint of the run, as any process could."""
        return torch.load(self.work_dir / name, weights_only=SAFELY)

    def trace(self, key):
        """Values of one tensor before and after every step, in float64."""
        start = self.recorder.start[key].double().numpy()
        return start, [r[key].double().numpy() for r in self.records]

    def scalar(self, name):
        """History of a scalar in the message hub."""
        return self.runner.message_hub.get_scalar(name).data[0]


def state_of(model):
    """Copy the ``state_dict`` of a model."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(left, right):
    """Names of the tensors that differ in a bit between two states."""
    assert left.keys() == right.keys()
    return [k for k in left if not torch.equal(left[k], right[k])]


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
