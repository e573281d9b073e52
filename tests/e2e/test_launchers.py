"""``mmdet-ema train`` under torchrun, on two ranks of which one dies."""

import pytest
import torch

from tests.e2e.conftest import load

pytestmark = pytest.mark.e2e
EXTRA = """
custom_imports = dict(
    imports=['mmdet_ema', 'tests.e2e.cpu_ranks'], _delete_=True)
# torch's synchronized BatchNorm wants a GPU
model.update(use_syncbn=False)
model_wrapper_cfg = dict(
    type='MMDistributedDataParallel', device_ids=None)
train_cfg.update(val_interval=4)
default_hooks['checkpoint'].update(max_keep_ckpts=1)
_base_.custom_hooks.append(dict(type='DiesOnceHook', mark={mark!r}))
"""


def train(tools, name, mark):
    """Train on two ranks, which start again when one of them dies."""
    config = tools.config(name, EXTRA.format(mark=str(mark)))
    words = ['--max-restarts', 1, '-m', 'mmdet_ema', 'train', config]
    words += ['--launcher', 'pytorch', '--resume']
    printed = tools.launch(
        *words,
        *('--work-dir', tools.folder / name),
        # else torch's ranks may be told the addresses of their former life
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1',
    )
    return printed, load(tools.folder / name / 'epoch_4.pth')


def test_elastic_restart_resumes_by_itself(tools):
    """It ends as a run in which nobody died, bit for bit.

    But for BatchNorm statistics: each rank has its own, a file those of one.
    """
    mark = tools.folder / 'died'
    printed, restarted = train(tools, 'restarted', mark)
    assert mark.exists()
    assert 'Auto resumed from the latest checkpoint' in printed
    assert 'epoch_2.pth' in printed
    _, whole = train(tools, 'nobody_died', mark)
    for part in ('state_dict', 'ema_state_dict'):
        left, right = restarted[part], whole[part]
        assert left.keys() == right.keys()
        differing = [k for k in left if not torch.equal(left[k], right[k])]
        assert [] == [k for k in differing if 'running' not in k]
