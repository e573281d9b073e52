# SWA of detectors (arXiv:2012.12645): after ten epochs of training six more,
# in each of which the learning rate falls from the highest to the lowest
# value, and the mean of the weights at their ends.
_base_ = './atss_digits_1xb8-10e.py'

epoch = 100  # iterations
runner = dict(max_epochs=16)
custom_hooks = [
    dict(
        type='EMAHook',
        schedule='mean',
        begin_epoch=11,
        interval=epoch,
        evaluate='both',
        recalibrate=100,  # batches, for BatchNorm at the end
        priority='NORMAL',
    )
]
lr_config = dict(
    policy='CosineRestart',
    by_epoch=False,
    periods=[10 * epoch, *[epoch] * 6],
    restart_weights=[1] * 7,
    min_lr_ratio=0.01,
)
