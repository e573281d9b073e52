"""The adapter of mmcv 1.7 (mmdet 2)."""
