"""``python -m mmdet_ema``, the same as ``mmdet-ema``."""

from mmdet_ema.cli.main import main

if __name__ == '__main__':
    main()
