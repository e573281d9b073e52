# SWA of detectors (arXiv:2012.12645): after ten epochs of training six more,
# in each of which the learning rate falls from the highest to the lowest
# value, and the mean of the weights at their ends.
_base_ = './rtmdet_digits_swa-constant_1xb8-16e.py'

epoch = 100  # iterations
_base_.custom_hooks[0].update(interval=epoch)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineRestartLR',
        periods=[10 * epoch - 50, *[epoch] * 6],
        restart_weights=[1] * 7,
        eta_min_ratio=0.01,
        by_epoch=False,
        begin=50,
        end=16 * epoch,
    ),
]
