"""Formats of checkpoints: one object each, asked in order.

To add one: a module with ``FORMAT``, and its name in :data:`FORMATS`.
"""

from typing import Dict

from mmdet_ema.checkpoint.formats import mmdet_ema, mmengine, plain
from mmdet_ema.checkpoint.formats.base import Format

FORMATS: Dict[str, Format] = {
    form.name: form
    for form in (mmdet_ema.FORMAT, mmengine.FORMAT, plain.FORMAT)
}
"""By name; the first that recognises a file reads it."""

__all__ = ['FORMATS', 'Format']
