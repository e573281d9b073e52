"""Measure the average beside its peers; write tables, JSON and a plot.

Usage: python -m benchmarks [--only update,swap] [--device cpu] [--quick]

The exit status is 1 if a figure could not be measured, 2 if a word is wrong.
"""

from __future__ import annotations

import sys
import time

from benchmarks.figures import NOT_INSTALLED, Result
from benchmarks.launch import run_process
from benchmarks.machine import describe
from benchmarks.options import parse
from benchmarks.plan import Wishes, plan
from benchmarks.report import write


def main() -> int:
    """Run the benchmark; return the exit status."""
    options = parse()
    start = time.monotonic()
    machine = describe()
    results: list[Result] = []
    for cases in plan(options.wishes):
        first = cases[0]
        _say(f'{first.part}, {first.device}, threads: {first.threads}')
        results += run_process(cases, options.wishes.limits, options.out)
    text = write(machine, results, options.out, _kind(options.wishes))
    print(f'\n{text}')
    _say(f'{time.monotonic() - start:.0f} s; written to {options.out}')
    return _report_failures(results)


def _kind(wishes: Wishes) -> str:
    return 'a try: too few rounds for figures' if wishes.quick else 'full'


def _report_failures(results: list[Result]) -> int:
    """Print what could not be measured; return the exit status.

    A peer that is not installed is in the tables as such, and no failure.
    """
    failures = [line for result in results for line in result.failures]
    failures = [line for line in failures if NOT_INSTALLED not in line]
    for line in failures:
        print(f'bench: not measured: {line}', file=sys.stderr)
    return 1 if failures else 0


def _say(text: str) -> None:
    print(f'bench: {text}', flush=True)


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit('bench: stopped')
