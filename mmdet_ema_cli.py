"""The command ``mmdet-ema``: the same as ``python -m mmdet_ema``.

A module outside of the package, since a script that imports the package
registers the hooks, and ``mmdet-ema --help`` is not to wait for that.
"""

import runpy


def main() -> None:
    """Run the command line."""
    runpy.run_module('mmdet_ema', run_name='__main__')
