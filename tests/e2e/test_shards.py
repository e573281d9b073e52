"""mmdet's tools on RTMDet, sharded over two real ranks."""

import pytest
import torch

from tests import needs
from tests.e2e.conftest import last_validation, load

pytestmark = needs.torch(2, 6, why='fully_shard')
SETTINGS = """
train_cfg = dict(max_epochs=2)
_base_.custom_hooks[0].update(evaluate='both', decay=0.9, tau=2)
custom_imports = dict(imports=['mmdet_ema', 'tests.e2e.confidence'])
val_evaluator = dict(_delete_=True, type='Confidence')
test_evaluator = val_evaluator
"""
FSDP2 = """
runner_type = 'FlexibleRunner'
strategy = dict(type='FSDP2Strategy', shard=['backbone.stage*', 'neck'])
"""
# offloaded on a CPU, torch 2.13 dies
FSDP1 = """
runner_type = 'FlexibleRunner'
custom_imports = dict(
    imports=['mmdet_ema', 'tests.e2e.confidence', 'tests.e2e.cpu_ranks'])
strategy = dict(
    type='FSDPStrategy',
    model_wrapper=dict(type='MMFullyShardedDataParallel', device_id='cpu'),
    state_dict_cfg=dict(
        state_dict_type='FULL_STATE_DICT',
        state_dict_config=dict(
            type='FullStateDictConfig', offload_to_cpu=False),
        optim_state_dict_config=dict(
            type='FullOptimStateDictConfig', offload_to_cpu=False)))
# RTMDet would turn BatchNorm into that of several GPUs
model['use_syncbn'] = False
"""


@pytest.fixture(scope='module', params=['FSDP2', 'FSDP1'])
def sharded(tools, request):
    """A finished training on two ranks: how it is tested, and its folder."""
    name = request.param
    folder = tools.folder / name
    config = tools.config(name, SETTINGS + globals()[name])
    command = tools.command('train', config, folder, '--launcher', 'pytorch')
    tools.launch(*command[1:])
    # mmengine's own strategy shards in one process, too
    alone = tools.config('alone', SETTINGS) if name == 'FSDP1' else config
    return alone, folder


def test_one_process_tests_to_the_last_validation(tools, sharded):
    """The same config, without a launcher: the same metric from the file.

    Of the averages: raw BatchNorm statistics are those of each rank.
    """
    config, folder = sharded
    last = last_validation(folder)
    metrics = tools.test(config, folder / 'epoch_2.pth', folder.name)
    assert last['digits/mAP'] != last['digits/mAP_raw']
    # sums of float32 in another order
    expected = pytest.approx(last['digits/mAP'], rel=1e-4)
    assert expected == metrics['digits/mAP']


def test_file_is_whole(tools, sharded, trained):
    """The names, kinds and shapes of a file of one process."""
    files = load(sharded[1] / 'epoch_2.pth'), load(trained[1] / 'epoch_2.pth')
    for part in ('state_dict', 'ema_state_dict'):
        left, right = (
            {k: (x.dtype, x.shape) for k, x in file[part].items()}
            for file in files
        )
        assert left == right
        # FSDP1 names tied weights last
        assert [*left] == [*right] or sharded[1].name == 'FSDP1'
    assert not any(
        torch.equal(x, files[0]['ema_state_dict'][f'module.{k}'])
        for k, x in files[0]['state_dict'].items()
        if k.endswith('conv.weight')
    )
