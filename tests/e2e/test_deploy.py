"""A file of a run with the hook, in a process that cannot import the package.

What it gives is what ``tools/test.py`` gave where the package is.
"""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from tests.e2e.conftest import environment, load

pytestmark = pytest.mark.e2e

ALONE = """
import sys
sys.modules['mmdet_ema'] = None  # an import raises ImportError
"""
INFER = """
import json
import torch
from mmengine.config import Config
from mmdet.apis import DetInferencer, inference_detector, init_detector
file, way, *pictures = sys.argv[1:]
if way == 'inferencer':
    inferencer = DetInferencer(weights=file, device='cpu', show_progress=False)
    found = inferencer(pictures, no_save_vis=True)['predictions']
    scores = [scene['scores'] for scene in found]
else:
    meta = torch.load(file, weights_only=True)['meta']
    config = Config.fromstring(meta['cfg'], file_format='.py')
    model = init_detector(config, file, device='cpu')
    found = [inference_detector(model, picture) for picture in pictures]
    scores = [scene.pred_instances.scores.tolist() for scene in found]
print('scores', json.dumps(scores))
"""


def alone(program, *words):
    """Run a program that cannot import the package."""
    done = subprocess.run(
        [sys.executable, '-c', ALONE + program, *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def check_alone(tools, weights, file, way='init_detector'):
    """A file gives the scores that ``tools/test.py`` gave for the weights."""
    path = tools.folder / f'test_{weights}' / 'out.pkl'
    tested = pickle.loads(path.read_bytes())
    text = alone(INFER, file, way, *(scene['img_path'] for scene in tested))
    scores = json.loads(text.split('scores ')[1])
    assert len(scores) == len(tested)
    for mine, scene in zip(scores, tested):
        theirs = scene['pred_instances']['scores']
        # batches of other sizes give other roundings
        top = np.sort(np.asarray(theirs))[::-1][:20]
        mine = np.sort(np.asarray(mine))[::-1][: len(top)]
        np.testing.assert_allclose(mine, top, rtol=0, atol=1e-4)


@pytest.mark.usefixtures('tested')
@pytest.mark.parametrize('way', ['inferencer', 'init_detector'])
def test_file_alone_is_enough(tools, trained, way):
    """The config in the file builds the model, and the averages are in it."""
    _, work_dir, _ = trained
    check_alone(tools, 'ema', work_dir / 'epoch_4.pth', way)


@pytest.mark.usefixtures('tested')
def test_published_file(tools, trained):
    """``publish_model.py`` leaves a file of weights that does the same."""
    _, work_dir, _ = trained
    out = tools.folder / 'published.pth'
    tool = tools.path('model_converters/publish_model')
    program = (
        'import runpy\nsys.argv = sys.argv[1:]\n'
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    alone(program, tool, work_dir / 'epoch_4.pth', out)
    (published,) = tools.folder.glob('published-*.pth')
    assert {'optimizer', 'ema_state_dict'}.isdisjoint(load(published))
    check_alone(tools, 'ema', published)


def test_config_of_the_training_is_kept(trained):
    """It has the import and the hook, and is back after a resume."""
    _, work_dir, _ = trained
    file = load(work_dir / 'epoch_4.pth')
    assert 'mmdet_ema' not in file['meta']['cfg']
    assert 'EMAHook' not in file['meta']['cfg']
    assert 'PipelineSwitchHook' in file['meta']['cfg']
    assert "'mmdet_ema'" in file['meta']['training_cfg']
    assert file['meta']['cfg'] == file['message_hub']['runtime_info']['cfg']
