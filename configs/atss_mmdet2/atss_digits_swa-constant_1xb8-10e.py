# Stochastic weight averaging (SWA, arXiv:1803.05407): the mean of the weights
# after every step of the last five epochs, whose learning rate is constant.
_base_ = './atss_digits_1xb8-10e.py'
custom_hooks = [
    dict(
        type='EMAHook',
        schedule='mean',
        begin_epoch=6,
        evaluate='both',
        recalibrate=100,  # batches, for BatchNorm at the end
        priority='NORMAL',
    )
]
