"""``EMAOptimizerConstructor`` for mmcv 1.x."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Mapping, Optional

from mmcv.runner import DefaultOptimizerConstructor
from torch import nn
from torch.optim import Optimizer

from mmdet_ema.errors import OptionError
from mmdet_ema.for_mmcv1.runner import logger_of_the_tool
from mmdet_ema.optimizers.construction import Construction


class EMAOptimizerConstructor(DefaultOptimizerConstructor):  # type: ignore[misc]
    """Few parameter groups, made for a run whose weights are averaged.

    Weights of convolutions and linear layers have weight decay, norms,
    biases and the rest have none. Weight decay is scaled to a nominal batch
    size: ``weight_decay * samples / nominal``, with ``samples`` = batch size
    x processes x ``cumulative_iters``. Groups have names.

    Args:
        optimizer_cfg (dict): Config of the optimizer.
        paramwise_cfg (dict, optional): All options of mmcv's default
            constructor, with the same meaning, and:

            - ``flat_decay_mult`` (float): Factor of the weight decay of
              one-dimensional parameters, as in mmengine.
            - ``decay_kinds`` (list[str]): Kinds with weight decay, of
              'weight', 'norm', 'bias' and 'other', where no option of the
              framework says otherwise. Defaults to ['weight'].
            - ``nominal_batch_size`` (int, optional): Samples a step that
              ``weight_decay`` is meant for; None for no scaling. Defaults
              to 64.
            - ``batch_size`` (int, optional): Samples that one process takes
              in an iteration. Defaults to None: a hook finds it.
            - ``accumulation`` (int, optional): Iterations to one step, with
              ``batch_size``. Defaults to 1.

    Raises:
        OptionError: If an option is wrong (a ``ValueError``).

    Example:
        >>> optimizer = dict(
        ...     constructor='EMAOptimizerConstructor',
        ...     type='SGD', lr=0.01, momentum=0.937, weight_decay=5e-4,
        ... )
    """

    def __init__(
        self,
        optimizer_cfg: Mapping[str, Any],
        paramwise_cfg: Optional[Mapping[str, Any]] = None,
    ):
        if 'type' not in optimizer_cfg:
            raise OptionError(
                'EMAOptimizerConstructor builds one optimizer and found no '
                "type in optimizer=dict(...); add one, such as type='SGD'."
            )
        self._construction = Construction(
            optimizer_cfg, paramwise_cfg, logger_of_the_tool()
        )
        super().__init__(optimizer_cfg)
        # NaN: to mmcv these are given, to us they are not
        kinds = ('norm', 'bias', 'dwconv')
        unsaid = {f'{kind}_decay_mult': math.nan for kind in kinds}
        self.paramwise_cfg = {**unsaid, **self._construction.rules()}
        self.base_lr = self.base_wd = 1.0

    def add_params(
        self,
        params: List[Dict[str, Any]],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: Optional[bool] = None,
    ) -> None:
        """Add the groups of a model; mmcv comes back for each child."""
        self._construction.add_params(
            params, module, prefix, is_dcn_module, super().add_params
        )

    def __call__(self, model: nn.Module) -> Optimizer:
        """Build the optimizer."""
        optimizer: Optimizer = super().__call__(model)
        self._construction.finish(optimizer, accumulation=1)
        return optimizer
