"""Memory that an average keeps, and takes for a moment.

'kept' is what making the average and its first updates leave behind;
'update', 'swap' and 'save' are what each needs beyond that while it runs.
"""

from __future__ import annotations

import io
import json
import os
from typing import Any, Callable, Dict

import torch
from torch import nn

from benchmarks import peers
from benchmarks.clocks import Call
from benchmarks.competitors import in_order, make_all
from benchmarks.figures import Case, Figure
from benchmarks.modules import build_module
from benchmarks.parts.save import save_of, save_of_hook
from benchmarks.parts.swap import framework_hook, swap_of, swap_of_hook
from benchmarks.room import Gauge, check_room, give_back
from benchmarks.rounds import Limits
from benchmarks.shapes import float_bytes, records_of

Sample = Dict[str, float]


def measure(case: Case, limits: Limits) -> Dict[str, Figure]:
    """Measure a case, once: bytes hardly vary."""
    records = records_of(case.model)
    check_room(4 * float_bytes(records), case.device)
    model = build_module(records, case.device)

    def probe(name: str) -> Sample:
        if case.device != 'cpu':
            return bytes_of(name, model, case.device)
        return _in_child(lambda: bytes_of(name, model, case.device))

    samples, failed = make_all(case.competitors, probe)
    figures = {name: Figure() for name in samples}
    for name, sample in samples.items():
        figures[name].add(sample)
    return in_order(case, figures, failed)


def bytes_of(name: str, model: nn.Module, device: str) -> Sample:
    """Return the bytes that a competitor keeps and takes.

    Args:
        name: The competitor.
        model: The model.
        device: 'cpu' or 'cuda'.
    """
    gauge = Gauge(device)
    # what is paid once, by the first of all updates
    small = build_module(records_of('3x3072'), device)
    for call in _calls(name, small).values():
        call()
    gauge.reset()
    before = gauge.used()
    calls = _calls(name, model)
    calls['update']()
    # what was freed may still be the allocator's
    give_back(device)
    sample = {'kept': gauge.used() - before}
    for metric, call in calls.items():
        sample[metric] = _extra(gauge, call)
    return {metric: float(value) for metric, value in sample.items()}


def _calls(name: str, model: nn.Module) -> Dict[str, Call]:
    if name == 'mmengine-buffers':
        hook = framework_hook(model, update_buffers=True)
        return {
            'update': lambda: hook.ema_model.update_parameters(model),
            'swap': swap_of_hook(hook),
            'save': save_of_hook(hook, model, _to_nowhere),
        }
    peer = peers.make(name, model)
    calls: Dict[str, Call] = {'update': peer.update}
    if name.startswith('ours'):
        calls['swap'] = swap_of(peer.average)
        calls['save'] = save_of(peer.average, model, _to_nowhere)
    return calls


def _extra(gauge: Gauge, call: Call) -> int:
    gauge.reset()
    before = gauge.used()
    call()
    return max(0, gauge.most() - before)


def _in_child(probe: Callable[[], Sample]) -> Sample:
    """Run a probe in a process of its own, whose memory starts afresh."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(writer, probe)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    answer = json.loads(text or '{}')
    if 'sample' not in answer:
        raise RuntimeError(answer.get('failed', f'ended with status {status}'))
    sample: Sample = answer['sample']
    return sample


def _answer(writer: int, probe: Callable[[], Sample]) -> None:
    try:
        answer: Dict[str, Any] = {'sample': probe()}
    except BaseException as error:
        answer = {'failed': f'{type(error).__name__}: {error}'}
    with os.fdopen(writer, 'w') as pipe:
        json.dump(answer, pipe)
    os._exit(0)


class _Nowhere(io.RawIOBase):
    """A file that keeps nothing."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


def _to_nowhere(checkpoint: Any) -> None:
    nowhere: Any = _Nowhere()
    torch.save(checkpoint, nowhere)
