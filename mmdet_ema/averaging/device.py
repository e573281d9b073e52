"""The device that the averages live on."""

from __future__ import annotations

from typing import Optional, Union

import torch

from mmdet_ema.errors import OptionError, show


def check_device(
    device: Union[str, torch.device, None],
) -> Optional[torch.device]:
    """Return the device of the averages, None for the parameters' own.

    Args:
        device: What the user gave.

    Returns:
        The device.

    Raises:
        OptionError: If it is no device, or not on this machine.
    """
    if device is None:
        return None
    try:
        found = torch.empty(0, device=device).device
        reason = 'it holds no values' if found.type == 'meta' else ''
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    if reason:
        raise OptionError(
            f'device={show(device)} cannot be used here ({reason}); use None, '
            f"'cpu' or a device of this machine."
        )
    return torch.device(device)
