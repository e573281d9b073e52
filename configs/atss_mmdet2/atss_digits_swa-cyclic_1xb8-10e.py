# SWA of detectors (arXiv:2012.12645): five epochs of training as usual, then
# five whose learning rate falls from the highest to the lowest value; the mean
# of the weights at their ends.
_base_ = './atss_digits_1xb8-10e.py'

epoch = 100  # iterations
custom_hooks = [
    dict(
        type='EMAHook',
        schedule='mean',
        begin_epoch=6,
        interval=epoch,
        evaluate='both',
        recalibrate=100,  # batches, for BatchNorm at the end
        priority='NORMAL',
    )
]
lr_config = dict(
    policy='CosineRestart',
    by_epoch=False,
    periods=[5 * epoch, *[epoch] * 5],
    restart_weights=[1] * 6,
    min_lr_ratio=0.01,
)
