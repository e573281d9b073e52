"""Evaluate the raw weights beside the averages, in one pass over the data.

Each batch goes through the model twice. The cost is the second forward pass,
two swaps of the weights and a copy of the evaluator (with its annotations);
the data is read and prepared once.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any, Callable, Dict, Iterator, List, Mapping

from mmengine.runner.amp import autocast

from mmdet_ema.hooks.for_mmengine.metric_copies import copy_metric
from mmdet_ema.hooks.lifecycle import EMALifecycle

PREFIX = 'raw/'


class RawEvaluation:
    """Evaluations of the raw weights beside one evaluation loop.

    Args:
        loop: The evaluation loop of the averages.
        life: The lifecycle that has the averages.

    Raises:
        OptionError: If a metric of the loop cannot be copied.
    """

    def __init__(self, loop: Any, life: EMALifecycle):
        self._loop = loop
        self._life = life
        self._evaluator = copy.copy(loop.evaluator)
        self._evaluator.metrics = [
            copy_metric(metric) for metric in loop.evaluator.metrics
        ]
        self._found: List[Dict[str, Any]] = []

    def begin(self) -> None:
        """Evaluate the raw weights whenever the loop evaluates."""
        self.end()
        for metric in self._evaluator.metrics:
            metric.results.clear()
        evaluate = self._loop.evaluator.evaluate

        def evaluate_both(size: int) -> Any:
            found = evaluate(size)
            self._found.append(self._evaluator.evaluate(size))
            return found

        self._loop.evaluator.evaluate = evaluate_both

    def end(self) -> None:
        """Leave the loop as it was; safe to call at any time."""
        self._found = []
        vars(self._loop.evaluator).pop('evaluate', None)

    def process(self, step: Callable[[Any], Any], data_batch: Any) -> None:
        """Predict one batch with the raw weights.

        Args:
            step: ``val_step`` or ``test_step`` of the model.
            data_batch: The batch; a copy is used, since models write their
                predictions into it.
        """
        batch = copy.deepcopy(data_batch)
        fp16 = getattr(self._loop, 'fp16', False)
        with self._raw_weights(), autocast(enabled=fp16):
            outputs = step(batch)
        self._evaluator.process(
            data_samples=_without_losses(outputs), data_batch=batch
        )

    def metrics(self, final: Mapping[str, Any]) -> Dict[str, Any]:
        """Return the metrics of the raw weights, each under ``raw/<name>``.

        A loop may evaluate several times and put a word before the names,
        as mmdet's ``TeacherStudentValLoop`` does; the same word comes here.

        Args:
            final: Metrics of the averages, as the loop has named them.
        """
        return {
            f'{PREFIX}{_final_name(name, i, final)}': value
            for i, found in enumerate(self._found)
            for name, value in found.items()
        }

    @contextlib.contextmanager
    def _raw_weights(self) -> Iterator[None]:
        averager = self._life.evaluated
        if averager is None:
            yield
            return
        averager.restore()
        try:
            yield
        finally:
            averager.apply()


def _final_name(name: str, index: int, final: Mapping[str, Any]) -> str:
    """Return what the i-th evaluation's metric is called in the end."""
    named = [k for k in final if k == name or k.endswith(f'/{name}')]
    return named[min(index, len(named) - 1)] if named else name


def _without_losses(outputs: Any) -> Any:
    """Drop the losses that a model may append to its predictions."""
    last = outputs[-1] if len(outputs) else None
    keys = getattr(last, 'keys', None)
    return outputs[:-1] if keys and list(keys()) == ['loss'] else outputs
