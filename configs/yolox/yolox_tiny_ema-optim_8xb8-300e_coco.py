_base_ = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'
custom_imports = dict(imports=['mmdet_ema'], allow_failed_imports=False)

# SGD with lr 0.01 and weight decay 5e-4, chosen for 64 samples a step
optim_wrapper = dict(constructor='EMAOptimizerConstructor')

# A `custom_hooks` list here would drop the other hooks of the base config, so
# its list is edited in place. BiasWarmupHook replaces the first scheduler.
_base_.custom_hooks[2] = dict(type='EMAHook', priority=49)
_base_.custom_hooks.append(dict(type='BiasWarmupHook', warmup_epochs=5))
_base_.param_scheduler.pop(0)
