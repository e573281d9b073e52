"""Copies of metrics that do not get into the way of the original."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

from mmdet_ema.core.errors import OptionError

_OUTPUTS = (
    'csv_savepath',
    'jsonfile_prefix',
    'out_file_path',
    'outfile_path',
    'outfile_prefix',
    'output_dir',
    'pklfile_prefix',
    'pred_dir',
    'proposals_file',
    'result_prefix',
    'seg_out_dir',
    'submission_prefix',
)


def copy_metric(metric: Any) -> Any:
    """Copy a metric, with files and temporary folders of its own.

    Args:
        metric: A metric of mmengine; it is not changed.

    Returns:
        The copy. Files that the original writes get ``_raw`` in their names.

    Raises:
        OptionError: If the metric cannot be copied.
    """
    folders = {
        name: value
        for name, value in vars(metric).items()
        if isinstance(value, tempfile.TemporaryDirectory)
    }
    # a copied folder object would delete the original's folder in the end
    own = {id(old): tempfile.TemporaryDirectory() for old in folders.values()}
    try:
        twin = copy.deepcopy(metric, dict(own))
    except Exception as error:
        raise OptionError(
            f"evaluate='both' needs a copy of the metric "
            f'{type(metric).__name__}, which cannot be copied ({error}); use '
            f"evaluate='ema' or 'raw'."
        ) from None
    for old in folders.values():
        _move_paths(twin, old.name, own[id(old)].name)
    _rename_outputs(twin, {folder.name for folder in own.values()})
    return twin


def _move_paths(metric: Any, old: str, new: str) -> None:
    for name, value in vars(metric).items():
        if isinstance(value, str) and value.startswith(old):
            _set_path(metric, name, new + value[len(old) :])


def _rename_outputs(metric: Any, own: Any) -> None:
    for name in _OUTPUTS:
        path = getattr(metric, name, None)
        if isinstance(path, str) and not path.startswith(tuple(own)):
            stem, suffix = os.path.splitext(path)
            _set_path(metric, name, f'{stem}_raw{suffix}')


def _set_path(metric: Any, name: str, path: str) -> None:
    """Change a path; where it was a folder, make the new one."""
    if os.path.isdir(getattr(metric, name)):
        os.makedirs(path, exist_ok=True)
    setattr(metric, name, path)
