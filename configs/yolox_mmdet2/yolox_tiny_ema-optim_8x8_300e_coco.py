import mmdet

_base_ = f'{mmdet.__path__[0]}/.mim/configs/yolox/yolox_tiny_8x8_300e_coco.py'
custom_imports = dict(imports=['mmdet_ema'], allow_failed_imports=False)
optimizer = dict(constructor='EMAOptimizerConstructor')
lr_config = dict(warmup=None)  # BiasWarmupHook takes its place
# This list replaces that of the base config, so it names its other hooks too.
custom_hooks = [
    dict(type='YOLOXModeSwitchHook', num_last_epochs=15, priority=48),
    dict(type='SyncNormHook', num_last_epochs=15, interval=10, priority=48),
    dict(type='EMAHook', priority=49),
    dict(type='BiasWarmupHook', warmup_epochs=5),
]
