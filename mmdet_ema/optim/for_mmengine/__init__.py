"""The constructor and the warm-up for mmengine."""

from mmdet_ema.optim.for_mmengine.registration import register

__all__ = ['register']
