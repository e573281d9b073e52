"""Draw what raw and averaged weights find on the trees, side by side.

Usage: python -m study.pictures
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import numpy as np
import torch

from mmdet_ema.checkpoint.contents import read_contents
from mmdet_ema.for_mmengine.runner import model_of
from mmdet_ema.for_mmengine.tune import load, runner_of
from study.runs import ROOT, SETTINGS, config_of, train, write_data

import scenes  # isort: skip  # study.runs finds the folder of the demo

PICTURE = ROOT / 'work_dirs' / 'study' / 'trees.jpg'


def main() -> None:
    """Train a run on the trees, unless it is there, and draw."""
    setting = SETTINGS['trees']
    write_data(setting)
    print('demo-trees: training (minutes), unless that is done', flush=True)
    train(setting, 0)
    folder = setting.folder(0)
    config = str(folder / 'config.py')
    config_of(setting, 0).dump(config)
    contents = read_contents(str(folder / f'iter_{setting.steps}.pth'))
    with runner_of(config) as runner:
        found = {
            name: detections(runner, contents.sets[name].tensors)
            for name in ('raw', 'ema')
        }
    scenes.draw(setting.data, found, PICTURE, 'trees')
    print(PICTURE)


@torch.no_grad()
def detections(runner: Any, state: Mapping[str, Any]) -> scenes.Found:
    """Return what weights find on the validation tiles, by file name."""
    load(runner, state)
    model: Any = model_of(runner).eval()
    found: scenes.Found = {}
    for batch in runner.val_dataloader:
        for sample in model.val_step(batch):
            instances = sample.pred_instances.cpu().numpy()
            rows = np.column_stack((instances.bboxes, instances.labels))
            above = instances.scores > scenes.SCORE
            found[Path(sample.img_path).name] = rows[above]
    return found


if __name__ == '__main__':
    main()
