"""A module that ``copy.deepcopy`` cannot copy, for a config to import."""

import threading

from mmdet3d.models.middle_encoders import PointPillarsScatter
from mmdet3d.registry import MODELS


@MODELS.register_module()
class UncopyableScatter(PointPillarsScatter):
    """The same computation, with a handle of the operating system in it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.handle = threading.Lock()
