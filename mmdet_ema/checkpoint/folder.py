"""The folder of a run: old files go late, and a run that died is tidied up.

The frameworks remove the last file, or the last best one, before they write
the next. A run that is killed in between is left without any.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import (
    Any,
    Callable,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

from mmdet_ema.checkpoint.files import (
    TEMPORARY,
    lock,
    read_structure,
    sync_folder,
)
from mmdet_ema.checkpoint.mapped import read_file
from mmdet_ema.errors import CheckpointError

STOPPED = 'sigterm_iter_{}.pth'
"""What a run writes when it is told to stop between two of its files."""


class RemovesLater:
    """A file backend that removes a file when the next one is written.

    What is not local is removed at once.
    """

    def __init__(self, backend: Any):
        self._backend = backend
        self._removals: List[Tuple[Callable[[Any], Any], Any, Any]] = []
        self._is_held = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: Any) -> None:
        """Note that a file is to be removed."""
        self._note(self._backend.remove, path)

    def rmtree(self, path: Any) -> None:
        """Note that a folder is to be removed: DeepSpeed's checkpoint."""
        self._note(self._backend.rmtree, path)

    def _note(self, remove: Callable[[Any], Any], path: Any) -> None:
        if os.path.exists(path):
            self._removals.append((remove, path, _moment_of(path)))
        else:
            remove(path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Remove nothing in the body, which writes more than one file."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        self.finish()

    def finish(self) -> None:
        """Remove what was noted, unless the next file has taken its place."""
        if self._is_held:
            return
        for remove, path, moment in self._removals:
            if os.path.exists(path) and _moment_of(path) == moment:
                remove(path)
        self._removals.clear()


def _moment_of(path: Any) -> Any:
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns


def link_whole(target: str, path: str) -> None:
    """Let a link point at another file; at no time is there none."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f'.{name}{TEMPORARY}')
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, path)
    sync_folder(folder or '.')


def remove_leftovers(folders: Iterable[str], log: Any) -> None:
    """Remove the half files of a run that was killed.

    A file that a process is still writing stays: it is locked.
    """
    removed = []
    for folder in sorted(set(folders)):
        if not os.path.isdir(folder):
            continue
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if not (name.startswith('.') and name.endswith(TEMPORARY)):
                continue
            with contextlib.suppress(OSError):  # of another user, say
                if not os.path.islink(path):
                    with open(path, 'r+b') as file:
                        if not lock(file):
                            continue
                os.unlink(path)
                removed.append(path)
    if removed:
        log.info(
            f'EMA: {", ".join(removed)}: removed; a run was killed while it '
            f'wrote a file.'
        )


def remove_stopped(folder: str) -> None:
    """Remove what a run wrote when it was told to stop: it is resumed."""
    start, _, end = STOPPED.partition('{}')
    for name in os.listdir(folder):
        if name.startswith(start) and name.endswith(end):
            path = os.path.join(folder, name)
            # of ranks that each write a file, or DeepSpeed's
            (shutil.rmtree if os.path.isdir(path) else os.unlink)(path)


def readable(path: str, folder: str, chosen: bool, log: Any) -> str:
    """Return a checkpoint to resume from, if need be another one.

    Where a person chose the file, the error names another one. Else the
    newest was asked for, and the other one takes its place.
    """
    try:
        read_structure(path)
        return path
    except CheckpointError as error:
        own = os.path.dirname(os.path.abspath(path)) if path else folder
        newest = newest_readable(own if os.path.isdir(own) else folder)
        if newest is None:
            raise
        if chosen:
            raise CheckpointError(
                f'{error} The newest one there that can be resumed is '
                f'{newest!r}.'
            ) from None
        log.warning(f'EMA: {error} Training resumes from {newest!r} instead.')
        return newest


def newest_readable(folder: str) -> Optional[str]:
    """Return the newest file that can be read and resumed from, if any."""
    names = os.listdir(folder) if folder else []
    paths = [os.path.join(folder, x) for x in names if x.endswith('.pth')]
    paths = [x for x in paths if os.path.isfile(x) and not os.path.islink(x)]
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        try:
            found = read_structure(path)
        except CheckpointError:
            continue
        meta = found.get('meta')
        known = meta.keys() if isinstance(meta, Mapping) else ()
        if 'optimizer' in found and {'epoch', 'iter'} <= {*known}:
            return path
    return None


def newer_best(
    folder: str,
    known: Optional[str],
    iteration: int,
    told: Callable[[Any], Sequence[Any]],
) -> Optional[Tuple[str, Any]]:
    """Find a best file that the file that is resumed does not know of.

    The frameworks write the former after the latter. A run that is killed in
    between would leave it behind, and go on from an older best score.

    Args:
        folder: Where the best files are.
        known: The best file that the resumed one knows of.
        iteration: Iterations that are in the resumed file.
        told: Returns which file was the best when a file was written, and its
            score: what is returned of the newest one.
    """
    found = []
    own = os.path.basename(known or '')
    for name in os.listdir(folder):
        if not (name.startswith('best_') and name.endswith('.pth')):
            continue
        path = os.path.join(folder, name)
        with contextlib.suppress(CheckpointError, KeyError, TypeError):
            # not its structure alone: a score may be a scalar of NumPy
            content = read_file(path)
            best, score = told(content)
            when = content['meta']['iter']
            if os.path.basename(best) == name and when <= iteration:
                found.append((when, name == own, path, score))
    if not found:
        return None
    _, is_known, path, score = max(found, key=lambda x: x[:2])
    return None if is_known else (path, score)
