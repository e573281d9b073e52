"""How many steps a run averages, against a loop that counts them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdet_ema.averaging import OptionError
from mmdet_ema.training.options import parse_options
from mmdet_ema.training.plan import (
    RunFacts,
    check_begin,
    has_begun,
    planned_steps,
)


def counted(options, facts, done):
    """Go through a run as mmengine does and count what is averaged.

    An optimizer steps at every k-th iteration and at the last one; an
    iteration is averaged from ``begin_iter`` or ``begin_epoch`` on, or
    always on resume of an average that has begun.
    """
    steps = done
    for iteration in range(facts.iteration + 1, facts.max_iters + 1):
        length = facts.max_iters // facts.max_epochs
        epoch = (iteration - 1) // length + 1
        begun = done or (
            iteration >= max(options.begin_iter, 1)
            and epoch >= max(options.begin_epoch, 1)
        )
        last = iteration == facts.max_iters
        stepped = iteration % facts.accumulation == 0 or last
        steps += bool(begun and stepped)
    return steps


@settings(max_examples=400, deadline=None)
@given(
    epochs=st.integers(1, 6),
    length=st.integers(1, 12),
    accumulation=st.integers(1, 5),
    begin=st.one_of(
        st.tuples(st.just('begin_iter'), st.integers(0, 72)),
        st.tuples(st.just('begin_epoch'), st.integers(0, 6)),
    ),
    data=st.data(),
)
def test_planned_steps(epochs, length, accumulation, begin, data):
    """The planned steps are those that a run really takes."""
    max_iters = epochs * length
    iteration = data.draw(st.integers(0, max_iters))
    done = data.draw(st.integers(0, iteration))
    facts = RunFacts(iteration, max_iters, epochs, accumulation=accumulation)
    name, value = begin
    limit = max_iters if name == 'begin_iter' else epochs
    options = parse_options(**{name: min(value, limit)})
    check_begin(options, facts)
    assert counted(options, facts, done) == planned_steps(options, facts, done)


@pytest.mark.parametrize(
    ('begin', 'facts', 'done', 'expected'),
    [
        ({}, RunFacts(0, 100, 10), 0, 100),
        ({}, RunFacts(0, 100, 10, accumulation=4), 0, 25),
        ({}, RunFacts(0, 101, 1, accumulation=4), 0, 26),
        (dict(begin_iter=1), RunFacts(0, 100, 10), 0, 100),
        (dict(begin_iter=100), RunFacts(0, 100, 10), 0, 1),
        (dict(begin_epoch=1), RunFacts(0, 100, 10), 0, 100),
        (dict(begin_epoch=2), RunFacts(0, 100, 10), 0, 90),
        (dict(begin_epoch=10), RunFacts(0, 100, 10), 0, 10),
        ({}, RunFacts(40, 100, 10), 40, 100),
        ({}, RunFacts(40, 100, 10), 35, 95),
        (dict(begin_epoch=3), RunFacts(40, 100, 10), 20, 80),
        ({}, RunFacts(40, 100, 10), 0, 60),
        (dict(begin_epoch=9), RunFacts(40, 100, 10), 0, 20),
        ({}, RunFacts(100, 100, 10), 100, 100),
    ],
    ids=str,
)
def test_examples(begin, facts, done, expected):
    """Accumulation, a begin as late as can be and a resume, by hand."""
    options = parse_options(**begin)
    check_begin(options, facts)
    assert expected == planned_steps(options, facts, done)


@pytest.mark.parametrize(
    ('begin', 'first'),
    [
        ({}, (1, 1)),
        (dict(begin_iter=1), (1, 1)),
        (dict(begin_iter=7), (7, 2)),
        (dict(begin_epoch=1), (1, 1)),
        (dict(begin_epoch=3), (11, 3)),
    ],
    ids=str,
)
def test_has_begun(begin, first):
    """The first iteration that counts is the one that was named."""
    options = parse_options(**begin)
    begun = [
        (iteration + 1, epoch + 1)
        for iteration in range(20)
        for epoch in [iteration // 5]
        if has_begun(options, iteration, epoch)
    ]
    assert first == begun[0]
    assert 20 - first[0] + 1 == len(begun)


@pytest.mark.parametrize(
    ('begin', 'facts', 'words'),
    [
        (
            dict(begin_epoch=11),
            RunFacts(0, 100, 10),
            ('begin_epoch=11', '10 epochs', 'up to 10', 'begin_iter'),
        ),
        (
            dict(begin_epoch=2),
            RunFacts(0, 100, 1, by_epoch=False),
            ('begin_epoch=2', 'counts iterations', 'begin_iter'),
        ),
        (
            dict(begin_iter=101),
            RunFacts(0, 100, 10),
            ('begin_iter=101', '100 iterations', 'up to 100'),
        ),
    ],
    ids=str,
)
def test_past_the_end(begin, facts, words):
    """A begin past the end is refused with value, range and remedy."""
    with pytest.raises(OptionError) as error:
        check_begin(parse_options(**begin), facts)
    message = str(error.value)
    assert [] == [word for word in words if word not in message]
    assert '\n' not in message
