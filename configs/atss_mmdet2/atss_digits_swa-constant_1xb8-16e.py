# Stochastic weight averaging (SWA, arXiv:1803.05407): after ten epochs of
# training six more at a constant learning rate, and the mean of the weights
# after each of their steps.
_base_ = './atss_digits_1xb8-10e.py'

runner = dict(max_epochs=16)
custom_hooks = [
    dict(
        type='EMAHook',
        schedule='mean',
        begin_epoch=11,
        evaluate='both',
        recalibrate=100,  # batches, for BatchNorm at the end
        priority='NORMAL',
    )
]
