"""Optimizers that record their steps."""

import torch

SGD = dict(type='SeenSGD', lr=0.01, momentum=0.9, weight_decay=0.064)


def settings(optimizer):
    """Return group -> its options."""
    return {
        group['name']: {k: v for k, v in group.items() if k != 'params'}
        for group in optimizer.param_groups
    }


class Seen:
    """Records the options of its groups in every step."""

    def step(self, closure=None):
        self.__dict__.setdefault('seen', []).append(settings(self))
        return super().step(closure)


class SeenSGD(Seen, torch.optim.SGD):
    """SGD whose steps are recorded."""


class SeenAdamW(Seen, torch.optim.AdamW):
    """AdamW whose steps are recorded."""


def seen(optimizer, option):
    """Return group -> values of an option in the steps."""
    steps = optimizer.seen
    return {name: [s[name][option] for s in steps] for name in steps[0]}
