"""A whole training step of RTMDet-tiny through mmengine's Runner."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Callable, Dict

import torch

from benchmarks.clocks import clock_of
from benchmarks.competitors import in_order, make_all
from benchmarks.figures import Case, Figure
from benchmarks.loading import NotInstalledError, load
from benchmarks.rounds import Limits, Sample, run_rounds

CONFIG = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
PICTURES, SIZE, BOXES = 2, 320, 8


def measure(case: Case, limits: Limits) -> Dict[str, Figure]:
    """Measure a case: seconds a step, and of these in hooks ('hooks').

    A hook's part is too small to be seen in the difference of whole steps on
    a busy machine, so the time inside the hooks around the step is taken too.
    """
    with tempfile.TemporaryDirectory() as folder:
        samplers, failed = make_all(
            case.competitors, lambda n: _make(n, case, Path(folder))
        )
        figures = run_rounds(samplers, limits.shorter(4, 5))
    return in_order(case, figures, failed)


def _make(name: str, case: Case, folder: Path) -> Sample:
    runners = load('benchmarks.runners')
    batch = _batch()
    runner = runners.begin(
        name, _model(), batch, folder / name, default_scope='mmdet'
    )
    spent = _watch_hooks(runner)
    step = runners.stepper(runner, batch)
    clock = clock_of('cpu')

    def whole() -> None:
        step()
        if case.device != 'cpu':
            torch.cuda.synchronize()

    def sample() -> Dict[str, float]:
        spent.clear()
        seconds = clock.measure(whole)
        return {**seconds, 'hooks': sum(spent)}

    # the first steps allocate, and update the average for the first time
    sample()
    sample()
    return sample


def _watch_hooks(runner: Any) -> list[float]:
    """Return a list to which every call of hooks adds its seconds."""
    spent: list[float] = []
    call_hook: Callable[..., None] = runner.call_hook
    clock = clock_of('cpu')

    def timed(*args: Any, **options: Any) -> None:
        seconds = clock.measure(lambda: call_hook(*args, **options))
        spent.append(seconds['wall'])

    runner.call_hook = timed
    return spent


def _model() -> Any:
    try:
        load('mmdet.utils').register_all_modules()
    except (AssertionError, OSError) as error:
        raise NotInstalledError(str(error)) from error
    config = load('mmengine.hub').get_config(CONFIG).model
    # pretrained weights do not make a step faster
    config.backbone.init_cfg = None
    torch.manual_seed(0)
    return load('mmdet.registry').MODELS.build(config)


def _batch() -> Dict[str, Any]:
    """Return random pictures with random boxes."""
    samples = load('mmdet.structures').DetDataSample
    instances = load('mmengine.structures').InstanceData
    values = torch.Generator().manual_seed(0)
    corners = torch.rand(PICTURES, BOXES, 4, generator=values) * SIZE / 2
    corners[..., 2:] += corners[..., :2] + 8
    labels = torch.randint(80, (PICTURES, BOXES), generator=values)
    shape = (PICTURES, 3, SIZE, SIZE)
    pictures = torch.randint(256, shape, dtype=torch.uint8, generator=values)
    truths = [instances(bboxes=b, labels=n) for b, n in zip(corners, labels)]
    facts = dict(img_shape=(SIZE, SIZE), pad_shape=(SIZE, SIZE))
    return dict(
        inputs=list(pictures),
        data_samples=[
            samples(gt_instances=truth, metainfo={**facts, 'img_id': i})
            for i, truth in enumerate(truths)
        ],
    )
