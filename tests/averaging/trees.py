"""Hypothesis strategies: random module trees with random ties."""

import torch
from hypothesis import strategies as st
from torch import nn

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SHAPES = ((2, 3), (3, 2), (4,), (), (0,), (2, 2, 2))


class Node(nn.Module):
    """A module that holds what it is given."""


@st.composite
def trees(draw):
    """Draw a model whose parameters and buffers share memory at random.

    Returns the model; ``model.plan`` says what was tied with what.
    """
    nodes = [Node()]
    for i in range(draw(st.integers(0, 3))):
        parent = nodes[draw(st.integers(0, len(nodes) - 1))]
        nodes.append(Node())
        parent.add_module(f'child{i}', nodes[-1])
    made = []
    for i in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(('parameter', 'buffer', 'integers')))
        tie = draw(st.sampled_from(('none', 'none', 'object', 'data')))
        tensor = _make(draw, kind, tie, made)
        node = nodes[draw(st.integers(0, len(nodes) - 1))]
        if isinstance(tensor, nn.Parameter):
            node.register_parameter(f't{i}', tensor)
        else:
            keep = draw(st.sampled_from((True, True, False)))
            node.register_buffer(f't{i}', tensor, persistent=keep)
        made.append(tensor)
    return nodes[0]


def _make(draw, kind, tie, made):
    old = draw(st.sampled_from(made)) if made and tie != 'none' else None
    trainable = draw(st.booleans())
    if old is not None and tie == 'object':
        return old
    if old is not None:
        memory = old.detach()
        return _wrap(memory, kind, trainable)
    shape = draw(st.sampled_from(SHAPES))
    if kind == 'integers':
        return torch.randint(0, 9, shape)
    dtype = draw(st.sampled_from(DTYPES))
    return _wrap(torch.randn(shape).to(dtype), kind, trainable)


def _wrap(memory, kind, trainable):
    if kind == 'parameter' and memory.is_floating_point():
        return nn.Parameter(memory, requires_grad=trainable)
    return memory


def memory_of(tensor):
    """Return the addresses of all bytes of a tensor, from its strides."""
    if tensor.numel() == 0:
        return set()
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride()):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    width = tensor.element_size()
    start = tensor.data_ptr()
    return {
        start + int(offset) * width + byte
        for offset in offsets.reshape(-1)
        for byte in range(width)
    }


def tied_groups(state):
    """Return sets of names whose address ranges touch, by closure."""
    groups = []
    for name, tensor in state.items():
        bytes_of = memory_of(tensor)
        span = set(range(min(bytes_of), max(bytes_of) + 1)) if bytes_of else ()
        names, span = {name}, set(span)
        apart = []
        for other_names, other_span in groups:
            if span & other_span:
                names, span = names | other_names, span | other_span
            else:
                apart.append((other_names, other_span))
        groups = [*apart, (names, span)]
    return [names for names, _ in groups]


def changing(model):
    """Return the saved tensors that training changes in place, by name.

    Those that share memory with frozen parameters alone do not change.
    """
    state = model.state_dict(keep_vars=True)
    changing = {}
    for names in tied_groups(state):
        tensors = {name: state[name] for name in names}
        owners = [t for t in tensors.values() if isinstance(t, nn.Parameter)]
        if not owners or any(owner.requires_grad for owner in owners):
            changing.update(tensors)
    return changing
