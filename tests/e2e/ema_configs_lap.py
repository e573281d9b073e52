"""Stands in for the package ``lap``, which mmdet's trackers ask for.

Copied under the name ``lap.py`` to where a tool finds it, if the real one is
not installed. Linear assignment by SciPy.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment


def lapjv(cost, extend_cost=False, cost_limit=np.inf):
    """Return the cost, and the partner of each row and column (or -1)."""
    rows, columns = cost.shape
    size = rows + columns
    padded = np.zeros((size, size))
    padded[:rows, columns:] = padded[rows:, :columns] = cost_limit / 2
    padded[:rows, :columns] = cost
    row_of = np.full(rows, -1)
    column_of = np.full(columns, -1)
    for i, j in zip(*linear_sum_assignment(padded)):
        if i < rows and j < columns:
            row_of[i], column_of[j] = j, i
    matched = np.flatnonzero(row_of >= 0)
    return float(cost[matched, row_of[matched]].sum()), row_of, column_of
