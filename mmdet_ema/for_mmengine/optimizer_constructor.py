"""``EMAOptimizerConstructor`` for mmengine."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional

from mmengine.logging import MMLogger
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmdet_ema.errors import OptionError
from mmdet_ema.for_mmengine.runner import RunLog
from mmdet_ema.optimizers.construction import Construction
from mmdet_ema.training.patches import replacing


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
        optimizer = dict(optim_wrapper_cfg).get('optimizer')
        if not isinstance(optimizer, Mapping):
            raise OptionError(
                'EMAOptimizerConstructor builds one optimizer and found no '
                'optimizer=dict(...) in optim_wrapper. For several, let a '
                'constructor of your own call it for each submodule and '
                'return an OptimWrapperDict.'
            )
        self._construction = Construction(optimizer, paramwise_cfg, RunLog())
        super().__init__(optim_wrapper_cfg)
        self.paramwise_cfg = self._construction.rules()
        self.base_lr = self.base_wd = 1.0

    def add_params(
        self,
        params: List[Dict[str, Any]],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: Optional[bool] = None,
    ) -> None:
        """Add the groups of a model; mmengine comes back for each child."""
        # mmengine's line for each parameter has the factor of a rate for the
        # rate; our table says what was built
        theirs = super().add_params
        with replacing(MMLogger.get_current_instance(), 'disabled', True):
            self._construction.add_params(
                params, module, prefix, is_dcn_module, theirs
            )

    def __call__(self, model: nn.Module) -> Any:
        """Build the optimizer; return its wrapper."""
        wrapper = super().__call__(model)
        counts = self.optim_wrapper_cfg.get('accumulative_counts', 1)
        self._construction.finish(wrapper.optimizer, counts)
        return wrapper
