"""One update of the average, of every competitor on the same weights."""

from __future__ import annotations

from typing import Dict

from benchmarks import peers
from benchmarks.caches import Prepare, prepare_for
from benchmarks.clocks import Call, count_syncs
from benchmarks.competitors import in_order, make_all, time_calls
from benchmarks.figures import Case, Figure
from benchmarks.modules import build_module, change
from benchmarks.room import check_room
from benchmarks.rounds import Limits
from benchmarks.shapes import float_bytes, records_of


def measure(case: Case, limits: Limits) -> Dict[str, Figure]:
    """Measure a case.

    Args:
        case: The case; its setting is the state of the caches.
        limits: How many rounds.

    Returns:
        The figures, with 'syncs' on a GPU.
    """
    records = records_of(case.model)
    copies = len(case.competitors) + 2
    check_room(copies * float_bytes(records), case.device)
    model = build_module(records, case.device)
    made, failed = make_all(case.competitors, lambda n: peers.make(n, model))
    change(model)
    prepare = _settled(prepare_for(case.setting, case.device), made)
    calls = {name: peer.update for name, peer in made.items()}
    # a point of a curve needs fewer rounds than a row of the tables
    enough = limits if case.part == 'update' else limits.shorter(0.3, 5)
    figures = time_calls(case, calls, prepare, enough)
    if case.device != 'cpu':
        _count_syncs(made, figures)
    return in_order(case, figures, failed)


def _settled(prepare: Prepare, made: Dict[str, peers.Peer]) -> Prepare:
    """Let no update of before run beside one that is timed."""

    def settled(call: Call) -> None:
        for peer in made.values():
            peer.settle()
        prepare(call)
        for peer in made.values():
            peer.settle()

    return settled


def _count_syncs(
    made: Dict[str, peers.Peer], figures: Dict[str, Figure]
) -> None:
    for name, peer in made.items():
        if figures[name].failed is None:
            figures[name].add({'syncs': count_syncs(peer.update)})
