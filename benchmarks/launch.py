"""Measure cases in processes of their own, and collect the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.figures import Case, Result, failure, from_json
from benchmarks.rounds import Limits

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 900
"""Seconds after which a process is ended."""


def run_process(
    cases: list[Case], limits: Limits, folder: Path
) -> list[Result]:
    """Measure cases of one device and number of threads in a new process.

    Args:
        cases: The cases.
        limits: Limits of the rounds.
        folder: Where its output goes: ``logs/<part>.log``.

    Returns:
        A result for every case, also if the process ends too early.
    """
    name = '_'.join([cases[0].part, cases[0].device, str(cases[0].threads)])
    logs = (folder / 'logs').resolve()
    logs.mkdir(parents=True, exist_ok=True)
    lines = logs / f'{name}.jsonl'
    lines.write_text('')
    with (logs / f'{name}.log').open('w') as log:
        end = _run(
            _asked(cases, limits), lines, log, _environment(cases[0], logs)
        )
    return _complete(cases, _read(lines), f'{end}, see {log.name}')


def _run(asked: str, lines: Path, log: object, env: dict[str, str]) -> str:
    """Run the worker; return in words how it ended."""
    try:
        done = subprocess.run(
            [sys.executable, '-m', 'benchmarks.worker', str(lines)],
            input=asked,
            text=True,
            cwd=ROOT,
            env=env,
            stdout=log,  # type: ignore[call-overload]
            stderr=subprocess.STDOUT,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        return f'the process took more than {LONGEST} s'
    return f'the process ended with status {done.returncode}'


def _asked(cases: list[Case], limits: Limits) -> str:
    return json.dumps(
        dict(limits=asdict(limits), cases=[asdict(case) for case in cases])
    )


def _environment(case: Case, folder: Path) -> dict[str, str]:
    threads = dict.fromkeys(
        ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), str(case.threads)
    )
    hidden = {'CUDA_VISIBLE_DEVICES': ''} if case.device == 'cpu' else {}
    # the system's own temporary folder may be in memory
    temporary = {'TMPDIR': str(folder)}
    return {**os.environ, **threads, **hidden, **temporary}


def _read(lines: Path) -> list[Result]:
    rows = lines.read_text(encoding='utf-8').splitlines()
    return [from_json(json.loads(row)) for row in rows]


def _complete(
    cases: list[Case], results: list[Result], end: str
) -> list[Result]:
    """Add what is missing, as failed."""
    measured = {result.case: result for result in results}
    return [
        measured.get(case)
        or Result(case, {name: failure(end) for name in case.competitors})
        for case in cases
    ]
