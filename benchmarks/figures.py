"""What is to be measured, what was, and the statistics of it."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

NOT_INSTALLED = 'not installed'


@dataclass(frozen=True)
class Case:
    """Competitors that are measured side by side, in the same rounds.

    Args:
        part: What is measured, such as 'update'.
        model: Whose tensors.
        competitors: Their names.
        device: 'cpu' or 'cuda'. Defaults to 'cpu'.
        threads: Threads of torch. Defaults to 1.
        setting: What else sets the case apart, such as 'cold'.
            Defaults to ''.
    """

    part: str
    model: str
    competitors: tuple[str, ...]
    device: str = 'cpu'
    threads: int = 1
    setting: str = ''

    @property
    def title(self) -> str:
        """One line that names the case."""
        threads = f'{self.threads} thread' + 's' * (self.threads > 1)
        words = [self.part, self.model, self.device, threads, self.setting]
        return ', '.join(filter(None, words))


@dataclass
class Figure:
    """What was measured of one competitor.

    Args:
        samples: Values by metric, one a round: seconds, bytes or counts.
        failed: Why there is no figure. Defaults to None.
    """

    samples: dict[str, list[float]] = field(default_factory=dict)
    failed: str | None = None

    def add(self, sample: dict[str, float]) -> None:
        """Add the values of a round."""
        for metric, value in sample.items():
            self.samples.setdefault(metric, []).append(value)


@dataclass
class Result:
    """A case with the figures of its competitors."""

    case: Case
    figures: dict[str, Figure]

    @property
    def failures(self) -> list[str]:
        """One line for each competitor without a figure."""
        return [
            f'{self.case.title}: {name}: {figure.failed}'
            for name, figure in self.figures.items()
            if figure.failed is not None
        ]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values, with summaries beside the samples."""
        figures = {name: asdict(fig) for name, fig in self.figures.items()}
        for name, figure in self.figures.items():
            figures[name]['summary'] = {
                metric: asdict(summary(values))
                for metric, values in figure.samples.items()
            }
        return {'case': asdict(self.case), 'figures': figures}


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of ``rounds`` values."""

    median: float
    lower: float
    upper: float
    rounds: int


def summary(values: list[float]) -> Summary:
    """Return median and quartiles of at least one value."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, method='inclusive')
    return Summary(median, lower, upper, len(values))


def failure(error: BaseException | str) -> Figure:
    """Return the figure of a competitor that could not be measured."""
    if isinstance(error, BaseException):
        text = ' '.join(str(error).split())
        error = f'{type(error).__name__}: {text}'[:200]
    return Figure(failed=error)


def ratios(top: Figure, bottom: Figure, metric: str) -> list[float]:
    """Return the ratio of two competitors in every round.

    On a noisy machine both of a round are slow together, so the median of
    these is steadier than the ratio of the medians.
    """
    pairs = zip(top.samples[metric], bottom.samples[metric])
    return [a / b for a, b in pairs]


def differences(top: Figure, bottom: Figure, metric: str) -> list[float]:
    """Return the difference of two competitors in every round."""
    pairs = zip(top.samples[metric], bottom.samples[metric])
    return [a - b for a, b in pairs]


def from_json(row: dict[str, Any]) -> Result:
    """Return the result that :meth:`Result.as_json` returned."""
    case = {**row['case'], 'competitors': tuple(row['case']['competitors'])}
    figures = {
        name: Figure(figure['samples'], figure['failed'])
        for name, figure in row['figures'].items()
    }
    return Result(Case(**case), figures)
