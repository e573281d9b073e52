"""A training step of a RetinaNet-R50 in a plain PyTorch loop."""

from __future__ import annotations

from typing import Dict

import torch

from benchmarks import peers
from benchmarks.clocks import HostClock
from benchmarks.competitors import in_order, make_all
from benchmarks.figures import Case, Figure
from benchmarks.retinanet import RetinaNet
from benchmarks.rounds import Limits, Sample, run_rounds

# pictures, size, steps a sample: the last update of a sample ends within it
ON_GPU = (2, 800, 10)
ON_CPU = (1, 128, 1)


def measure(case: Case, limits: Limits) -> Dict[str, Figure]:
    """Measure a case: seconds a step, everything on the device included.

    Each competitor has a model and an optimizer of its own.
    """
    made, failed = make_all(case.competitors, lambda n: _make(n, case.device))
    figures = run_rounds(made, limits.shorter(10, 5))
    return in_order(case, figures, failed)


def _make(name: str, device: str) -> Sample:
    pictures, size, steps = ON_CPU if device == 'cpu' else ON_GPU
    training = Training(name, device, pictures, size)

    def several() -> None:
        for _ in range(steps):
            training.step()
        training.wait()

    def sample() -> Dict[str, float]:
        training.wait()
        return {'wall': HostClock().measure(several)['wall'] / steps}

    # the first steps allocate and choose convolutions
    sample()
    return sample


class Training:
    """A model that is trained and averaged.

    Args:
        name: Whose average; 'none' for no average.
        device: 'cpu' or 'cuda'.
        pictures: Pictures a step.
        size: Their side in pixels.
    """

    def __init__(self, name: str, device: str, pictures: int, size: int):
        torch.manual_seed(0)
        self.model = RetinaNet().to(device).train()
        self._peer = peers.make(name, self.model) if name != 'none' else None
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.SGD(trained, lr=1e-5, momentum=0.9)
        self._batch = torch.rand(pictures, 3, size, size, device=device)

    def step(self) -> None:
        """Train one step, and take it into the average."""
        self._optimizer.zero_grad()
        self.model(self._batch).backward()
        if self._peer is not None:
            self._peer.before_step()
        self._optimizer.step()
        if self._peer is not None:
            self._peer.update()

    def wait(self) -> None:
        """Wait until everything has been computed."""
        if self._peer is not None:
            self._peer.settle()
        if self._batch.is_cuda:
            torch.cuda.synchronize()
