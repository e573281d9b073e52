"""The tensors of real detectors, by name, shape, dtype and kind.

They come from ``shapes.json``, so that a benchmark needs torch alone;
``benchmarks/write_shapes.py`` writes the file from mmdet's configs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name('shapes.json')


@dataclass(frozen=True)
class Record:
    """A tensor of a model.

    Args:
        name: Its name in ``state_dict``.
        shape: Its shape.
        dtype: Its dtype without ``torch.``.
        kind: 'parameter', 'frozen' (a parameter that is not trained),
            'buffer' or 'unsaved' (a buffer that ``state_dict`` leaves out).
        tied_to: Name of the record that is the same tensor. Defaults to None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = 'float32'
    kind: str = 'parameter'
    tied_to: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        dtype = getattr(torch, self.dtype)
        return (
            math.prod(self.shape) * torch.empty(0, dtype=dtype).element_size()
        )

    @property
    def is_float(self) -> bool:
        """Whether it is floating point."""
        return bool(getattr(torch, self.dtype).is_floating_point)

    def as_row(self) -> list[Any]:
        """Return it as a row of the file."""
        row = [self.name, list(self.shape), self.dtype, self.kind]
        return row if self.tied_to is None else [*row, self.tied_to]


def from_row(row: list[Any]) -> Record:
    """Return the record of a row of the file."""
    name, shape, *rest = row
    return Record(name, tuple(shape), *rest)


@lru_cache(maxsize=None)
def read_shapes() -> dict[str, list[Record]]:
    """Return the records of every model in the file."""
    models = json.loads(PATH.read_text(encoding='utf-8'))
    return {n: [from_row(row) for row in rows] for n, rows in models.items()}


def spread(tensors: int, total_bytes: int) -> list[Record]:
    """Return records of equal float32 parameters, ten to a module.

    Args:
        tensors: How many.
        total_bytes: Bytes of all together, about.
    """
    size = max(1, total_bytes // tensors // 4)
    return [
        Record(f'stage{i // 100}.block{i // 10 % 10}.weight{i % 10}', (size,))
        for i in range(tensors)
    ]


def records_of(model: str) -> list[Record]:
    """Return the records of a model.

    Args:
        model: A name of the file, 'toy-1000' (1,000 tensors of 1 kB) or
            ``<tensors>x<bytes>``.
    """
    if model == 'toy-1000':
        return spread(1000, 1000 * 1024)
    if model in read_shapes():
        return read_shapes()[model]
    tensors, _, size = model.partition('x')
    return spread(int(tensors), int(size))


def float_bytes(records: list[Record]) -> int:
    """Return the bytes of all float tensors, tied ones counted once."""
    return sum(r.bytes for r in records if r.is_float and r.tied_to is None)
