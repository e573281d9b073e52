"""Groups of an optimizer: the framework's rules, and a default by kind.

The default constructor of the framework makes a group of every parameter, of
base values of 1: so it gives factors, and NaN where no rule of it speaks. Here
NaN becomes the default of the parameter's kind, and parameters that are
trained alike are put into one group.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Tuple,
)

from torch import Tensor, nn
from torch.optim import Optimizer

from mmdet_ema import checks
from mmdet_ema.averaging.distributed import world_size
from mmdet_ema.checks import check_number
from mmdet_ema.errors import OptionError, did_you_mean, show
from mmdet_ema.optimizers.kinds import KINDS, WEIGHT, kind_of
from mmdet_ema.optimizers.nominal import mark, remind, scale_weight_decay

_FACTORS = ('lr_mult', 'decay_mult')  # of a custom key
_MULTIPLIERS = (
    'norm_decay_mult',
    'bias_lr_mult',
    'bias_decay_mult',
    'dwconv_decay_mult',
    'flat_decay_mult',
    'dcn_offset_lr_mult',
)


class Construction:
    """Makes groups from the framework's; scales and reports once it is built.

    ``optimizer_cfg`` and ``paramwise_cfg`` are those of a config; ``log`` has
    ``info(text)`` and ``warning(text)``.
    """

    def __init__(
        self,
        optimizer_cfg: Mapping[str, Any],
        paramwise_cfg: Optional[Mapping[str, Any]],
        log: Any,
    ):
        self._options = _checked(paramwise_cfg)
        self._keys: Dict[str, Dict[str, Any]] = self._options['custom_keys']
        # what factors multiply: a number, a tensor, or None
        self._bases: Dict[str, Any] = {}
        for name in ('lr', 'weight_decay'):
            base = self._bases[name] = optimizer_cfg.get(name)
            if base is not None and not isinstance(base, Tensor):
                check_number(f'optimizer.{name}', base, 0, math.inf)
        self._log = log
        # of each parameter its first name, as keys see it, kind and whether
        # it is flat
        self._met: Dict[Tensor, Tuple[str, str, bool]] = {}
        self._unused_keys: List[str] = []

    def rules(self) -> Dict[str, Any]:
        """Return the ``paramwise_cfg`` for the framework's constructor.

        Flat parameters are left to us, as mmcv 1.x has no rule for them, and
        so are options of a key that are no factors.
        """
        theirs = {*_MULTIPLIERS} - {'flat_decay_mult'}
        rules = {k: x for k, x in self._options.items() if k in theirs}
        rules['custom_keys'] = {}
        for key, options in self._keys.items():
            given = {x: options[x] for x in _FACTORS if x in options}
            rules['custom_keys'][key] = {'decay_mult': math.nan, **given}
        return rules

    def add_params(
        self,
        params: List[Dict[str, Any]],
        module: nn.Module,
        prefix: str,
        is_dcn_module: Optional[bool],
        add_params: Callable[..., None],
    ) -> None:
        """Add the groups of a model to a list, or let go on at a child.

        ``is_dcn_module`` says whether it is a child of a deformable
        convolution; it is None for the model. ``add_params`` is the
        framework's own: it calls the constructor's for each child.
        """
        in_dcn = bool(is_dcn_module)
        for leaf, tensor in module.named_parameters(recurse=False):
            name = f'{prefix}.{leaf}'
            kind = kind_of(name, tensor, module, in_dcn)
            is_flat = tensor.dim() == 1 and not in_dcn
            self._met.setdefault(tensor, (name, kind, is_flat))
        if is_dcn_module is not None:
            add_params(params, module, prefix, is_dcn_module)
            return
        # a group of each parameter, for base values of 1
        factors: List[Dict[str, Any]] = []
        with _all_thawed(module):
            add_params(factors, module, prefix)
        params.extend(self._groups(factors))

    def _groups(self, factors: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """Return the groups: weight, norm, bias, other.

        Of each kind those of the base learning rate come first, then in the
        order of the model.
        """
        met, self._met = self._met, {}
        # a tied parameter follows its first name
        rules = {rule['params'][0]: rule for rule in reversed(factors)}
        followed = set()
        groups: Dict[str, Dict[str, Any]] = {}
        order = {}
        for tensor, (name, kind, is_flat) in met.items():
            # the longest key decides, then the alphabet
            matches = sorted(key for key in self._keys if key in name)
            key = max(matches, key=len, default='')
            followed.add(key)
            options = self._keys.get(key, {})
            more = {k: v for k, v in options.items() if k not in _FACTORS}
            rule = rules.get(tensor, {})
            lr, decay = rule.get('lr', 1.0), rule.get('weight_decay', math.nan)
            default = 1.0 if kind in self._options['decay_kinds'] else 0.0
            if math.isnan(decay) and is_flat and not matches:
                decay = self._options.get('flat_decay_mult', decay)
            if math.isnan(decay):
                decay = default
            words = [kind]
            words += [f'lr*{lr!r}'] if lr != 1 else []
            words += [f'decay*{decay!r}'] if decay != default else []
            words += [f'{k}={v!r}' for k, v in sorted(more.items())]
            group = ' '.join(words)
            if group not in groups:
                order[group] = KINDS.index(kind), lr != 1
                groups[group] = {
                    'params': [],
                    'name': group,
                    **self._times('lr', lr),
                    **self._times('weight_decay', decay),
                    **more,
                }
            groups[group]['params'].append(tensor)
        self._unused_keys = [key for key in self._keys if key not in followed]
        return [groups[name] for name in sorted(groups, key=order.__getitem__)]

    def _times(self, name: str, factor: float) -> Dict[str, Any]:
        base = self._bases[name]
        if base is not None:
            return {name: base * factor}
        if factor in (0, 1):
            return {name: 0.0} if factor == 0 else {}
        raise OptionError(
            f'paramwise_cfg multiplies {name} by {factor:g}, but the '
            f'optimizer is given none; add {name}=... to it.'
        )

    def finish(self, optimizer: Optimizer, accumulation: int) -> None:
        """Scale the weight decay if that can be done; say what was built."""
        samples = None
        if 'batch_size' in self._options:
            steps = self._options.get('accumulation', accumulation)
            samples = self._options['batch_size'] * steps * world_size()
        mark(optimizer, self._options['nominal_batch_size'], samples)
        for line in self._without_effect():
            self._log.warning(f'EMAOptimizerConstructor: no effect of {line}')
        self._log.info(_table(optimizer))
        base, groups = self._bases['weight_decay'], optimizer.param_groups
        if base and not any(float(g.get('weight_decay', 0)) for g in groups):
            self._log.warning(
                f'EMAOptimizerConstructor: weight_decay={base} '
                f'reaches no parameter; look at the table. Of FSDP, use '
                f'use_orig_params=True.'
            )
        if samples is not None:
            scale_weight_decay([optimizer], samples, self._log)
        else:
            remind(optimizer, self._log)

    def _without_effect(self) -> Iterator[str]:
        if self._unused_keys:
            names = ', '.join(map(repr, self._unused_keys))
            yield (
                f'custom_keys {names}: no parameter has that in its name, or '
                f'a longer key goes first; correct or remove what is not '
                f'meant.'
            )
        options, words = self._options, ('batch_size', 'accumulation')
        given = [f'{x}={options[x]}' for x in words if x in options]
        if given and options['nominal_batch_size'] is None:
            yield (
                f'{" and ".join(given)}: nominal_batch_size=None says that '
                f'the weight decay is not scaled; remove one of them.'
            )
        elif given and 'batch_size' not in options:
            yield (
                f'{given[0]} without batch_size: the hooks then find both by '
                f'themselves; give batch_size=... too, or remove it.'
            )


@contextlib.contextmanager
def _all_thawed(model: nn.Module) -> Iterator[None]:
    """Thaw all parameters for a moment: the frameworks skip frozen ones.

    Ours are in their groups: whoever thaws one later trains it as the options
    say, and the groups are the same however much is frozen, so that the state
    of an optimizer can be resumed.
    """
    frozen = [
        p
        for p in model.parameters()
        if not p.requires_grad and (p.is_floating_point() or p.is_complex())
    ]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _table(optimizer: Optimizer) -> str:
    rows = [('group', 'tensors', 'frozen', 'elements', 'lr', 'weight decay')]
    for group in optimizer.param_groups:
        tensors, decay = group['params'], group.get('weight_decay')
        rows.append(
            (
                str(group.get('name', '')),
                str(len(tensors)),
                str(sum(not tensor.requires_grad for tensor in tensors)),
                f'{sum(tensor.numel() for tensor in tensors):,}',
                f'{float(group["lr"]):.6g}' if 'lr' in group else '-',
                '-' if decay is None else f'{decay:.6g}',
            )
        )
    first, *widths = (max(map(len, column)) for column in zip(*rows))
    total = sum(len(group['params']) for group in optimizer.param_groups)
    lines = [
        f'EMAOptimizerConstructor: {type(optimizer).__name__}, {total} '
        f'tensors in {len(rows) - 1} groups'
    ]
    for name, *cells in rows:
        numbers = [f'{cell:>{w}}' for cell, w in zip(cells, widths)]
        lines.append('  '.join(['', name.ljust(first), *numbers]))
    return '\n'.join(lines)


def _checked(cfg: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """Check ``paramwise_cfg``; return what is given, and our defaults."""
    cfg = {} if cfg is None else cfg
    if not isinstance(cfg, Mapping):
        raise OptionError(
            f'paramwise_cfg={show(cfg)} is not allowed; use a dict.'
        )
    checks.check_names('paramwise_cfg', cfg, _CHECKS)
    checked: Dict[str, Any] = dict(custom_keys={}, decay_kinds=(WEIGHT,))
    checked['nominal_batch_size'] = 64
    for name, value in cfg.items():
        if value is not None:
            checked[name] = _CHECKS[name](name, value)
        elif name == 'nominal_batch_size':
            checked[name] = None  # no scaling; elsewhere: as if not given
    return checked


def _check_keys(name: str, value: Any) -> Dict[str, Dict[str, Any]]:
    if not isinstance(value, Mapping):
        raise OptionError(
            f'custom_keys={show(value)} is not allowed; use a dict from a '
            f'part of a name to a dict, as in '
            f'dict(backbone=dict(lr_mult=0.1)).'
        )
    checked: Dict[str, Dict[str, Any]] = {}
    for key, options in value.items():
        name = f'custom_keys[{key!r}]'
        if not isinstance(options, Mapping):
            raise OptionError(
                f'{name}={show(options)} is not allowed; use a dict, as in '
                f'dict(lr_mult=0.1, decay_mult=0.0).'
            )
        checked[key] = dict(options)
        for word, factor in options.items():
            near = did_you_mean(word, _FACTORS)
            if word in _FACTORS:
                number = check_number(f'{name} {word}', factor, 0, math.inf)
                checked[key][word] = number
            elif near:  # other words are options of the optimizer
                raise OptionError(f'{name} has no option {word!r}.{near}')
    return checked


def _check_kinds(name: str, value: Any) -> List[str]:
    if not isinstance(value, (list, tuple)):
        raise OptionError(
            f'decay_kinds={show(value)} is not allowed; use a list of some of '
            f'{", ".join(map(repr, KINDS))}.'
        )
    return [checks.check_choice(name, kind, KINDS) for kind in value]


_factor = functools.partial(check_number, low=0, high=math.inf)
_samples = functools.partial(checks.check_count, least=1)
_CHECKS: Dict[str, Callable[[str, Any], Any]] = {
    'custom_keys': _check_keys,
    **dict.fromkeys(_MULTIPLIERS, _factor),
    'bypass_duplicate': checks.check_flag,  # tied ones come once anyway
    'decay_kinds': _check_kinds,
    'nominal_batch_size': _samples,
    'batch_size': _samples,
    'accumulation': _samples,
}
