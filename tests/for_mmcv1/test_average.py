"""``mmdet-ema average`` where data and model of a config are mmcv 1.x's."""

import pytest
import torch

from mmdet_ema.cli.main import main


@pytest.mark.parametrize(
    'options',
    [
        ['--profile', 'soup:greedy', '--config', 'c.py'],
        ['--profile', 'mean', '--recalibrate', 'c.py'],
    ],
    ids=['soup', 'recalibrate'],
)
def test_needs_mmengine(tmp_path, capsys, options):
    """What takes a config is refused in one line, before a file is made."""
    path, out = tmp_path / 'a.pth', tmp_path / 'out.pth'
    torch.save({'state_dict': {'x': torch.ones(2)}}, path)
    with pytest.raises(SystemExit, match='2'):
        main(['average', str(path), '-o', str(out), *options])
    error = capsys.readouterr().err
    assert 'builds the model and data of a config by mmengine' in error
    assert 1 == error.count('\n')
    assert not out.exists()
