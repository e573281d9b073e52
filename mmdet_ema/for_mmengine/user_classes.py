"""A user's own averaging class: a subclass of ``BaseAveragedModel``."""

from __future__ import annotations

import inspect
from typing import Any, Mapping, Optional

from mmengine.model import BaseAveragedModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmdet_ema.averaging.update import Rule
from mmdet_ema.errors import OptionError, show
from mmdet_ema.training.openmmlab_words import is_family


def find_rule(ema_type: Any, options: Mapping[str, Any]) -> Optional[Rule]:
    """Find a user's averaging class and return its rule.

    Its ``avg_func`` is called for each tensor; the class never sees the
    model, so that nothing is deep-copied.

    Args:
        ema_type: Name in mmengine's ``MODELS`` registry, or the class.
        options: Options for the class; those that are None are left out.

    Returns:
        The rule; None if there is no such class, or it is OpenMMLab's own.

    Raises:
        OptionError: If the class has an ``update_parameters`` of its own.
    """
    kind = _averaging_class(ema_type)
    if kind is None or is_family(ema_type):
        return None
    if kind.update_parameters is not BaseAveragedModel.update_parameters:
        raise OptionError(
            f'ema_type={show(ema_type)} overrides update_parameters; only an '
            f'avg_func can be used. Move what it does there.'
        )
    given = {k: v for k, v in options.items() if v is not None}
    return _rule_of(kind(nn.Identity(), **given))


def _averaging_class(ema_type: Any) -> Optional[Any]:
    kind = ema_type if inspect.isclass(ema_type) else _registered(ema_type)
    own = inspect.isclass(kind) and issubclass(kind, BaseAveragedModel)
    return kind if own else None


def _registered(name: Any) -> Any:
    with MODELS.switch_scope_and_registry(None) as registry:
        return registry.get(name) if isinstance(name, str) else None


def _rule_of(instance: Any) -> Rule:
    def rule(average: Tensor, raw: Tensor, step: int) -> None:
        if step == 1:
            average.copy_(raw)
        else:
            instance.steps.fill_(step - 1)
            instance.avg_func(average, raw, instance.steps)

    return rule
