"""Averages of files: those that a run would have tracked, and plain ones.

A toy walks at random for 500 steps and leaves ten files. The oracle averages
every weight that it has had, in NumPy float64.
"""

import functools
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdet_ema import CheckpointError, OptionError
from mmdet_ema.checkpoint import profiles
from mmdet_ema.checkpoint.average import average
from mmdet_ema.checkpoint.combination import read_files
from mmdet_ema.checkpoint.profiles import parse_profile
from mmdet_ema.checkpoint.runs import Run
from tests import oracle
from tests.checkpoint.walk import EVERY, MAIN, STEPS, Walk


def counts(*coefficients):
    return parse_profile(f'coefficients:{",".join(map(str, coefficients))}')


@pytest.fixture(scope='module')
def walk(tmp_path_factory):
    """A run with posthoc=True, and a mean of all steps."""
    averages = dict(swa=dict(schedule='mean'))
    folder = tmp_path_factory.mktemp('walk')
    return Walk(folder, averages=averages, posthoc=True, **MAIN)


def tracked(decay_of):
    def expected(values):
        return oracle.average(values[0], values[1:], decay_of)

    return expected


EXACT = {
    'ema:0.999/50': tracked(lambda n: oracle.ramp(n, 0.999, 50)),
    'ema:0.99/12.5': tracked(lambda n: oracle.ramp(n, 0.99, 12.5)),
    'exponential(decay=0.999, tau=50)': tracked(
        lambda n: oracle.ramp(n, 0.999, 50)
    ),
    'mean()': tracked(lambda n: (n - 1) / n),
    # of the means at two files
    'swa:400': lambda values: values[101:].mean(0),
    'swa:80%': lambda values: values[101:].mean(0),
    'mean': None,
}


@pytest.mark.parametrize('text', [x for x in EXACT if x != 'mean'])
def test_tracked_in_the_run(walk, text):
    """What the run could have tracked, to the rounding of float32."""
    files = read_files(walk.files)
    made = average(files, parse_profile(text))
    assert made.fit.error < 1e-9
    found = walk.check(made, EXACT[text])
    # buffers, too
    for key in ('norm.running_mean', 'norm.running_var'):
        expected = EXACT[text](walk.values(key))
        np.testing.assert_allclose(found[key], expected, rtol=1e-5, atol=2e-7)


WITHIN = {
    'ema:0.995': tracked(lambda n: 0.995),
    'ema:0.995/25': tracked(lambda n: oracle.ramp(n, 0.995, 25)),
    'inverse(decay=0.997)': tracked(lambda n: min(0.997, (1 + n) / (10 + n))),
    'swa:300': lambda values: values[201:].mean(0),
    'half_life(half_life=150)': tracked(lambda n: 2 ** (-1 / 150)),
}


@pytest.mark.parametrize('text', WITHIN)
def test_within_the_error(walk, text):
    """Other windows, as near as the error that is shown."""
    profile = parse_profile(text)
    made = average(read_files(walk.files), profile)
    assert 0 <= made.fit.error < 0.1
    assert made.absolute_sum <= 3 + 1e-9
    walk.check(made, WITHIN[text], made.fit.error, profile.target(STEPS))


def test_every_profile_of_every_step(tmp_path):
    """Raw weights of every step and the start give any profile, exactly."""
    run = Walk(tmp_path, steps=12, every=1, posthoc=True, decay=0.9)
    for text, expected in {
        'ema:0.8': tracked(lambda n: 0.8),
        'ema:0.7/3': tracked(lambda n: oracle.ramp(n, 0.7, 3)),
        'swa:25%': lambda values: values[10:].mean(0),
        'power:0.2': tracked(
            lambda n: (1 - 1 / n) ** (profiles.power_exponent(0.2) + 1)
        ),
    }.items():
        made = average(read_files(run.files), parse_profile(text))
        assert made.fit.error < 1e-9
        run.check(made, expected)


@pytest.mark.parametrize('phase', [0, 3])
def test_interval(tmp_path, phase):
    """A window is made of what was averaged, every k-th step."""
    run = Walk(tmp_path, posthoc=True, interval=7, phase=phase, **MAIN)

    def expected(values):
        mean, decay = values[0], 1.0
        for n, value in enumerate(values[1:], 1):
            decay *= oracle.ramp(n, 0.995, 50)
            if n % 7 == phase:
                mean, decay = decay * mean + (1 - decay) * value, 1.0
        return mean

    files, profile = read_files(run.files), parse_profile('ema:0.995/50')
    made = average(files, profile)
    assert 0 < made.fit.error < 0.1
    run.check(made, expected, made.fit.error, Run(files).target(profile))
    exact = average(files, parse_profile('ema:0.999/50'))
    assert exact.fit.error < 1e-9


@pytest.mark.parametrize('level', [1.0, 100.0], ids=['sound', 'negative'])
def test_variance_is_never_negative(walk, level):
    """Running statistics have coefficients of their own, where it would be."""
    files, profile = read_files(walk.files), parse_profile('ema:0.9993/50')
    key = 'norm.running_var'
    for contents in files:
        for weights in contents.sets.values():
            weights.tensors[key] = torch.ones(3)
    start = average(files, profile)
    lowest = min(start.terms, key=lambda term: term.coefficient)
    assert lowest.coefficient < 0
    lowest.tensors[key] = torch.full((3,), level)
    made = average(files, profile)
    signed = sum(x.coefficient * x.tensors[key].double() for x in made.terms)
    assert (signed < 0).all() == (level > 1) == (made.statistics is not None)
    found = made.state_dict()
    for name in ('norm.running_mean', key):
        parts = [term.tensors[name].double() for term in made.terms]
        counts = [term.statistics for term in made.terms]
        expected = sum(c * x for c, x in zip(counts, parts))
        torch.testing.assert_close(found[name].double(), expected)
    counts = [term.statistics for term in made.terms]
    assert sum(counts) == pytest.approx(1, abs=1e-12)
    if made.statistics is None:
        assert counts == [term.coefficient for term in made.terms]
    else:
        assert min(counts) >= 0
        assert (found[key] > 0).all()


def test_mean(walk):
    """Every file counts the same: the averages that it deploys, or others."""
    files = read_files(walk.files)
    for weights, name in ((None, 'ema'), ('raw', 'raw'), ('swa', 'swa')):
        made = average(files, parse_profile('mean'), weights=weights)
        key = 'first.weight'
        parts = [x.sets[name].tensors[key].double().numpy() for x in files]
        found = made.state_dict()[key]
        np.testing.assert_allclose(found, np.mean(parts, 0), rtol=3e-7)


def test_mean_of_8_bits(tmp_path):
    """Summed up as any others; torch promotes them to nothing else."""
    kind = getattr(torch, 'float8_e4m3fn', None)
    if kind is None:
        pytest.skip('this torch has no such dtype')
    paths = [str(tmp_path / f'{i}.pth') for i in range(3)]
    values = torch.tensor([1.0, 2.0])
    try:
        for path, x in zip(paths, (values.to(kind), (-values).to(kind))):
            torch.save({'state_dict': {'a': x}}, path)
    except Exception:
        pytest.skip('this torch has too little for it')
    torch.save({'state_dict': {'a': values}}, paths[2])
    made = average(read_files(paths[:2]), counts(0.75, 0.25))
    found = made.state_dict()['a']
    assert (found.dtype, found.tolist()) == (kind, [0.5, 1.0])
    mixed = average(read_files(paths[1:]), counts(0.5, 0.5))
    with pytest.raises(CheckpointError, match=r'a is of .* and of .* in the'):
        mixed.state_dict()


def test_mean_of_low_precision(walk):
    """An average of bfloat16 is float32; a mean of raw weights is bfloat16."""
    files = read_files(walk.files)
    for weights, dtype in ((None, torch.float32), ('raw', torch.bfloat16)):
        made = average(files, parse_profile('mean'), weights=weights)
        assert made.state_dict()['low'].dtype == dtype


@pytest.mark.parametrize('last', [1, 4])
def test_lawa(walk, last):
    """The mean of the raw weights of the last files."""
    made = average(read_files(walk.files), parse_profile(f'lawa:{last}'))
    steps = range(STEPS, 0, -EVERY)[:last]
    walk.check(made, lambda values: values[list(steps)].mean(0))


@pytest.mark.parametrize('decay', profiles.WSM)
def test_wsm(walk, decay):
    """Raw weights count as a decay of the learning rate would have it."""
    made = average(read_files(walk.files[::-1]), parse_profile(f'wsm:{decay}'))
    steps = [*range(EVERY, STEPS + 1, EVERY)]
    counts = profiles.wsm_coefficients(decay, steps)
    walk.check(
        made, lambda values: np.tensordot(counts, values[steps], axes=1)
    )
    assert made.absolute_sum == pytest.approx(1)


def test_bema(walk):
    """The average, and a share of the way from the start to the end."""
    made = average(read_files(walk.files[-1:]), parse_profile('bema:0.2'))
    share = (10 + STEPS) ** -0.2
    track = EXACT['ema:0.999/50']
    walk.check(
        made,
        lambda values: track(values) + share * (values[-1] - values[0]),
    )
    assert made.absolute_sum == pytest.approx(1 + 2 * share)
    assert (made.state_dict()['norm.running_var'] >= 0).all()


def test_coefficients(walk):
    """Each file counts what it is told, in the order given."""
    files = read_files([walk.files[i] for i in (9, 0, 4)])
    made = average(files, counts(1.5, -0.3, -0.2), weights='raw')
    walk.check(
        made,
        lambda values: (
            1.5 * values[500] - 0.3 * values[50] - 0.2 * values[250]
        ),
    )
    statistics = [term.statistics for term in made.terms]
    assert [1, 0, 0] == statistics


def test_greedy_soup(walk):
    """A file is in the mean if that does not make the metric worse."""
    files = read_files(walk.files[::3])  # steps 50, 200, 350, 500
    value = {50: 3.0, 200: 1.0, 350: 2.0, 500: -1.0}
    key, seen = 'norm.weight', []
    parts = {
        step: x.sets['raw'].tensors[key].double()
        for step, x in zip(value, files)
    }

    def evaluate(state):
        """Find out what was mixed; the mean of some values is a bonus."""
        for count in range(1, 5):
            for chosen in itertools.combinations(value, count):
                mean = sum(parts[x] for x in chosen) / count
                if torch.allclose(state[key].double(), mean, atol=1e-6):
                    seen.append(chosen)
                    return max(value[x] for x in chosen) + sum(
                        value[x] > 1.5 for x in chosen
                    )
        raise AssertionError('not a mean of files')

    profile = parse_profile('soup:greedy')
    options = dict(weights='raw', evaluate=evaluate)
    made = average(files, profile, **options)
    assert [(50,), (200,), (350,), (500,)] == seen[:4]
    # best first: 50, then 350 (4 > 5 - 1), 200 and 500 change nothing
    assert [(50, 350), (50, 200, 350), (50, 200, 350, 500)] == seen[4:]
    assert [0.25] * 4 == [term.coefficient for term in made.terms]
    assert 'soup of 4 of 4: 5.0000' in made.notes
    options['evaluate'] = lambda state: -evaluate(state)
    made = average(files, profile, **options)
    assert ['iter_500.pth'] == [
        term.contents.path.rpartition('/')[2] for term in made.terms
    ]
    assert 'soup of 1 of 4: 1.0000' in made.notes


def test_one_value_twice(walk, tmp_path):
    """A best file holds what another one holds, and is left out."""
    copy = tmp_path / 'best.pth'
    copy.write_bytes(Path(walk.files[-1]).read_bytes())
    (tmp_path / 'ema_start.pt').write_bytes(
        (walk.folder / 'ema_start.pt').read_bytes()
    )
    files = read_files([*walk.files, str(copy)])
    made = average(files, parse_profile('lawa:2'))
    assert f'{copy} holds the same as {walk.files[-1]}' in made.notes[0]
    steps = [STEPS - EVERY, STEPS]
    walk.check(made, lambda values: values[steps].mean(0))


REFUSED = [
    ('ema:0.5', 'error of the profile .*, above 10%. Windows between'),
    ('lawa:11', 'lawa:11 needs 11 files of a run, 10 are given'),
    ('swa:501', 'swa:501: the files end at step 500; ask for at most'),
    ('soup:greedy', 'soup:greedy chooses by a metric: give --config CONFIG'),
]


@pytest.mark.parametrize(('text', 'match'), REFUSED, ids=str)
def test_refused(walk, text, match):
    """What these files cannot give, in one line."""
    files = read_files(walk.files)
    with pytest.raises((CheckpointError, OptionError), match=match) as error:
        average(files, parse_profile(text))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('given', 'match'),
    [
        (dict(profile=counts(1)), '1 coefficients are given for 2 files'),
        (dict(profile=counts(1, 1)), 'sum up to 2; they must sum up to 1'),
        (dict(profile=counts(3, -2)), r'coefficients sum up to 5, above 3'),
        (
            dict(profile=parse_profile('ema:0.9'), weights='raw'),
            "weights='raw' has no effect on ema:0.9; leave it out",
        ),
        (
            dict(profile=counts(0.5, 0.5), start='x'),
            "start='x' has no effect on coefficients",
        ),
        (
            dict(profile=parse_profile('mean'), weights='fast'),
            "no weights named 'fast'; there is: raw, ema",
        ),
    ],
    ids=str,
)
def test_wrong_options(walk, given, match):
    """One line, before anything is read."""
    files = read_files(walk.files[:2])
    with pytest.raises(ValueError, match=match) as error:
        average(files, **given)
    assert '\n' not in str(error.value)


def changed(path, tmp_path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, tmp_path / 'changed.pth')
    return str(tmp_path / 'changed.pth')


def test_other_model(walk, tmp_path):
    """Other names or shapes are refused, whatever is asked for."""
    for change, match in (
        (
            lambda x: [
                half.pop(prefix + 'low')
                for half, prefix in (
                    (x['state_dict'], ''),
                    (x['ema_state_dict'], 'module.'),
                    *(
                        (y['state_dict'], '')
                        for y in x['ema_averages'].values()
                    ),
                )
            ],
            r'low has none there, and shape \(3,\) here',
        ),
        (
            lambda x: x['state_dict'].update(low=torch.ones(4)),
            r'low has shape \(4,\) there, and shape \(3,\) here',
        ),
    ):
        other = changed(walk.files[1], tmp_path, change)
        with pytest.raises(CheckpointError, match=match):
            read_files([walk.files[0], other])


def test_other_runs(walk, tmp_path):
    """Files of another run are refused, but for a mean; it is said how."""
    other = Walk(tmp_path / 'other', seed=1, posthoc=True, every=25, **MAIN)
    mixed = read_files([walk.files[3], other.files[-1]])
    for text in ('ema:0.995', 'lawa:2', 'wsm:cosine', 'bema:0.2'):
        match = 'cannot be combined by steps: their averages started from'
        with pytest.raises(CheckpointError, match=match):
            average(mixed, parse_profile(text))
    average(mixed, parse_profile('mean')).state_dict()
    average(mixed, counts(0.5, 0.5)).state_dict()
    # of the same step: they do not say what they started from
    one, two = (
        Walk(tmp_path / str(seed), seed, steps=4, every=4, decay=0.9)
        for seed in (3, 4)
    )
    files = read_files([*one.files, *two.files])
    with pytest.raises(CheckpointError, match='both of step 4, and differ'):
        average(files, parse_profile('lawa:2'))


def test_run_that_had_no_averages_at_first(walk, tmp_path):
    """Its first files hold raw weights alone: lawa takes those of all."""
    step = STEPS - 2 * EVERY
    path = str(tmp_path / 'early.pth')
    state = dict(walk.states[step])
    state['tied.weight'] = state['first.weight']
    torch.save({'state_dict': state, 'meta': dict(iter=step)}, path)
    later = []
    for i, file in enumerate(walk.files[-2:], 1):
        content = torch.load(file, weights_only=True)
        content['meta']['iter'] = step + i * EVERY
        later.append(str(tmp_path / f'{i}.pth'))
        torch.save(content, later[-1])
    files = read_files([*later, path])
    made = average(files, parse_profile('lawa:3'))
    assert ['weights', 'raw', 'raw'] == [term.name for term in made.terms]
    walk.check(made, lambda values: values[[step, step + EVERY, -1]].mean(0))
    made = average(files, parse_profile('mean'))
    assert 'averages are combined with weights that are' in made.notes[0]
    profile = parse_profile('ema:0.9985/50')
    made = average(files, profile)
    assert f'{path} has no averages yet: it is left out' in made.notes
    late = average(read_files(later), profile)
    assert made.fit == late.fit


def test_one_run_is_taken_for_granted(tmp_path):
    """Without a start in the files it is said that nothing tells it."""
    run = Walk(tmp_path, steps=20, every=10, decay=0.9)
    made = average(read_files(run.files), parse_profile('lawa:2'))
    assert (
        'nothing in the files says that they are of one run' in made.notes[0]
    )


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        (
            lambda x: x['ema_meta'].update(schedule='constant(decay=0.9)'),
            r"ema is by exponential\(.*\) every 1 steps in '.*', and by "
            r"constant\(decay=0\.9\) every 1 steps in '.*': it was changed",
        ),
        (
            lambda x: x['ema_meta'].update(num_updates=7),
            'ema has counted 7 updates in 150 steps, which interval=1 does',
        ),
        (
            lambda x: x['ema_meta'].update(restarted=2),
            'their averages were restarted between them',
        ),
    ],
    ids=['schedule', 'counters', 'restarted'],
)
def test_changed_in_the_run(walk, tmp_path, change, match):
    """What was changed on the way is refused: the profile is not known."""
    other = changed(walk.files[2], tmp_path, change)
    files = read_files([walk.files[0], other])
    with pytest.raises(CheckpointError, match=match):
        average(files, parse_profile('ema:0.999/50'))


def set_meta(content, **values):
    content['ema_meta'].update(values)


ANYTHING = [-1, 0, 3, 10**12, 1.5, 'x', None, [], True, torch.ones(2)]
SCHEDULES = [
    'constant(decay=2)',
    'constant(decay=nan)',
    'cosine(total_steps=1000000000000)',
    'power(power=inf)',
    'exponential(decay=0.9, tau=1e-300, kappa=0)',
    'mean(' * 1000,
]


@pytest.mark.parametrize(
    'key',
    [
        *('averaged_steps', 'changed_at', 'interval', 'num_steps'),
        *('num_updates', 'restarted', 'schedule', 'start'),
    ],
)
def test_damaged_counters(walk, tmp_path, key):
    """Whatever a file says of its averages, one line at the worst."""
    for value in [*ANYTHING, *(SCHEDULES if key == 'schedule' else [])]:
        change = functools.partial(set_meta, **{key: value})
        path = changed(walk.files[2], tmp_path, change)
        for paths in ([path], [walk.files[0], path]):
            for text in ('ema:0.999/50', 'bema:0.2', 'lawa:1'):
                said = ''
                try:
                    average(read_files(paths), parse_profile(text))
                except (CheckpointError, OptionError) as error:
                    said = str(error)
                assert '\n' not in said


def test_other_names_in_one_file(walk, tmp_path):
    """Raw weights and averages of other tensors are refused."""

    def change(content):
        del content['ema_state_dict']['module.low']

    path = changed(walk.files[2], tmp_path, change)
    made = average(read_files([path]), parse_profile('lawa:1'))
    match = "raw of '.*' is of another model than '.*': low has none there"
    with pytest.raises(CheckpointError, match=match):
        made.state_dict()


def test_schedule_that_is_not_known(walk, tmp_path):
    """A callable of one's own is not used, with a line; a mean is."""

    def change(content):
        content['ema_meta'].update(schedule='my.schedule()')
        content['ema_averages'] = {}

    files = read_files([changed(walk.files[0], tmp_path, change)])
    match = 'cannot be made of these .*ema: the files do not say which sched'
    with pytest.raises(CheckpointError, match=match):
        average(files, parse_profile('ema:0.999/50'))
    raw = average(files, parse_profile('constant(decay=0)'))
    said = ' '.join(raw.notes)
    assert 'ema: the files do not say which schedule made it' in said
    assert 1 == len(raw.terms)


def test_start(walk, tmp_path):
    """Starting weights are of the run, or not used; those given must be."""
    path = tmp_path / 'iter_500.pth'
    path.write_bytes(Path(walk.files[-1]).read_bytes())
    files, start = read_files([str(path)]), tmp_path / 'ema_start.pt'
    profile = parse_profile('ema:0.999/50')
    made = average(files, profile)
    assert 'with the starting weights is not there' in made.notes[0]
    with pytest.raises(CheckpointError, match='needs starting weights'):
        average(files, parse_profile('bema:0.2'))
    torch.save({'state_dict': walk.states[1]}, start)
    made = average(files, profile)
    assert 'does not have the starting weights of' in made.notes[0]
    with pytest.raises(CheckpointError, match='leave --start out'):
        average(files, profile, start=str(start))
    right = str(walk.folder / 'ema_start.pt')
    assert [] == average(files, profile, start=right).notes


def test_files_without_steps(walk, tmp_path):
    """Plain files go by their iteration, or by the order given."""
    paths = []
    for i in (2, 0, 1):
        path = str(tmp_path / f'{i}.pth')
        state = walk.states[EVERY * (i + 1)]
        torch.save({'state_dict': state, 'meta': dict(iter=i)}, path)
        paths.append(path)
    made = average(read_files(paths), parse_profile('lawa:2'))
    steps = [2 * EVERY, 3 * EVERY]
    key = 'first.weight'
    expected = walk.values(key)[steps].mean(0)
    np.testing.assert_allclose(made.state_dict()[key], expected, rtol=3e-7)
    assert (
        walk.states[150]['norm.num_batches_tracked']
        == (made.state_dict()['norm.num_batches_tracked'])
    )
    with pytest.raises(CheckpointError, match='does not say how many steps'):
        average(read_files(paths), parse_profile('ema:0.9'))
    for path in paths:
        torch.save(torch.load(path, weights_only=True)['state_dict'], path)
    made = average(read_files(paths), parse_profile('lawa:2'))
    assert 'they are taken in the order given' in ' '.join(made.notes)
    expected = walk.values(key)[[EVERY, 2 * EVERY]].mean(0)
    np.testing.assert_allclose(made.state_dict()[key], expected, rtol=3e-7)


@pytest.mark.parametrize('key', ['epoch', 'global_step', 'start_epoch'])
def test_order_of_files_of_other_projects(key, tmp_path):
    """A shell puts epoch 10 before epoch 9; what a file says counts."""
    paths = []
    for i in (8, 9, 10):
        paths.append(str(tmp_path / f'checkpoint-{i}.pth'))
        content = {'model': {'a': torch.tensor(float(i))}, key: i}
        torch.save(content, paths[-1])
    files = read_files(sorted(paths))
    made = average(files, parse_profile('lawa:2'))
    assert made.state_dict()['a'] == 9.5
    assert files[0].path in (term.contents.path for term in made.terms)
    assert made.lead[0] is files[0]


def test_file_that_is_given_twice(walk, tmp_path):
    """By its name, or by a link: it counts twice, and that is said."""
    link = tmp_path / 'last.pth'
    link.symlink_to(walk.files[-1])
    files = read_files([*walk.files, str(link)])
    for given in ('mean', 'coefficients:' + ','.join(['0'] * 9 + ['.5'] * 2)):
        made = average(files, parse_profile(given))
        assert [f'{walk.files[-1]} is given 2 times, and counts as often'] == (
            made.notes
        )


def test_not_finite(walk, tmp_path):
    """A file with NaN is named; a mask of -inf is no such thing."""

    def change(content):
        content['state_dict']['first.bias'][0] = torch.nan

    bad = changed(walk.files[1], tmp_path, change)
    made = average(read_files([walk.files[0], bad]), parse_profile('mean'))
    said = re.escape(bad) + "' holds NaN or Inf in first.bias of ema"
    with pytest.raises(CheckpointError, match=said):
        made.state_dict()


def test_at_the_start_of_a_run(tmp_path):
    """Where all sets are the same, tensors are not taken for copied ones."""
    run = Walk(tmp_path, steps=2, every=1, schedule='annealing')
    first = read_files(run.files[:1])  # an update that copies
    made = average(
        [first[0], *read_files(run.files[1:])],
        counts(0.5, 0.5),
        weights='raw',
    )
    run.check(made, lambda values: values[1:].mean(0))


def test_copied_statistics(tmp_path):
    """Under update_buffers=False a fit has those of the end; a mean, means."""
    run = Walk(tmp_path, posthoc=True, update_buffers=False, **MAIN)
    files, key = read_files(run.files), 'norm.running_var'
    made = average(files, parse_profile('ema:0.995/50'))
    assert torch.equal(made.state_dict()[key], run.states[-1][key])
    made = average(files, parse_profile('lawa:2'))
    expected = run.values(key)[[STEPS - EVERY, STEPS]].mean(0)
    np.testing.assert_allclose(made.state_dict()[key], expected, rtol=3e-7)
