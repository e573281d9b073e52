"""Compiled kernels for averages in host memory.

They are optional: where they were not built, or do not fit the processor,
torch's own kernels take their place. No header of Python or torch is needed
to build them, so they fit every version.
"""
