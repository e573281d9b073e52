"""Evaluate what a run of the study has, and what its files allow."""

from __future__ import annotations

import json
import resource
import time
from typing import Any, Dict

import torch

from mmdet_ema.checkpoint.combination import read_files
from mmdet_ema.checkpoint.format import EMA, PREFIX, STEPS, WEIGHTS
from mmdet_ema.checkpoint.runs import Run
from mmdet_ema.checkpoint.windows import files_of
from mmdet_ema.for_mmengine.tune import (
    evaluate_weights,
    recalibrated,
    runner_of,
    tune,
)
from study.runs import AUTO, MAIN, METRIC, Setting, config_of, name_of

# what tune tries, as shares of the run; not those that were tracked
WINDOWS = (0.025, 0.04, 0.07, 0.12, 0.18, 0.25, 0.4, 0.7)
BATCHES = 25
TUNED = 'tune'
AGAIN = ('raw', 'default', name_of(AUTO), 'swa', TUNED)


def evaluate(setting: Setting, seed: int) -> None:
    """Write ``results.json`` of a run, unless it is there.

    It has the mAP by part of the data, set of weights and whether statistics
    were estimated again.
    """
    folder = setting.folder(seed)
    results = folder / 'results.json'
    if results.exists():
        return
    config = str(folder / 'config.py')
    config_of(setting, seed).dump(config)
    states = torch.load(
        folder / 'tracked.pth', map_location='cpu', weights_only=True
    )
    last = torch.load(
        folder / f'iter_{setting.steps}.pth',
        map_location='cpu',
        weights_only=True,
    )
    states[name_of(MAIN)] = last[WEIGHTS]
    states['raw'] = {
        name[len(PREFIX) :]: value
        for name, value in last[EMA].items()
        if name != STEPS
    }
    run = Run(read_files(files_of(str(folder))))
    wanted = [share * setting.steps for share in WINDOWS]
    found: Dict[str, Any] = {'plain': {}, 'recalibrated': {}}
    for part, (root, split) in setting.parts().items():
        annotations = f'annotations/{split}.json'
        place = {
            'val_dataloader.dataset.data_root': f'{root}/',
            'val_dataloader.dataset.ann_file': annotations,
            'val_dataloader.dataset.data_prefix.img': f'{split}/',
            'val_evaluator.ann_file': str(root / annotations),
        }
        with runner_of(config, cfg_options=place) as runner:
            if part == 'validation':
                start = time.monotonic()
                tuned = tune(runner, run, wanted, metric=METRIC)
                found['seconds'] = time.monotonic() - start
                found['megabytes'] = round(
                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                )
                found['pick'] = tuned.best.title
                found['windows'] = {
                    f'{row.length:g}': row.value(METRIC)
                    for row in tuned.rows
                    if row.schedule is not None
                }
                found['refused'] = [x.steps for x in tuned.refused]
                states[TUNED] = tuned.weights
                again = {
                    name: recalibrated(runner, states[name], BATCHES)
                    for name in AGAIN
                }
            for kind, sets in (('plain', states), ('recalibrated', again)):
                found[kind][part] = {
                    name: evaluate_weights(runner, state).get(METRIC, 0.0)
                    for name, state in sets.items()
                }
    beside = results.with_suffix('.part')
    beside.write_text(json.dumps(found, indent=1))
    beside.replace(results)
