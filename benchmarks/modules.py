"""Modules with the tensors of a model, for peers that need a module."""

from __future__ import annotations

from typing import Iterable

import torch
from torch import Tensor, nn

from benchmarks.shapes import Record

_NORM = {'weight', 'bias', 'running_mean', 'running_var'}
SPREAD = 0.02
"""Standard deviation of the values; no update meets a denormal number."""


def build_module(records: Iterable[Record], device: str = 'cpu') -> nn.Module:
    """Build nested modules with these tensors under these names.

    A module with the four tensors of a BatchNorm is one, since an average may
    treat those apart. Modules without tensors (activations) are left out.

    Args:
        records: The tensors.
        device: Where they are. Defaults to 'cpu'.

    Returns:
        The module; its values are the same at every call.
    """
    records = list(records)
    root = nn.Module()
    values = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    owners = _owners(root, records)
    for record in records:
        path, _, name = record.name.rpartition('.')
        if record.tied_to is None:
            tensors[record.name] = _tensor(record, values, device)
        tensor = tensors[record.tied_to or record.name]
        _register(owners[path], name, tensor, record.kind)
    return root


@torch.no_grad()
def change(module: nn.Module) -> None:
    """Move every weight away from its average, as training does.

    By a quarter of its spread: weights near zero go by many times their size.
    """
    values = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=values)
        parameter.add_((noise * (SPREAD / 4)).to(parameter))


def _owners(root: nn.Module, records: list[Record]) -> dict[str, nn.Module]:
    """Make the module of every path that has tensors."""
    names: dict[str, dict[str, int]] = {}
    for record in records:
        path, _, name = record.name.rpartition('.')
        names.setdefault(path, {})[name] = sum(record.shape)
    owners = {'': root}
    for path in names:
        _make(owners, path, names)
    return owners


def _make(
    owners: dict[str, nn.Module], path: str, names: dict[str, dict[str, int]]
) -> nn.Module:
    if path not in owners:
        above, _, name = path.rpartition('.')
        inside = names.get(path, {})
        norm = inside.keys() >= _NORM
        module = nn.BatchNorm2d(inside['weight']) if norm else nn.Module()
        _make(owners, above, names).add_module(name, module)
        owners[path] = module
    return owners[path]


def _tensor(record: Record, values: torch.Generator, device: str) -> Tensor:
    dtype = getattr(torch, record.dtype)
    tensor = torch.zeros(record.shape, dtype=dtype)
    if record.is_float:
        tensor.normal_(0, SPREAD, generator=values)
    tensor = tensor.to(device)
    trained = record.kind == 'parameter'
    if trained or record.kind == 'frozen':
        return nn.Parameter(tensor, requires_grad=trained)
    return tensor


def _register(owner: nn.Module, name: str, tensor: Tensor, kind: str) -> None:
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor, persistent=kind != 'unsaved')
