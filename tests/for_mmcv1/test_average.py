"""The toolbox where data and model of a config are mmcv 1.x's."""

import pytest

from mmdet_ema.cli.main import main


@pytest.mark.parametrize(
    'command',
    [
        ['average', 'no.pth', '--profile', 'soup:greedy', '--config', 'c.py'],
        ['average', 'no.pth', '--profile', 'mean', '--recalibrate', 'c.py'],
        ['tune', 'c.py', 'work_dirs/a'],
    ],
    ids=['soup', 'recalibrate', 'tune'],
)
def test_needs_mmengine(tmp_path, capsys, command):
    """What takes a config is refused in one line, before a file is read."""
    out = tmp_path / 'out.pth'
    with pytest.raises(SystemExit, match='2'):
        main([*command, '-o', str(out)])
    error = capsys.readouterr().err
    assert 'builds the model and data of a config by mmengine' in error
    assert 'under mmcv 1.x make averages by mmdet-ema average, test' in error
    assert 1 == error.count('\n')
    assert not out.exists()
