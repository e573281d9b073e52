"""What a run measures: the cases of every part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List

from benchmarks.figures import Case
from benchmarks.rounds import QUICK, Limits

MODELS = ('rtmdet-tiny', 'yolox-s', 'retinanet-r50', 'swin-l', 'toy-1000')
"""Models, in the order of the tables."""

TENSORS = (1, 3, 10, 30, 100, 300, 1000, 3000)
TENSORS_BYTES = 16 * 2**20
BYTES = tuple(2**k * 2**20 for k in range(9))
BYTES_TENSORS = 300

UPDATE = (
    *('floor', 'ours', 'ours-ramp', 'ours-ignore', 'ours-overlap'),
    *('mmengine', 'mmengine-buffers', 'mmdet', 'mmdet-buffers'),
    *('torch', 'ema-pytorch', 'timm'),
)
CURVE = ('floor', 'ours', 'ours-ignore', 'mmdet-buffers', 'torch')
SWAP = ('floor', 'ours', 'mmengine', 'mmengine-buffers')
SAVE = ('floor', 'ours', 'mmengine', 'mmengine-buffers')
STEP = ('none', 'ours', 'mmengine-buffers', 'mmdet-buffers')
HOOK = ('none', 'update', 'ours', 'mmengine-buffers')
MEMORY = ('ours', 'mmengine-buffers', 'mmdet-buffers', *UPDATE[-3:])
LOOP = ('none', 'ours', 'ours-overlap', 'ours-host', 'mmdet-buffers', 'torch')


@dataclass(frozen=True)
class Wishes:
    """What the user asks for.

    Args:
        parts: Names of ``PARTS``.
        models: Models of the parts that have several.
        devices: 'cpu', 'cuda' or both.
        threads: Numbers of threads.
        quick: Whether to take a few rounds only. Defaults to False.
    """

    parts: tuple[str, ...]
    models: tuple[str, ...]
    devices: tuple[str, ...]
    threads: tuple[int, ...]
    quick: bool = False

    @property
    def limits(self) -> Limits:
        """Limits of the rounds of a case."""
        return QUICK if self.quick else Limits(seconds=5.0, least=7)

    def threads_on(self, device: str) -> tuple[int, ...]:
        """Return the numbers of threads: on a GPU they make no odds."""
        return self.threads if device == 'cpu' else self.threads[:1]


Planner = Callable[[Wishes, str, int], Iterator[Case]]


def _update(wishes: Wishes, device: str, threads: int) -> Iterator[Case]:
    for model in wishes.models:
        for cache in ('cold', 'hot'):
            yield Case('update', model, UPDATE, device, threads, cache)


def _tensors(wishes: Wishes, device: str, threads: int) -> Iterator[Case]:
    for tensors in TENSORS[:2] if wishes.quick else TENSORS:
        model = f'{tensors}x{TENSORS_BYTES}'
        yield Case('tensors', model, CURVE, device, threads, 'cold')


def _bytes(wishes: Wishes, device: str, threads: int) -> Iterator[Case]:
    for size in BYTES[:2] if wishes.quick else BYTES:
        model = f'{BYTES_TENSORS}x{size}'
        yield Case('bytes', model, CURVE, device, threads, 'cold')


def _swap(wishes: Wishes, device: str, threads: int) -> Iterator[Case]:
    for model in wishes.models:
        yield Case('swap', model, SWAP, device, threads, 'cold')


def _save(wishes: Wishes, device: str, threads: int) -> Iterator[Case]:
    if threads != wishes.threads[0]:
        return
    for model in wishes.models:
        for place in ('memory', 'disk'):
            yield Case('save', model, SAVE, device, threads, place)


def _step(wishes: Wishes, device: str, threads: int) -> Iterator[Case]:
    yield Case('step', 'rtmdet-tiny', STEP, device, threads)


def _loop(wishes: Wishes, device: str, threads: int) -> Iterator[Case]:
    if device != 'cpu':
        yield Case('loop', 'retinanet-r50', LOOP, device, threads)


def _hook(wishes: Wishes, device: str, threads: int) -> Iterator[Case]:
    yield Case('hook', 'a linear layer', HOOK, device, threads)


def _memory(wishes: Wishes, device: str, threads: int) -> Iterator[Case]:
    names = MEMORY if device == 'cpu' else (*MEMORY, 'ours-host')
    if threads == wishes.threads[0]:
        for model in wishes.models:
            yield Case('memory', model, names, device, threads)


PARTS: Dict[str, Planner] = {
    'update': _update,
    'tensors': _tensors,
    'bytes': _bytes,
    'swap': _swap,
    'save': _save,
    'step': _step,
    'loop': _loop,
    'hook': _hook,
    'memory': _memory,
}


def plan(wishes: Wishes) -> list[list[Case]]:
    """Return the cases, those of one process together.

    Args:
        wishes: What the user asks for.

    Returns:
        A list a process: of one part, device and number of threads.
    """
    return [cases for cases in _processes(wishes) if cases]


def _processes(wishes: Wishes) -> Iterator[List[Case]]:
    for device in wishes.devices:
        for part in wishes.parts:
            for threads in wishes.threads_on(device):
                yield list(PARTS[part](wishes, device, threads))
