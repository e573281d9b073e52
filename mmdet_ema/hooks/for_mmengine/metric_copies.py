"""Copies of metrics that do not get into the way of the original."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

from mmdet_ema.core.errors import OptionError

_FILES = ('out_file_path', 'outfile_prefix')


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
    _rename_files(twin, {folder.name for folder in own.values()})
    return twin


def _move_paths(metric: Any, old: str, new: str) -> None:
    for name, value in vars(metric).items():
        if isinstance(value, str) and value.startswith(old):
            setattr(metric, name, new + value[len(old) :])


def _rename_files(metric: Any, own: Any) -> None:
    for name in _FILES:
        path = getattr(metric, name, None)
        if isinstance(path, str) and not path.startswith(tuple(own)):
            stem, suffix = os.path.splitext(path)
            setattr(metric, name, f'{stem}_raw{suffix}')
