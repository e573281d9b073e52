"""Extracted and converted files of a real run score as the run's own file."""

import json
import pickle

import pytest
import torch

from mmdet_ema.checkpoint.contents import read_contents
from tests.e2e.conftest import cli, load
from tests.e2e.test_deploy import INFER, alone, same

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize('weights', ['ema', 'raw'])
def test_extracted_file_scores_as_the_whole(tools, trained, weights):
    """In tools/test.py, as .pth and through safetensors, and by itself."""
    config, work_dir, _ = trained
    whole = work_dir / 'epoch_4.pth'
    expected = scores(tools, config, whole, f'whole_{weights}', weights)
    name = f'only_{weights}'
    words = ('--weights', weights)
    out, safe, back = (
        tools.folder / f'{name}{end}'
        for end in ('.pth', '.safetensors', '_back.pth')
    )
    cli(tools, 'extract', whole, '-o', out, *words)
    cli(tools, 'extract', whole, '-o', safe, *words)
    cli(tools, 'extract', safe, '-o', back)
    for path in (out, back):
        # a file of one set is all that the hook can evaluate
        found = scores(tools, config, path, path.stem, 'ema')
        assert found == expected
    again = tools.folder / f'{name}_again.pth'
    cli(tools, 'extract', '--recipe', out, '-o', again)
    assert again.read_bytes() == out.read_bytes()
    found = pickle.loads(
        (tools.folder / f'test_{name}' / 'out.pkl').read_bytes()
    )
    pictures = [scene['img_path'] for scene in found]
    tested = [scene['pred_instances']['scores'] for scene in found]
    text = alone(INFER, out, 'init_detector', *pictures)
    same(json.loads(text.split('scores ')[1]), tested)


def test_converted_file_resumes_the_same(tools, trained):
    """A file of mmengine's layout, made of ours: same weights, same n."""
    _, work_dir, _ = trained
    out = tools.folder / 'mmengine.pth'
    said = cli(
        tools,
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


def scores(tools, config, path, name, weights):
    """Return the mAPs that mmdet's own tool gives."""
    option = f'custom_hooks.0.evaluate={weights}'
    found = tools.test(config, path, name, option)
    return {k: x for k, x in found.items() if 'mAP' in k}
