"""The toy of the installed generation: what both test, they test alike."""

from mmdet_ema.frameworks import has_mmcv1

if has_mmcv1():
    from tests.optimizers.mmcv1 import toy
else:
    from tests.optimizers.mmengine import toy

__all__ = ['toy']
