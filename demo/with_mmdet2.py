"""The demo with mmdet 2, on mmcv 1.x."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from framework import ROOT, Framework


class Mmdet2(Framework):
    """ATSS; its ``tools/test.py`` runs no hook: ours tells it what to load."""

    config = ROOT / 'configs' / 'atss_mmdet2' / 'atss_digits_1xb8-10e.py'
    work_dir = ROOT / 'work_dirs' / 'demo_mmcv1'
    minutes = '2 minutes'
    metric = 'bbox_mAP'

    def last_checkpoint(self) -> Path | None:
        """Return the last checkpoint, or None if there is none."""
        link = self.work_dir / 'latest.pth'
        return link.resolve() if link.exists() else None

    def train(self, resume: bool) -> None:
        """Train, or go on from the last checkpoint."""
        words = ['--auto-resume'] if resume else []
        self.run_tool(
            *('train', 'train', '--work-dir', self.work_dir, '--seed', 0),
            *words,
        )

    def test(self, weights: str) -> float:
        """Test the last checkpoint; return the mAP."""
        out = self.test_folder(weights)
        self.run(
            *('-m', f'test_{weights}', 'mmdet_ema', 'test', self.config),
            *(self.last_checkpoint(), '--weights', weights),
            *('--work-dir', out, '--eval', 'bbox'),
            *('--out', out / 'found.pkl'),
        )
        (path,) = out.glob('eval_*.json')
        return float(json.loads(path.read_text())['metric'][self.metric])

    def detections(
        self, weights: str, score: float
    ) -> dict[str, npt.NDArray[Any]]:
        """Return what the last test found."""
        path = self.work_dir / f'test_{weights}' / 'found.pkl'
        text = (ROOT / 'data/digits/annotations/val.json').read_text()
        names = [image['file_name'] for image in json.loads(text)['images']]
        found = {}
        # a list of boxes and scores by scene and digit
        for name, scene in zip(names, pickle.loads(path.read_bytes())):
            rows = [
                np.column_stack((boxes[:, :4], np.full(len(boxes), digit)))[
                    boxes[:, 4] > score
                ]
                for digit, boxes in enumerate(scene)
            ]
            found[name] = np.concatenate(rows)
        return found
