"""The whole path: data, training, two tests, a table and a picture.

The tools of the installed mmdet do the work, 3 or 2: ``tools/train.py`` trains
with ``EMAHook``, ``tools/test.py`` tests the last checkpoint with the EMA
weights, then with the raw ones. Everything is written below ``work_dirs``.

Usage: python demo/run.py
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import time

from digits import write_digits
from framework import ROOT, Framework
from picture import draw
from results import Results, write_json

DATA = ROOT / 'data' / 'digits'


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
    picture = framework.work_dir / 'ema.png'
    report = framework.work_dir / 'ema.json'
    _say('writing the digits detection set')
    write_digits(DATA)
    if report.exists():
        shutil.rmtree(framework.work_dir)
    _train(framework)
    results = framework.results(_test(framework))
    draw(results, picture)
    write_json(results, report)
    print(f'\n{_table(results)}\n')
    _say(f'done in {time.monotonic() - start:.0f} s')
    for path in (framework.last_checkpoint(), picture, report):
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
    """Test both sets of weights of the last checkpoint."""
    scores = {}
    for weights in ('ema', 'raw'):
        _say(f'testing the {weights} weights')
        scores[weights] = framework.test(weights)
    return scores


def _table(results: Results) -> str:
    """Return mAP of raw and EMA at every validation and at the end."""
    rows = ['            raw mAP   EMA mAP']
    rows += [
        f'epoch {point.epoch:>4}    {point.raw:7.3f}   {point.ema:7.3f}'
        for point in results.validations
    ]
    test = results.test
    rows.append(f'test.py       {test["raw"]:7.3f}   {test["ema"]:7.3f}')
    return '\n'.join(rows)


def _say(text: str) -> None:
    print(f'demo: {text}', flush=True)


if __name__ == '__main__':
    main()
