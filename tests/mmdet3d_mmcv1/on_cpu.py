"""Run a tool of mmdet3d 1.0, which puts its model on a GPU, without one.

Usage: python on_cpu.py TOOL ARGUMENTS
"""

import runpy
import sys

import torch

torch.nn.Module.cuda = lambda module, device=None: module
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
