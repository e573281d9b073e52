"""The command line, ``mmdet-ema``: one small module a command."""
