"""Options of the constructor that do nothing, each in a line."""

from __future__ import annotations

from typing import Iterable, Iterator, Optional

from mmdet_ema.optimizers.kinds import Named
from mmdet_ema.optimizers.paramwise import Paramwise
from mmdet_ema.optimizers.rules import key_of


def without_effect(
    options: Paramwise, parameters: Iterable[Named]
) -> Iterator[str]:
    """Say which of the given options have no effect.

    Args:
        options: What the config says.
        parameters: Parameters of the model.

    Yields:
        One line for all custom keys, one for the options of the scaling.
    """
    for line in (_keys(options, parameters), _scaling(options)):
        if line is not None:
            yield f'EMAOptimizerConstructor: no effect of {line}'


def _keys(options: Paramwise, parameters: Iterable[Named]) -> Optional[str]:
    keys = options.custom_keys
    used = {key_of(parameter, keys) for parameter in parameters}
    unused = [repr(key) for key in keys if key not in used]
    if not unused:
        return None
    return (
        f'custom_keys {", ".join(unused)}: no parameter has that in its name, '
        f'or a longer key goes first; correct or remove what is not meant.'
    )


def _scaling(options: Paramwise) -> Optional[str]:
    given = [
        f'{name}={value}'
        for name, value in (
            ('batch_size', options.batch_size),
            ('accumulation', options.accumulation),
        )
        if value is not None
    ]
    if given and options.nominal_batch_size is None:
        return (
            f'{" and ".join(given)}: nominal_batch_size=None says that the '
            f'weight decay is not scaled; remove one of them.'
        )
    if given and options.batch_size is None:
        return (
            f'{given[0]} without batch_size: the hooks then find both by '
            f'themselves; give batch_size=... too, or remove it.'
        )
    return None
