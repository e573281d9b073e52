"""The copy of a metric does not get into the way of the original."""

import os
import tempfile

import pytest

from mmdet_ema.hooks.for_mmengine.metric_copies import copy_metric


class Metric:
    """Writes files, and owns a temporary folder with a folder in it."""

    def __init__(self, **outputs):
        self.tmp_dir = tempfile.TemporaryDirectory()
        self.seg_out_dir = os.path.join(self.tmp_dir.name, 'pred')
        os.makedirs(self.seg_out_dir)
        vars(self).update(outputs)


@pytest.mark.parametrize(
    ('name', 'path', 'expected'),
    [
        ('out_file_path', 'a/out.pkl', 'a/out_raw.pkl'),
        ('outfile_prefix', 'a/out', 'a/out_raw'),
        ('pklfile_prefix', 'a/out', 'a/out_raw'),
        ('submission_prefix', 'a/out', 'a/out_raw'),
    ],
)
def test_outputs_have_names_of_their_own(name, path, expected):
    """Whatever the metric writes, the copy writes beside it."""
    metric = Metric(**{name: path})
    assert getattr(copy_metric(metric), name) == expected
    assert getattr(metric, name) == path


def test_temporary_folder_is_another_one():
    """The copy has its own folder, and taking it away leaves the other."""
    metric = Metric()
    twin = copy_metric(metric)
    assert twin.tmp_dir.name != metric.tmp_dir.name
    assert os.path.dirname(twin.seg_out_dir) == twin.tmp_dir.name
    assert os.path.isdir(twin.seg_out_dir)
    twin.tmp_dir.cleanup()
    assert os.path.isdir(metric.seg_out_dir)


def test_output_folder_is_made(tmp_path):
    """A folder that the metric made for itself is made for the copy."""
    metric = Metric(output_dir=str(tmp_path / 'a'))
    os.makedirs(metric.output_dir)
    assert os.path.isdir(copy_metric(metric).output_dir)
    assert copy_metric(metric).output_dir == str(tmp_path / 'a_raw')
