"""Few parameter groups: one for each kind, learning rate and weight decay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

from torch import nn

from mmdet_ema.errors import OptionError
from mmdet_ema.optimizers.kinds import KINDS, Named, walk
from mmdet_ema.optimizers.paramwise import Paramwise
from mmdet_ema.optimizers.rules import Dialect, Settings, settings_of


@dataclass
class Group:
    """Parameters that are trained alike.

    Attributes:
        name: Kind and what is not its default, as in ``'bias lr*2'``.
        kind: Kind of the parameters.
        settings: Their factors.
        parameters: The parameters.
    """

    name: str
    kind: str
    settings: Settings
    parameters: List[Named] = field(default_factory=list)


def group_parameters(
    model: nn.Module,
    options: Paramwise,
    dialect: Dialect,
    dcn_types: Tuple[type, ...] = (),
) -> List[Group]:
    """Put every parameter of a model into one group.

    Frozen parameters are in their groups too: whoever thaws one later trains
    it as the options say, and the groups are the same however much is
    frozen, so that the state of an optimizer can be resumed.

    Args:
        model: The model.
        options: What the config says.
        dialect: The framework's order of rules.
        dcn_types: Classes of deformable convolutions. Defaults to ().

    Returns:
        The groups: weight, norm, bias, other; of each kind those of the
        base learning rate first, then in the order of the model.
    """
    groups: Dict[str, Group] = {}
    for parameter in walk(model, dcn_types):
        kind = parameter.kind
        settings = settings_of(parameter, options, dialect)
        name = _name(kind, settings, options.default_decay(kind))
        group = groups.setdefault(name, Group(name, kind, settings))
        group.parameters.append(parameter)
    return sorted(groups.values(), key=_order)


def param_groups(
    groups: List[Group], lr: Optional[float], weight_decay: Optional[float]
) -> List[Dict[str, Any]]:
    """Return the groups as an optimizer takes them.

    Args:
        groups: The groups.
        lr: Base learning rate; None for the optimizer's own.
        weight_decay: Base weight decay; None for the optimizer's own.

    Returns:
        A dict each: ``params``, ``name`` and options.

    Raises:
        OptionError: If a factor has nothing to multiply.
    """
    return [
        {
            'params': [p.tensor for p in group.parameters],
            'name': group.name,
            **_times('lr', lr, group.settings.lr_mult),
            **_times('weight_decay', weight_decay, group.settings.decay_mult),
            **group.settings.more,
        }
        for group in groups
    ]


def _times(name: str, base: Optional[float], factor: float) -> Dict[str, Any]:
    if base is not None:
        return {name: base * factor}
    if factor == 1:
        return {}
    if factor == 0:
        return {name: 0.0}
    raise OptionError(
        f'paramwise_cfg multiplies {name} by {factor:g}, but the optimizer '
        f'is given none; add {name}=... to it.'
    )


def _name(kind: str, settings: Settings, default_decay: float) -> str:
    words = [kind]
    if settings.lr_mult != 1:
        words.append(f'lr*{settings.lr_mult!r}')
    if settings.decay_mult != default_decay:
        words.append(f'decay*{settings.decay_mult!r}')
    return ' '.join([*words, *_more(settings.more)])


def _more(options: Mapping[str, Any]) -> List[str]:
    return [f'{name}={options[name]!r}' for name in sorted(options)]


def _order(group: Group) -> Tuple[int, bool]:
    return KINDS.index(group.kind), group.settings.lr_mult != 1
