"""The whole path: data, training, two tests, a table and a picture.

The tools of the installed mmdet do the work, 3 or 2: ``tools/train.py`` trains
with ``EMAHook`` and two averages, ``tools/test.py`` tests the last checkpoint
with each set of weights. Everything is written below ``work_dirs``.

Usage: python demo/run.py
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import time
from typing import Any

import scenes
from digits import write_digits
from framework import ROOT, Framework

from mmdet_ema.cli import plot

DATA = ROOT / 'data' / 'digits'
SETS = ('raw', 'fast', 'ema')


def main() -> None:
    """Run the demo; after Ctrl-C the next one goes on."""
    try:
        _demo(_framework())
    except KeyboardInterrupt:
        sys.exit('demo: stopped; the next one goes on from the last epoch')


def _framework() -> Framework:
    """Return the installed generation of mmdet."""
    version = importlib.metadata.version('mmdet')
    if version.startswith('2.'):
        from with_mmdet2 import Mmdet2

        return Mmdet2()
    from with_mmdet3 import Mmdet3

    return Mmdet3()


def _demo(framework: Framework) -> None:
    start = time.monotonic()
    folder = framework.work_dir
    report, *pictures = (
        folder / name for name in ('ema.json', 'ema.png', 'scenes.png')
    )
    _say('writing the digits detection set')
    write_digits(DATA)
    if report.exists():
        shutil.rmtree(folder)
    _train(framework)
    test = _test(framework)
    metrics, decay, _ = plot.read_curves(plot.read_lines(folder))
    ends = {name: f'_{name}' for name in SETS if name != 'ema'}
    curves = {
        name: metrics[framework.metric + ends.get(name, '')] for name in SETS
    }
    plot.draw(folder, pictures[0], framework.metric)
    found = {x: framework.detections(x, scenes.SCORE) for x in ('raw', 'ema')}
    scenes.draw(DATA, found, pictures[1])
    report.write_text(
        json.dumps(dict(validations=curves, decay=decay, test=test), indent=2)
    )
    print(f'\n{_table(curves, test)}\n')
    _say(f'done in {time.monotonic() - start:.0f} s')
    for path in (framework.last_checkpoint(), *pictures, report):
        print(f'  {path.relative_to(ROOT)}')


def _train(framework: Framework) -> None:
    """Train; go on where an interrupted demo stopped."""
    resume = framework.last_checkpoint() is not None
    if resume:
        _say('resuming the training (random numbers differ from one in a go)')
    else:
        _say(f'training with EMAHook (about {framework.minutes} on two cores)')
    framework.train(resume)


def _test(framework: Framework) -> dict[str, float]:
    """Test each set of weights of the last checkpoint."""
    scores = {}
    for weights in SETS:
        _say(f'testing the {weights} weights')
        scores[weights] = framework.test(weights)
    return scores


def _table(curves: dict[str, Any], test: dict[str, float]) -> str:
    """Return the mAP of each set at every validation and at the end."""
    rows = {
        f'epoch {epoch:>4}': {x: curves[x][epoch] for x in SETS}
        for epoch in sorted(curves['ema'])
    }
    rows['test.py'] = test
    lines = ['mAP       ' + ''.join(f'{x:>9}' for x in SETS)]
    lines += [
        f'{head:<10}' + ''.join(f'{row[x]:9.3f}' for x in SETS)
        for head, row in rows.items()
    ]
    return '\n'.join(lines)


def _say(text: str) -> None:
    print(f'demo: {text}', flush=True)


if __name__ == '__main__':
    main()
