"""The demo with mmdet 3, on mmengine."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from framework import ROOT, Framework


class Mmdet3(Framework):
    """RTMDet; the hook itself chooses which weights are tested."""

    config = ROOT / 'configs' / 'rtmdet' / 'rtmdet_digits_1xb8-10e.py'
    work_dir = ROOT / 'work_dirs' / 'demo'
    minutes = '5 minutes'
    metric = 'coco/bbox_mAP'

    def last_checkpoint(self) -> Path | None:
        """Return the last checkpoint, or None if there is none."""
        pointer = self.work_dir / 'last_checkpoint'
        return Path(pointer.read_text().strip()) if pointer.exists() else None

    def train(self, resume: bool) -> None:
        """Train, or go on from the last checkpoint."""
        words = ['--resume'] if resume else []
        self.run_tool('train', 'train', '--work-dir', self.work_dir, *words)

    def test(self, weights: str) -> float:
        """Test the last checkpoint; return the mAP."""
        out = self.test_folder(weights)
        self.run_tool(
            *('test', f'test_{weights}', self.last_checkpoint()),
            *('--work-dir', out, '--out', out / 'found.pkl'),
            *('--cfg-options', f'custom_hooks.0.evaluate={weights}'),
        )
        (path,) = out.glob('*/*.json')
        return float(json.loads(path.read_text())[self.metric])

    def detections(
        self, weights: str, score: float
    ) -> dict[str, npt.NDArray[Any]]:
        """Return what the last test found."""
        path = self.work_dir / f'test_{weights}' / 'found.pkl'
        found = {}
        for scene in pickle.loads(path.read_bytes()):
            instances = scene['pred_instances']
            rows = np.column_stack((instances['bboxes'], instances['labels']))
            above = np.asarray(instances['scores']) > score
            found[Path(scene['img_path']).name] = rows[above]
        return found
