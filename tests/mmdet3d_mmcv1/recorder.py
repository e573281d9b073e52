"""Hooks that keep what a training did, and make it one that can resume."""

import os
import random

import numpy as np
import torch
from mmcv.runner import HOOKS, Hook

from tests.mmcv1_tools.recorder import RecorderHook


@HOOKS.register_module()
class ValRecorderHook(RecorderHook):
    """Keeps, too, what ``val`` in the workflow ran on: ``val.pt``."""

    def before_run(self, runner):
        super().before_run(runner)
        self.seen = []

    def before_val_iter(self, runner):
        if runner.inner_iter == 0:
            weights = runner.model.module.state_dict().items()
            self.seen.append({k: v.clone() for k, v in weights})

    def after_run(self, runner):
        super().after_run(runner)
        torch.save(self.seen, os.path.join(runner.work_dir, 'val.pt'))


@HOOKS.register_module()
class SeedHook(Hook):
    """Makes each epoch random in the same way, whatever came before it.

    mmcv saves no state of random numbers, nor the place at which mmdet3d's
    sampler of pasted objects stands.
    """

    def before_epoch(self, runner):
        random.seed(runner.epoch)
        np.random.seed(runner.epoch)
        torch.manual_seed(runner.epoch)
        data = runner.data_loader.dataset
        while hasattr(data, 'dataset'):
            data = data.dataset
        for step in data.pipeline.transforms:
            samplers = getattr(step, 'db_sampler', None)
            for sampler in samplers.sampler_dict.values() if samplers else ():
                sampler._indices.sort()
                sampler._reset()
