"""The groups as a small table."""

from __future__ import annotations

from typing import Any, List, Sequence, Tuple

from torch.optim import Optimizer

_HEAD = ('group', 'tensors', 'frozen', 'elements', 'lr', 'weight decay')


def describe_groups(optimizer: Optimizer) -> str:
    """Return the groups of an optimizer as lines of text.

    Args:
        optimizer: The optimizer; its groups have names.
    """
    rows = [_row(group) for group in optimizer.param_groups]
    widths = [max(map(len, column)) for column in zip(_HEAD, *rows)]
    lines = [_line(cells, widths) for cells in (_HEAD, *rows)]
    total = sum(len(group['params']) for group in optimizer.param_groups)
    first = (
        f'EMAOptimizerConstructor: {type(optimizer).__name__}, {total} '
        f'tensors in {len(rows)} groups'
    )
    return '\n'.join([first, *lines])


def _row(group: Any) -> Tuple[str, ...]:
    tensors = group['params']
    return (
        str(group.get('name', '')),
        str(len(tensors)),
        str(sum(not tensor.requires_grad for tensor in tensors)),
        f'{sum(tensor.numel() for tensor in tensors):,}',
        f'{float(group["lr"]):.6g}' if 'lr' in group else '-',
        f'{group["weight_decay"]:.6g}' if 'weight_decay' in group else '-',
    )


def _line(cells: Sequence[str], widths: List[int]) -> str:
    first, *rest = (f'{c:>{w}}' for c, w in zip(cells, widths))
    return '  '.join(['', first.strip().ljust(widths[0]), *rest])
