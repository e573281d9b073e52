"""Settings of every test run, before torch is imported."""

import os

# waiting OpenMP threads make small operators slow on a busy machine
os.environ.setdefault('OMP_NUM_THREADS', '1')
