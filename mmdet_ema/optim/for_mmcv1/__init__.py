"""The constructor and the warm-up for mmcv 1.x."""

from mmdet_ema.optim.for_mmcv1.registration import register

__all__ = ['register']
