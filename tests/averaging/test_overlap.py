"""Jobs beside the training: one at a time, joined where it matters."""

import gc
import os
import threading
import time

import pytest
import torch

from mmdet_ema.averaging.overlap import (
    Inline,
    SideStream,
    Snapshot,
    Worker,
    background_for,
)
from tests.averaging.models import raw_bytes, run_python

CPU, GPU = torch.device('cpu'), torch.device('cuda', 0)
NONE = Snapshot([])
# Seconds: what a test waits for that never comes if the code is right is
# short; what has to come has plenty of time.
SHORT, LONG = 0.2, 30


@pytest.fixture
def gate():
    """A lock that jobs wait at; opened at the end, so that none hangs."""
    event = threading.Event()
    yield event
    event.set()


def open_later(gate, seconds=SHORT):
    timer = threading.Timer(seconds, gate.set)
    timer.start()
    return timer


def ours():
    """Return the threads of workers that are alive."""
    return {
        thread
        for thread in threading.enumerate()
        if thread.name.startswith('mmdet_ema')
    }


def wait_until(condition):
    stop = time.monotonic() + LONG
    while not condition() and time.monotonic() < stop:
        time.sleep(0.01)
    return condition()


def test_snapshot():
    """Copies keep values, dtype and layout, whatever happens to the raws."""
    image = torch.randn(2, 3, 4, 5)
    raws = [
        image.contiguous(memory_format=torch.channels_last),
        image[:, 1],
        torch.tensor([1, 2**62]),
        torch.tensor(float('nan')),
        torch.zeros(0, 3),
        torch.tensor([True]),
        torch.nn.Parameter(torch.ones(2).bfloat16()),
        image[0, 0, :1].expand(6, 5),
    ]
    snapshot = Snapshot(raws)
    addresses = [copy.data_ptr() for copy in snapshot.copies]
    before = [raw_bytes(raw) for raw in raws]
    with torch.no_grad():
        snapshot.take()
        for raw in raws[:7]:
            raw.zero_()
    assert before == [raw_bytes(copy) for copy in snapshot.copies]
    assert addresses == [copy.data_ptr() for copy in snapshot.copies]
    assert raws[0].stride() == snapshot.copies[0].stride()
    assert [r.dtype for r in raws] == [c.dtype for c in snapshot.copies]
    assert not any(copy.requires_grad for copy in snapshot.copies)


def test_snapshot_follows_data():
    """A snapshot copies what ``.data`` is at the moment."""
    raw = torch.nn.Parameter(torch.zeros(3, 3))
    snapshot = Snapshot([raw])
    raw.data = torch.arange(9.0).view(3, 3).t()
    with torch.no_grad():
        snapshot.take()
    assert torch.equal(raw.detach(), snapshot.copies[0])


def test_snapshot_of_inference_mode():
    """Copies of inference tensors can be filled outside of that mode."""
    with torch.inference_mode():
        raw = torch.ones(3)
        snapshot = Snapshot([raw])
    snapshot.take()
    assert torch.equal(torch.ones(3), snapshot.copies[0])


@pytest.mark.parametrize('make', [Inline, lambda: Worker(None, True)])
def test_snapshot_is_taken_before_the_job(make):
    """A job sees what the tensors were when it was started."""
    raw = torch.ones(3)
    snapshot, background = Snapshot([raw]), make()
    for value in (1.0, 2.0):
        raw.fill_(value)
        background.start(snapshot, lambda: snapshot.copies[0].sum().item())
        raw.fill_(-1)
        assert 3 * value == background.join()
        assert 3 * value == background.join()


def test_inline_runs_here():
    """Without a background a job is done when ``start`` returns."""
    background, seen = Inline(), []
    background.start(NONE, lambda: seen.append(threading.current_thread()))
    assert [threading.current_thread()] == seen
    assert not background.is_background


def test_worker_runs_beside(gate):
    """A worker returns at once; release and join wait for the job."""
    worker = Worker(None, reads_raws=True)
    worker.start(NONE, lambda: gate.wait(LONG) and 'done')
    for wait in (worker.release, worker.join):
        timer = open_later(gate)
        wait()
        assert gate.is_set()
        timer.join()
    assert 'done' == worker.join()
    assert worker.is_background


def test_worker_of_snapshots_lets_go_at_once(gate):
    """Where jobs read snapshots only, the weights may change meanwhile."""
    worker = Worker(None, reads_raws=False)
    worker.start(NONE, lambda: gate.wait(LONG))
    worker.release()
    assert not gate.is_set()
    open_later(gate)
    assert worker.join()


def test_release_before_anything():
    """There is nothing to wait for before the first job."""
    Worker(None, reads_raws=True).release()
    Inline().release()


def test_one_thread_for_all_jobs():
    """All jobs of a worker run on one thread, not the caller's."""
    worker, seen = Worker(None, reads_raws=True), set()
    for _ in range(20):
        worker.start(NONE, lambda: seen.add(threading.get_ident()))
        worker.join()
    assert 1 == len(seen)
    assert threading.get_ident() not in seen


def test_errors_come_from_join():
    """An error shows in ``join``, not in ``release``; the next job runs."""
    worker = Worker(None, reads_raws=True)
    worker.start(NONE, lambda: 1 / 0)
    worker.release()
    with pytest.raises(ZeroDivisionError):
        worker.join()
    worker.start(NONE, lambda: 'fine')
    assert 'fine' == worker.join()


def test_jobs_record_no_graph():
    """Jobs run without gradients, also where the caller records them."""
    worker = Worker(None, reads_raws=True)
    with torch.enable_grad():
        worker.start(NONE, torch.is_grad_enabled)
    assert worker.join() is False


@pytest.mark.parametrize('count', [1, 2])
def test_threads_of_torch(count):
    """A job may use as many of torch's threads as the training may."""
    worker, before = Worker(None, reads_raws=True), torch.get_num_threads()
    try:
        for threads in (count, 3 - count):
            torch.set_num_threads(threads)
            worker.start(NONE, torch.get_num_threads)
            assert threads == worker.join()
            assert threads == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def test_thread_goes_with_its_worker():
    """A worker that nobody needs any more leaves no thread behind."""
    before = ours()
    for _ in range(5):
        worker = Worker(None, reads_raws=True)
        worker.start(NONE, lambda: None)
        worker.join()
    del worker
    gc.collect()
    assert wait_until(lambda: ours() <= before)


def test_job_is_forgotten():
    """What a job held is freed once it is done."""
    worker, big = Worker(None, reads_raws=True), torch.zeros(1000)
    gone = threading.Event()

    class Owner:
        def __call__(self):
            return None

        def __del__(self):
            gone.set()

    worker.start(NONE, Owner())
    worker.join()
    gc.collect()
    assert gone.wait(LONG)
    assert 0 == big.sum()


@pytest.mark.parametrize(
    ('pairs', 'overlap', 'kind'),
    [
        ([(CPU, CPU)], False, Inline),
        ([(CPU, CPU)], True, Worker),
        ([], True, Inline),
        ([(GPU, CPU)], True, Inline),
        ([(CPU, CPU), (CPU, torch.device('meta'))], True, Inline),
        ([(GPU, GPU), (CPU, CPU)], True, Inline),
        ([(GPU, GPU)], False, Inline),
    ],
)
def test_choice(pairs, overlap, kind):
    """A thread is taken for the host, where overlap is wanted; else none."""
    found, offloads = background_for(pairs, overlap)
    assert kind is type(found)
    assert offloads is False


@pytest.mark.parametrize('overlap', [True, False])
def test_choice_for_a_gpu(monkeypatch, overlap):
    """Averages away from the GPU get a thread; beside it, a stream."""
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: device)
    found, offloads = background_for([(CPU, GPU)], overlap)
    assert (Worker, True) == (type(found), offloads)
    found, offloads = background_for([(GPU, GPU)], overlap)
    wanted = SideStream if overlap else Inline
    assert (wanted, False) == (type(found), offloads)


EXIT = """
import sys, time
# frameworks, which the package would look for, take seconds to import
sys.modules.update(dict.fromkeys(['mmengine', 'mmcv']))
import torch
from mmdet_ema.averaging.overlap import Snapshot, Worker
def job():
    time.sleep(0.5)
    print('done', flush=True)
worker = Worker(None, reads_raws=True)
worker.start(Snapshot([]), job)
{ending}
"""


@pytest.mark.parametrize(
    ('ending', 'code'),
    [
        ('', 0),
        ('sys.exit(3)', 3),
        ("raise ValueError('stop')", 1),
        ('del worker', 0),
    ],
)
def test_exit_with_a_job_under_way(ending, code):
    """A process that ends finishes its job, and keeps its exit status."""
    found = run_python(EXIT.format(ending=ending))
    assert code == found.returncode
    assert 'done\n' == found.stdout
    assert ('ValueError: stop' in found.stderr) == (code == 1)
    assert 'mmdet_ema' not in found.stderr


FORK = """
import os, signal, sys
sys.modules.update(dict.fromkeys(['mmengine', 'mmcv']))
import torch
from mmdet_ema.averaging.overlap import Snapshot, Worker
worker, none = Worker(None, reads_raws=True), Snapshot([])
worker.start(none, lambda: 1)
assert worker.join() == 1
child = os.fork()
if not child:
    signal.alarm(30)  # waits for ever if there is no thread
    worker.start(none, lambda: 2)
    os._exit(40 + worker.join())
_, status = os.waitpid(child, 0)
assert os.WEXITSTATUS(status) == 42, status
worker.start(none, lambda: 3)
assert worker.join() == 3
"""


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='the system cannot fork')
def test_fork():
    """A forked process gets a thread of its own; its parent keeps its own."""
    found = run_python(FORK)
    assert 0 == found.returncode, found.stderr
