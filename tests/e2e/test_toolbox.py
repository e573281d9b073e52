"""Extracted and converted files of a real run score as the run's own file."""

import pytest
import torch

from mmdet_ema.checkpoint.contents import read_contents
from tests.e2e.conftest import load, maps
from tests.e2e.test_deploy import check_alone

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize('weights', ['ema', 'raw'])
def test_extracted_file_scores_as_the_whole(tools, trained, tested, weights):
    """In tools/test.py, as .pth and through safetensors, and by itself."""
    config, work_dir, _ = trained
    whole = work_dir / 'epoch_4.pth'
    name = f'only_{weights}'
    words = ('--weights', weights)
    out, safe, back = (
        tools.folder / f'{name}{end}'
        for end in ('.pth', '.safetensors', '_back.pth')
    )
    tools.cli('extract', whole, '-o', out, *words)
    tools.cli('extract', whole, '-o', safe, *words)
    tools.cli('extract', safe, '-o', back)
    for path in (out, back):
        # a file of one set is all that the hook can evaluate
        option = 'custom_hooks.0.evaluate=ema'
        found = tools.test(config, path, path.stem, option)
        assert maps(found) == tested[weights]
    again = tools.folder / f'{name}_again.pth'
    tools.cli('extract', '--recipe', out, '-o', again)
    assert again.read_bytes() == out.read_bytes()
    check_alone(tools, weights, out)


def test_converted_file_resumes_the_same(tools, trained):
    """A file of mmengine's layout, made of ours: same weights, same n."""
    _, work_dir, _ = trained
    out = tools.folder / 'mmengine.pth'
    said = tools.cli(
        *('convert', work_dir / 'epoch_4.pth', '-o', out),
        *('--to', 'mmengine'),
    )
    assert 'mmdet_ema -> mmengine, with raw, ema (n = 16)' in said
    content, ours = load(out), load(work_dir / 'epoch_4.pth')
    assert int(content['ema_state_dict']['steps']) == 16
    for part in ('state_dict', 'ema_state_dict'):
        for key, value in ours[part].items():
            assert torch.equal(content[part][key], value)
    assert content['optimizer']['state'].keys()
    # that layout has one average
    assert 'weights fast' == said.partition('lost: ')[2].split('\n')[0]
    assert read_contents(str(out)).format == 'mmengine'
