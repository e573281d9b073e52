"""Learning rate and weight decay of one parameter: the frameworks' rules.

Written anew from what ``DefaultOptimWrapperConstructor`` (mmengine) and
``DefaultOptimizerConstructor`` (mmcv 1.x) document and do, and tested side by
side with both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Mapping, Optional, Tuple

from torch import nn

from mmdet_ema.optimizers.kinds import Named
from mmdet_ema.optimizers.paramwise import Paramwise

DecayRule = Tuple[str, Callable[[Named], bool]]
Dialect = Tuple[DecayRule, ...]
"""Options of weight decay and the parameters that each is about; of those
that are given, the first that is about a parameter decides."""


def _is_bias(parameter: Named) -> bool:
    return parameter.leaf == 'bias' and not parameter.in_dcn


def _is_plain_bias(parameter: Named) -> bool:
    special = parameter.is_norm or parameter.is_depthwise
    return _is_bias(parameter) and not special


def _is_flat(parameter: Named) -> bool:
    return parameter.tensor.dim() == 1 and not parameter.in_dcn


MMENGINE: Dialect = (
    ('norm_decay_mult', lambda p: p.is_norm),
    ('bias_decay_mult', _is_bias),
    ('dwconv_decay_mult', lambda p: p.is_depthwise),
    ('flat_decay_mult', _is_flat),
)
MMCV1: Dialect = (
    ('norm_decay_mult', lambda p: p.is_norm),
    ('dwconv_decay_mult', lambda p: p.is_depthwise),
    ('bias_decay_mult', _is_plain_bias),
    ('flat_decay_mult', _is_flat),
)


@dataclass(frozen=True)
class Settings:
    """What the options say of one parameter.

    Attributes:
        lr_mult: Factor of the learning rate.
        decay_mult: Factor of the weight decay.
        more: Other options of its group, from ``custom_keys``.
    """

    lr_mult: float
    decay_mult: float
    more: Mapping[str, Any] = field(default_factory=dict)


def settings_of(
    parameter: Named, options: Paramwise, dialect: Dialect
) -> Settings:
    """Return the settings of a parameter.

    A custom key goes before every other option. Where it says nothing of
    weight decay, that of the parameter's kind holds.

    Args:
        parameter: The parameter.
        options: What the config says.
        dialect: The framework's order of rules.
    """
    default = options.default_decay(parameter.kind)
    key = key_of(parameter, options.custom_keys)
    if key is not None:
        custom = dict(options.custom_keys[key])
        lr_mult = custom.pop('lr_mult', 1.0)
        return Settings(lr_mult, custom.pop('decay_mult', default), custom)
    decay = _decay_mult(parameter, options.multipliers, dialect)
    return Settings(
        _lr_mult(parameter, options.multipliers),
        default if decay is None else decay,
    )


def key_of(parameter: Named, keys: Iterable[str]) -> Optional[str]:
    """Return the longest key that is part of a parameter's name.

    Args:
        parameter: The parameter.
        keys: The custom keys.

    Returns:
        The key that decides; None if none is part of the name.
    """
    name = f'{parameter.path}.{parameter.leaf}'
    matches = sorted(key for key in keys if key in name)
    return max(matches, key=len) if matches else None


def _lr_mult(parameter: Named, given: Mapping[str, float]) -> float:
    if parameter.in_dcn:
        offset = 'conv_offset' in parameter.path
        ours = offset and isinstance(parameter.module, nn.Conv2d)
        return given.get('dcn_offset_lr_mult', 1.0) if ours else 1.0
    if parameter.leaf == 'bias' and not parameter.is_norm:
        return given.get('bias_lr_mult', 1.0)
    return 1.0


def _decay_mult(
    parameter: Named, given: Mapping[str, float], dialect: Dialect
) -> Optional[float]:
    for name, is_about in dialect:
        if name in given and is_about(parameter):
            return given[name]
    return None
