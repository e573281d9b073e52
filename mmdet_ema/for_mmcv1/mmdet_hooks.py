"""Our hook under the names of mmdet 2's two, with their numbers."""

from __future__ import annotations

from mmdet_ema.for_mmcv1.ema_hook import EMAHook


class ExpMomentumEMAHook(EMAHook):
    """In the place of mmdet 2's hook of that name.

    ``d = (1 - momentum) * (1 - exp(-n / total_iter))``, with momentum 0.0002,
    total_iter 2000 and float buffers averaged by default.

    Args:
        **options: As for :class:`EMAHook`, but for other ramps.
    """

    _words = 'ExpMomentumEMAHook'


class LinearMomentumEMAHook(EMAHook):
    """In the place of mmdet 2's hook of that name.

    ``d = min(1 - momentum, n / (warm_up + n - 1))``, with momentum 0.0002,
    warm_up 100 and float buffers averaged by default.

    Args:
        **options: As for :class:`EMAHook`, but for other ramps.
    """

    _words = 'LinearMomentumEMAHook'
