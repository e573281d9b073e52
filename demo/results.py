"""What a demo run measured, and the files that it is read from."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Iterable


@dataclass(frozen=True)
class Validation:
    """mAP of the averages and of the raw weights after an epoch."""

    epoch: int
    ema: float
    raw: float


@dataclass(frozen=True)
class Results:
    """What the demo measured.

    Attributes:
        validations: One entry a validation, in order.
        decay: Pairs of optimizer step and decay, along the training.
        test: mAP that ``tools/test.py`` printed, under 'ema' and 'raw'.
    """

    validations: list[Validation]
    decay: list[tuple[int, float]]
    test: dict[str, float]

    @classmethod
    def of(
        cls,
        validations: Iterable[Validation],
        decay: Iterable[tuple[int, float]],
        test: dict[str, float],
    ) -> Results:
        """Return the results of a training run, resumed or not.

        Args:
            validations: In the order in which they were logged; what was done
                again counts.
            decay: Pairs of optimizer step and decay, in that order too.
            test: mAP of each set of weights.
        """
        last = {point.epoch: point for point in validations}
        ordered = [last[epoch] for epoch in sorted(last)]
        return cls(ordered, sorted(dict(decay).items()), test)


def write_json(results: Results, path: Path) -> None:
    """Write the results as JSON, whole or not at all.

    Args:
        results: What was measured.
        path: Where to.
    """
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(asdict(results), indent=2) + '\n')
    os.replace(temporary, path)


def read_lines(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Read logs of one JSON dict a line, in the order of their names.

    Args:
        files: The logs.

    Returns:
        All lines.
    """
    texts = [path.read_text() for path in sorted(files)]
    return [json.loads(line) for text in texts for line in text.splitlines()]
