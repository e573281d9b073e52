"""The process that measures cases: reads them, writes a line for each.

Usage: python -m benchmarks.worker RESULTS.jsonl < CASES.json
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, Dict

from benchmarks.figures import Case, Figure, Result, failure
from benchmarks.rounds import Limits

MODULES = {'tensors': 'update', 'bytes': 'update'}
"""Parts that are measured as another one is."""


def main() -> None:
    """Measure what is asked for on standard input."""
    asked = json.load(sys.stdin)
    limits = Limits(**asked['limits'])
    _set_up(asked['cases'][0]['threads'])
    with Path(sys.argv[1]).open('a', encoding='utf-8') as results:
        for row in asked['cases']:
            case = Case(**{**row, 'competitors': tuple(row['competitors'])})
            result = Result(case, measure(case, limits))
            print(json.dumps(result.as_json()), file=results, flush=True)


def measure(case: Case, limits: Limits) -> Dict[str, Figure]:
    """Measure a case; if it fails, so do all its competitors."""
    name = MODULES.get(case.part, case.part)
    try:
        part: Any = importlib.import_module(f'benchmarks.parts.{name}')
        figures: Dict[str, Figure] = part.measure(case, limits)
    except Exception as error:
        return {name: failure(error) for name in case.competitors}
    return figures


def _set_up(threads: int) -> None:
    import torch

    from benchmarks.loading import find_peers

    torch.set_num_threads(threads)
    find_peers()


if __name__ == '__main__':
    main()
