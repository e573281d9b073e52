"""``mmdet-ema plot``: the curves of a run, from the logs of both generations.

The lines are those that real runs wrote, shortened.
"""

import argparse
import json
import os

import pytest

from mmdet_ema.cli import plot
from mmdet_ema.errors import OptionError

MMENGINE = [
    dict(
        lr=0.008, loss=0.9, ema_decay=0.4, ema_distance=0.01, epoch=1, step=25
    ),
    dict(
        lr=0.008, loss=0.8, ema_decay=0.6, ema_distance=0.02, epoch=1, step=50
    ),
    {'coco/bbox_mAP': 0.03, 'coco/bbox_mAP_raw': 0.02, 'time': 2.4, 'step': 1},
    dict(
        lr=0.008, loss=0.7, ema_decay=0.7, ema_distance=0.03, epoch=2, step=75
    ),
    {'coco/bbox_mAP': 0.05, 'coco/bbox_mAP_raw': 0.04, 'time': 0.7, 'step': 2},
]
AGAIN = [
    {'coco/bbox_mAP': 0.06, 'coco/bbox_mAP_raw': 0.01, 'time': 0.7, 'step': 2},
]
MMCV1 = [
    dict(env_info='...', seed=0),
    dict(mode='train', epoch=1, iter=50, lr=0.01, ema_decay=0.5),
    dict(
        mode='val',
        epoch=1,
        iter=100,
        lr=0.01,
        bbox_mAP=0.1,
        bbox_mAP_raw=0.2,
    ),
    dict(mode='train', epoch=2, iter=50, lr=0.01, ema_decay=0.75),
    dict(
        mode='val',
        epoch=2,
        iter=100,
        lr=0.01,
        bbox_mAP=0.4,
        bbox_mAP_raw=0.3,
    ),
]


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def test_run_that_was_resumed(tmp_path):
    """What was done again counts; half a line at the end does not."""
    first = tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json'
    write(first, MMENGINE)
    first.write_text(first.read_text() + '{"coco/bbox_')
    write(tmp_path / '20260102_000000' / 'vis_data' / 'scalars.json', AGAIN)
    metrics, decays, distances = plot.read_curves(plot.read_lines(tmp_path))
    assert metrics == {
        'coco/bbox_mAP': {1: 0.03, 2: 0.06},
        'coco/bbox_mAP_raw': {1: 0.02, 2: 0.01},
    }
    assert decays == {25: 0.4, 50: 0.6, 75: 0.7}
    assert distances == {25: 0.01, 50: 0.02, 75: 0.03}


@pytest.mark.parametrize('by', ['epoch', 'iteration', 'mmcv1'])
def test_run_that_began_anew(tmp_path, by):
    """What an earlier one logged of later steps is no part of it."""
    for start, value in enumerate((0.1, 0.2), 1):
        lines = []
        for i in range(1, 6 if start == 1 else 3):
            line = dict(lr=0.1, ema_decay=value, epoch=i, step=10 * i)
            if by == 'iteration':
                del line['epoch']
            metric = {'mAP': value, 'step': 10 * i if by != 'epoch' else i}
            if by == 'mmcv1':
                line = dict(line, mode='train', iter=10)
                del line['step']
                metric = dict(mAP=value, mode='val', epoch=i, iter=4, lr=0.1)
            lines += [line, metric]
        path = tmp_path / f'2026010{start}_000000'
        if by == 'mmcv1':
            write(path.with_suffix('.log.json'), lines)
        else:
            write(path / 'vis_data' / 'scalars.json', lines)
    metrics, decays, _ = plot.read_curves(plot.read_lines(tmp_path))
    factor = 10 if by == 'iteration' else 1
    assert metrics['mAP'] == {factor: 0.2, 2 * factor: 0.2}
    assert decays == {10: 0.2, 20: 0.2}


def test_run_of_mmcv1(tmp_path):
    """Its iterations are counted by epoch, its validations by line."""
    write(tmp_path / '20260101_000000.log.json', MMCV1)
    metrics, decays, _ = plot.read_curves(plot.read_lines(tmp_path))
    assert metrics['bbox_mAP'] == {1: 0.1, 2: 0.4}
    assert metrics['bbox_mAP_raw'] == {1: 0.2, 2: 0.3}
    assert decays == {50: 0.5, 100: 0.75}


@pytest.mark.parametrize('lines', [MMENGINE, MMENGINE[:2], MMENGINE[2:3]])
def test_picture(tmp_path, lines):
    """A PNG file beside the logs, whatever has been logged by then."""
    pytest.importorskip('matplotlib')
    write(tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json', lines)
    path = plot.draw(tmp_path)
    assert path == tmp_path / 'ema.png'
    assert path.read_bytes().startswith(b'\x89PNG')
    assert ['20260101_000000', 'ema.png'] == sorted(
        found.name for found in tmp_path.iterdir()
    )


def test_every_set_of_weights_is_drawn(tmp_path, monkeypatch):
    """The log of the decays tells sets of weights from metrics of COCO."""
    figure = pytest.importorskip('matplotlib.figure').Figure
    drawn, savefig = [], figure.savefig

    def save(self, *args, **options):
        axes = self.axes[0]
        drawn.append(
            {x.get_label(): [*x.get_ydata()] for x in axes.get_lines()}
        )
        savefig(self, *args, **options)

    monkeypatch.setattr(figure, 'savefig', save)
    names = ['', '_raw', '_fast', '_very_fast']
    line = {
        f'coco/bbox_mAP{size}{name}': 0.1 * i
        for size in ('_s', '', '_50')
        for i, name in enumerate(names)
    }
    decays = dict(ema_decay=0.9, ema_decay_fast=0.5, ema_decay_very_fast=0.1)
    lines = [dict(lr=0.1, epoch=1, step=4, **decays), dict(line, step=1)]
    write(tmp_path / 'vis_data' / 'scalars.json', lines)
    plot.draw(tmp_path, metric='coco/bbox_mAP')
    plot.draw(tmp_path, metric='coco/bbox_mAP_50')
    expected = {
        'EMA weights': [0.0],
        'raw weights': [0.1],
        'fast': [0.2],
        'very_fast': [pytest.approx(0.3)],
    }
    assert drawn == [expected, expected]


def test_place_that_cannot_be_written(tmp_path, monkeypatch):
    """One line, before anybody waits for the picture; nothing is left."""
    folder = tmp_path / 'ema.png'
    folder.mkdir()
    with pytest.raises(argparse.ArgumentTypeError, match='it is a folder'):
        plot.picture(str(folder))
    monkeypatch.setattr(os, 'access', lambda *words: False)
    with pytest.raises(argparse.ArgumentTypeError, match='is read-only'):
        plot.picture(str(tmp_path / 'a.png'))
    pytest.importorskip('matplotlib')
    with pytest.raises(OptionError, match='name another picture'):
        plot.write(plot.new_figure(1, 1), folder)
    assert [folder] == list(tmp_path.iterdir())


def test_folder_without_logs(tmp_path):
    """It is named, with what was looked for."""
    with pytest.raises(OptionError, match='holds no log of a run'):
        plot.draw(tmp_path)


def test_metric_that_is_not_there(tmp_path):
    """Those that are there are listed."""
    write(tmp_path / 'vis_data' / 'scalars.json', MMENGINE)
    with pytest.raises(OptionError, match='the logs have coco/bbox_mAP'):
        plot.draw(tmp_path, metric='coco/bbox_mAp')
