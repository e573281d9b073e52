"""Train, evaluate and write the tables of the study.

What is done already is not done again: work_dirs/study has it.

Usage: python -m study [--only digits,trees] [--seeds 5]
"""

from __future__ import annotations

import argparse
import time

from study import runs, tables
from study.evaluate import evaluate


def main() -> None:
    """Run the study that the command line asks for."""
    parser = argparse.ArgumentParser(description='Run the study.')
    names = [name for name in runs.SETTINGS if name != 'short']
    parser.add_argument(
        '--only', default='digits', help=f'settings, of {", ".join(names)}'
    )
    parser.add_argument('--seeds', type=int, help='how many; the usual number')
    parser.add_argument(
        '--tables', action='store_true', help='only write what is there'
    )
    options = parser.parse_args()
    chosen = options.only.split(',')
    unknown = [name for name in chosen if name not in runs.SETTINGS]
    if unknown:
        parser.error(f'no setting {unknown[0]}; there are {", ".join(names)}')
    for name in () if options.tables else chosen:
        setting = runs.SETTINGS[name]
        runs.write_data(setting)
        for seed in range(options.seeds or setting.seeds):
            start = time.monotonic()
            runs.train(setting, seed)
            evaluate(setting, seed)
            took = time.monotonic() - start
            print(f'study: {name}, seed {seed}: {took:.0f} s', flush=True)
    results = tables.read()
    if results:
        tables.write(results)
        print(tables.describe(results))


if __name__ == '__main__':
    main()
