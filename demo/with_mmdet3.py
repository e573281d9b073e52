"""The demo with mmdet 3, on mmengine."""

from __future__ import annotations

import json
from pathlib import Path

from framework import ROOT, Framework
from results import Results, Validation, read_lines

METRIC = 'coco/bbox_mAP'


class Mmdet3(Framework):
    """RTMDet; the hook itself chooses which weights are tested."""

    config = ROOT / 'configs' / 'rtmdet' / 'rtmdet_digits_1xb8-10e.py'
    work_dir = ROOT / 'work_dirs' / 'demo'
    minutes = '3 minutes'

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
            *('--work-dir', out),
            *('--cfg-options', f'custom_hooks.0.evaluate={weights}'),
        )
        (path,) = out.glob('*/*.json')
        return float(json.loads(path.read_text())[METRIC])

    def results(self, test: dict[str, float]) -> Results:
        """Return what was measured."""
        lines = read_lines(self.work_dir.glob('2*/vis_data/scalars.json'))
        validations = [
            Validation(line['step'], line[METRIC], line[f'raw/{METRIC}'])
            for line in lines
            if METRIC in line
        ]
        decay = [
            (line['step'], line['ema_decay'])
            for line in lines
            if 'ema_decay' in line
        ]
        return Results.of(validations, decay, test)
