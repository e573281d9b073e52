"""Averages of tensors that were parametrized in the middle of a training."""

from __future__ import annotations

import contextlib
import copy
from typing import Any, Dict, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

_WORD = 'parametrizations.'


@torch.no_grad()
def parametrized(
    model: nn.Module, averages: Mapping[str, Tensor]
) -> Dict[str, Tensor]:
    """Turn averages of plain tensors into those of what now computes them.

    Args:
        model: The model, with parametrizations.
        averages: Averages by name, from before they were put on.

    Returns:
        Averages by new name; tensors that were parametrized before, or cannot
        be taken back, are left out.
    """
    found: Dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, ParametrizationList):
            continue
        owner, _, weight = name.rpartition(_WORD)
        average = averages.get(f'{owner}{weight}')
        if average is None:
            continue
        value = average.clone()
        # a copy: some keep what they were last given
        for step in reversed(list(copy.deepcopy(module))):
            inverse: Any = getattr(step, 'right_inverse', None)
            # so does torch
            with contextlib.suppress(NotImplementedError):
                value = inverse(value) if inverse else value
        if isinstance(value, Tensor):
            found[f'{name}.original'] = value
        else:
            found.update(
                (f'{name}.original{i}', part) for i, part in enumerate(value)
            )
    return found
