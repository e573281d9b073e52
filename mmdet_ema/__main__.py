"""``python -m mmdet_ema``, and ``mmdet-ema``, which runs this."""

from mmdet_ema.cli.main import main

if __name__ == '__main__':
    main()
