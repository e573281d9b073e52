"""File formats: where raw and average weights are, and what is plain.

Imports torch and what is below alone, and knows nothing of a runner.
"""

from mmdet_ema.checkpoint.files import read_structure
from mmdet_ema.checkpoint.format import EMAPart, pack, put_raw, unpack

__all__ = ['EMAPart', 'pack', 'put_raw', 'read_structure', 'unpack']
