"""``mmdet-ema average``: parser, and what is printed."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping

from mmdet_ema.cli.reports import aligned
from mmdet_ema.cli.shared import (
    add_command,
    add_made_file,
    add_metric,
    add_unsafe,
    check_mmengine,
    recipe_of,
    say,
)
from mmdet_ema.errors import OptionError

if TYPE_CHECKING:
    from mmdet_ema.checkpoint.combination import Combination

_OWN = (
    *('profile', 'coefficients', 'weights', 'start', 'config', 'metric'),
    *('recalibrate', 'batches'),
)
# coefficients that nobody wants to read
_SMALL = 1e-4
_HELP = """\
The mean of files, or the EMA, SWA, ... of another window that one run would
have tracked. Sums are in float64; the file deploys as it is.

profiles, of all steps (fitted to what the files hold; see the error):
  ema:0.9995        EMA of that decay; ema:0.9999/2000 with the tau of a ramp
  swa:25%            mean of the last share of the steps; swa:5000 of so many
  power:0.05        power average of that relative width
  'inverse(decay=0.999)'   any schedule of the hook, with its options
profiles, of the files (exact):
  mean              all the same
  lawa:5            the last five, raw
  wsm:cosine        raw, as if the learning rate had decayed by cosine, linear
                    or 1-sqrt from the first file to the last
  bema:0.2          the last average with less lag, of that exponent
  soup:greedy       files into a mean as long as a metric gets no worse

examples:
  mmdet-ema average work_dirs/a/epoch_*.pth -o soup.pth --profile lawa:5
  mmdet-ema average work_dirs/a/epoch_*.pth -o b.pth --profile ema:0.999/500
  mmdet-ema average a.pth b.pth -o c.pth --coefficients 0.3,0.7
  mmdet-ema average *.pth -o d.pth --profile soup:greedy --config CONFIG
  mmdet-ema average *.pth -o e.pth --profile mean --recalibrate CONFIG
  mmdet-ema average --recipe e.pth -o same_as_e.pth"""


def add_parser(commands: Any) -> None:
    """Add the parser of the command."""
    does = 'average checkpoints: mean, EMA of another decay, SWA, soup'
    parser = add_command(commands, 'average', run, does, _HELP)
    parser.add_argument(
        'files', metavar='FILE', nargs='*', help='checkpoints, of one run'
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--profile', help='what the average should be')
    what.add_argument(
        '--coefficients',
        metavar='C,C,...',
        help='what each file counts; they sum up to 1 '
        '(--coefficients=-1,2 where the first is negative)',
    )
    parser.add_argument(
        '--weights',
        metavar='NAME',
        help='which weights of each file: raw, ema, ...; by default those '
        'that it deploys, for lawa and wsm the raw ones',
    )
    parser.add_argument(
        '--start',
        metavar='FILE',
        help='starting weights of the run; by default ema_start.pt beside '
        'the files',
    )
    parser.add_argument(
        '--config', help='whose validation chooses, for soup:greedy'
    )
    add_metric(parser)
    parser.add_argument(
        '--recalibrate',
        metavar='CONFIG',
        help='estimate BatchNorm statistics again, from its training data',
    )
    parser.add_argument(
        '--batches',
        metavar='N',
        type=int,
        help='how many batches; by default 100',
    )
    add_unsafe(parser)
    add_made_file(parser)


def run(options: argparse.Namespace) -> int:
    """Average files; return the exit status."""
    from mmdet_ema.checkpoint import saving
    from mmdet_ema.checkpoint.combination import Combination

    own = {name: getattr(options, name) for name in _OWN}
    files, said, made = recipe_of(options, own)
    if made is None:
        _check(options)
    if options.config:
        check_mmengine('--config')
    if said.get('recalibrate'):
        check_mmengine('--recalibrate')
    saving.check_free(options.out, options.force)
    if made is None:
        combination = _combine(options)
        if said['recalibrate'] and said['batches'] is None:
            said['batches'] = 100
        made = combination.recipe(said)
    else:
        combination = Combination.of_recipe(said, files, options.unsafe)
    for line in _lines(combination):
        say(line, options.out)
    state = combination.state_dict()
    if said.get('recalibrate'):
        from mmdet_ema.for_mmengine.tune import recalibrated, runner_of

        changes = said.get('cfg_options')  # of tune
        with runner_of(said['recalibrate'], cfg_options=changes) as runner:
            found = recalibrated(runner, state, said['batches'])
        for name, value in found.items():
            # the rest is as it was, but of the dtypes of the model
            if name.rpartition('.')[2].startswith('running_'):
                state[name] = value
    path = combination.save(state, made, options.out, options.force)
    if path != saving.STDOUT:
        say(f'{path}: written', options.out)
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.profile is None and options.coefficients is None:
        raise OptionError(
            'what is to be made? Give --profile, as --profile mean, or '
            '--coefficients; --help has them all.'
        )
    if options.batches is not None:
        if options.recalibrate is None:
            raise OptionError(
                '--batches has no effect without --recalibrate CONFIG.'
            )
        if options.batches < 1:
            raise OptionError(
                f'--batches {options.batches} is out of range; use at least 1.'
            )
    soup = options.profile == 'soup:greedy'
    for name in ('config', 'metric'):
        if getattr(options, name) is not None and not soup:
            raise OptionError(
                f'--{name} has no effect without --profile soup:greedy; '
                f'leave it out.'
            )


def _combine(options: argparse.Namespace) -> Combination:
    from mmdet_ema.checkpoint.average import average
    from mmdet_ema.checkpoint.combination import read_files
    from mmdet_ema.checkpoint.profiles import parse_profile

    text = options.profile
    if text is None:
        text = f'coefficients:{options.coefficients}'
    profile = parse_profile(text)
    files = read_files(options.files, unsafe=options.unsafe)
    with contextlib.ExitStack() as stack:
        evaluate = None
        if options.config is not None:
            from mmdet_ema.for_mmengine.tune import runner_of

            runner = stack.enter_context(runner_of(options.config))
            evaluate = _score_by(runner, options)
        return average(
            files,
            profile,
            weights=options.weights,
            start=options.start,
            evaluate=evaluate,
        )


def _score_by(
    runner: Any, options: argparse.Namespace
) -> Callable[[Mapping[str, Any]], float]:
    """Return what makes a score of weights, higher for better ones."""
    from mmdet_ema.for_mmengine.tune import choose, evaluate_weights

    told = False

    def score(state: Mapping[str, Any]) -> float:
        nonlocal told
        found = evaluate_weights(runner, state)
        name, greater = choose(runner, found, options.metric)
        if not told:
            sign = '' if greater else ', negative, as lower is better'
            say(f'scores are {name}{sign}', options.out)
            told = True
        return found[name] if greater else -found[name]

    return score


def _lines(combination: Combination) -> Iterator[str]:
    """Yield what each file counts, and what that is worth."""
    terms = combination.terms
    # but for rounding
    own = any(abs(x.statistics - x.coefficient) > 1e-9 for x in terms)
    rows = [('coefficient', *(['statistics'] if own else []), 'weights', '')]
    small = 0
    for contents, name, c, s in terms:
        if max(abs(c), s) < _SMALL:
            small += 1
            continue
        counts = (f'{c:.6f}', *([f'{s:.6f}'] if own else []))
        rows.append((*counts, name, contents.path))
    yield from aligned(rows, [*[True] * (len(rows[0]) - 1), False])
    if small:
        yield f'and {small} more, each below {_SMALL:g}'
    said = f'sum of absolute coefficients {combination.absolute_sum:.3f}'
    if combination.fit is not None:
        said = f'error of the profile {combination.fit.error:.2%}, {said}'
    if own:
        said += '; running statistics have their own, none negative, as a '
        said += 'variance would be'
    if combination.statistics is not None:
        said += f': error {combination.statistics.error:.2%}'
    yield said
    yield from combination.notes
