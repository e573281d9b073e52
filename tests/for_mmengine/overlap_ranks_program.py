"""Run by ``torchrun`` on two ranks: ``ranks_program``, overlapped or not.

Usage: torchrun --nproc-per-node 2 \
    -m tests.for_mmengine.overlap_ranks_program KIND WORK_DIR OVERLAP
"""

import os
import sys

from tests.for_mmengine import ranks_program

if __name__ == '__main__':
    ranks_program.EMA['overlap'] = sys.argv[3] == 'True'
    ranks_program.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as in ranks_program
