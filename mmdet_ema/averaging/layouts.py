"""Whether the tensors of a plan are still what was planned for."""

from __future__ import annotations

from typing import List, Optional, Sequence

from torch import Tensor


class Layouts:
    """Where raw tensors lie, to be compared before each use.

    ``parameter.data = ...`` gives no notice, and multi-tensor calls broadcast
    what does not fit.

    Args:
        averages: Tensors of the same shapes; if not, they are never right.
        raws: Tensors that belong to somebody else.
    """

    def __init__(self, averages: Sequence[Tensor], raws: Sequence[Tensor]):
        self._raws = raws
        sizes = [[tensor.size() for tensor in x] for x in (averages, raws)]
        self._seen = self._now() if sizes[0] == sizes[1] else []

    def are_right(self) -> bool:
        """Return whether all tensors still lie where and how they lay."""
        return self._now() == self._seen

    def _now(self) -> List[List[object]]:
        # map() over methods of the class: half the time of a comprehension
        return [
            list(map(Tensor.data_ptr, self._raws)),
            list(map(Tensor.size, self._raws)),
            list(map(Tensor.stride, self._raws)),
        ]


def check_readable(
    averages: Sequence[Tensor],
    raws: Sequence[Tensor],
    names: Optional[Sequence[str]] = None,
) -> None:
    """Refuse raw tensors that their averages cannot follow.

    Args:
        averages: The averages, or copies.
        raws: The raw tensors, in the same order.
        names: Their names, where they are known. Defaults to None.

    Raises:
        RuntimeError: If one has another shape, or its memory was freed.
    """
    for i, (average, raw) in enumerate(zip(averages, raws)):
        name = f'{names[i]}, ' if names else ''
        if average.shape != raw.shape:
            raise RuntimeError(
                f'{name}a tensor of shape {tuple(average.shape)} in the '
                f'model, has become one of shape {tuple(raw.shape)}, which '
                'its average cannot follow: give it back its shape, or call '
                'refresh() (the hook does so before each epoch): the average '
                'starts again from the new values'
            )
        if raw.numel() and not raw.data_ptr() and not raw.is_meta:
            raise RuntimeError(
                f'{name}a tensor of shape {tuple(raw.shape)} in the model, '
                'has lost its memory (FSDP frees that of weights which it '
                'has sharded): it cannot be averaged'
            )
