"""Our hook under the name of BEVDet's, with its numbers."""

from __future__ import annotations

import os
from typing import Any, Optional

from mmdet_ema.checkpoint.format import EMA
from mmdet_ema.checkpoint.mmcv1 import add_averages, is_second_file
from mmdet_ema.checks import check_count, check_path
from mmdet_ema.errors import CheckpointError, OptionError
from mmdet_ema.for_mmcv1.compatible import COMPATIBLE
from mmdet_ema.for_mmcv1.ema_hook import EMAHook
from mmdet_ema.training.options import show_options


class MEGVIIEMAHook(EMAHook):
    """Instead of the hook of that name in BEVDet and projects based on it.

    ``d = decay * (1 - exp(-(init_updates + n) / tau))``, with decay 0.999,
    tau 2000, init_updates 0 and float buffers averaged by default.

    Args:
        resume (str, optional): A second file of that hook,
            ``epoch_N_ema.pth``: the averages and n, where the run resumes
            from the ``epoch_N.pth`` beside it. Defaults to None.
        interval (int): How often that hook writes its second file, -1 for
            each epoch. Has no effect: there is none. Defaults to -1.
        **options: ``init_updates`` (int), and those of :class:`EMAHook` but
            for other ramps.
    """

    _hook = 'MEGVIIEMAHook'
    theirs = 'BEVDetMEGVIIEMAHook'

    def __init__(
        self,
        *,
        init_updates: int = 0,
        resume: Optional[str] = None,
        interval: int = -1,
        **options: Any,
    ):
        if interval != -1:
            check_count('interval', interval, 1, 'Or -1, for each epoch.')
        self._saves_every = interval
        self._init_updates = check_count('init_updates', init_updates, 0)
        self._second = check_path('resume', resume)
        super().__init__(init_updates=init_updates, **options)

    show_options(__init__, **dict.fromkeys(COMPATIBLE))

    def before_run(self, runner: Any) -> None:
        """Check that the raw weights of the second file were loaded."""
        super().before_run(runner)
        if self._second is not None:
            raise OptionError(
                f'resume={self._second!r} has the averages alone; resume the '
                f'run from the raw checkpoint beside it as well '
                f'(--resume-from epoch_N.pth), or leave resume out.'
            )
        if self._saves_every > 0:
            self.log.warning(
                f'EMA: interval={self._saves_every} of MEGVIIEMAHook has no '
                f'effect: no second file is written, the averages are in '
                f'each file of checkpoint_config.'
            )

    def after_read_checkpoint(
        self, runner: Any, checkpoint: Any, filename: str, resumes: bool
    ) -> None:
        """Join a raw checkpoint and the second file beside it."""
        if resumes and is_second_file(checkpoint):
            raise CheckpointError(
                f"{filename!r} is an EMA file of BEVDet's MEGVIIEMAHook, "
                f'without raw weights and optimizer; resume from the raw '
                f'checkpoint beside it and give the hook '
                f'resume={filename!r}.'
            )
        if resumes and self._second is not None:
            self._join(checkpoint, self._second)
            self._second = None
        elif resumes and EMA not in checkpoint:
            stem, _ = os.path.splitext(os.path.realpath(filename))
            beside = f'{stem}_ema.pth'
            if os.path.isfile(beside):
                self.log.warning(
                    f'EMA: the averages of the checkpoint are in {beside!r}; '
                    f'to go on from them, give the hook resume={beside!r}.'
                )
        super().after_read_checkpoint(runner, checkpoint, filename, resumes)

    def _join(self, checkpoint: Any, second: str) -> None:
        if EMA in checkpoint:
            self.log.warning(
                f'EMA: resume={second!r} has no effect: the checkpoint that '
                f'the run resumes from has averages of its own.'
            )
            return
        for doubt in add_averages(checkpoint, second, self._init_updates):
            self.log.warning(f'EMA: {doubt}')
        self.log.info(f'EMA: the averages and n are those of {second!r}.')
