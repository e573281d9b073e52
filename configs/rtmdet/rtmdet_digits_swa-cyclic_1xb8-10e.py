# SWA of detectors (arXiv:2012.12645): five epochs of training as usual, then
# five whose learning rate falls from the highest to the lowest value; the mean
# of the weights at their ends.
_base_ = './rtmdet_digits_swa-constant_1xb8-10e.py'

epoch = 100  # iterations
_base_.custom_hooks[0].update(interval=epoch)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineRestartLR',
        periods=[5 * epoch - 50, *[epoch] * 5],
        restart_weights=[1] * 6,
        eta_min_ratio=0.01,
        by_epoch=False,
        begin=50,
        end=10 * epoch,
    ),
]
