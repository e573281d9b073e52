"""``FSDP2Strategy``: models that do not fit on one GPU, through mmengine.

mmengine has strategies for FSDP1 and DeepSpeed, none for ``fully_shard``.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from fnmatch import fnmatchcase
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import mmengine
import torch
import torch.distributed as dist
from mmengine._strategy import DDPStrategy, SingleDeviceStrategy
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.model import revert_sync_batchnorm
from mmengine.runner.checkpoint import save_checkpoint, weights_to_cpu
from mmengine.utils import get_git_hash
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet_ema.averaging.shards import (
    as_sharded,
    gather,
    is_sharded,
    part_of,
)
from mmdet_ema.checks import check_count, check_flag, check_patterns
from mmdet_ema.errors import OptionError, show

_DTYPES = ('float32', 'bfloat16', 'float16')


class FSDP2Strategy(DDPStrategy):  # type: ignore[misc]
    """Shards parameters, gradients and optimizer states over all ranks.

    A checkpoint is one file, written by rank 0: the one that a single process
    writes. It resumes on any number of ranks, or without shards. A process
    that was started alone shards nothing. It is a strategy of
    ``FlexibleRunner``, and needs torch 2.6.

    Args:
        shard (Sequence[str]): Names of modules (``'backbone.layers.*'``) that
            are gathered each for itself, when they are called; ``*`` stands
            for any text between two dots. The rest is gathered together. Only
            modules that are *called*: a detector calls ``bbox_head.loss()``,
            not ``bbox_head()``. Defaults to ().
        param_dtype (str, optional): dtype of the gathered parameters, such as
            'bfloat16'. What is trained and averaged stays float32, and so
            does what BatchNorm computes. Defaults to None, as they are.
        float32 (Sequence[str]): Names of modules that compute in float32
            under ``param_dtype``: the losses of most heads need it of their
            ``'bbox_head'``. Defaults to ().
        reduce_dtype (str, optional): dtype that gradients are reduced in.
            Defaults to None, as ``param_dtype``.
        cpu_offload (bool): Keep parameters, gradients and optimizer states in
            host memory. Defaults to False.
        replicate (int): How many copies of the model there are, each sharded
            over a part of the ranks (hybrid sharding): as many as machines,
            say, so that nothing but gradients goes between them. Defaults
            to 1.
        reshard_after_forward (bool): Free what was gathered after the forward
            pass of a module; False keeps it until its backward pass.
            Defaults to True.
        **options: Those of mmengine's ``DDPStrategy``: ``sync_bn``, ...

    Raises:
        OptionError: If an option is out of range, a name matches no module,
            or torch is too old.

    Example:
        >>> runner_type = 'FlexibleRunner'
        >>> strategy = dict(type='FSDP2Strategy', shard=['backbone.layer*'])
    """

    def __init__(
        self,
        *,
        shard: Sequence[str] = (),
        param_dtype: Optional[str] = None,
        float32: Sequence[str] = (),
        reduce_dtype: Optional[str] = None,
        cpu_offload: bool = False,
        replicate: int = 1,
        reshard_after_forward: bool = True,
        **options: Any,
    ):
        try:
            from torch.distributed.fsdp import fully_shard  # noqa: F401
        except ImportError:
            raise OptionError(
                f'FSDP2Strategy needs torch 2.6, this is {torch.__version__}; '
                f"update it, or use strategy=dict(type='DDPStrategy')."
            ) from None
        self._shard = check_patterns('shard', shard)
        self._float32 = check_patterns('float32', float32)
        self._dtypes: Dict[str, Any] = {
            'param_dtype': _dtype('param_dtype', param_dtype),
            'reduce_dtype': _dtype('reduce_dtype', reduce_dtype),
        }
        self._cpu_offload = check_flag('cpu_offload', cpu_offload)
        self._replicate = check_count('replicate', replicate, 1)
        self._reshards = check_flag(
            'reshard_after_forward', reshard_after_forward
        )
        super().__init__(**options)

    def _setup_distributed(
        self, launcher: str = 'pytorch', backend: str = 'nccl', **options: Any
    ) -> None:
        """Make the process group: of gloo, where there is no GPU."""
        if launcher == 'pytorch' and not torch.cuda.is_available():
            # mmengine would set the device of a GPU
            backend = 'gloo' if backend == 'nccl' else backend
            dist.init_process_group(backend, **options)
            return
        if self._cpu_offload and backend == 'nccl':
            backend = 'cpu:gloo,cuda:nccl'
        super()._setup_distributed(launcher, backend, **options)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        """Shard the model, in place; the same module is returned."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        if not dist.is_initialized():
            # one process, as a test of the same config: nothing to shard
            model = SingleDeviceStrategy.convert_model(self, model)
            return model.to(get_device())
        model = self.convert_model(model.to(get_device()))
        if get_device() == 'cpu':
            model = revert_sync_batchnorm(model)  # which needs a GPU
        for tensor in (*model.parameters(), *model.buffers()):
            # as DDP does: no seed has to be the same
            dist.broadcast(tensor.detach(), 0)
        ranks, copies = dist.get_world_size(), self._replicate
        if ranks % copies:
            raise OptionError(
                f'replicate={copies}: {ranks} ranks cannot be divided by it; '
                f'start a multiple of {copies}, or leave it out.'
            )
        shape = (ranks,) if copies == 1 else (copies, ranks // copies)
        names = ('replicate', 'shard')[-len(shape) :]
        options: Dict[str, Any] = {
            'mesh': init_device_mesh(
                get_device(), shape, mesh_dim_names=names
            ),
            'mp_policy': MixedPrecisionPolicy(**self._dtypes),
            'reshard_after_forward': self._reshards,
            'offload_policy': (
                # only a GPU reads faster what is pinned
                CPUOffloadPolicy(pin_memory=get_device() != 'cpu')
                if self._cpu_offload
                else OffloadPolicy()
            ),
        }
        single = MixedPrecisionPolicy(torch.float32)
        kept = self._chosen(model, 'float32', self._float32)
        for module in kept:
            fully_shard(module, **{**options, 'mp_policy': single})
        low = self._dtypes['param_dtype']
        inside = {id(x) for module in kept for x in module.modules()}
        norms: List[nn.Module] = [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            and module.affine
            and id(module) not in inside
        ]
        if low not in (None, torch.float32) and norms:
            # torch wants weights in the dtype of the statistics there
            around = MixedPrecisionPolicy(torch.float32, output_dtype=low)
            own = {**options, 'mp_policy': around}
            own['reshard_after_forward'] = False  # there is little of them
            fully_shard(norms, **own)
        for module in self._chosen(model, 'shard', self._shard):
            if all(module is not other for other in kept):
                fully_shard(module, **options)
        fully_shard(model, **options)
        return model

    def _chosen(
        self, model: nn.Module, option: str, patterns: Sequence[str]
    ) -> List[nn.Module]:
        """Return the modules of these names, the inner ones first."""
        named = [(name, x) for name, x in model.named_modules() if name]
        for pattern in patterns:
            if not any(_matches(name, pattern) for name, _ in named):
                raise OptionError(
                    f'{option}={[pattern]}: no module of the model has such a '
                    f"name; give names of model.named_modules(), '*' stands "
                    f'for any text between two dots.'
                )
        return [
            module
            for name, module in reversed(named)
            if any(_matches(name, pattern) for pattern in patterns)
        ]

    def build_optim_wrapper(
        self, optim_wrapper: Any, model: Any = None
    ) -> Any:
        """Build it from a config, on the sharded parameters.

        Raises:
            OptionError: If it was built before, or scales the loss.
        """
        if not isinstance(optim_wrapper, dict) or not isinstance(
            optim_wrapper.get('optimizer', {}), dict
        ):
            raise OptionError(
                'FSDP2Strategy makes other parameters of the model, which an '
                'optimizer that was built before does not know; give '
                'optim_wrapper as a config.'
            )
        wrapper = super().build_optim_wrapper(optim_wrapper, model)
        if any(hasattr(w, 'loss_scaler') for _, w in _each(wrapper)):
            raise OptionError(
                'optim_wrapper of type AmpOptimWrapper scales the loss, '
                'which FSDP2Strategy does not; use OptimWrapper and '
                "strategy=dict(type='FSDP2Strategy', param_dtype='bfloat16')."
            )
        return wrapper

    def model_state_dict(self) -> Dict[str, Any]:
        """Return whole weights in host memory on rank 0, else nothing."""
        state = self.model.state_dict()
        weights = OrderedDict(gather(state.items()))
        weights._metadata = state._metadata  # type: ignore[attr-defined]
        return weights_to_cpu(weights)  # type: ignore[no-any-return]

    def optim_state_dict(self) -> Dict[str, Any]:
        """Return the state of an optimizer without shards, on rank 0."""
        return _gathered(super().optim_state_dict())  # type: ignore[no-any-return]

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: Optional[Dict[str, Any]] = None,
        callback: Optional[Callable[[Any], Any]] = None,
    ) -> None:
        """Gather on all ranks, and write on rank 0: one file."""
        checkpoint: Dict[str, Any] = {'state_dict': self.model_state_dict()}
        if save_optimizer and hasattr(self, 'optim_wrapper'):
            checkpoint['optimizer'] = self.optim_state_dict()
        if save_param_scheduler and hasattr(self, 'param_schedulers'):
            checkpoint['param_schedulers'] = self.scheduler_state_dict()
        checkpoint.update(extra_ckpt or {})
        checkpoint['meta'] = {
            **checkpoint.get('meta', {}),
            'seed': self.seed,
            'time': time.strftime('%Y%m%d_%H%M%S', time.localtime()),
            'mmengine': mmengine.__version__ + get_git_hash(),
        }
        if callback is not None:
            callback(checkpoint)
        if is_main_process():
            save_checkpoint(checkpoint, filename)

    def load_checkpoint(
        self, filename: str, *, map_location: Any = 'cpu', **options: Any
    ) -> Dict[str, Any]:
        """Load a whole file on each rank, which takes its part of it."""
        # a GPU need not hold the whole file
        map_location = 'cpu' if map_location == 'default' else map_location
        return super().load_checkpoint(  # type: ignore[no-any-return]
            filename, map_location=map_location, **options
        )

    def load_model_state_dict(
        self,
        state_dict: Dict[str, Any],
        *,
        strict: bool = False,
        revise_keys: Sequence[Any] = ((r'^module.', ''),),
    ) -> None:
        """Load whole weights."""
        own = self.model.state_dict()
        parts: OrderedDict[str, Any] = OrderedDict()
        for name, value in state_dict.items():
            for pattern, replacement in revise_keys:
                name = re.sub(pattern, replacement, name)
            parts[name] = _part(value, own.get(name))
        super().load_model_state_dict(parts, strict=strict, revise_keys=[])

    def load_optim_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Load the state of an optimizer without shards."""
        for name, wrapper in _each(self.optim_wrapper):
            own = state_dict[name] if name else state_dict
            groups = wrapper.optimizer.param_groups
            parameters = [p for group in groups for p in group['params']]
            for i, values in own['state'].items():
                own['state'][i] = {
                    key: _part(value, parameters[i])
                    for key, value in values.items()
                }
        super().load_optim_state_dict(state_dict)


def _dtype(option: str, name: Optional[str]) -> Optional[torch.dtype]:
    if name is None:
        return None
    if name not in _DTYPES:
        raise OptionError(
            f'{option}={show(name)}: use one of {", ".join(_DTYPES)}, or None.'
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _matches(name: str, pattern: str) -> bool:
    """Return whether a name matches level by level."""
    names, patterns = name.split('.'), pattern.split('.')
    return len(names) == len(patterns) and all(
        map(fnmatchcase, names, patterns)
    )


def _each(wrapper: Any) -> Iterator[Any]:
    """Yield each optimizer wrapper with its key in the state, '' if alone."""
    yield from getattr(wrapper, 'optim_wrappers', {'': wrapper}).items()


def _part(value: Any, like: Any) -> Any:
    """Shard a whole tensor like another; what does not fit stays as it is."""
    fits = isinstance(value, Tensor) and isinstance(like, Tensor)
    if fits and is_sharded(like) and value.shape == like.shape:
        return as_sharded(part_of(value, like), like)
    return value


def _gathered(value: Any) -> Any:
    """Return nested values with whole tensors, on rank 0."""
    if isinstance(value, dict):
        return {key: _gathered(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_gathered, value))
    if isinstance(value, Tensor):
        return gather([('', value)]).get('')
    return value
