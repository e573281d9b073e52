"""The average, computed in NumPy float64 from the formula alone.

Nothing here imports the package: it is what the package is checked against.
"""

import numpy as np


def ramp(n, decay=0.9999, tau=2000):
    """Rule 1: ``d = decay * (1 - exp(-n / tau))``."""
    return decay * (1.0 - np.exp(-np.float64(n) / tau))


def average(start, weights, decay_of):
    """Average recorded weights of one tensor.

    ``start`` is the array before the first step, ``weights`` the arrays after
    each step, ``decay_of`` maps n = 1, 2, ... to the decay.
    """
    mean = np.asarray(start, dtype=np.float64)
    for n, value in enumerate(weights, start=1):
        decay = np.float64(decay_of(n))
        mean = decay * mean + (1 - decay) * np.asarray(value, np.float64)
    return mean


def average_every(start, weights, decay_of, interval, phase=0):
    """Average every ``interval`` steps with the product of the decays."""
    mean = np.asarray(start, dtype=np.float64)
    decay = np.float64(1.0)
    for n, value in enumerate(weights, start=1):
        decay = decay * np.float64(decay_of(n))
        if (n - phase) % interval == 0:
            mean = decay * mean + (1 - decay) * np.asarray(value, np.float64)
            decay = np.float64(1.0)
    return mean


def relative_error(found, expected):
    """Largest deviation, relative to the largest magnitude of the tensor."""
    found = np.asarray(found, np.float64)
    scale = max(float(np.abs(expected).max(initial=0.0)), 1e-12)
    return float(np.abs(found - expected).max(initial=0.0)) / scale
