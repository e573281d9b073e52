"""File formats: where raw and average weights are, and what is plain.

Imports the core and torch only, and knows nothing of a runner.
"""

from mmdet_ema.checkpoint.files import read_structure
from mmdet_ema.checkpoint.format import EMAPart, pack, put_raw, unpack
from mmdet_ema.checkpoint.weights_only import (
    Codec,
    foreign,
    from_plain,
    to_plain,
)

__all__ = [
    'Codec',
    'EMAPart',
    'foreign',
    'from_plain',
    'pack',
    'put_raw',
    'read_structure',
    'to_plain',
    'unpack',
]
