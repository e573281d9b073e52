"""Averages of a model's tensors; knows torch alone, and no trainer."""

from mmdet_ema.averaging.averager import WeightAverager
from mmdet_ema.errors import CheckpointError, NonFiniteError, OptionError
from mmdet_ema.schedules import SCHEDULES, Schedule, build_schedule

__all__ = [
    'SCHEDULES',
    'CheckpointError',
    'NonFiniteError',
    'OptionError',
    'Schedule',
    'WeightAverager',
    'build_schedule',
]
