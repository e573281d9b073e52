"""The EMA part of a checkpoint: where raw weights and averages are.

``state_dict`` holds the averages, so that the file deploys as it is;
``ema_state_dict`` holds ``steps`` and the raw weights as ``module.<name>``:
the layout of mmengine's own ``EMAHook``. ``ema_meta`` says who wrote it, how.
``ema_averages`` holds further averages by name, each with ``state_dict``,
``schedule`` and its counters.
"""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, MutableMapping, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmdet_ema.averaging.averages import MAIN
from mmdet_ema.averaging.shards import layout
from mmdet_ema.averaging.state import (
    check_fit,
    is_part,
    read_count,
    read_progress,
)
from mmdet_ema.errors import CheckpointError

WEIGHTS = 'state_dict'
EMA = 'ema_state_dict'
META = 'ema_meta'
MORE = 'ema_averages'
STEPS = 'steps'
CHANGED = 'changed_at'
"""Key in ``ema_meta``: the step after which a decay was changed."""
REFERENCE = 'reference_samples'
"""The same: samples a step that the decay was chosen for."""
PREFIX = 'module.'
FORMAT_VERSION = 1
_ROLES = {WEIGHTS: 'average', EMA: 'raw'}
# what optimizers keep in the shape of a parameter
_LIKE_PARAMETER = ('exp_avg', 'exp_avg_sq', 'momentum_buffer', 'square_avg')
_DAMAGED = 'the file is damaged. Take another checkpoint'


@dataclass
class EMAPart:
    """The EMA part of a checkpoint.

    ``meta`` is empty in a file of another writer; ``more`` are further
    averages by name, each with its ``state_dict``.
    """

    averages: Dict[str, Any]
    raws: Dict[str, Any]
    steps: int
    meta: Dict[str, Any] = field(default_factory=dict)
    more: Dict[str, Dict[str, Any]] = field(default_factory=dict)

    @property
    def deployed(self) -> str:
        """Name of the averages in ``state_dict``."""
        return str(self.meta.get('deploy', MAIN))

    @property
    def before(self) -> Dict[str, Any]:
        """``ema_meta`` with the schedule of the main averages."""
        main = self.more.get(MAIN, {})
        return {k: main.get(k, x) for k, x in self.meta.items()}

    def states(self) -> Dict[str, Dict[str, Any]]:
        """Return counters and tensors of all averages by name."""
        mine = {'num_steps': self.steps, WEIGHTS: self.averages}
        halves = {self.deployed: {**self.meta, **mine}}
        return {
            name: {**state, 'averages': self.tensors(state[WEIGHTS])}
            for name, state in {**halves, **self.more}.items()
        }

    def tensors(self, half: Mapping[str, Any]) -> Dict[str, Tensor]:
        """Return the tensors of one half, without extra state of modules."""
        return {k: v for k, v in half.items() if isinstance(v, Tensor)}

    def check(self, model: nn.Module, strict: bool, log: Any) -> None:
        """Check that both halves fit a model; if strict, names as well."""
        present = self.tensors(layout(model))
        try:
            halves = [(WEIGHTS, self.averages), (EMA, self.raws)]
            halves += [
                (f'{MORE}.{k}', x[WEIGHTS]) for k, x in self.more.items()
            ]
            for what, half in halves:
                check_weights(present, half, what)
                check_fit(present, self.tensors(half), strict)
        except CheckpointError as error:
            raise CheckpointError(
                f'the EMA part of the checkpoint does not fit: {error} To '
                f'start a new training from this file, use load_from without '
                f'resume.'
            ) from None
        missing = [name for name in present if name not in self.averages]
        if missing and len(missing) == len(present):
            raise CheckpointError(
                'no tensor of the model is in the EMA part of the checkpoint; '
                'it belongs to another model.'
            )
        if missing:
            log.warning(
                f'EMA: {len(missing)} tensors of the model are not in the '
                f'checkpoint ({", ".join(missing[:3])}); their average starts '
                f'from the weights that they have.'
            )


def pack(
    checkpoint: MutableMapping[str, Any],
    averages: Mapping[str, Tensor],
    raws: Mapping[str, Tensor],
    steps: int,
    meta: Mapping[str, Any],
    more: Optional[Mapping[str, Mapping[str, Any]]] = None,
) -> None:
    """Give a checkpoint its EMA part, in place and in host memory.

    Names that share one tensor share it in the file too.

    Args:
        checkpoint: A checkpoint whose ``state_dict`` holds the live weights.
        averages: Averages by name; names left out average to themselves.
        raws: Raw weights by name; names left out are those that are live.
        steps: Steps that the averages have seen.
        meta: What else to say in ``ema_meta``: plain values only.
        more: Further averages by name: counters, and ``state_dict``.
    """
    copies: Dict[Any, Tensor] = {}

    def on_host(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        if value.layout is not torch.strided:
            return value.cpu()
        away = value.device.type != 'cpu'
        # a file would hold the whole storage of a part
        if not away and not is_part(value):
            return value
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in copies:
            copies[key] = value.cpu() if away else value.clone()
        return copies[key]

    live = checkpoint[WEIGHTS]
    ema = OrderedDict({STEPS: torch.tensor(steps, device='cpu')})
    for name, value in live.items():
        ema[PREFIX + name] = on_host(raws.get(name, value))
        live[name] = on_host(averages.get(name, value))
    checkpoint[EMA] = ema
    checkpoint.pop(MORE, None)
    if more:
        checkpoint[MORE] = {
            key: {
                **state,
                WEIGHTS: {k: on_host(x) for k, x in state[WEIGHTS].items()},
            }
            for key, state in more.items()
        }
    checkpoint[META] = {
        'format_version': FORMAT_VERSION,
        'roles': dict(_ROLES),
        'steps': steps,
        **meta,
    }


def unpack(checkpoint: Mapping[str, Any]) -> Optional[EMAPart]:
    """Return the EMA part of a checkpoint, or None if there is none.

    Raises:
        CheckpointError: If there is a part that cannot be understood.
    """
    if EMA not in checkpoint and META not in checkpoint:
        return None
    weights: Any = checkpoint.get(WEIGHTS)
    ema = checkpoint.get(EMA)
    if not isinstance(ema, Mapping) or STEPS not in ema:
        raise CheckpointError(
            f'the {EMA!r} of the checkpoint has no {STEPS!r}; it was not '
            f'written by an EMAHook of this generation. Load the file with '
            f'load_from (no resume) to start from its weights.'
        )
    meta = checkpoint.get(META)
    meta = {} if meta is None else meta
    for half, what in ((weights, WEIGHTS), (ema, EMA), (meta, META)):
        check_names(half, what)
    roles = meta.get('roles', _ROLES)
    # as text, because arrays cannot be compared
    if str(roles) != str(_ROLES):
        raise CheckpointError(
            f'{META} has roles={roles!r:.80}, this mmdet_ema reads '
            f'{_ROLES}; the file is damaged, or install a newer one.'
        )
    version = meta.get('format_version', FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f'{META} has format_version={version!r}, this mmdet_ema reads up '
            f'to {FORMAT_VERSION}; install a newer one.'
        )
    counts = ('batch_size', CHANGED, 'interval', 'restarted', 'world_size')
    for key in counts:
        read_count(meta, key, 1)
    steps = read_count(ema, STEPS)
    read_progress({**meta, 'num_steps': steps})
    more: Any = checkpoint.get(MORE, {})
    check_names(more, MORE)
    for name, state in more.items():
        check_names(state, f'{MORE}.{name}')
        check_names(state.get(WEIGHTS), f'{WEIGHTS} in {MORE}.{name}')
        read_progress(state)
    size = len(PREFIX)
    raws = {k[size:]: v for k, v in ema.items() if k.startswith(PREFIX)}
    averages = {plain_name(k, raws): v for k, v in weights.items()}
    return EMAPart(averages, raws, steps, dict(meta), dict(more))


def put_raw(checkpoint: MutableMapping[str, Any], part: EMAPart) -> None:
    """Make ``state_dict`` hold the raw weights, for the framework to load."""
    weights = checkpoint[WEIGHTS]
    missing = [name for name in part.averages if name not in part.raws]
    if missing:
        raise CheckpointError(
            f'the checkpoint holds no raw weights of {len(missing)} tensors '
            f'({", ".join(missing[:3])}); training cannot resume from it, '
            f"nor can they be evaluated. Use load_from, or evaluate='ema'."
        )
    replaced = OrderedDict(
        (name, part.raws[plain_name(name, part.raws)]) for name in weights
    )
    if hasattr(weights, '_metadata'):
        replaced._metadata = weights._metadata  # type: ignore[attr-defined]
    checkpoint[WEIGHTS] = replaced


def put_set(
    checkpoint: MutableMapping[str, Any], part: EMAPart, name: str
) -> None:
    """Make ``state_dict`` hold ``'raw'`` weights, or averages of a name."""
    if name == 'raw':
        put_raw(checkpoint, part)
    elif name in part.more:
        # tensors that are not averaged are in ``state_dict`` alone
        checkpoint[WEIGHTS].update(part.more[name][WEIGHTS])
    elif name != part.deployed:
        names = ', '.join(['raw', part.deployed, *part.more])
        raise CheckpointError(
            f'the checkpoint has no weights named {name!r}; it has {names}.'
        )


def plain_name(name: str, names: Mapping[str, Any]) -> str:
    """Strip the prefix of a wrapper, as the framework does when it loads."""
    if name in names or not name.startswith(PREFIX):
        return name
    return name[len(PREFIX) :]


def check_names(value: Any, what: str) -> None:
    """Refuse what is not a dict whose keys are text."""
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise CheckpointError(
            f'{what} of the checkpoint is a {kind}, not a dict; {_DAMAGED}.'
        )
    for name in value:
        if not isinstance(name, str):
            raise CheckpointError(
                f'{what} of the checkpoint has the name {name!r:.80}, which '
                f'is no text; {_DAMAGED}.'
            )


def check_weights(
    present: Mapping[str, Any], given: Mapping[str, Any], what: str = WEIGHTS
) -> None:
    """Refuse weights that a model cannot hold, whatever their shape.

    A framework leaves out what it cannot copy into the model, with a line in
    the log. Names that the model lacks are left to it.
    """
    for name, value in given.items():
        mine = present.get(plain_name(name, present))
        if not isinstance(mine, Tensor) or _can_hold(mine, value):
            continue
        kind = type(value).__name__
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            kind = f'{kind} of shape {shape} ({value.layout}, {value.dtype})'
        raise CheckpointError(
            f'{name} is a {kind} in {what} of the checkpoint, the model has '
            f'{mine.dtype} of shape {tuple(mine.shape)} there; the file is '
            f'damaged, or belongs to another model.'
        )


def _can_hold(mine: Tensor, value: Any) -> bool:
    if not isinstance(value, Tensor) or value.layout != mine.layout:
        return False
    if value.is_quantized or mine.is_quantized:
        return value.is_quantized == mine.is_quantized
    if mine.dim() == 0 and value.dim() == 1 and len(value) != 1:
        return False  # torch would load the first of them
    if mine.is_floating_point() or not value.is_floating_point():
        return value.is_floating_point() == mine.is_floating_point()
    # whole numbers that somebody saved as floats
    whole = torch.isfinite(value) & (value == value.round())
    return bool(whole.all())


def check_training_state(
    checkpoint: Mapping[str, Any], optimizers: Sequence[Any], log: Any
) -> None:
    """Check what else training resumes from, before anything is loaded.

    ``optimizers`` are those of the run that are made by now.
    """
    meta: Any = checkpoint.get('meta')
    check_names(meta, "'meta'")
    for key in ('epoch', 'iter', 'seed'):
        value = meta.get(key)
        try:
            whole = operator.index(value) >= 0  # NumPy's too
        except Exception:  # a tensor, an array, nothing at all
            whole = key == 'seed' and value is None
        if not whole:
            raise CheckpointError(
                f'{key}={value!r:.80} in the meta of the checkpoint is no '
                f'whole number from 0 on; {_DAMAGED}, or use load_from '
                f'without resume.'
            )
    if 'optimizer' not in checkpoint:
        log.warning(
            'EMA: the checkpoint has no state of the optimizer; it starts '
            'from nothing, and the run differs from one that went on.'
        )
        return
    saved = checkpoint['optimizer']
    check_names(saved, "'optimizer'")
    # one state, or one a name
    states = [
        x
        for x in (saved, *saved.values())
        if isinstance(x, Mapping) and 'state' in x and 'param_groups' in x
    ]
    # an optimizer of somebody's own may keep its state in another way
    plain = Optimizer.load_state_dict
    sure = [x for x in optimizers if type(x).load_state_dict is plain]
    if len(states) < len(sure):
        raise CheckpointError(
            f'the checkpoint has the state of {len(states)} optimizers, this '
            f'run has {len(optimizers)}; {_DAMAGED}, or use load_from '
            f'without resume.'
        )
    for state, optimizer in zip(states, optimizers):
        _check_optimizer(state, optimizer.param_groups)


def _check_optimizer(
    state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> None:
    mine = [len(group['params']) for group in groups]
    try:
        saved = list(state['param_groups'])
        theirs = [len(group['params']) for group in saved]
        order = [i for group in saved for i in group['params']]
        state_of = state['state'].items()
        slots = {k: v for k, v in state_of if isinstance(k, int)}
        numbers = [
            value
            for group in saved
            for key, value in group.items()
            if type(groups[0].get(key)) in (int, float)
        ]
        sound = (
            {*slots} <= {*order}
            and all(isinstance(slot, Mapping) for slot in slots.values())
            and all(map(math.isfinite, numbers))
        )
    except Exception:  # anything may be anywhere
        sound = False
    if not sound:
        raise CheckpointError(
            f'the groups of parameters of the optimizer in the checkpoint, '
            f'or the state of one, are not what torch writes; {_DAMAGED}.'
        )
    if theirs != mine:
        raise CheckpointError(
            f'the optimizer of the checkpoint has groups of {theirs} '
            f'parameters, that of this run {mine}; resume with the same '
            f'optimizer config, or use load_from without resume.'
        )
    parameters = [p for group in groups for p in group['params']]
    for index, parameter in zip(order, parameters):
        for key, value in slots.get(index, {}).items():
            if key not in _LIKE_PARAMETER or value is None:
                continue
            shape = getattr(value, 'shape', None)
            fits = isinstance(value, Tensor) and shape == parameter.shape
            if not fits or not value.is_floating_point() or value.is_sparse:
                raise CheckpointError(
                    f'{key} of parameter {index} in the optimizer of the '
                    f'checkpoint is a {type(value).__name__} of shape '
                    f'{shape}, the parameter has {tuple(parameter.shape)}; '
                    f'{_DAMAGED}.'
                )
