"""Run a program as several real ranks, and read what each of them dumped."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(program, count, folder, *arguments):
    """Run ``python -m PROGRAM RANK COUNT FOLDER ...`` on so many ranks.

    Each dumps into ``rank{r}.pt`` of the folder.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    running = [
        subprocess.Popen(
            [
                *(sys.executable, '-W', 'ignore', '-m', program),
                *(str(rank), str(count), str(folder), *arguments),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                'OMP_NUM_THREADS': '1',
                'MASTER_ADDR': '127.0.0.1',
                'MASTER_PORT': str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in running]
    finally:
        for rank in running:
            rank.kill()
    codes = [rank.returncode for rank in running]
    assert [0] * count == codes, '\n'.join(text[-3000:] for text in said)
    return [
        torch.load(folder / f'rank{rank}.pt', weights_only=False)
        for rank in range(count)
    ]
