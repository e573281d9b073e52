"""Changes what an import should not: the comparison has to see it."""

from mmcv.runner import BaseRunner
from mmcv.utils import get_logger

get_logger('meddling')


def call_hook(self, fn_name):
    """Do as mmcv does."""
    for hook in self._hooks:
        getattr(hook, fn_name)(self)


BaseRunner.call_hook = call_hook
