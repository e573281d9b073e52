"""The tables of a run, a section a part."""

from __future__ import annotations

from typing import Callable, Dict, Iterator, List, Tuple

from benchmarks import cells
from benchmarks.figures import (
    Case,
    Figure,
    Result,
    differences,
    ratios,
    summary,
)
from benchmarks.peers import LABELS

Results = List[Result]
_Key = Tuple[str, int, str]

TITLES = {
    'update': 'One update',
    'tensors': 'One update against the number of tensors, 16 MiB in all',
    'bytes': 'One update against bytes, 300 tensors',
    'swap': 'Averages into the model and out again',
    'save': 'Saving raw weights and averages',
    'step': 'A training step of RTMDet-tiny through the Runner',
    'loop': 'A training step of a RetinaNet-R50 in a plain loop',
    'hook': 'An iteration of a linear layer through the Runner',
    'memory': 'Memory',
}
_BASELINES = {'update': 'mmdet-buffers', 'swap': 'mmengine-buffers'}


def tables(results: Results) -> str:
    """Return all tables, in the order of ``TITLES``."""
    parts = {r.case.part for r in results}
    sections = [
        f'## {title}\n\n{_section(part, results)}'
        for part, title in TITLES.items()
        if part in parts
    ]
    return '\n\n'.join(sections) + '\n'


def _section(part: str, results: Results) -> str:
    chosen = [r for r in results if r.case.part == part]
    write = _WRITERS.get(part, _timings)
    texts = [
        f'{_caption(key)}\n\n{write(group)}'
        for key, group in _groups(chosen).items()
    ]
    return '\n\n'.join(texts)


def _groups(results: Results) -> Dict[_Key, Results]:
    groups: Dict[_Key, Results] = {}
    for result in results:
        case = result.case
        key = (case.device, case.threads, case.setting)
        groups.setdefault(key, []).append(result)
    return groups


def _caption(key: _Key) -> str:
    device, threads, setting = key
    where = 'GPU' if device != 'cpu' else f'CPU, threads: {threads}'
    return f'**{where}{", " + setting if setting else ""}**'


def _timings(results: Results) -> str:
    """Milliseconds of all competitors, a column a model."""
    texts = [
        _grid(metric, results)
        for metric in ('wall', 'device')
        if any(_has(r, metric) for r in results)
    ]
    if any(_has(r, 'syncs') for r in results):
        texts.append(_syncs(results))
    if results[0].case.part == 'update':
        texts.append(_gate(results))
    return '\n\n'.join(texts)


def _has(result: Result, metric: str) -> bool:
    return any(metric in f.samples for f in result.figures.values())


def _grid(metric: str, results: Results) -> str:
    kind = '' if metric == 'wall' else ' on the device'
    rows = [
        [LABELS[name], *(_timing(r, name, metric) for r in results)]
        for name in results[0].case.competitors
    ]
    head = [f'ms{kind}', *(_model(r.case) for r in results)]
    return cells.table(head, [*rows, *_gains(metric, results)])


def _timing(result: Result, name: str, metric: str) -> str:
    reference = result.figures.get('floor') if name != 'floor' else None
    return cells.timing(result.figures[name], metric, reference)


def _gains(metric: str, results: Results) -> Iterator[List[str]]:
    """A row that says how many times faster ours is than the framework's."""
    baseline = _BASELINES.get(results[0].case.part)
    if baseline is not None:
        gains = [_gain(r, baseline, metric) for r in results]
        yield [f'{LABELS[baseline]} / mmdet_ema', *gains]


def _gain(result: Result, baseline: str, metric: str) -> str:
    top, ours = result.figures[baseline], result.figures['ours']
    if top.failed is not None or ours.failed is not None:
        return cells.NOTHING
    return f'{summary(ratios(top, ours, metric)).median:.2f}x'


def _gate(results: Results) -> str:
    """What ``nonfinite='skip'`` costs, in the same rounds."""
    rows = []
    for result in results:
        skip, ignore = (result.figures[n] for n in ('ours', 'ours-ignore'))
        row = [cells.NOTHING, cells.NOTHING]
        if skip.failed is None and ignore.failed is None:
            extra = summary(differences(skip, ignore, 'wall'))
            share = extra.median / summary(skip.samples['wall']).median
            row = [cells.spread(extra, 1000), cells.percent(share)]
        rows.append([_model(result.case), *row])
    head = ["`nonfinite='skip'` costs", 'ms', 'share of the update']
    return cells.table(head, rows)


def _syncs(results: Results) -> str:
    rows = [
        [LABELS[name], *(_count(r.figures[name], 'syncs') for r in results)]
        for name in results[0].case.competitors
    ]
    head = ['host waits for the GPU', *(_model(r.case) for r in results)]
    return cells.table(head, rows)


def _count(figure: Figure, metric: str) -> str:
    if figure.failed is not None:
        return cells.problem(figure)
    return cells.number(figure.samples[metric][0])


def _model(case: Case) -> str:
    """Return the head of a column."""
    tensors, _, size = case.model.partition('x')
    if case.part == 'tensors':
        return tensors
    return f'{int(size) >> 20} MiB' if case.part == 'bytes' else case.model


def _steps(results: Results) -> str:
    """Whole steps, what they take longer, and the time inside hooks."""
    (result,) = results
    bare = result.figures['none']
    rows = [
        [LABELS[name], *_step(figure, bare)]
        for name, figure in result.figures.items()
    ]
    head = ['', 'ms a step', 'longer, ms', 'ms in hooks', 'share of the step']
    return cells.table(head, rows)


def _step(figure: Figure, bare: Figure) -> List[str]:
    if figure.failed is not None or bare.failed is not None:
        return [cells.problem(figure), *[cells.NOTHING] * 3]
    wall = cells.timing(figure, 'wall', None)
    extra = summary(differences(figure, bare, 'wall'))
    metric = 'hooks' if 'hooks' in figure.samples else 'wall'
    own = summary(differences(figure, bare, metric)).median
    hooks = cells.timing(figure, 'hooks', None) if metric == 'hooks' else ''
    share = own / summary(bare.samples['wall']).median
    return [wall, cells.spread(extra, 1000), hooks, cells.percent(share)]


def _hooks(results: Results) -> str:
    """Iterations, and what a hook adds besides a bare update."""
    (result,) = results
    rows = [
        [
            LABELS[name],
            cells.timing(figure, 'wall', None),
            *_besides(result, name),
        ]
        for name, figure in result.figures.items()
    ]
    head = ['', 'ms an iteration', 'longer, ms', 'besides the update, ms']
    return cells.table(head, rows)


def _besides(result: Result, name: str) -> List[str]:
    figure, bare = result.figures[name], result.figures['none']
    update = result.figures['update']
    wrong = any(f.failed is not None for f in (figure, bare, update))
    if name in ('none', 'update') or wrong:
        return [cells.NOTHING, cells.NOTHING]
    longer = differences(figure, bare, 'wall')
    added = cells.spread(summary(longer), 1000)
    if name != 'ours':
        return [added, cells.NOTHING]
    pairs = zip(longer, update.samples['wall'])
    return [added, cells.spread(summary([a - b for a, b in pairs]), 1000)]


def _memory(results: Results) -> str:
    """Bytes by competitor, a table a model."""
    return '\n\n'.join(_bytes(result) for result in results)


def _bytes(result: Result) -> str:
    metrics = ('kept', 'update', 'swap', 'save')
    rows = [
        [LABELS[name], *(_megabytes(figure, m) for m in metrics)]
        for name, figure in result.figures.items()
    ]
    head = [f'MB, {result.case.model}', *metrics]
    return cells.table(head, rows)


def _megabytes(figure: Figure, metric: str) -> str:
    if figure.failed is not None:
        return cells.problem(figure)
    values = figure.samples.get(metric)
    return cells.megabytes(values[0]) if values else cells.NOTHING


_WRITERS: Dict[str, Callable[[Results], str]] = {
    'step': _steps,
    'loop': _steps,
    'hook': _hooks,
    'memory': _memory,
}
