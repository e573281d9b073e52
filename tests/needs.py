"""What a test needs of the stack that it runs on; without it, it is skipped.

``@needs.torch(2, 1)``, ``@needs.mmdet``: each with its reason.
"""

import importlib.util

import pytest
import torch as _torch

TORCH = tuple(int(x) for x in _torch.__version__.split('.')[:2])


def torch(*version, why):
    """Need a version of torch.

    Args:
        *version: Major and minor number.
        why: What it lacks before.
    """
    text = '.'.join(map(str, version))
    return pytest.mark.skipif(
        TORCH < version, reason=f'needs torch {text}: {why}'
    )


def package(name):
    """Need a package."""
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f'{name} is not in this stack')


# torch 1.13 refuses every file with a float in it
SAFELY = TORCH >= (2, 0)
compile = torch(2, 4, why='torch.compile of an optimizer with momentum')
gloo_bfloat16 = torch(2, 4, why='gloo for bfloat16')
told_of_steps = torch(2, 0, why='hooks around the steps of optimizers')
cpu_scaler = torch(2, 3, why='a gradient scaler for the CPU')
mmdet = package('mmdet')
