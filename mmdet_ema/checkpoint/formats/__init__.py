"""Formats of checkpoints: one object each, asked in order.

To add one of another project: a row of ``others.LAYOUTS``, or a module with
a ``Format`` where a row cannot say it.
"""

from typing import Dict

from mmdet_ema.checkpoint.contents import Format
from mmdet_ema.checkpoint.formats import mmcv1, mmdet_ema, others

FORMATS: Dict[str, Format] = {
    form.name: form
    for form in (
        mmdet_ema.FORMAT,
        mmdet_ema.MMENGINE,
        *mmcv1.FORMATS,
        *others.FORMATS,
    )
}
"""By name; the first that recognises a file reads it."""
ALIASES = {
    'convnext': 'deit',
    'd-fine': 'rtdetr',
    'deim': 'rtdetr',
    'detectron2': 'd2go',
    'mmpretrain': 'mmengine',
    'torch': 'averaged-model',
}
"""Other names of formats."""
