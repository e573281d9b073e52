"""The file of the starting weights: what is told apart."""

import torch

from mmdet_ema.checkpoint.start import fingerprint, is_there, keep_start
from tests.averaging.models import FLOAT8, odd_tensors
from tests.needs import TORCH
from tests.optimizers.logs import Lines


def test_every_kind_of_tensor(tmp_path):
    """Written once, found again; each bit, name and dtype counts."""
    weights = {
        f'w{i}': x
        for i, x in enumerate(odd_tensors())
        # torch before 2.2 cannot save 8-bit floats
        if TORCH >= (2, 2) or x.dtype not in FLOAT8
    }
    weights['empty'] = torch.zeros(0, 3)
    weights['one'] = torch.ones(1).as_strided((1,), (5,))
    path, log = str(tmp_path / 'new' / 'start.pth'), Lines()
    mine = keep_start(path, weights, log)
    assert is_there(path, mine)
    assert mine == fingerprint(dict(reversed([*weights.items()])))
    others = [
        {**weights, 'w2': torch.tensor(4, dtype=torch.uint8)},
        {**weights, 'w3': weights['w3'].abs()},  # -0.0
        {**weights, 'w1': weights['w1'].to(torch.uint8)},
        {**weights, 'empty': torch.zeros(3, 0)},
        {('x' if k == 'w0' else k): x for k, x in weights.items()},
    ]
    assert 6 == len({mine, *map(fingerprint, others)})
    assert [] == log.warnings
    assert [path] == list(map(str, (tmp_path / 'new').iterdir()))
