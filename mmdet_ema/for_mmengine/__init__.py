"""The adapter of mmengine 0.10 (mmcv 2, mmdet 3, mmdet3d 1)."""
