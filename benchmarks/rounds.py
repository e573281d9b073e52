"""Rounds: every competitor is timed once a round, in an order of its own."""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, Mapping

from benchmarks.figures import Figure, failure

Sample = Callable[[], Dict[str, float]]
# without these a slow machine would need hours for a large model
_LATE = 4
_FEWEST = 3


@dataclass(frozen=True)
class Limits:
    """How long to go on.

    Args:
        seconds: No round starts after this long, but for the first ``least``,
            and none but the first three after four times as long.
        least: Rounds at least, on a machine that is fast enough.
        most: Rounds at most.
    """

    seconds: float
    least: int
    most: int = 400

    def are_reached(self, rounds: int, seconds: float) -> bool:
        """Return whether no other round is to start."""
        needed = self.least if seconds < _LATE * self.seconds else _FEWEST
        return rounds >= min(needed, self.least) and seconds > self.seconds

    def shorter(self, factor: float, least: int) -> Limits:
        """Return limits for calls that take long or vary little."""
        least = min(self.least, least)
        return Limits(self.seconds * factor, least, self.most)


QUICK = Limits(seconds=0.05, least=3, most=5)


def run_rounds(
    samplers: Mapping[str, Sample], limits: Limits
) -> Dict[str, Figure]:
    """Measure competitors side by side.

    The order is shuffled anew in every round, so that no competitor always
    comes after the same other one. Who raises drops out.

    Args:
        samplers: By competitor, what measures it once.
        limits: How long to go on.

    Returns:
        The figures; those of one round are at the same place in every list.
    """
    figures = {name: Figure() for name in samplers}
    running = dict(samplers)
    with _no_collections():
        for order in _orders(list(samplers), limits):
            for name in order:
                if name in running:
                    _measure(name, running, figures)
    return figures


def _measure(
    name: str, running: Dict[str, Sample], figures: Dict[str, Figure]
) -> None:
    try:
        figures[name].add(running[name]())
    except Exception as error:
        figures[name] = failure(error)
        del running[name]


def _orders(names: list[str], limits: Limits) -> Iterator[list[str]]:
    shuffle = random.Random(0).shuffle
    start = time.monotonic()
    for done in range(limits.most):
        if limits.are_reached(done, time.monotonic() - start):
            return
        shuffle(names)
        yield names


class _no_collections:  # noqa: N801
    """Keeps Python's garbage collector out of the timed calls."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()
