"""Competitors are timed side by side: once a round, in a shuffled order."""

from __future__ import annotations

import gc
import logging
import random
import statistics
import time
import warnings
from dataclasses import dataclass, field
from typing import Callable, Dict, Iterable, List, NamedTuple, Tuple

import torch

Call = Callable[[], object]
Sample = Callable[[], Tuple[float, ...]]
NOT_INSTALLED = 'not installed'
FLUSH = 2**28
"""Bytes that are read before a call: more than the caches of most machines."""


@dataclass
class Figure:
    """What was measured of one competitor.

    Attributes:
        samples: Seconds, one tuple a round.
        failed: Why there are none.
    """

    samples: List[Tuple[float, ...]] = field(default_factory=list)
    failed: str = ''

    def column(self, index: int = 0) -> List[float]:
        """Return one of the values of every round."""
        return [sample[index] for sample in self.samples]


class Spread(NamedTuple):
    """Quartiles."""

    lower: float
    median: float
    upper: float


def spread(values: List[float]) -> Spread:
    """Return the quartiles of at least two values."""
    return Spread(*statistics.quantiles(values, method='inclusive'))


def ratios(top: List[float], bottom: List[float]) -> Spread:
    """Return the quartiles of the ratio within each round.

    On a noisy machine both of a round are slow together, so these are
    steadier than the ratio of the medians.
    """
    return spread([a / b for a, b in zip(top, bottom)])


def compare(
    names: Iterable[str], make: Callable[[str], Sample], rounds: int
) -> Dict[str, Figure]:
    """Measure competitors side by side.

    Args:
        names: Their names.
        make: Makes what measures one once. Who raises is left out.
        rounds: How often each is measured.

    Returns:
        The figures; the values of a round are at the same place in each.
    """
    figures = {name: Figure() for name in names}
    samplers: Dict[str, Sample] = {}
    # the frameworks tell of every object that they build
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name, figure in figures.items():
            try:
                samplers[name] = make(name)
            except ModuleNotFoundError as error:
                figure.failed = f'{NOT_INSTALLED} ({error.name})'
            except Exception as error:
                text = ' '.join(str(error).split())
                figure.failed = f'failed: {type(error).__name__}: {text}'[:200]
        order = list(samplers)
        shuffle = random.Random(0).shuffle
        gc.collect()
        gc.disable()
        for _ in range(rounds):
            # else one would always find what the same other left in the caches
            shuffle(order)
            for name in order:
                figures[name].samples.append(samplers[name]())
    gc.enable()
    logging.disable(logging.NOTSET)
    return figures


def cold_timer(device: str) -> Callable[[Call], Sample]:
    """Return what makes a timer of a call whose tensors are in no cache.

    A forward and a backward pass touch more than the caches hold. On a GPU
    the time is from an idle device to an idle device, launches included.

    Args:
        device: 'cpu' or 'cuda'.
    """
    # read, not written: dirty lines would be written back during the call
    flush = torch.ones(FLUSH // 4, device=device)

    def timer(call: Call) -> Sample:
        def sample() -> Tuple[float]:
            flush.sum()
            return (seconds(call, device),)

        return sample

    return timer


def seconds(call: Call, device: str) -> float:
    """Return how long a call takes, the work on the device included."""
    wait: Call = lambda: None  # noqa: E731
    if device == 'cuda':
        wait = torch.cuda.synchronize
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start
