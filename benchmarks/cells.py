"""Numbers and Markdown tables."""

from __future__ import annotations

from typing import Iterable, Sequence

from benchmarks.figures import NOT_INSTALLED, Figure, Summary, ratios, summary

NOTHING = '-'


def number(value: float) -> str:
    """Return three significant digits, without an exponent."""
    if value == 0:
        return '0'
    text = f'{value:.3g}'
    return f'{value:.0f}' if 'e+' in text else f'{float(text):g}'


def spread(found: Summary, scale: float = 1.0) -> str:
    """Return a median with its quartiles."""
    median, lower, upper = (
        number(value * scale)
        for value in (found.median, found.lower, found.upper)
    )
    return f'{median} ({lower} to {upper})'


def timing(figure: Figure, metric: str, reference: Figure | None) -> str:
    """Return milliseconds and how often they are those of a reference.

    Args:
        figure: The figure.
        metric: Which of its values.
        reference: What it is compared with, round by round; None for nothing.

    Returns:
        The cell; it says so if there is no figure.
    """
    if figure.failed is not None:
        return problem(figure)
    text = spread(summary(figure.samples[metric]), 1000)
    if reference is None or reference.failed is not None:
        return text
    times = summary(ratios(figure, reference, metric)).median
    return f'{text}, {times:.2f}x'


def problem(figure: Figure) -> str:
    """Return in words why there is no figure."""
    reason = str(figure.failed).replace('|', '/')
    if reason.startswith(NOT_INSTALLED):
        return NOT_INSTALLED
    return f'failed: {reason}'


def percent(value: float) -> str:
    """Return a share in percent."""
    return f'{number(100 * value)} %'


def megabytes(value: float) -> str:
    """Return bytes in units of a million."""
    return f'{value / 1e6:.1f}'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first to the right."""
    line = '|---' + '|--:' * (len(head) - 1) + '|'
    lines = [_row(head), line, *(_row(row) for row in rows)]
    return '\n'.join(lines)


def _row(cells: Sequence[str]) -> str:
    return '| ' + ' | '.join(cells) + ' |'
