"""Optimizer constructors and warm-up: what makes an average of weights good.

The grouping of parameters, the scaling of weight decay and the warm-up know
no framework; ``for_mmengine`` and ``for_mmcv1`` only forward to them.
"""
