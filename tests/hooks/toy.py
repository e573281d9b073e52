"""A small model that mmengine's own Runner trains in a second."""

import numpy as np
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

import mmdet_ema  # noqa: F401  registers the hook


class ToyData(Dataset):
    """Deterministic regression data: two runs see the same batches."""

    METAINFO = dict(classes=('a', 'b'), palette=[(1, 2, 3), (4, 5, 6)])

    def __init__(self, size=8, seed=0):
        draw = np.random.RandomState(seed)
        self.inputs = draw.randn(size, 4).astype('float32')
        self.metainfo = self.METAINFO

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
        for parameter in self.parameters():
            parameter.data.fill_(0.3) if parameter.dim() == 1 else (
                parameter.data.copy_(torch.linspace(-1, 1, parameter.numel())
                                     .view_as(parameter))
            )
        self._is_init = True

    def forward(self, inputs, mode='tensor'):
        out = self.tied(self.norm(self.first(inputs))) + self.frozen(inputs)
        out = self.head(out * self.low.float())
        if mode == 'loss':
            return dict(loss=(out**2).mean() + out.sin().mean())
        return [dict(out=row) for row in out]


class WeightMetric(BaseMetric):
    """Records the weights that an evaluation really ran with."""

    seen = []

    def __init__(self, model_of=None, fail=None, **kwargs):
        super().__init__(**kwargs)
        self.fail = fail

    def process(self, data_batch, data_samples):
        self.results.append(float(sum(d['out'].sum() for d in data_samples)))
        if self.fail is not None:
            raise self.fail

    def compute_metrics(self, results):
        return dict(score=float(np.sum(results)))


class RecordingSGD(torch.optim.SGD):
    """Records the whole state of the model after every real step."""

    model = None
    records = ()

    def step(self, closure=None):
        loss = super().step(closure)
        type(self).records.append(state_of(type(self).model))
        return loss


def state_of(model):
    """Copy the ``state_dict`` of a model."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def record(model, **options):
    """Return a recording optimizer over the model, and its records."""
    RecordingSGD.model, RecordingSGD.records = model, []
    options = {'lr': 0.01, 'momentum': 0.5, **options}
    optimizer = RecordingSGD(model.parameters(), **options)
    return optimizer, RecordingSGD.records


def loader(size=8, batch=2, seed=0):
    """A plain data loader config over the toy data."""
    return dict(
        dataset=ToyData(size, seed),
        batch_size=batch,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
        num_workers=0,
    )


def make_runner(work_dir, hooks, model=None, optimizer=None, **options):
    """Build a runner as a config would."""
    model = ToyModel() if model is None else model
    if optimizer is None:
        optimizer, _ = record(model)
    wrapper = options.pop('optim_wrapper', None)
    if wrapper is None:
        counts = options.pop('accumulative_counts', 1)
        wrapper = OptimWrapper(optimizer, accumulative_counts=counts)
    epochs = options.pop('max_epochs', 2)
    metric = options.pop('metric', None) or WeightMetric()
    settings = dict(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=loader(),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=wrapper,
        val_dataloader=loader(4, seed=1),
        val_cfg=dict(),
        val_evaluator=Evaluator([metric]),
        custom_hooks=hooks,
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        experiment_name=f'toy{id(work_dir)}_{np.random.randint(1 << 30)}',
        log_level='WARNING',
    )
    settings.update(options)
    return Runner(**settings)
