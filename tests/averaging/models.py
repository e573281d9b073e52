"""Small models and helpers that the tests of the core share."""

import os
import pathlib
import subprocess
import sys

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = pathlib.Path(__file__).resolve().parents[2]
# torch before 2.1 has none
FLOAT8 = [
    getattr(torch, name)
    for name in ('float8_e4m3fn', 'float8_e5m2')
    if hasattr(torch, name)
]
# torch before 2.5 has it under cuda only
OutOfMemoryError = getattr(
    torch, 'OutOfMemoryError', torch.cuda.OutOfMemoryError
)


def storage_of(tensor):
    """Return the storage of a tensor, in bytes."""
    if hasattr(tensor, 'untyped_storage'):
        return tensor.untyped_storage()
    # before torch 2.0
    return tensor.storage().untyped()


class Mixed(nn.Module):
    """Convolution, BatchNorm, tied, frozen and low-precision tensors."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(2, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.low = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer('float_buffer', torch.zeros(4))
        self.register_buffer('counts', torch.zeros(2, dtype=torch.int64))
        self.register_buffer('mask', torch.zeros(2, dtype=torch.bool))
        self.register_buffer('grid', torch.zeros(7), persistent=False)
        with torch.no_grad():
            for parameter in self.parameters():
                draw = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(draw)

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((2, 3))
        x = self.tied(self.first(x)) * self.scale
        return self.frozen(x).sum() + self.low.float().sum()


class Unsaved(nn.Linear):
    """Leaves its weight out of the ``state_dict``."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer('x', torch.zeros(1))
        self._register_state_dict_hook(self._leave_out)

    @staticmethod
    def _leave_out(module, state, prefix, metadata):
        del state[prefix + 'weight']


def holder(*parameters, **tensors):
    """Make a model of parameters p0, p1, ..., and of tensors by name."""
    model = nn.Module()
    for k, tensor in enumerate(parameters):
        model.register_parameter(f'p{k}', nn.Parameter(tensor))
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            model.register_parameter(name, tensor)
        else:
            model.register_buffer(name, tensor)
    return model


def fill(model, value):
    """Set every parameter and float buffer of a model."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(value)


def perturb(model, generator, size=0.1):
    """Change every trainable parameter and buffer, as a step would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=size)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                noise = torch.randn(buffer.shape, generator=generator)
                buffer.add_(noise.to(buffer.dtype), alpha=size)
            elif buffer.dtype == torch.bool:
                buffer.logical_not_()
            else:
                buffer.add_(3)


def state_of(model):
    """Copy the ``state_dict`` of a model."""
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
    }


def odd_tensors():
    """Return dense tensors of many dtypes and layouts, with odd values."""
    nan, inf = float('nan'), float('inf')
    image = torch.randn(2, 3, 4, 5)
    return [
        torch.tensor([2**62, -1]),
        torch.tensor([True, False]),
        torch.tensor(3, dtype=torch.uint8),
        torch.tensor([nan, -inf, -0.0, 1e-45]),
        torch.tensor([1.5, 3e38], dtype=torch.bfloat16),
        torch.tensor([6e-8, 65504.0], dtype=torch.float16),
        torch.tensor([complex(nan, -0.0)]),
        image.contiguous(memory_format=torch.channels_last),
        image.double().permute(3, 1, 0, 2),
        torch.arange(12).view(3, 4).t(),
        *(torch.tensor([0.5, -2.0]).to(dtype) for dtype in FLOAT8),
    ]


def averages_of(averager):
    """Copy the averages of an averager by name."""
    return {k: v.clone() for k, v in averager.named_averages()}


def bits_of(model):
    """Return the bytes of every parameter and buffer of a model."""
    named = list(model.named_parameters()) + list(model.named_buffers())
    return {name: raw_bytes(tensor) for name, tensor in named}


def raw_bytes(tensor):
    """Return the bytes of a tensor: NaN and -0.0 count."""
    # a contiguous tensor of one element may have any stride
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.detach().reshape(-1))
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b''


class CountCalls(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def numpy64(tensor):
    """Return a tensor as a NumPy float64 array, exactly."""
    return tensor.detach().to(torch.float64).numpy()


def run_python(code, *arguments, **environment):
    """Run code in a fresh process with the repository on its path."""
    return subprocess.run(
        [sys.executable, '-c', code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
    )
