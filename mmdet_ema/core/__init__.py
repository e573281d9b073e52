"""Maths and tensors: schedules, update kernels, selection, the averager.

Imports torch only, and knows nothing of any trainer.
"""

from mmdet_ema.core.averager import WeightAverager
from mmdet_ema.core.errors import CheckpointError, NonFiniteError, OptionError
from mmdet_ema.core.schedule_spec import SCHEDULES, build_schedule
from mmdet_ema.core.schedules import Schedule

__all__ = [
    'SCHEDULES',
    'CheckpointError',
    'NonFiniteError',
    'OptionError',
    'Schedule',
    'WeightAverager',
    'build_schedule',
]
