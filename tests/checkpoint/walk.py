"""A toy that walks at random, and the files that such a run leaves."""

import numpy as np
import torch
from torch import nn

from mmdet_ema import WeightAverager
from mmdet_ema.checkpoint.format import pack
from mmdet_ema.checkpoint.start import START, fingerprint

STEPS, EVERY = 500, 50
# what float32 rounds in each of 500 updates, times the sum of |c|, and room
ROUNDING = 2e-6


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.low = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        mask = torch.tensor([0.0, -torch.inf])
        self.register_buffer('mask', mask)


class Walk:
    """A run without a framework: its files, and all weights that it had."""

    def __init__(self, folder, seed=0, steps=STEPS, every=EVERY, **options):
        torch.manual_seed(seed)
        self.folder, self.model = folder, Toy()
        self.draw = torch.Generator().manual_seed(seed)
        folder.mkdir(exist_ok=True)
        self.averager = WeightAverager(self.model, **options)
        self.states = [self._state()]
        if self.averager.posthoc:
            start = self.averager.starting_weights()
            torch.save({'state_dict': start}, folder / 'ema_start.pt')
            self.start = fingerprint(start)
        self.files = []
        for step in range(1, steps + 1):
            self._step()
            self.averager.update()
            self.states.append(self._state())
            if step % every == 0:
                self.files.append(self._save(folder / f'iter_{step}.pth'))

    def _state(self):
        return {k: x.clone() for k, x in self.model.state_dict().items()}

    @torch.no_grad()
    def _step(self):
        def noise(tensor):
            return torch.randn(tensor.shape, generator=self.draw) * 0.01

        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter += noise(parameter).to(parameter.dtype)
        self.model.norm.running_mean += noise(self.model.norm.running_mean)
        # a variance that is soon near 0, and never below
        variance = self.model.norm.running_var
        variance.copy_((variance * 0.9 + noise(variance)).abs())
        self.model.norm.num_batches_tracked += 1

    def _save(self, path, **meta):
        averager = self.averager
        more = {
            name: {
                'schedule': str(averager.schedules[name]),
                **averager.progress(name),
                'state_dict': dict(
                    averager.named_averages(stored=True, name=name)
                ),
            }
            for name in averager.names
        }
        main = more.pop('ema')
        averages = main.pop('state_dict')
        meta = {**main, 'interval': averager.interval, **meta}
        if averager.posthoc:
            meta[START] = self.start
        checkpoint = {'state_dict': self.model.state_dict(), 'meta': {}}
        steps = averager.num_steps
        pack(checkpoint, averages, {}, steps, meta, more)
        torch.save(checkpoint, path)
        return str(path)

    def values(self, key):
        """All values of a tensor in float64, that at the start first."""
        return np.stack([x[key].double().numpy() for x in self.states])

    def check(self, combination, expected_of, error=0.0, profile=None):
        """Compare with an oracle; by Cauchy-Schwarz within the error."""
        found = combination.state_dict()
        for key in PARAMETERS:
            values = self.values(key)
            expected = expected_of(values)
            room = ROUNDING * np.abs(values).max()
            # sum of (p - q)(w - v), for any v as both profiles sum up to 1
            spread = np.sqrt(((values - expected) ** 2).sum(0))
            norm = 0.0 if profile is None else float(profile.norm())
            allowed = room + error * norm * spread
            away = np.abs(found[key].double().numpy() - expected)
            assert (away <= allowed).all(), (key, (away / allowed).max())
        last = self.states[-1]
        for key in ('norm.num_batches_tracked', 'frozen.weight', 'mask'):
            assert torch.equal(found[key], last[key])
        assert found['tied.weight'] is found['first.weight']
        assert list(found) == list(last)
        return found


PARAMETERS = ('first.weight', 'first.bias', 'norm.weight')
MAIN = dict(decay=0.999, tau=50)
