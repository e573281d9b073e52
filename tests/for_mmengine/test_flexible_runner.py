"""``FlexibleRunner``, which loads before it calls ``before_run``."""

import itertools

import torch
from mmengine.evaluator import Evaluator
from mmengine.runner import FlexibleRunner

from tests import needs, oracle
from tests.for_mmengine.toy import (
    Recorder,
    RecordingSGD,
    Run,
    Score,
    ToyModel,
    loader,
    same,
)

EMA = dict(type='EMAHook', decay=0.9, tau=3)
_names = itertools.count()


class FlexibleRun(Run):
    """The same run through ``FlexibleRunner``."""

    def __init__(self, work_dir, *hooks, max_epochs=2, **options):
        self.model, self.work_dir = ToyModel(), work_dir
        self.model.init_weights()
        self.optimizer = RecordingSGD(
            self.model.parameters(), lr=0.002, momentum=0.5
        ).watch(self.model)
        self.recorder = Recorder()
        self.runner = FlexibleRunner(
            model=self.model,
            work_dir=str(work_dir),
            train_dataloader=loader(),
            train_cfg=dict(by_epoch=True, max_epochs=max_epochs),
            optim_wrapper=dict(optimizer=self.optimizer),
            param_scheduler=dict(type='ConstantLR', factor=1.0),
            val_dataloader=loader(4, seed=1),
            val_cfg=dict(),
            val_evaluator=Evaluator([Score()]),
            custom_hooks=[*hooks, self.recorder],
            # runs of one second would share a visualizer
            experiment_name=f'flexible{next(_names)}',
            **options,
        )


def test_load_from_starts_the_average_from_the_loaded_weights(tmp_path):
    """``load_from`` works, where mmengine's own hook has no model yet."""
    FlexibleRun(tmp_path / 'a', EMA).train()
    path = tmp_path / 'a' / 'epoch_2.pth'
    loaded = torch.load(path, weights_only=needs.SAFELY)['state_dict']
    run = FlexibleRun(tmp_path / 'b', EMA, load_from=str(path)).train()
    assert torch.equal(
        run.recorder.start['head.weight'], loaded['head.weight']
    )
    weights = run.load('epoch_2.pth')['state_dict']
    assert {} == run.wrong(weights, lambda n: oracle.ramp(n, 0.9, 3))


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    """4 epochs at once equal 2 and, resumed, 2 more: bit for bit."""
    whole = FlexibleRun(tmp_path / 'whole', EMA, max_epochs=4).train()
    FlexibleRun(tmp_path / 'part', EMA, max_epochs=2).train()
    path = str(tmp_path / 'part' / 'epoch_2.pth')
    resumed = FlexibleRun(
        tmp_path / 'part', EMA, max_epochs=4, resume=path
    ).train()
    left, right = (r.load('epoch_4.pth') for r in (whole, resumed))
    assert same(left['state_dict'], right['state_dict']) == []
    assert same(left['ema_state_dict'], right['ema_state_dict']) == []
