"""Make the competitors of a case; one that fails does not stop the others."""

from __future__ import annotations

from typing import Callable, Dict, Tuple, TypeVar

from benchmarks.caches import Prepare
from benchmarks.clocks import Call, clock_of
from benchmarks.figures import NOT_INSTALLED, Case, Figure, failure
from benchmarks.loading import NotInstalledError
from benchmarks.rounds import Limits, Sample, run_rounds

T = TypeVar('T')


def make_all(
    names: Tuple[str, ...], make: Callable[[str], T]
) -> Tuple[Dict[str, T], Dict[str, Figure]]:
    """Make every competitor.

    Args:
        names: Their names.
        make: Makes one.

    Returns:
        What was made, and figures of those that failed.
    """
    made: Dict[str, T] = {}
    failed: Dict[str, Figure] = {}
    for name in names:
        try:
            made[name] = make(name)
        except NotInstalledError as error:
            failed[name] = failure(f'{NOT_INSTALLED}: {error}')
        except Exception as error:
            failed[name] = failure(error)
    return made, failed


def time_calls(
    case: Case, calls: Dict[str, Call], prepare: Prepare, limits: Limits
) -> Dict[str, Figure]:
    """Time one call of each competitor in every round.

    Args:
        case: Whose competitors they are.
        calls: By competitor, what is timed.
        prepare: Called before each, untimed, with the call.
        limits: How many rounds.

    Returns:
        The figures.
    """
    clock = clock_of(case.device)

    def sampler(call: Call) -> Sample:
        def sample() -> Dict[str, float]:
            prepare(call)
            return clock.measure(call)

        return sample

    samplers = {name: sampler(call) for name, call in calls.items()}
    return run_rounds(samplers, limits)


def in_order(case: Case, *parts: Dict[str, Figure]) -> Dict[str, Figure]:
    """Return figures in the order of the case's competitors."""
    figures = {n: figure for part in parts for n, figure in part.items()}
    return {name: figures[name] for name in case.competitors}
