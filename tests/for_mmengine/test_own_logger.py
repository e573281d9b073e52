"""The line that an import logs leaves the framework's loggers alone."""

import subprocess
import sys

PROGRAM = """
import sys
import mmdet_ema
from mmengine.logging import MMLogger, print_log

assert not MMLogger._instance_dict, MMLogger._instance_dict
MMLogger.get_instance('mmengine', log_file=sys.argv[1])
print_log('a line of the run', logger='current')
"""


def test_import_makes_no_logger_of_the_framework(tmp_path):
    """Whoever asks mmengine for a logger later gets one with its file."""
    path = tmp_path / 'run.log'
    found = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', PROGRAM, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == found.returncode, found.stderr
    assert 'a line of the run' in path.read_text()
    assert "dict(type='EMAHook') builds its own hook" in found.stderr
