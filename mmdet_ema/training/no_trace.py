"""Run something that leaves no trace in a model or in random generators."""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict, defaultdict, deque
from typing import Iterator

import torch
from torch import nn

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


@contextlib.contextmanager
def same_randomness() -> Iterator[None]:
    """Run the body; random generators are then as they were before."""
    import numpy as np  # here, as nothing else in training/ needs it

    python, numpy = random.getstate(), np.random.get_state()
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = [torch.cuda.current_device()] if on_gpu else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Run the body; the model is then as it was, but for its parameters.

    What an evaluation leaves behind is undone: a frame that the model
    remembers, layers that a hook has fused, statistics in buffers. Attributes
    are kept one level deep: a list gets its items back, an object that the
    body changed inside stays changed.
    """
    # torch's wrappers (FSDP) keep there what one forward pass sets up for all
    modules = [
        module
        for module in model.modules()
        if not any(
            kind.__module__.startswith('torch.distributed.')
            for kind in type(module).__mro__
        )
    ]
    before = [(vars(module), dict(vars(module))) for module in modules]
    contents = [
        (value, value.copy())
        for _, attributes in before
        for value in attributes.values()
        if type(value) in _CONTAINERS
    ]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        with same_randomness():
            yield
    finally:
        for live, attributes in before:
            live.clear()
            live.update(attributes)
        for value, content in contents:
            # the same object: handles of hooks refer to it
            value.clear()
            add = value.extend if hasattr(value, 'extend') else value.update
            add(content)
        for buffer, content in buffers:
            if buffer.shape != content.shape:
                buffer.resize_(content.shape)  # observers do that in place
            buffer.data.copy_(content)
