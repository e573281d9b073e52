"""``EMAOptimizerConstructor`` for mmengine: forwards to the construction."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Tuple

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.utils.dl_utils import mmcv_full_available
from torch import nn

from mmdet_ema.errors import OptionError
from mmdet_ema.for_mmengine.runner import RunLog
from mmdet_ema.optimizers.construction import Construction
from mmdet_ema.optimizers.rules import MMENGINE


class EMAOptimizerConstructor(DefaultOptimWrapperConstructor):  # type: ignore[misc]
    """Few parameter groups, made for a run whose weights are averaged.

    Weights of convolutions and linear layers have weight decay, norms,
    biases and the rest have none. Weight decay is scaled to a nominal batch
    size: ``weight_decay * samples / nominal``, with ``samples`` = batch size
    x processes x ``accumulative_counts``. Groups have names.

    Args:
        optim_wrapper_cfg (dict): Config of the wrapper, with ``optimizer``.
        paramwise_cfg (dict, optional): All options of mmengine's default
            constructor, with the same meaning, and:

            - ``decay_kinds`` (list[str]): Kinds with weight decay, of
              'weight', 'norm', 'bias' and 'other', where no option of the
              framework says otherwise. Defaults to ['weight'].
            - ``nominal_batch_size`` (int, optional): Samples a step that
              ``weight_decay`` is meant for; None for no scaling. Defaults
              to 64.
            - ``batch_size`` (int, optional): Samples that one process takes
              in an iteration. Defaults to None: a hook finds it.
            - ``accumulation`` (int, optional): Iterations to one step, with
              ``batch_size``. Defaults to ``accumulative_counts``.

    Raises:
        OptionError: If an option is wrong (a ``ValueError``).

    Example:
        >>> optim_wrapper = dict(
        ...     constructor='EMAOptimizerConstructor',
        ...     optimizer=dict(
        ...         type='SGD', lr=0.01, momentum=0.937, weight_decay=5e-4
        ...     ),
        ... )
    """

    def __init__(
        self,
        optim_wrapper_cfg: Mapping[str, Any],
        paramwise_cfg: Optional[Mapping[str, Any]] = None,
    ):
        optimizer = _optimizer_cfg(optim_wrapper_cfg)
        self._construction = Construction(
            optimizer, paramwise_cfg, MMENGINE, RunLog()
        )
        # anything but an empty dict makes it ask for groups
        super().__init__(optim_wrapper_cfg, dict(bypass_duplicate=True))

    def add_params(
        self, params: List[Dict[str, Any]], module: nn.Module, **_: Any
    ) -> None:
        """Add the groups of a model to a list.

        Args:
            params: The list.
            module: The model.
        """
        params.extend(self._construction.param_groups(module, _dcn_types()))

    def __call__(self, model: nn.Module) -> Any:
        """Build the optimizer and its wrapper.

        Args:
            model: The model.

        Returns:
            The wrapper.
        """
        wrapper = super().__call__(model)
        counts = self.optim_wrapper_cfg.get('accumulative_counts', 1)
        self._construction.finish(wrapper.optimizer, counts)
        return wrapper


def _optimizer_cfg(wrapper_cfg: Any) -> Mapping[str, Any]:
    optimizer = dict(wrapper_cfg).get('optimizer')
    if not isinstance(optimizer, Mapping):
        raise OptionError(
            'EMAOptimizerConstructor builds one optimizer and found no '
            'optimizer=dict(...) in optim_wrapper. For several, let a '
            'constructor of your own call it for each submodule and return '
            'an OptimWrapperDict.'
        )
    return optimizer


def _dcn_types() -> Tuple[type, ...]:
    if not mmcv_full_available():
        return ()
    from mmcv.ops import DeformConv2d, ModulatedDeformConv2d

    return DeformConv2d, ModulatedDeformConv2d
