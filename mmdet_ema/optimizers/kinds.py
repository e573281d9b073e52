"""What kind of parameter a parameter is: by its module, name and shape."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

WEIGHT, NORM, BIAS, OTHER = KINDS = ('weight', 'norm', 'bias', 'other')

_NORM_TYPES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
# known by their type, for FSDP shards them into vectors
_WEIGHT_TYPES = (
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.Linear,
    nn.MultiheadAttention,
    nn.RNNBase,
)
_WEIGHT_WORDS = {'weight', 'weights', 'kernel'}
# LayerNorm2d and RMSNorm, but not NormedConv2d: that has a norm, it is none
_NORM_CLASS = re.compile(r'norm(alization)?_?(\d+d?)?$', re.IGNORECASE)


def kind_of(name: str, tensor: Tensor, module: nn.Module, in_dcn: bool) -> str:
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
    """
    parts = name.split('.')
    if 'parametrizations' in parts[-3:-2]:
        said = parts[-2]
    else:  # without indices, as of a ParameterList
        said = next((x for x in reversed(parts) if not x.isdigit()), parts[0])
    words = said.split('_')
    if words[0] == BIAS or words[-1] == BIAS:
        return OTHER if in_dcn else BIAS
    if isinstance(module, _NORM_TYPES):
        return NORM
    if _WEIGHT_WORDS.isdisjoint(words):
        return OTHER
    if _is_magnitude(parts[-1], module):
        return NORM
    if isinstance(module, _WEIGHT_TYPES):
        return WEIGHT
    class_name = type(module).__name__
    if _NORM_CLASS.search(class_name):
        return NORM
    if tensor.dim() < 2:
        return NORM if 'norm' in class_name.lower() else OTHER
    return WEIGHT


def _is_magnitude(leaf: str, module: nn.Module) -> bool:
    """Return whether it is the g of ``g * v / |v|``, the weight."""
    if isinstance(module, ParametrizationList):
        first = type(module[0]).__name__  # torch 1.13 has no such class
        return leaf == 'original0' and first == '_WeightNorm'
    return leaf.endswith('_g') and hasattr(module, f'{leaf[:-1]}v')
