"""A disk without room, files that cannot be read, files of another process."""

import contextlib
import errno
import fcntl
import os
import resource
import signal
import subprocess

import pytest

from mmdet_ema import CheckpointError
from mmdet_ema.checkpoint.files import TEMPORARY, read_structure
from tests.conftest import MMCV1
from tests.contract.dying import check_whole
from tests.contract.toy import EMA, Hook, Run, newest, same

needs_mmengine = pytest.mark.skipif(MMCV1, reason='needs mmengine')


@pytest.fixture
def disk(tmp_path):
    """A small file system; a folder where none may be mounted."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=512k', 'tmpfs', str(folder)]
    try:
        is_mounted = not subprocess.run(mount, capture_output=True).returncode
    except OSError:
        is_mounted = False
    yield folder
    if is_mounted:
        subprocess.run(['umount', '-l', str(folder)], check=True)


class Fill(Hook):
    """Fills the disk in the second epoch, all but what a log needs."""

    def __init__(self, folder):
        self.folder, self.filler = folder, folder / 'filler'

    def before_train_epoch(self, runner):
        if runner.epoch != 1:
            return
        if not os.path.ismount(self.folder):
            # a stand-in: no file may be as large as a checkpoint is
            size = (self.folder / 'epoch_1.pth').stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, -1))
            return
        with open(self.filler, 'wb', buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            os.truncate(self.filler, file.tell() - 2 * 4096)

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        if self.filler.exists():
            self.filler.unlink()


def make_run(folder, *hooks, **ema):
    hooks = [*hooks, dict(EMA, **ema)]
    return Run(folder, *hooks, keep=1, resume=newest(folder))


def test_full_disk(tmp_path, disk):
    """The old file stays, one line says what happened; a resume is exact."""
    whole = make_run(tmp_path / 'whole').train()
    fill = Fill(disk)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match='was not written') as caught:
            make_run(disk, fill).train()
    finally:
        fill.free()
        signal.signal(signal.SIGXFSZ, before)
    error = caught.value
    assert error.errno in (errno.ENOSPC, errno.EFBIG)
    for word in ('epoch_2.pth', 'MiB needed', 'MiB free', 'as they were'):
        assert word in str(error)
    assert check_whole(disk)
    assert ['epoch_1.pth'] == [x.name for x in disk.glob('epoch_*.pth*')]
    assert [] == list(disk.glob(f'.*{TEMPORARY}'))
    rest = make_run(disk).train()
    assert [] == same(whole.load().averages, rest.load().averages)
    assert [] == same(whole.load().raws, rest.load().raws)
    assert ['epoch_2.pth'] == [x.name for x in disk.glob('epoch_*.pth*')]


@pytest.fixture
def cut_off(tmp_path):
    """A run whose last file is cut off, and which kept the one before."""
    Run(tmp_path, EMA).train()
    path = tmp_path / 'epoch_2.pth'
    os.truncate(path, path.stat().st_size // 2)
    return tmp_path


def resume(folder, path=None):
    """Resume from a file, or from the newest one."""
    return Run(folder, EMA, epochs=3, resume=path or True)


def test_newest_file_that_cannot_be_read(cut_off):
    """The newest one that can be read takes its place, which is said."""
    run = resume(cut_off).train()
    assert 8 == len(run.records)
    first = cut_off / 'epoch_1.pth'
    assert 'epoch_2.pth' in run.log or 'latest.pth' in run.log
    assert 'WARNING' in run.log
    assert f"resumes from '{first}' instead" in run.log
    assert check_whole(cut_off)


@needs_mmengine
def test_last_checkpoint_that_is_empty(tmp_path):
    """A loss of power can leave it so; the newest file is found."""
    Run(tmp_path, EMA).train()
    (tmp_path / 'last_checkpoint').write_text('')
    run = resume(tmp_path).train()
    assert 4 == len(run.records)
    assert f"resumes from '{tmp_path / 'epoch_2.pth'}' instead" in run.log


def test_file_of_that_name_that_cannot_be_read(cut_off):
    """It is not replaced by another one, but that one is named."""
    run = resume(cut_off, cut_off / 'epoch_2.pth')
    first = cut_off / 'epoch_1.pth'
    run.refuse(CheckpointError, f"can be resumed is '{first}'")


def test_nothing_can_be_read(cut_off):
    """A run does not begin again unless it is told to."""
    (cut_off / 'epoch_1.pth').unlink()
    resume(cut_off).refuse(CheckpointError, 'cut off')


def test_half_files_of_a_dead_run_are_removed(tmp_path):
    """Those of a process that is alive, and those of others, stay."""
    Run(tmp_path, EMA, epochs=1).train()
    dead, living = (
        tmp_path / f'.epoch_{i}.pth.{i}{TEMPORARY}' for i in (8, 9)
    )
    foreign = tmp_path / '.epoch_7.pth.tmp'
    for path in (dead, living, foreign):
        path.write_bytes(b'half')
    with open(living, 'r+b') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run = resume(tmp_path).train()
    assert [False, True, True] == [
        path.exists() for path in (dead, living, foreign)
    ]
    assert f'{dead}: removed' in run.log
    read_structure(str(tmp_path / 'epoch_3.pth'))
