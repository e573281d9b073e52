"""Optimizer constructors and warm-up: what makes an average of weights good.

The grouping of parameters, the scaling of weight decay and the warm-up know
no framework; the adapter of each generation only forwards to them.
"""
