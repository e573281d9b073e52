"""The command line, ``mmdet-ema``."""
