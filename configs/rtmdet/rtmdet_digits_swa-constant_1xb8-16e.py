# Stochastic weight averaging (SWA, arXiv:1803.05407): after ten epochs of
# training six more at a constant learning rate, and the mean of the weights
# after each of their steps.
_base_ = './rtmdet_digits_1xb8-10e.py'

train_cfg = dict(max_epochs=16)
_base_.custom_hooks[0] = dict(
    type='EMAHook',
    schedule='mean',
    begin_epoch=11,
    evaluate='both',
    recalibrate=100,  # batches, for BatchNorm at the end
    priority=49,
)
