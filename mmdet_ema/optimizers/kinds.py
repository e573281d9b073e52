"""What kind of parameter a parameter is: by its module, name and shape."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Iterator, Set, Tuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

WEIGHT, NORM, BIAS, OTHER = KINDS = ('weight', 'norm', 'bias', 'other')

NORM_TYPES: Tuple[type, ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
)
"""What OpenMMLab's constructors call a normalization layer."""

# known by their type, for FSDP shards them into vectors
_WEIGHT_TYPES: Tuple[type, ...] = (
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.Linear,
    nn.MultiheadAttention,
    nn.RNNBase,
)
_WEIGHT_WORDS = {'weight', 'weights', 'kernel'}
# LayerNorm2d and RMSNorm, but not NormedConv2d: that has a norm, it is none
_NORM_CLASS = re.compile(r'norm(alization)?_?(\d+d?)?$', re.IGNORECASE)


@dataclass(frozen=True)
class Named:
    """A parameter and where it is.

    Attributes:
        name: Full name, as ``named_parameters`` gives it.
        path: Name of the module.
        leaf: Name in the module.
        module: The module that holds it.
        tensor: The parameter.
        in_dcn: Whether the module is a child of a deformable convolution.
    """

    name: str
    path: str
    leaf: str
    module: nn.Module
    tensor: nn.Parameter
    in_dcn: bool

    @property
    def kind(self) -> str:
        """'weight', 'norm', 'bias' or 'other'."""
        return kind_of(self)

    @property
    def is_norm(self) -> bool:
        """Whether it belongs to a normalization layer."""
        return isinstance(self.module, NORM_TYPES)

    @property
    def is_depthwise(self) -> bool:
        """Whether it belongs to a depthwise convolution."""
        module = self.module
        return (
            isinstance(module, nn.Conv2d)
            and module.in_channels == module.groups
        )


def walk(model: nn.Module, dcn_types: Tuple[type, ...]) -> Iterator[Named]:
    """Yield every parameter once, in the order of the module tree.

    A tied parameter comes under the first of its names.

    Args:
        model: The model.
        dcn_types: Classes of deformable convolutions.

    Yields:
        The parameters, frozen ones too.
    """
    yield from _walk(model, '', False, dcn_types, set())


def kind_of(parameter: Named) -> str:
    """Return the kind of a parameter.

    * ``'bias'``: its name is ``bias``, begins with ``bias_`` or ends with
      ``_bias``. Those of normalization layers too; those of the offset layer
      of a deformable convolution not, they are ``'other'``.
    * ``'norm'``: the other parameters of torch's normalization layers; the
      weight, of any shape, of a class whose name ends with ``Norm``
      (``RMSNorm``, ``LayerNorm2d``); magnitudes of weight normalization.
    * ``'weight'``: ``weight`` or ``kernel`` is a word of its name, and it
      has two dimensions at least or its module is one of torch's:
      convolutions, linear layers, embeddings, attention, recurrent layers.
    * ``'other'``: position tables, class tokens, scales, slopes, ...

    Args:
        parameter: The parameter.
    """
    words = _leaf_word(parameter.name).split('_')
    if words[0] == BIAS or words[-1] == BIAS:
        return OTHER if parameter.in_dcn else BIAS
    if parameter.is_norm:
        return NORM
    if _WEIGHT_WORDS.isdisjoint(words):
        return OTHER
    if _is_magnitude(parameter):
        return NORM
    if isinstance(parameter.module, _WEIGHT_TYPES):
        return WEIGHT
    if _is_named_norm(parameter):
        return NORM
    return WEIGHT if parameter.tensor.dim() > 1 else OTHER


def _is_named_norm(parameter: Named) -> bool:
    """Return whether a class that is none of torch's says it is a norm."""
    name = type(parameter.module).__name__
    vector = parameter.tensor.dim() < 2
    return bool(_NORM_CLASS.search(name)) or (
        vector and 'norm' in name.lower()
    )


def _is_magnitude(parameter: Named) -> bool:
    """Return whether it is the g of ``g * v / |v|``, the weight."""
    module, leaf = parameter.module, parameter.leaf
    if isinstance(module, ParametrizationList):
        first = type(module[0]).__name__  # torch 1.13 has no such class
        return leaf == 'original0' and first == '_WeightNorm'
    return leaf.endswith('_g') and hasattr(module, f'{leaf[:-1]}v')


def _walk(
    module: nn.Module,
    path: str,
    in_dcn: bool,
    dcn_types: Tuple[type, ...],
    seen: Set[int],
) -> Iterator[Named]:
    for leaf, tensor in module.named_parameters(recurse=False):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            name = _join(path, leaf)
            yield Named(name, path, leaf, module, tensor, in_dcn)
    is_dcn = isinstance(module, dcn_types)
    for name, child in module.named_children():
        yield from _walk(child, _join(path, name), is_dcn, dcn_types, seen)


def _join(path: str, name: str) -> str:
    return f'{path}.{name}' if path else name


def _leaf_word(name: str) -> str:
    """Return the name that says what it is, without indices and wrappers."""
    parts = name.split('.')
    if 'parametrizations' in parts[-3:-2]:
        return parts[-2]
    while len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    return parts[-1]
