"""Statistics, and results as plain values."""

import json

from benchmarks.figures import (
    Case,
    Figure,
    Result,
    Summary,
    differences,
    failure,
    from_json,
    ratios,
    summary,
)

CASE = Case('update', 'toy-1000', ('floor', 'ours'), 'cpu', 2, 'cold')


def test_summary_is_median_and_quartiles():
    """The quartiles of 1 ... 5 are 2, 3 and 4."""
    expected = Summary(median=3, lower=2, upper=4, rounds=5)

    assert expected == summary([5.0, 1.0, 4.0, 2.0, 3.0])


def test_one_value_is_its_own_quartiles():
    """Bytes are measured once."""
    assert Summary(7, 7, 7, 1) == summary([7.0])


def test_ratio_is_taken_within_a_round():
    """A round in which the machine is ten times slower does not count."""
    top = Figure({'wall': [2.0, 20.0, 2.0]})
    bottom = Figure({'wall': [1.0, 10.0, 1.0]})

    assert [2.0, 2.0, 2.0] == ratios(top, bottom, 'wall')
    assert [1.0, 10.0, 1.0] == differences(top, bottom, 'wall')


def test_result_survives_json():
    """What is read from a file is what was written."""
    result = Result(
        CASE, {'floor': Figure({'wall': [1.0, 2.0]}), 'ours': failure('no')}
    )

    again = from_json(json.loads(json.dumps(result.as_json())))

    assert result == again


def test_json_has_the_summary_beside_the_samples():
    """Whoever reads the file needs no statistics."""
    result = Result(CASE, {'floor': Figure({'wall': [1.0, 2.0, 3.0]})})

    found = result.as_json()['figures']['floor']['summary']['wall']

    assert dict(median=2.0, lower=1.5, upper=2.5, rounds=3) == found


def test_failure_names_case_competitor_and_reason():
    """One line says what could not be measured, and why."""
    figures = {'floor': Figure(), 'ours': failure(ValueError('a\nb'))}

    (line,) = Result(CASE, figures).failures

    expected = 'update, toy-1000, cpu, 2 threads, cold: ours: ValueError: a b'
    assert expected == line
