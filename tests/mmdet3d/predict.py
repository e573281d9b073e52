"""Predictions of each half of a checkpoint, without mmdet_ema.

Usage: python predict.py CONFIG CHECKPOINT OUT
"""

import pickle
import sys

import torch
from mmdet3d.registry import MODELS
from mmdet3d.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner

config, checkpoint, out = sys.argv[1:]
register_all_modules()
cfg = Config.fromfile(config, import_custom_modules=False)
model = MODELS.build(cfg.model).eval()
saved = torch.load(checkpoint, weights_only=True)
raw = saved['ema_state_dict']
halves = dict(
    ema=saved['state_dict'],
    raw={k[len('module.') :]: v for k, v in raw.items() if k != 'steps'},
)
found = {}
for name, weights in halves.items():
    model.load_state_dict(weights)
    batches = Runner.build_dataloader(cfg.test_dataloader)
    with torch.no_grad():
        found[name] = [
            sample.to_dict()
            for batch in batches
            for sample in model.test_step(batch)
        ]
assert 'mmdet_ema' not in sys.modules
with open(out, 'wb') as file:
    pickle.dump(found, file)
