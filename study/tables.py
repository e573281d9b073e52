"""Tables and the pictures of the study, written into its pages."""

from __future__ import annotations

import json
import re
import statistics
from typing import Any, Callable, Dict, List, Sequence, Tuple

from matplotlib.figure import Figure

from mmdet_ema.cli import plot
from study.evaluate import AGAIN, BATCHES, TUNED
from study.runs import AUTO, ROOT, SETTINGS, SHARES, Setting, name_of

PAGES = {x: ROOT / 'docs' / x / 'study.md' for x in ('en', 'zh_cn')}
PICTURES = ROOT / 'docs' / 'images'
PARTS = ('validation', 'held out')
TRACKED = [name_of(share) for share in SHARES]
AUTOMATIC = name_of(AUTO)
Results = Dict[str, List[Dict[str, Any]]]

WORDS = {
    'en': {
        'weights': 'weights',
        'validation': 'validation',
        'held out': 'held out',
        'gain': 'over raw',
        'recalibrated': 'recalibrated, over raw',
        'raw': 'raw',
        'default': 'the default, 0.9999',
        'swa': 'SWA, the last quarter',
        TUNED: "`tune`'s pick",
        'window': 'window of {:g} %',
        'auto': "{}, `decay='auto'`",
        'seed': 'seed',
        'pick': 'pick',
        'best': 'best of eight',
        'over': "pick over `'auto'`",
        'cost': 'time, memory',
        'mean': 'mean',
        'of': '{}: {}',
    },
    'zh_cn': {
        'weights': '权重',
        'validation': '验证集',
        'held out': '留出部分',
        'gain': '比原始权重',
        'recalibrated': '重新估计后，比原始权重',
        'raw': '原始权重',
        'default': '默认值 0.9999',
        'swa': 'SWA，最后四分之一',
        TUNED: '`tune` 的选择',
        'window': '窗口 {:g} %',
        'auto': "{}，`decay='auto'`",
        'seed': '种子',
        'pick': '选择',
        'best': '八者最好',
        'over': "选择比 `'auto'`",
        'cost': '时间，内存',
        'mean': '平均',
        'of': '{}：{}',
    },
}


def read() -> Results:
    """Return the results of the runs that are done, by setting."""
    found: Results = {}
    for name, setting in SETTINGS.items():
        if name == 'short':
            continue
        files = setting.folder(0).parent.glob('seed_*/results.json')
        runs = [json.loads(path.read_text()) for path in sorted(files)]
        if runs:
            found[name] = runs
    return found


def write(results: Results) -> None:
    """Write tables into both pages, and the pictures."""
    for language, page in PAGES.items():
        text = page.read_text(encoding='utf-8')
        for name, runs in results.items():
            words, setting = WORDS[language], SETTINGS[name]
            for kind, table in (
                ('sets', sets_table(runs, words)),
                ('tune', tune_table(setting, runs, words)),
            ):
                text = _put(text, f'{name} {kind}', table)
        page.write_text(text, encoding='utf-8')
    for name, runs in results.items():
        _draw(SETTINGS[name], runs)


def sets_table(runs: Sequence[Dict[str, Any]], words: Dict[str, str]) -> str:
    """Return mAP by set of weights, mean and deviation over the seeds."""
    head = [words['weights']]
    for part in PARTS:
        head += [words[part], words['gain'], words['recalibrated']]
    lines = [head, ['---'] * len(head)]
    for name in ('raw', 'default', *TRACKED, 'swa', TUNED):
        line = [title(name, words)]
        for part in PARTS:
            raws = [run['plain'][part]['raw'] for run in runs]
            values = [run['plain'][part][name] for run in runs]
            again = [
                run['recalibrated'][part][name] - raw
                for run, raw in zip(runs, raws)
                if name in AGAIN
            ]
            gains = [value - raw for value, raw in zip(values, raws)]
            line += [
                spread(values),
                '' if name == 'raw' else spread(gains, '+'),
                spread(again, '+'),
            ]
        lines.append(line)
    return _markdown(lines)


def tune_table(
    setting: Setting, runs: Sequence[Dict[str, Any]], words: Dict[str, str]
) -> str:
    """Return what ``tune`` picked for each seed, and the best of eight."""
    head = [words['seed'], words['pick']]
    for part in PARTS:
        head += [
            words['of'].format(words[part], words['pick']),
            words['best'],
            words['over'],
        ]
    lines = [[*head, words['cost']], ['---'] * (len(head) + 1)]
    overs: Dict[str, List[float]] = {part: [] for part in PARTS}
    for seed, run in enumerate(runs):
        line = [str(seed), share_of(run['pick'], setting.steps)]
        # chosen by the validation, as tune chooses
        best = max(TRACKED, key=run['plain']['validation'].__getitem__)
        for part in PARTS:
            found = run['plain'][part]
            overs[part].append(found[TUNED] - found[AUTOMATIC])
            line += [
                f'{found[TUNED]:.3f}',
                f'{found[best]:.3f}',
                f'{overs[part][-1]:+.3f}',
            ]
        lines.append([*line, f'{run["seconds"]:.0f} s, {run["megabytes"]} MB'])
    means = [spread(overs[part], '+') for part in PARTS]
    lines.append([words['mean'], '', '', '', means[0], '', '', means[1], ''])
    return _markdown(lines)


def share_of(pick: str, steps: int) -> str:
    """Return the length of a window as a share of the run."""
    if not pick.startswith('window '):
        return f'`{pick}`'
    return f'{100 * float(pick[len("window ") :]) / steps:.3g} %'


def title(name: str, words: Dict[str, str]) -> str:
    """Return what a set of weights is called in a table."""
    if name not in TRACKED:
        return words[name]
    share = 100 * SHARES[TRACKED.index(name)]
    text = words['window'].format(round(share, 6))
    return words['auto'].format(text) if name == AUTOMATIC else text


def spread(values: Sequence[float], sign: str = '') -> str:
    """Return mean and standard deviation; nothing for no values."""
    if not values:
        return ''
    mean = f'{statistics.mean(values):{sign}.3f}'
    if len(values) == 1:
        return mean
    return f'{mean} ± {statistics.stdev(values):.3f}'


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _put(text: str, name: str, table: str) -> str:
    """Put a table between its marks in a page."""
    begin, end = f'<!-- {name} -->', '<!-- end -->'
    found, count = re.subn(
        f'({re.escape(begin)}\n).*?({end})',
        lambda match: f'{match[1]}\n{table}\n\n{match[2]}',
        text,
        flags=re.DOTALL,
    )
    # a setting that no page speaks of is for the reader of results.json
    return found if count else text


def _draw(setting: Setting, runs: Sequence[Dict[str, Any]]) -> None:
    """Draw the gain over the raw weights against the window."""
    figure = Figure(figsize=(5, 3.4), layout='constrained')
    axes = figure.subplots()
    for part, color in zip(PARTS, ('tab:blue', 'tab:orange')):
        _line(axes, part, color, setting, runs)
    axes.axhline(0, color='gray', lw=1)
    axes.set_xscale('log')
    axes.set(
        title=f'{setting.title} ({len(runs)} seed{"s" * (len(runs) > 1)})',
        xlabel='window, % of the run',
        ylabel='mAP over that of the raw weights',
    )
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    # a setting that is run alone leaves the pictures of the others
    plot.write(figure, PICTURES / f'study_{setting.name}.png')


def _line(
    axes: Any,
    part: str,
    color: str,
    setting: Setting,
    runs: Sequence[Dict[str, Any]],
) -> None:
    def gains(get: Callable[[Dict[str, Any]], float]) -> List[float]:
        return [get(run) - run['plain'][part]['raw'] for run in runs]

    found: List[Tuple[float, float, float]] = []
    for share, name in zip(SHARES, TRACKED):
        values = gains(lambda run, n=name: run['plain'][part][n])  # type: ignore[misc]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        found.append((100 * share, statistics.mean(values), deviation))
    x, mean, deviation = zip(*found)
    axes.errorbar(
        x, mean, deviation, fmt='o-', color=color, ms=4, label=part, capsize=2
    )
    picks = gains(lambda run: run['plain'][part][TUNED])
    axes.axhline(
        statistics.mean(picks), color=color, ls=':', label=f'tune, {part}'
    )


def describe(results: Results) -> str:
    """Return the tables as text, for the terminal."""
    blocks = []
    for name, runs in results.items():
        setting = SETTINGS[name]
        blocks += [
            f'{setting.title}: {len(runs)} seed(s) of {setting.steps} steps; '
            f'statistics from {BATCHES} batches',
            sets_table(runs, WORDS['en']),
            tune_table(setting, runs, WORDS['en']),
        ]
    return '\n\n'.join(blocks)
