"""The demo with mmdet 2, on mmcv 1.x."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from framework import ROOT, Framework
from results import Results, Validation, read_lines

METRIC = 'bbox_mAP'


class Mmdet2(Framework):
    """ATSS; its ``tools/test.py`` runs no hook, so raw weights get a file."""

    config = ROOT / 'configs' / 'atss_mmdet2' / 'atss_digits_1xb8-10e.py'
    work_dir = ROOT / 'work_dirs' / 'demo_mmcv1'
    minutes = '2 minutes'

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
        file = self.last_checkpoint()
        if weights == 'raw':
            file = self._raw_file()
        self.run_tool(
            *('test', f'test_{weights}', file),
            *('--work-dir', out, '--eval', 'bbox'),
        )
        (path,) = out.glob('eval_*.json')
        return float(json.loads(path.read_text())['metric'][METRIC])

    def _raw_file(self) -> Path:
        file = self.work_dir / 'raw.pth'
        script = ROOT / 'demo' / 'raw_weights.py'
        self.run(script, 'raw_weights', self.last_checkpoint(), file)
        return file

    def results(self, test: dict[str, float]) -> Results:
        """Return what was measured."""
        lines = read_lines(self.work_dir.glob('*.log.json'))
        validations = [
            Validation(line['epoch'], line[METRIC], line[f'raw/{METRIC}'])
            for line in lines
            if METRIC in line
        ]
        return Results.of(validations, _decay(lines), test)


def _decay(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return steps and decays; mmcv counts the iterations of each epoch."""
    train = [line for line in lines if line.get('mode') == 'train']
    length = max(line['iter'] for line in train)
    return [
        ((line['epoch'] - 1) * length + line['iter'], line['ema_decay'])
        for line in train
    ]
