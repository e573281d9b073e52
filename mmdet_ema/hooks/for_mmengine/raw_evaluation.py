"""Evaluate the raw weights beside the averages, in one pass over the data.

Each batch goes through the model twice. The cost is the second forward pass,
two swaps of the weights and a copy of the evaluator (with its annotations);
the data is read and prepared once.
"""

from __future__ import annotations

import contextlib
import copy
import os
from typing import Any, Callable, Dict

from mmengine.runner.amp import autocast

from mmdet_ema.hooks.lifecycle import EMALifecycle

PREFIX = 'raw/'


class RawEvaluation:
    """One evaluation of the raw weights.

    Args:
        loop: The evaluation loop of the averages, about to run.
        life: The lifecycle, whose averages are in the model now.
    """

    def __init__(self, loop: Any, life: EMALifecycle):
        self._evaluator = copy.deepcopy(loop.evaluator)
        self._samples = len(loop.dataloader.dataset)
        self._fp16 = getattr(loop, 'fp16', False)
        self._life = life
        for metric in self._evaluator.metrics:
            _write_elsewhere(metric)

    def process(self, step: Callable[[Any], Any], data_batch: Any) -> None:
        """Predict one batch with the raw weights.

        Args:
            step: ``val_step`` or ``test_step`` of the model.
            data_batch: The batch; a copy is used, since models write their
                predictions into it.
        """
        batch = copy.deepcopy(data_batch)
        with self._raw_weights(), autocast(enabled=self._fp16):
            outputs = step(batch)
        self._evaluator.process(
            data_samples=_without_losses(outputs), data_batch=batch
        )

    def metrics(self) -> Dict[str, Any]:
        """Return the metrics, each under ``raw/<name>``."""
        found = self._evaluator.evaluate(self._samples)
        return {f'{PREFIX}{name}': value for name, value in found.items()}

    @contextlib.contextmanager
    def _raw_weights(self) -> Any:
        averager = self._life.averager
        if averager is None:
            yield
            return
        averager.restore()
        try:
            yield
        finally:
            averager.apply()


def _without_losses(outputs: Any) -> Any:
    """Drop the losses that a model may append to its predictions."""
    last = outputs[-1] if len(outputs) else None
    keys = getattr(last, 'keys', None)
    return outputs[:-1] if keys and list(keys()) == ['loss'] else outputs


def _write_elsewhere(metric: Any) -> None:
    """Keep a metric that writes files from overwriting its twin's."""
    for name in ('out_file_path', 'outfile_prefix'):
        path = getattr(metric, name, None)
        if isinstance(path, str):
            stem, suffix = os.path.splitext(path)
            setattr(metric, name, f'{stem}_raw{suffix}')
