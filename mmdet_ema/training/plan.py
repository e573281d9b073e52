"""What a run will average, as far as it is known when training starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Iterable, Mapping, Optional, Sequence, Tuple

from mmdet_ema.averaging.averages import MAIN
from mmdet_ema.checkpoint.format import REFERENCE
from mmdet_ema.errors import OptionError
from mmdet_ema.schedules import to_the_power
from mmdet_ema.training.options import Options


@dataclass(frozen=True)
class RunFacts:
    """A training run, as planned."""

    iteration: int  # done when training starts; above 0 on resume
    max_iters: int  # in all, as the epochs
    max_epochs: int
    by_epoch: bool = True  # whether the loop counts epochs
    accumulation: int = 1  # iterations to one optimizer step
    batch_size: int = 1  # samples that one process takes in an iteration
    world_size: int = 1
    validates: bool = True  # whether it has a validation
    agrees: bool = True  # whether one is sure to be run on all ranks at once
    doubts: Tuple[str, ...] = ()  # on what looks wrong in its config
    folder: str = ''  # where its files go; '' on a rank that writes none

    @property
    def samples(self) -> int:
        """Samples that one optimizer step takes, over all processes."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def recalibrates(self) -> bool:
        """Whether statistics that were estimated again can be evaluated."""
        return self.agrees if self.world_size > 1 else self.validates


def batch_size_of(loader: Any) -> int:
    """Return the samples in a batch of a data loader, 1 if it is unknown."""
    sampler = getattr(loader, 'batch_sampler', None)
    sizes = (getattr(x, 'batch_size', None) for x in (loader, sampler))
    return int(next(filter(None, sizes), 1))


def refuse_second(
    hooks: Sequence[Any], custom_hooks: Optional[Sequence[Any]] = None
) -> None:
    """Refuse a run with several EMA hooks, ours or not.

    ``custom_hooks`` are those of the config of mmengine, where another part
    of the config may bring a hook as well.
    """
    if len(hooks) < 2:
        return
    names = [
        f'{type(hook).__module__}.{type(hook).__name__} '
        f'(priority={hook.priority!r})'
        for hook in hooks
    ]
    remedy = 'keep one in custom_hooks.'
    ours = []
    for i, hook in enumerate(custom_hooks or ()):
        # a script may have hooks in it that are made already
        kind = hook.get('type') if isinstance(hook, dict) else type(hook)
        if str(getattr(kind, '__name__', kind)).endswith('EMAHook'):
            ours.append((i, kind))
    if len(ours) == 1:
        place, kind = ours[0]
        base = '_base_.' if isinstance(kind, str) else ''  # else new-style
        remedy = (
            f'custom_hooks[{place}] of the config is one already, and '
            f"custom_imports = dict(imports=['mmdet_ema'], "
            f'allow_failed_imports=False) alone makes it ours: leave the '
            f'other out. To change the options of the one in a base, write '
            f"{base}custom_hooks[{place}].update(evaluate='both')."
        )
    raise OptionError(
        f'there are {len(names)} EMA hooks: {" and ".join(names)}. They '
        f"would average each other's weights; {remedy}"
    )


# what a config calls the last epochs, for which a hook changes the data
_LAST_EPOCHS = (
    *('train_pipeline_stage2', 'stage2_num_epochs'),
    *('switch_epoch', 'num_last_epochs'),
)


def doubt_switch(
    names: Iterable[str], hooks: Sequence[Any], remedy: str
) -> Tuple[str, ...]:
    """Doubt a config with last epochs that no hook switches to.

    A list of hooks in a config replaces the one of its base.
    """
    last = [x for x in _LAST_EPOCHS if x in {*names}]
    if not last or any('Switch' in type(x).__name__ for x in hooks):
        return ()
    return (
        f'the config has {last[0]} but no hook that switches to it '
        f'(PipelineSwitchHook, YOLOXModeSwitchHook): was custom_hooks of the '
        f'base replaced? {remedy}',
    )


class Plan:
    """The steps of a run, and the schedule over them.

    With kappa times as many samples a step as the decay was chosen for,
    ``decay ** kappa`` averages over the same number of samples (Busbridge et
    al. 2023, arXiv:2307.13813; the learning rate has to be scaled as well).
    """

    def __init__(
        self,
        options: Options,
        facts: RunFacts,
        done: int = 0,
        before: Optional[Mapping[str, Any]] = None,
        reference: Optional[int] = None,
    ):
        self.options, self.facts = options, facts
        # steps that the average has seen, and will have seen at the end
        self.done = done
        self.planned = planned_steps(options, facts, done)
        # the last of them that updates it, 0 for none
        since = (self.planned - options.choice.phase) % options.interval
        self.last_update = max(self.planned - since, 0)
        # ``ema_meta`` of the checkpoint; empty for a new run
        self.before = before or {}
        # samples a step that the decay was chosen for
        if reference is None:
            reference = _reference_of(self.before) or facts.samples
        self.reference = reference
        self.kappa = facts.samples / reference
        self.schedules = options.schedules_for(self.planned)
        self.unscaled = self.schedules[MAIN]
        if options.scale_decay and self.kappa != 1:
            for name, schedule in self.schedules.items():
                self.schedules[name] = to_the_power(schedule, self.kappa)
        self.schedule = self.schedules[MAIN]
        self.more = {k: x for k, x in self.schedules.items() if k != MAIN}
        # what a run that resumes from this one compares itself with
        self.meta: Dict[str, Any] = {
            'schedule': str(self.unscaled),
            'interval': options.interval,
            'batch_size': facts.batch_size * facts.accumulation,
            'world_size': facts.world_size,
            REFERENCE: reference if options.scale_decay else facts.samples,
        }

    @property
    def has_changed(self) -> bool:
        """Whether the decay is another than in the checkpoint.

        Then no schedule says what the average is made of.
        """
        told = [
            (
                str(meta.get('schedule')),
                meta.get('interval'),
                _samples_of(meta) / (_reference_of(meta) or 1),
            )
            for meta in (self.before, self.meta)
        ]
        return self.done > 0 and told[0] != told[1]


def _samples_of(meta: Mapping[str, Any]) -> int:
    samples: int = meta.get('batch_size', 0) * meta.get('world_size', 0)
    return samples


def _reference_of(meta: Mapping[str, Any]) -> Optional[int]:
    reference = meta.get(REFERENCE)
    if not isinstance(reference, int):
        reference = _samples_of(meta)
    return reference if reference > 0 else None


def planned_steps(options: Options, facts: RunFacts, done: int) -> int:
    """Return how many steps the average will have seen at the end."""
    first = facts.iteration
    iters_per_epoch = max(facts.max_iters // max(facts.max_epochs, 1), 1)
    # the last restart that is still to come
    restart = (max(options.restart_epochs, default=1) - 1) * iters_per_epoch
    if restart > first:
        first, done = restart, 0
    if not done:
        epochs = max(options.begin_epoch - 1, 0)
        begin = max(options.begin_iter - 1, epochs * iters_per_epoch)
        first = max(first, begin)
    if first >= facts.max_iters:
        return done
    # the framework steps at the last iteration too, whatever is left over
    total = -(-facts.max_iters // facts.accumulation)
    return done + total - first // facts.accumulation


def has_begun(options: Options, iteration: int, epoch: int) -> bool:
    """Return whether the iteration after so many is averaged."""
    begun = iteration + 1 >= options.begin_iter
    return begun and epoch + 1 >= options.begin_epoch


def check_begin(options: Options, facts: RunFacts) -> None:
    """Check that the average begins before the run ends."""
    if options.begin_epoch > facts.max_epochs:
        kind = '' if facts.by_epoch else ' (the run counts iterations)'
        raise OptionError(
            f'begin_epoch={options.begin_epoch} is past the end: '
            f'{facts.max_epochs} epochs are planned{kind}. Use a number up '
            f'to {facts.max_epochs}, or begin_iter.'
        )
    late = [x for x in options.restart_epochs if x > facts.max_epochs]
    if late:
        raise OptionError(
            f'restart_epochs={list(options.restart_epochs)}: epoch {late[0]} '
            f'is past the end: {facts.max_epochs} epochs are planned. Use '
            f'numbers up to {facts.max_epochs}.'
        )
    if options.begin_iter > facts.max_iters:
        raise OptionError(
            f'begin_iter={options.begin_iter} is past the end: '
            f'{facts.max_iters} iterations are planned. Use a number up to '
            f'{facts.max_iters}.'
        )
