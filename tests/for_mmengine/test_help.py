"""Examples of ``--help`` that need a CONFIG: they run as they are."""

import os
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest
from mmengine.model import BaseModel

from mmdet_ema.cli import average, tune
from mmdet_ema.cli.main import main
from tests.checkpoint.walk import Toy, Walk
from tests.for_mmengine.test_average import CONFIG
from tests.for_mmengine.toy import Score
from tests.toy import loss_of

ROOT = Path(__file__).resolve().parents[2]


class Walked(BaseModel, Toy):
    """The toy that walks, as a model of mmengine."""

    def forward(self, inputs, mode='tensor'):
        out = self.tied(self.norm(self.first(inputs[:, :3])))
        return dict(loss=loss_of(out)) if mode == 'loss' else [dict(out=out)]


class Found(Score):
    """Metrics named as those of COCO."""

    default_prefix = 'coco'

    def compute_metrics(self, results):
        score = super().compute_metrics(results)['score']
        return dict(bbox_mAP=score, bbox_mAP_50=score / 2)


def examples():
    for text in (average._HELP, tune._HELP):
        lines = text.partition('examples:\n')[2].replace('\\\n', ' ')
        yield from (x.strip() for x in lines.splitlines() if 'CONFIG' in x)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A run of 4,500 steps in work_dirs/a, some files of it, a config."""
    folder = tmp_path_factory.mktemp('help')
    run = folder / 'work_dirs' / 'a'
    run.parent.mkdir()
    walk = Walk(run, steps=4500, every=500, posthoc=True, decay=0.999, tau=500)
    for file in walk.files[-2:]:
        shutil.copy(file, folder)
    config = CONFIG.replace(
        'toy import Score, ToyData, ToyModel', 'toy import ToyData'
    )
    config = config.replace(
        '\ndef loader', f'from {__name__} import Found, Walked\n\ndef loader'
    )
    config = config.replace('type=ToyModel', 'type=Walked').replace(
        'type=Score', 'type=Found'
    )
    (folder / 'config.py').write_text(config)
    return folder


@pytest.mark.parametrize('line', examples())
def test_examples_with_a_config(line, folder, monkeypatch, capfd):
    """Each ends well, and leaves the file that it names."""
    monkeypatch.chdir(folder)
    words = [
        name
        for word in shlex.split(line.replace('CONFIG', 'config.py'))
        for name in (sorted(glob(word)) if '*' in word else [word])
    ]
    program, *words = words
    if '-o' in words:
        words.append('--force')
    if program == 'torchrun':
        done = subprocess.run(
            [
                sys.executable,
                '-m',
                'torch.distributed.run',
                '--standalone',
                *words,
            ],
            env={
                **os.environ,
                'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path]),
            },
        )
        assert 0 == done.returncode, capfd.readouterr().err
    else:
        assert 'mmdet-ema' == program
        with pytest.raises(SystemExit) as error:
            main(words)
        assert 0 == error.value.code, capfd.readouterr().err
    said = capfd.readouterr().out
    if '-o' in words:
        assert Path(words[words.index('-o') + 1]).exists()
    if 'tune' in words:
        assert 1 == said.count('the best one')
        assert ('coco/bbox_mAP_50' in said) == ('--metric' in words)
    else:
        assert 'written' in said
