"""A hook that keeps the weights after every step, for the oracle."""

import os

import torch
from mmcv.runner import HOOKS, Hook


@HOOKS.register_module()
class RecorderHook(Hook):
    """Writes the floats of a model before the first and after each step.

    It takes them from the model right after the optimizer's step, and writes
    ``recorded.pt`` at the end of the run, or ``recorded_N.pt`` where the run
    began after N iterations.
    """

    def before_run(self, runner):
        self.begin = runner.iter
        self.rows = {}

    def before_train_iter(self, runner):
        if not self.rows:
            self.keep(runner)

    def after_train_iter(self, runner):
        self.keep(runner)

    def after_run(self, runner):
        rows = {name: torch.stack(row) for name, row in self.rows.items()}
        name = f'recorded_{self.begin}.pt' if self.begin else 'recorded.pt'
        torch.save(rows, os.path.join(runner.work_dir, name))

    def keep(self, runner):
        for name, value in runner.model.module.state_dict().items():
            if value.is_floating_point():
                self.rows.setdefault(name, []).append(value.clone())
