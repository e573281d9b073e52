"""Evaluate weights that no run has had, with the evaluator of a config.

Model and data are built once; weights are copied into the model, and the
validation loop of the config runs again for each.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import tempfile
import time
from dataclasses import dataclass, field
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import EMAHook as MMEngineEMAHook
from mmengine.hooks import LoggerHook
from mmengine.runner import Runner, set_random_seed
from torch import Tensor

from mmdet_ema.averaging.state import check_fit
from mmdet_ema.checkpoint.average import average
from mmdet_ema.checkpoint.combination import Combination
from mmdet_ema.checkpoint.contents import RAW
from mmdet_ema.checkpoint.profiles import Profile
from mmdet_ema.checkpoint.runs import Run
from mmdet_ema.checkpoint.windows import (
    Window,
    averages_of,
    how_to_reach,
    make_windows,
)
from mmdet_ema.errors import CheckpointError, OptionError, did_you_mean, show
from mmdet_ema.for_mmengine.ema_hook import EMAHook
from mmdet_ema.for_mmengine.evaluation import evaluate_apart
from mmdet_ema.for_mmengine.runner import (
    choose_by,
    model_of,
    pass_forward,
)
from mmdet_ema.schedules import Schedule
from mmdet_ema.training.passes import same_randomness
from mmdet_ema.training.recalibrate import (
    batch_statistics,
    first_batches,
    is_better,
    layers_to_estimate,
)

# averages in the model would be wrong here, lines in a log too many
_LEFT_OUT = (EMAHook, MMEngineEMAHook, LoggerHook)


_NOTHING = (
    'the validation of the config gave no numbers to compare; give it an '
    'evaluator, and files of a model that finds something.'
)


@contextlib.contextmanager
def runner_of(
    config: str,
    launcher: str = 'none',
    cfg_options: Optional[Mapping[str, Any]] = None,
) -> Iterator[Any]:
    """Make a runner of a config that evaluates, and trains nothing.

    Its work folder is a temporary one: neither the config nor the logs of
    the training are touched.

    Args:
        config: Path of the config.
        launcher: ``'pytorch'`` for several ranks, as in mmengine's tools.
        cfg_options: Changes to the config, by dotted names.

    Yields:
        The runner; the weights of its model are not initialised.

    Raises:
        OptionError: If there is no such config, or it has no validation.
    """
    if not os.path.isfile(config):
        raise OptionError(f'there is no config file {config!r}.')
    cfg = Config.fromfile(config)
    if cfg_options:
        cfg.merge_from_dict(dict(cfg_options))
    missing = [
        name
        for name in ('val_cfg', 'val_dataloader', 'val_evaluator')
        if cfg.get(name) is None
    ]
    if missing:
        raise OptionError(
            f'{config!r} has no {" and ".join(missing)}: weights are compared '
            f'by the validation of the config; give it one.'
        )
    cfg.launcher, cfg.log_level = launcher, 'ERROR'
    cfg.load_from, cfg.resume = None, False
    if (cfg.get('randomness') or {}).get('seed') is None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=0)
    if cfg.get('visualizer'):
        # no run appears at a tracking service, or in the folder of another
        # one: mmengine keeps one visualizer for a name
        cfg.visualizer.update(vis_backends=[], name='mmdet_ema')
    # mmengine would choose each rank's GPU
    if launcher != 'none' and get_device() == 'cpu':
        dist.init_process_group('gloo')
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        # mmengine keeps one visualizer for a name, and a name for a second
        cfg.experiment_name = os.path.basename(folder)
        with _quiet():
            runner = _Unwrapped.from_cfg(cfg)
        runner._hooks = [
            hook for hook in runner.hooks if not isinstance(hook, _LEFT_OUT)
        ]
        yield runner


class _Unwrapped(Runner):  # type: ignore[misc]
    """Wraps no model: there are no gradients that ranks have to agree on."""

    def wrap_model(self, model_wrapper_cfg: Any, model: Any) -> Any:
        return model.to(get_device())


def evaluate_weights(
    runner: Any, state: Mapping[str, Tensor]
) -> Dict[str, float]:
    """Return the metrics of weights that are numbers.

    Call it on all ranks, with the same weights.
    """
    load(runner, state)
    with _quiet():
        # what is in the model, as it is
        found = evaluate_apart(runner, contextlib.nullcontext(), 'tune')
    return {name: float(value) for name, value in found.items()}


def recalibrated(
    runner: Any, state: Mapping[str, Tensor], batches: int
) -> Dict[str, Tensor]:
    """Return weights with BatchNorm statistics of training data.

    The batches are the same in every call.
    """
    if runner.cfg.get('train_dataloader') is None:
        raise OptionError(
            '--recalibrate needs the train_dataloader of the config, which '
            'has none; leave it out.'
        )
    load(runner, state)
    model = model_of(runner)
    model.train()
    if not layers_to_estimate(model):
        raise OptionError(
            '--recalibrate has no effect: the model has no BatchNorm layer '
            'that is trained; leave it out.'
        )
    with _quiet(), same_randomness():
        dataset = runner.train_dataloader.dataset
        # a loader of its own: some samplers yield nothing the second time
        loader = runner.build_dataloader(
            {**runner.cfg.train_dataloader, 'dataset': dataset}, runner.seed
        )
        set_random_seed(runner.seed)
        found = batch_statistics(
            model,
            first_batches(loader, batches),
            lambda batch: pass_forward(runner, batch),
        )
    buffers = dict(model.named_buffers())
    for name, value in found.items():
        buffers[name].copy_(value)
    # read back: a layer may be there under several names
    live = model.state_dict()
    return {name: live[name].detach().cpu().clone() for name in state}


def load(runner: Any, state: Mapping[str, Tensor]) -> None:
    """Copy weights into the model of a runner, or say that they do not fit."""
    model = model_of(runner)
    try:
        check_fit(model.state_dict(), state, strict=True)
    except CheckpointError as error:
        raise CheckpointError(
            f'the config is not that of the run: {error} Give that one.'
        ) from None
    model.load_state_dict(state)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what metrics and data sets print off the table."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@dataclass
class Row:
    """Weights that were evaluated."""

    name: str  # 'raw', that of an average in the last file, or 'window'
    length: Optional[float]  # of the window in steps, if it is known
    combination: Combination  # of files
    schedule: Optional[Schedule] = None  # the average a window stands for
    metrics: Dict[str, float] = field(default_factory=dict)
    # of the same with statistics of training data, if that was asked for
    recalibrated: Dict[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Its name, with the length of a window."""
        named = self.schedule is None
        return self.name if named else f'window {self.length:g}'

    def value(self, metric: str, recalibrated: bool = False) -> float:
        """Return a metric; NaN where nothing was found, as by COCO."""
        found = self.recalibrated if recalibrated else self.metrics
        return found.get(metric, math.nan)


@dataclass
class Tuned:
    """What :func:`tune` found."""

    run: Run  # the files
    rows: List[Row]  # raw weights, averages of the last file, windows
    metric: str  # that is compared
    greater: bool  # whether higher is better
    refused: List[Window]  # that the files do not allow
    next_time: List[str]  # what to record to reach them
    best: Row
    is_recalibrated: bool  # whether it is so with statistics of training data
    weights: Dict[str, Tensor]  # those of the best one


def tune(
    runner: Any,
    run: Run,
    wanted: Sequence[float],
    *,
    metric: Optional[str] = None,
    recalibrate: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Evaluate the windows that the files of a run allow.

    Call it on all ranks; each makes the same weights.

    Args:
        runner: One that :func:`runner_of` made, of the run's config.
        run: The files.
        wanted: Windows in steps.
        metric: The metric that is compared. Defaults to that of the config's
            ``save_best``, else the first one.
        recalibrate: Batches of training data from which BatchNorm statistics
            are estimated again; all weights are evaluated with them, too.
            Defaults to 0, not at all.
        tell: Gets a line after each evaluation, with the time that is left.

    Raises:
        OptionError: If a window is out of range, or there is no such metric.
        CheckpointError: If the weights do not fit the model.
    """
    made, refused = make_windows(run, wanted)
    rows = _in_last_file(run)
    rows += [Row('window', x.steps, x.combination, x.schedule) for x in made]
    start, greater = time.monotonic(), True
    best: Optional[Tuple[float, Row, bool, Dict[str, Tensor]]] = None
    chosen = ''
    for number, row in enumerate(rows, 1):
        state = row.combination.state_dict()
        choices = [(False, state)]
        row.metrics = evaluate_weights(runner, state)
        if recalibrate:
            state = recalibrated(runner, state, recalibrate)
            row.recalibrated = evaluate_weights(runner, state)
            choices.append((True, state))
        if row.metrics and not chosen:
            chosen, greater = choose(runner, row.metrics, metric)
        for is_recalibrated, weights in choices:
            value = row.value(chosen, is_recalibrated)
            if best is None or is_better(best[0], value, greater):
                best = value, row, is_recalibrated, weights
        seconds = (time.monotonic() - start) / number * (len(rows) - number)
        tell(
            f'{number}/{len(rows)} {row.title}: {chosen} '
            f'{row.value(chosen):.4f}, {duration(seconds)} left'
        )
    if not chosen or best is None:
        raise OptionError(_NOTHING)
    next_time = how_to_reach(run, made, refused)
    return Tuned(run, rows, chosen, greater, refused, next_time, *best[1:])


def _in_last_file(run: Run) -> List[Row]:
    """Return raw weights and averages of the last file."""
    last, lengths = run.files[-1], averages_of(run)
    names = [name for name in (RAW, *lengths) if name in last.sets]
    if not names:
        raise CheckpointError(
            f'{last.path!r} holds no raw weights and no averages; give the '
            f'work_dir of a run with EMAHook.'
        )
    return [
        Row(
            name,
            lengths.get(name),
            average([last], Profile('mean', 'mean'), weights=name),
        )
        for name in names
    ]


def duration(seconds: float) -> str:
    """Return a length of time in minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f'{minutes} min {rest} s' if minutes else f'{rest} s'


def choose(
    runner: Any, metrics: Mapping[str, float], name: Optional[str]
) -> Tuple[str, bool]:
    """Return the metric that is compared, and if higher is better."""
    if not metrics:
        raise OptionError(_NOTHING)
    if name is None:
        return choose_by(runner, metrics)
    if name not in metrics:
        raise OptionError(
            f'metric={show(name)} is not one of the validation; use one of '
            f'{", ".join(metrics)}.{did_you_mean(name, [*metrics])}'
        )
    return name, 'loss' not in name.lower()
