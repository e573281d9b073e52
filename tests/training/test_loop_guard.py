"""Something runs at the end of a loop, however the loop ends."""

import pytest

from mmdet_ema.training.loop_guard import guard_loop


class Loop:
    """A loop that records and may fail."""

    def __init__(self, error=None):
        self.error = error
        self.calls = []

    def run(self, *args, **kwargs):
        """Run the loop."""
        self.calls.append((args, kwargs))
        if self.error is not None:
            raise self.error
        return 'metrics'


def test_return():
    """Arguments and the result pass, and the call comes afterwards."""
    loop, left = Loop(), []
    guard_loop(loop, lambda: left.append(len(loop.calls)))
    assert 'metrics' == loop.run(1, a=2)
    assert [((1,), dict(a=2))] == loop.calls
    assert [1] == left


@pytest.mark.parametrize(
    'error',
    [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError],
)
def test_exception(error):
    """Any exception passes, after the call."""
    failure = error('x')
    loop, left = Loop(failure), []
    guard_loop(loop, lambda: left.append(1))
    with pytest.raises(error) as caught:
        loop.run()
    assert failure is caught.value
    assert [1] == left


def test_every_run():
    """The call comes at the end of every run."""
    loop, left = Loop(), []
    guard_loop(loop, lambda: left.append(1))
    for _ in range(3):
        loop.run()
    assert [1, 1, 1] == left


def test_once():
    """A loop that is guarded twice calls once a run."""
    loop, left = Loop(), []
    for _ in range(3):
        guard_loop(loop, lambda: left.append(1))
    loop.run()
    assert [1] == left
    assert 1 == len(loop.calls)


def test_other_loops():
    """Other loops of the same class are left alone."""
    loop, other, left = Loop(), Loop(), []
    guard_loop(loop, lambda: left.append(1))
    other.run()
    assert [] == left
    guard_loop(other, lambda: left.append(2))
    other.run()
    assert [2] == left


def test_looks_the_same():
    """The guarded method keeps its name and docstring."""
    loop = Loop()
    guard_loop(loop, lambda: None)
    assert 'run' == loop.run.__name__
    assert 'Run the loop.' == loop.run.__doc__


def test_nested():
    """A guarded loop that runs inside another leaves on its own."""
    left = []

    class Outer(Loop):
        def run(self):
            inner.run()
            left.append('outer body')

    inner, outer = Loop(), Outer()
    guard_loop(inner, lambda: left.append('inner'))
    guard_loop(outer, lambda: left.append('outer'))
    outer.run()
    assert ['inner', 'outer body', 'outer'] == left
