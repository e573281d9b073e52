"""Read what a demo run measured from the files that mmengine wrote."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Iterator

METRIC = 'coco/bbox_mAP'


@dataclass(frozen=True)
class Validation:
    """mAP of the averages and of the raw weights after an epoch."""

    epoch: int
    ema: float
    raw: float


@dataclass(frozen=True)
class Results:
    """What the demo measured.

    Attributes:
        validations: One entry a validation, in order.
        decay: Pairs of optimizer step and decay, along the training.
        test: mAP that ``tools/test.py`` printed, under 'ema' and 'raw'.
    """

    validations: list[Validation]
    decay: list[tuple[int, float]]
    test: dict[str, float]


def read_results(work_dir: Path, test: dict[str, float]) -> Results:
    """Read the scalars of a training run, resumed or not.

    Args:
        work_dir: Folder of the run.
        test: mAP of each set of weights, from :func:`read_test`.

    Returns:
        The results.
    """
    validations: dict[int, Validation] = {}
    decay: dict[int, float] = {}
    for line in _scalars(work_dir):
        if METRIC in line:
            pair = line[METRIC], line[f'raw/{METRIC}']
            validations[line['step']] = Validation(line['step'], *pair)
        if 'ema_decay' in line:
            decay[line['step']] = line['ema_decay']
    ordered = [validations[epoch] for epoch in sorted(validations)]
    return Results(ordered, sorted(decay.items()), test)


def read_test(work_dir: Path) -> float:
    """Read the mAP that ``tools/test.py`` wrote.

    Args:
        work_dir: Its ``--work-dir``.

    Returns:
        The mAP.
    """
    (path,) = work_dir.glob('*/*.json')
    return float(json.loads(path.read_text())[METRIC])


def write_json(results: Results, path: Path) -> None:
    """Write the results as JSON, whole or not at all.

    Args:
        results: What was measured.
        path: Where to.
    """
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(asdict(results), indent=2) + '\n')
    os.replace(temporary, path)


def _scalars(work_dir: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(work_dir.glob('2*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            yield json.loads(line)
