"""Write what a run measured: JSON, Markdown and, with matplotlib, a plot."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Dict, List

from benchmarks.figures import Result
from benchmarks.plots import draw
from benchmarks.tables import tables

VERSION = 1
"""Version of the layout of ``bench.json``."""


def write(
    machine: Dict[str, str], results: List[Result], folder: Path, kind: str
) -> str:
    """Write ``bench.json``, ``bench.md`` and ``bench.png``.

    Args:
        machine: What it was measured on.
        results: The results.
        folder: Where to.
        kind: What sort of run it was, in words.

    Returns:
        The text of ``bench.md``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = f'{_heading(machine, kind)}\n\n{tables(results)}'
    content = {
        'version': VERSION,
        'kind': kind,
        'machine': machine,
        'results': [result.as_json() for result in results],
    }
    _replace(folder / 'bench.json', json.dumps(content, indent=1) + '\n')
    _replace(folder / 'bench.md', text)
    if importlib.util.find_spec('matplotlib') is not None:
        draw(results, folder / 'bench.png')
    return text


def _heading(machine: Dict[str, str], kind: str) -> str:
    facts = '; '.join(f'{name}: {value}' for name, value in machine.items())
    return f'# Benchmark\n\nRun: {kind}. {facts}.'


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, path)
