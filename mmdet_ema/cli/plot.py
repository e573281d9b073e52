"""``mmdet-ema plot``: a picture of a run, from the logs in its work folder."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from mmdet_ema.errors import OptionError, did_you_mean

Curve = Dict[int, float]
"""Values by epoch or iteration."""
# what validation lines hold next to metrics
_NO_METRICS = ('data_time', 'epoch', 'iter', 'lr', 'memory', 'step', 'time')


def draw(
    work_dir: Path,
    picture: Optional[Path] = None,
    metric: Optional[str] = None,
) -> Path:
    """Draw metrics by weights, decay and distance of a run; return the path.

    Where the run was resumed or begun anew, what was done last counts. The
    metric is by default the one of which the logs have values of several sets
    of weights, an mAP before others.
    """
    lines = read_lines(work_dir)
    metrics, decays, distances = read_curves(lines)
    if not metrics and not decays:
        raise OptionError(
            f'{str(work_dir)!r} holds no log of a run with EMAHook: no '
            f'*/vis_data/scalars.json (mmengine) and no *.log.json (mmcv 1.x) '
            f'with metrics or ema_decay; give the work_dir of the training.'
        )
    by_set = _by_set(metrics, _sets(lines))
    bases = list(by_set)
    if metric is not None and metric not in bases:
        raise OptionError(
            f'--metric {metric}: the logs have {", ".join(bases) or "none"}.'
            f'{did_you_mean(metric, bases)}'
        )
    figure = new_figure(9, 3.6)
    from matplotlib.ticker import MaxNLocator

    left, right = figure.subplots(1, 2)
    shown = metric or (bases[0] if bases else '')
    curves = by_set.get(shown, {})
    averages = 'raw' in curves and 'ema' not in curves
    main = 'EMA weights' if averages else 'evaluated weights'
    words = {'': main, 'raw': 'raw weights'}
    colors = {'': 'tab:blue', 'raw': 'tab:orange'}
    others = iter(('green', 'red', 'purple', 'brown', 'pink', 'olive', 'cyan'))
    for name, curve in curves.items():
        left.plot(
            *zip(*sorted(curve.items())),
            's--' if name == 'raw' else 'o-',
            label=words.get(name, name),
            color=colors.get(name) or f'tab:{next(others, "gray")}',
            markersize=4,
        )
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel=_unit(lines), ylabel=shown or 'no validation yet')
    left.grid(alpha=0.3)
    if left.get_lines():
        left.legend()
    other = right.twinx()
    right.plot(*zip(*sorted(decays.items())) or ((), ()), color='tab:green')
    right.set(xlabel='iteration', ylabel='decay', ylim=(0, 1.02))
    right.yaxis.label.set_color('tab:green')
    other.plot(*zip(*sorted(distances.items())) or ((), ()), color='tab:red')
    other.set(ylabel='distance of average and raw weights')
    other.set_ylim(bottom=0)
    other.yaxis.label.set_color('tab:red')
    right.grid(alpha=0.3)
    figure.suptitle(
        f'{work_dir.resolve().name}: {shown or "training"} by weights, and '
        f'how the average follows them'
    )
    path = picture or work_dir / 'ema.png'
    write(figure, path)
    return path


def picture(path: str) -> Path:
    """Check the path of a picture, so that nobody waits for it in vain."""
    found = Path(path)
    if found.suffix not in ('.pdf', '.png', '.svg'):
        raise argparse.ArgumentTypeError(
            f'{path!r} is not a .png, .pdf or .svg file'
        )
    problem = why_not(found)
    if problem:
        raise argparse.ArgumentTypeError(problem)
    return found


def why_not(path: Path) -> str:
    """Return why a picture cannot be written there, or nothing."""
    said = f'{str(path)!r} cannot be written'
    if not path.parent.is_dir():
        return f'{said}: there is no such folder; make it'
    if path.is_dir():
        return f'{said}: it is a folder'
    if not os.access(path.parent, os.W_OK):
        return f'{said}: its folder is read-only'
    return ''


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of matplotlib, which may be missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError(
            'a picture needs matplotlib, which is not installed: '
            'pip install matplotlib'
        ) from None
    return Figure(figsize=(width, height), layout='constrained')


def write(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib beside its place, and move it there."""
    beside = path.with_name(f'.{path.stem}.tmp{path.suffix}')
    try:
        figure.savefig(beside, dpi=120)
        os.replace(beside, path)
    except OSError as error:
        raise OptionError(
            f'{str(path)!r} cannot be written ({error.strerror}); name '
            f'another picture.'
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def read_lines(work_dir: Path) -> List[Dict[str, Any]]:
    """Return what was logged, in order, a dict a line.

    A start of a run replaces what was logged from its first step on.
    """
    patterns = ('vis_data/scalars.json', '*/vis_data/scalars.json')
    files = [path for x in patterns for path in work_dir.glob(x)]
    lines: List[Dict[str, Any]] = []
    for path in sorted(files or work_dir.glob('*.log.json')):
        started = list(_read(path))
        lines = [*_before(lines, started), *started]
    return lines


def _read(path: Path) -> Iterator[Dict[str, Any]]:
    for line in path.read_text(encoding='utf-8').splitlines():
        try:
            found = json.loads(line)
        except ValueError:  # a run that was killed leaves half a line
            continue
        if isinstance(found, dict):
            yield found


def _before(
    lines: List[Dict[str, Any]], started: List[Dict[str, Any]]
) -> List[Dict[str, Any]]:
    """Return the lines that are of steps before a start of a run."""
    train = ('lr', 'ema_decay')
    first: Dict[str, Any] = next(
        (
            line
            for line in started
            if line.get('mode') != 'val' and any(x in line for x in train)
        ),
        {},
    )
    by_epoch = _unit([*lines, *started]) == 'epoch'

    def is_before(line: Dict[str, Any]) -> bool:
        if 'step' not in line:  # mmcv 1.x
            keys = ('epoch', 'iter')
            return [line.get(x, 0) for x in keys] < [first[x] for x in keys]
        validates = by_epoch and not any(x in line for x in train)
        return bool(line['step'] < first['epoch' if validates else 'step'])

    try:
        return [line for line in lines if is_before(line)]
    except (KeyError, TypeError):  # no line tells when it started
        return lines


def read_curves(
    lines: List[Dict[str, Any]],
) -> Tuple[Dict[str, Curve], Curve, Curve]:
    """Return metrics by name, decays and distances.

    Metrics come by epoch, or by iteration where the run validates by
    iteration; decay and distance of the main averages by iteration.
    """
    metrics: Dict[str, Curve] = {}
    decays: Curve = {}
    distances: Curve = {}
    train = [line for line in lines if 'ema_decay' in line]
    # mmcv 1.x counts the iterations of each epoch
    length = max((int(line.get('iter', 0)) for line in train), default=0)
    for line in lines:
        if 'ema_decay' in line:
            step = line.get('step')
            if step is None:
                step = (line.get('epoch', 1) - 1) * length + line['iter']
            decays[int(step)] = line['ema_decay']
            if 'ema_distance' in line:
                distances[int(step)] = float(line['ema_distance'])
        elif line.get('mode') == 'val' or (
            'mode' not in line and 'lr' not in line
        ):
            step = line.get('step', line.get('epoch', line.get('iter')))
            for name, value in line.items():
                number = isinstance(value, (int, float))
                if step is not None and number and name not in _NO_METRICS:
                    metrics.setdefault(name, {})[int(step)] = value
    return metrics, decays, distances


def _sets(lines: List[Dict[str, Any]]) -> List[str]:
    """Return the sets of weights that a run may have evaluated."""
    start = 'ema_decay_'
    names = [x for line in lines for x in line if x.startswith(start)]
    more = [name[len(start) :] for name in names]
    return list(dict.fromkeys(['raw', 'ema', *more]))


def _by_set(
    metrics: Dict[str, Curve], sets: List[str]
) -> Dict[str, Dict[str, Curve]]:
    """Return a curve a set of weights by metric, the most telling first.

    The main set has the plain names; its own is empty here.
    """
    found: Dict[str, Dict[str, Curve]] = {}
    for name, curve in metrics.items():
        bases = {
            name[: -len(x) - 1]: x for x in sets if name.endswith(f'_{x}')
        }
        base = min((x for x in bases if x in metrics), key=len, default=name)
        found.setdefault(base, {})[bases.get(base, '')] = curve

    def rank(name: str) -> Tuple[bool, bool]:
        return len(found[name]) == 1, 'mAP' not in name

    return {name: found[name] for name in sorted(found, key=rank)}


def _unit(lines: List[Dict[str, Any]]) -> str:
    """Return what validations are counted in."""
    steps = [x['step'] for x in lines if 'lr' not in x and 'step' in x]
    epochs = [x['epoch'] for x in lines if 'lr' in x and 'epoch' in x]
    by_iteration = steps and (not epochs or max(steps) > max(epochs))
    return 'iteration' if by_iteration else 'epoch'
