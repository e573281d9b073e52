"""The whole path: data, training, two tests, a table and a picture.

mmdet's own tools do the work: ``tools/train.py`` trains with ``EMAHook``,
``tools/test.py`` tests the last checkpoint with the EMA weights, then with the
raw ones. Everything is written below ``work_dirs/demo``.

Usage: python demo/run.py
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from digits import write_digits
from picture import draw
from results import Results, read_results, read_test, write_json

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs' / 'rtmdet' / 'rtmdet_digits_1xb8-10e.py'
WORK_DIR = ROOT / 'work_dirs' / 'demo'
DATA = ROOT / 'data' / 'digits'
REPORT = WORK_DIR / 'ema.json'


def main() -> None:
    """Run the demo; after Ctrl-C the next one goes on."""
    try:
        _demo()
    except KeyboardInterrupt:
        sys.exit('demo: stopped; the next one goes on from the last epoch')


def _demo() -> None:
    start = time.monotonic()
    _say('writing the digits detection set')
    write_digits(DATA)
    _train()
    scores = {weights: _test(weights) for weights in ('ema', 'raw')}
    results = read_results(WORK_DIR, scores)
    draw(results, WORK_DIR / 'ema.png')
    write_json(results, REPORT)
    print(f'\n{_table(results)}\n')
    _say(f'done in {time.monotonic() - start:.0f} s')
    for path in (_last_checkpoint(), WORK_DIR / 'ema.png', REPORT):
        print(f'  {path.relative_to(ROOT)}')


def _train() -> None:
    """Train; go on where an interrupted demo stopped."""
    if REPORT.exists():
        shutil.rmtree(WORK_DIR)
    resume = ['--resume'] if (WORK_DIR / 'last_checkpoint').exists() else []
    if resume:
        _say('resuming the training (augmentations differ from one in a go)')
    else:
        _say('training with EMAHook (about 3 minutes on two cores)')
    _run_tool('train', 'train', CONFIG, '--work-dir', WORK_DIR, *resume)


def _test(weights: str) -> float:
    """Test one set of weights of the last checkpoint; return the mAP."""
    _say(f'testing the {weights} weights')
    out = WORK_DIR / f'test_{weights}'
    shutil.rmtree(out, ignore_errors=True)
    choice = f'custom_hooks.0.evaluate={weights}'
    _run_tool(
        'test',
        f'test_{weights}',
        *(CONFIG, _last_checkpoint(), '--work-dir', out),
        *('--cfg-options', choice),
    )
    return read_test(out)


def _last_checkpoint() -> Path:
    return Path((WORK_DIR / 'last_checkpoint').read_text().strip())


def _run_tool(name: str, log_name: str, *arguments: object) -> None:
    """Run one of mmdet's own tools; its output goes to a log file."""
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    log = WORK_DIR / f'{log_name}.log'
    command = [sys.executable, str(_tool(name)), *map(str, arguments)]
    # on a busy machine waiting OpenMP threads cost more than they bring
    environment = {'OMP_NUM_THREADS': '1', **os.environ}
    with log.open('a') as file:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    if done.returncode:
        tail = '\n'.join(log.read_text().splitlines()[-15:])
        sys.exit(f'{tail}\n\ntools/{name}.py failed; the whole log: {log}')


def _tool(name: str) -> Path:
    """Return the path of a tool inside the installed mmdet."""
    (package,) = importlib.util.find_spec('mmdet').submodule_search_locations
    return Path(package) / '.mim' / 'tools' / f'{name}.py'


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
