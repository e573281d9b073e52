"""How many steps a run will average, and whether the options fit it."""

from __future__ import annotations

from typing import List

from mmdet_ema.errors import OptionError
from mmdet_ema.training.facts import RunFacts
from mmdet_ema.training.options import HookOptions


def has_begun(options: HookOptions, iteration: int, epoch: int) -> bool:
    """Return whether the next iteration is averaged.

    Args:
        options: Options of the hook.
        iteration: Iterations done.
        epoch: Epochs done.
    """
    return (
        iteration + 1 >= options.begin_iter
        and epoch + 1 >= options.begin_epoch
    )


def planned_steps(options: HookOptions, facts: RunFacts, done: int) -> int:
    """Return how many steps the average will have seen at the end.

    Args:
        options: Options of the hook.
        facts: The run as planned.
        done: Steps that it has seen already; above 0 only on resume.
    """
    first = facts.iteration
    if not done:
        epochs = max(options.begin_epoch - 1, 0)
        begin = max(options.begin_iter - 1, epochs * facts.iters_per_epoch)
        first = max(first, begin)
    if first >= facts.max_iters:
        return done
    # the framework steps at the last iteration too, whatever is left over
    total = -(-facts.max_iters // facts.accumulation)
    return done + total - first // facts.accumulation


def unused(options: HookOptions, facts: RunFacts, done: int) -> List[str]:
    """List the options that change nothing in this run.

    Args:
        options: Options of the hook.
        facts: The run as planned.
        done: Steps that the average has seen already.

    Returns:
        A sentence each.
    """
    found = list(options.no_effect)
    if done and (options.begin_iter or options.begin_epoch):
        name = 'begin_iter' if options.begin_iter else 'begin_epoch'
        found.append(f'{name} has no effect: the average has begun already.')
    if options.evaluate == 'both' and not facts.validates:
        found.append(
            "evaluate='both' has no effect: this run has no validation."
        )
    return found


def check_begin(options: HookOptions, facts: RunFacts) -> None:
    """Check that the average begins before the run ends.

    Args:
        options: Options of the hook.
        facts: The run as planned.

    Raises:
        OptionError: If it does not.
    """
    if options.begin_epoch > facts.max_epochs:
        kind = '' if facts.by_epoch else ' (the run counts iterations)'
        raise OptionError(
            f'begin_epoch={options.begin_epoch} is past the end: '
            f'{facts.max_epochs} epochs are planned{kind}. Use a number up '
            f'to {facts.max_epochs}, or begin_iter.'
        )
    if options.begin_iter > facts.max_iters:
        raise OptionError(
            f'begin_iter={options.begin_iter} is past the end: '
            f'{facts.max_iters} iterations are planned. Use a number up to '
            f'{facts.max_iters}.'
        )
