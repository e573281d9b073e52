"""``mmdet-ema demo``: what an EMA does, in a plain PyTorch loop."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmdet_ema.averaging import OptionError, WeightAverager
from mmdet_ema.cli import plot

_EPOCHS = 20
_BATCH = 32
_DECAY, _TAU = 0.995, 100
Curves = Dict[str, List[float]]


def run(picture: Path) -> None:
    """Train a small network on digits, print and draw raw against EMA."""
    train, test = _digits()
    print(
        f'{len(train[0])} handwritten digits to train on, {len(test[0])} to '
        f'test on; one label in ten is wrong on purpose, and the learning '
        f'rate stays high.\n\nerrors in %     raw     EMA'
    )
    curves: Curves = {'raw': [], 'EMA': []}
    for epoch, rates in enumerate(_train(train, test), 1):
        for name, rate in rates.items():
            curves[name].append(rate)
        if epoch % 2 == 0:
            print(
                f'epoch {epoch:3d}    {rates["raw"]:6.2f}  {rates["EMA"]:6.2f}'
            )
    last = {name: sum(x[-10:]) / 10 for name, x in curves.items()}
    print(f'mean of last 10 {last["raw"]:3.2f}  {last["EMA"]:6.2f}')
    try:
        _draw(curves, picture)
        print(f'\npicture: {picture}')
    except OptionError:
        print('\nFor a picture: pip install matplotlib')
    print(
        f'The loop is averager = WeightAverager(model, decay={_DECAY}, '
        f'tau={_TAU}), averager.update() after every optimizer step, and an '
        f'evaluation inside "with averager.applied():".'
    )


def _train(
    train: Tuple[Tensor, Tensor], test: Tuple[Tensor, Tensor]
) -> Iterator[Dict[str, float]]:
    """Train, and yield the errors of both sets of weights by epoch."""
    torch.manual_seed(0)
    # threads that wait for one another cost more than so small layers
    torch.set_num_threads(1)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    averager = WeightAverager(model, decay=_DECAY, tau=_TAU)
    images, labels = train
    for _ in range(_EPOCHS):
        model.train()
        for batch in torch.split(torch.randperm(len(images)), _BATCH):
            loss = functional.cross_entropy(
                model(images[batch]), labels[batch]
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            averager.update()
        rates = {'raw': _error(model, *test)}
        with averager.applied():
            rates['EMA'] = _error(model, *test)
        yield rates


@torch.no_grad()
def _error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    wrong = model(images).argmax(1) != labels
    return 100 * float(wrong.double().mean())


def _digits() -> Tuple[Tuple[Tensor, Tensor], Tuple[Tensor, Tensor]]:
    """Return 8x8 images and labels to train on and to test on."""
    try:
        from sklearn.datasets import (  # type: ignore[import-untyped]
            load_digits,
        )
    except ImportError:
        raise OptionError(
            'the digits come with scikit-learn, which is not installed: '
            'pip install scikit-learn matplotlib'
        ) from None
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=random)
    train, test = order[:1000], order[1000:]
    noisy = labels[train]
    wrong = torch.rand(len(noisy), generator=random) < 0.1
    noisy[wrong] = torch.randint(10, (int(wrong.sum()),), generator=random)
    return (images[train], noisy), (images[test], labels[test])


def _draw(curves: Curves, path: Path) -> None:
    figure = plot.new_figure(6, 3.5)
    axes = figure.subplots()
    epochs = range(1, _EPOCHS + 1)
    for (name, rates), colour in zip(
        curves.items(), ('tab:orange', 'tab:blue')
    ):
        axes.plot(epochs, rates, label=name, color=colour)
    axes.set_ylim(0, min(3 * max(curves['EMA'][5:]), 100))
    axes.set_xticks(range(0, _EPOCHS + 1, 2))
    axes.set_xlabel('epoch')
    axes.set_ylabel('errors on the test digits, %')
    axes.set_title('The same training, tested with raw weights and their EMA')
    axes.legend()
    plot.write(figure, path)
