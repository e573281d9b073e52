"""Run a program as several real ranks, and read what each of them found."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def free_port():
    """Return a port at which ranks can meet.

    It is below those that the system gives to connections, one of which
    could take it before the first rank does.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(('127.0.0.1', port))
            return port


def environment(rank, count, port):
    """What ``torchrun`` would tell a rank."""
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count)
    names.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, OMP_NUM_THREADS=1)
    return {name: str(value) for name, value in names.items()}


def run_ranks(program, count, folder, *arguments):
    """Run ``python -m PROGRAM FOLDER ...`` on so many ranks.

    Returns what ``main`` kept on each; what they print is in
    ``rank{r}.log`` of the folder.
    """
    port = free_port()
    command = [sys.executable, '-W', 'ignore', '-m', program, str(folder)]
    logs = [folder / f'rank{rank}.log' for rank in range(count)]
    running = []
    try:
        for rank, log in enumerate(logs):
            with open(log, 'w') as output:
                process = subprocess.Popen(
                    [*command, *arguments],
                    cwd=ROOT,
                    env={**os.environ, **environment(rank, count, port)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            running.append(process)
        codes = [process.wait(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    said = '\n'.join(log.read_text()[-4000:] for log in logs)
    assert [0] * count == codes, said
    return [
        torch.load(folder / f'rank{rank}.pt', weights_only=False)
        for rank in range(count)
    ]


def main(run):
    """Be a rank: keep what ``run(rank, count, folder, ...)`` returns."""
    folder, *arguments = sys.argv[1:]
    rank, count = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    found = run(rank, count, Path(folder), *arguments)
    torch.save(found, Path(folder, f'rank{rank}.pt'))
    sys.stdout.flush()
    sys.stderr.flush()
    # threads of gloo may outlive Python's shutdown
    os._exit(0)
