"""Rounds, ratios and tables."""

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import step
from benchmarks.rounds import Figure, compare, ratios
from benchmarks.tables import models_table, several_table, step_table


def test_every_round_takes_every_competitor_once_in_changing_order():
    """No competitor always comes after the same other one."""
    calls = []

    def make(name):
        return lambda: (float(len(calls)), calls.append(name))[:1]

    figures = compare('abc', make, 20)

    rounds = [tuple(calls[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(names) == ['a', 'b', 'c'] for names in rounds)
    assert len(set(rounds)) > 2
    # samples of a round are at the same place
    for k, names in enumerate(rounds):
        found = [figures[name].samples[k][0] for name in names]
        assert found == [3 * k, 3 * k + 1, 3 * k + 2]


def test_who_cannot_be_made_is_left_out():
    """It is said why; a missing package is not a failure."""

    def make(name):
        if name == 'gone':
            raise ModuleNotFoundError(name='timm')
        if name == 'broken':
            raise RuntimeError('out of\norder')
        return lambda: (1.0,)

    figures = compare(['gone', 'broken', 'fine'], make, 3)

    assert figures['gone'].failed == 'not installed (timm)'
    assert figures['broken'].failed == 'failed: RuntimeError: out of order'
    assert figures['fine'].column() == [1.0] * 3


def test_ratios_are_taken_within_a_round():
    """A round in which the machine is ten times slower does not count."""
    random = np.random.default_rng(0)
    floor, times = random.uniform(1, 10, 21), random.uniform(1, 2, 21)

    found = ratios(list(floor * times), list(floor))

    np.testing.assert_allclose(found, np.quantile(times, [0.25, 0.5, 0.75]))


def test_tables():
    """Milliseconds, ratios to the first, shares, and why there is nothing."""
    bare = Figure([(0.1, 0.0), (0.2, 0.0), (0.3, 0.0)])
    hook = Figure([(0.11, 0.0011), (0.22, 0.0011), (0.33, 0.0033)])
    figures = {'floor': bare, 'ours': hook, 'x': Figure(failed='a|b')}

    assert cells(models_table({'tiny': figures})) == [
        ['ms', 'tiny'],
        ['floor', '200'],
        ['ours', '220, 1.1x (1.1 to 1.1)'],
        ['x', 'a/b'],
    ]
    assert cells(step_table({'tiny': figures})) == [
        ['tiny', 'ms a step', 'to one without', 'ms in the average', 'share'],
        ['floor', '200 (150 to 250)', '', '', ''],
        [
            *('ours', '220 (165 to 275)', '1.1x (1.1 to 1.1)'),
            *('1.1 (1.1 to 2.2)', '1 % (0.75 to 1)'),
        ],
        ['x', 'a/b', '', '', ''],
    ]


def test_table_of_several_averages():
    """Two averages are compared with their floor and with two times one."""
    times = {'floor of 1': 1, 'ours, 1': 2, 'floor of 2': 2, 'ours, 2': 3}
    figures = {k: Figure([(x / 1000,)] * 3) for k, x in times.items()}

    _, *rows = cells(several_table({'tiny': figures}))

    assert rows == [
        ['tiny, 1', '1', '2', '2x (2 to 2)', '1x (1 to 1)'],
        ['tiny, 2', '2', '3', '1.5x (1.5 to 1.5)', '0.75x (0.75 to 0.75)'],
    ]


@pytest.mark.parametrize('name', [step.NONE, 'mmdet_ema'])
def test_plain_loop_is_measured(name):
    """The update is a part of the step."""
    whole, inside = step.in_plain_loop(name, 'cpu')()

    assert (inside > 0) == (name != step.NONE)
    assert inside < whole


def test_run_prints_and_writes_tables(tmp_path, capsys):
    """Two rounds of everything on the smallest model."""
    pytest.importorskip('mmdet')
    file = tmp_path / 'tables.md'
    words = ['--rounds', '2', '--threads', '1', '--models', 'rtmdet-tiny']

    status = command.main([*words, '--write', str(file)])

    text = file.read_text()
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert text.strip() == printed.out.strip().replace('\n\n\n', '\n\n')
    assert all(title in text for title in command.PARTS.values())
    # step, update and swap
    assert 3 == text.count('| mmdet_ema ')
    assert 'failed' not in text


@pytest.mark.parametrize(
    ('words', 'named'),
    [
        (('--only', 'updates'), 'no updates; there are step, update, several'),
        (('--models', 'yolo'), 'there are rtmdet-tiny, yolox-s'),
        (('--threads', '0'), '0 is not 1 or more'),
        (('--rounds', '1'), '--rounds 1: there are no quartiles'),
    ],
)
def test_wrong_word_is_named_with_what_there_is(capsys, words, named):
    """The exit status is 2, and nothing is measured."""
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def cells(table):
    head, _, *rows = table.splitlines()
    return [
        [cell.strip() for cell in line[1:-1].split('|')]
        for line in (head, *rows)
    ]
