"""Settings of every test run, before torch is imported."""

import os
import signal

# waiting OpenMP threads make small operators slow on a busy machine
os.environ.setdefault('OMP_NUM_THREADS', '1')

# a run in the background starts with Ctrl-C ignored; some tests send it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
