"""What a constructor does, whatever framework asks for it."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Mapping, Optional, Tuple

from torch import Tensor, nn
from torch.optim import Optimizer

from mmdet_ema.averaging.distributed import world_size
from mmdet_ema.checks import check_number
from mmdet_ema.optimizers.groups import group_parameters, param_groups
from mmdet_ema.optimizers.nominal import (
    is_waiting,
    mark,
    remind,
    scale_weight_decay,
)
from mmdet_ema.optimizers.paramwise import parse_paramwise
from mmdet_ema.optimizers.rules import Dialect
from mmdet_ema.optimizers.table import describe_groups
from mmdet_ema.optimizers.without_effect import without_effect


class Construction:
    """Groups for an optimizer, and what is left to do once it is built.

    Args:
        optimizer_cfg: Config of the optimizer.
        paramwise_cfg: Options of the constructor.
        dialect: The framework's order of rules.
        log: Has ``info(text)`` and ``warning(text)``.

    Raises:
        OptionError: If an option is wrong.
    """

    def __init__(
        self,
        optimizer_cfg: Mapping[str, Any],
        paramwise_cfg: Optional[Mapping[str, Any]],
        dialect: Dialect,
        log: Any,
    ):
        self._options = parse_paramwise(paramwise_cfg)
        self._dialect, self._log = dialect, log
        self._lr = _base(optimizer_cfg, 'lr')
        self._weight_decay = _base(optimizer_cfg, 'weight_decay')

    def param_groups(
        self, model: nn.Module, dcn_types: Tuple[type, ...]
    ) -> List[Dict[str, Any]]:
        """Return the groups as an optimizer takes them.

        Warns of options that have no effect on this model.

        Args:
            model: The model.
            dcn_types: Classes of deformable convolutions.
        """
        groups = group_parameters(
            model, self._options, self._dialect, dcn_types
        )
        parameters = [p for group in groups for p in group.parameters]
        for line in without_effect(self._options, parameters):
            self._log.warning(line)
        return param_groups(groups, self._lr, self._weight_decay)

    def finish(self, optimizer: Optimizer, accumulation: int) -> None:
        """Scale the weight decay if that can be done; say what was built.

        Args:
            optimizer: The optimizer, just built.
            accumulation: Iterations to one step, as the framework knows.
        """
        options = self._options
        samples = None
        if options.batch_size is not None:
            steps = options.accumulation or accumulation
            samples = options.batch_size * steps * world_size()
        mark(optimizer, options.nominal_batch_size, samples)
        self._log.info(describe_groups(optimizer))
        if self._weight_decay and not any(map(_decay, optimizer.param_groups)):
            self._log.warning(
                f'EMAOptimizerConstructor: weight_decay={self._weight_decay} '
                f'reaches no parameter; look at the table. Of FSDP, use '
                f'use_orig_params=True.'
            )
        if samples is not None:
            scale_weight_decay([optimizer], samples, self._log)
        elif is_waiting(optimizer):
            remind(optimizer, self._log)


def _base(optimizer_cfg: Mapping[str, Any], name: str) -> Any:
    """Return what factors multiply: a number, a tensor, or None."""
    value = optimizer_cfg.get(name)
    if value is not None and not isinstance(value, Tensor):
        check_number(f'optimizer.{name}', value, 0, math.inf)
    return value


def _decay(group: Dict[str, Any]) -> float:
    return float(group.get('weight_decay', 0.0))
