"""SIGTERM, where it goes to a whole group."""

import os
import signal

from torch.utils.data import DataLoader

from mmdet_ema.training.sigterm import spare_workers
from tests.toy import Samples


def test_workers_of_a_loader_live_on():
    """The step that is going on gets its data; its own function is kept."""
    seen = []
    loader = DataLoader(Samples(64, 0), num_workers=1)
    loader.worker_init_fn = os.umask
    spare_workers(loader)
    spare_workers(loader)
    batches = iter(loader)
    seen = [next(batches)]
    (worker,) = batches._workers
    os.kill(worker.pid, signal.SIGTERM)
    seen += batches
    assert 64 == len(seen)
    worker.join(60)
    assert 0 == worker.exitcode


def test_loader_without_workers_stays_as_it_is():
    """There is nothing to spare."""
    loader = DataLoader(Samples(4, 0))
    spare_workers(loader)
    spare_workers(None)
    assert loader.worker_init_fn is None
