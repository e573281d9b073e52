# A narrow RTMDet on the set that `python demo/digits.py data/digits` writes.
_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
custom_imports = dict(imports=['mmdet_ema'], allow_failed_imports=False)

norm = dict(norm_cfg=dict(type='BN'))
model = dict(
    backbone=dict(widen_factor=0.25, init_cfg=None, **norm),
    neck=dict(in_channels=[64, 128, 256], out_channels=64, **norm),
    bbox_head=dict(num_classes=10, in_channels=64, feat_channels=64, **norm),
    test_cfg=dict(nms_pre=100, score_thr=0.02, max_per_img=20),
)

load = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
]
pack = [dict(type='Resize', scale_factor=1.0), dict(type='PackDetInputs')]
train_pipeline = [*load, dict(type='YOLOXHSVRandomAug'), *pack]
test_pipeline = train_pipeline_stage2 = load + pack

loader = dict(num_workers=0, persistent_workers=False, pin_memory=False)
digits = dict(data_root='data/digits/', metainfo=dict(classes=[*'0123456789']))
train_set = dict(
    ann_file='annotations/train.json',
    data_prefix=dict(img='train/'),
    pipeline=train_pipeline,
)
val_set = dict(
    ann_file='annotations/val.json',
    data_prefix=dict(img='val/'),
    pipeline=test_pipeline,
)
train_dataloader = dict(
    batch_size=8, dataset=dict(**train_set, **digits), **loader
)
val_dataloader = test_dataloader = dict(
    batch_size=50, dataset=dict(**val_set, **digits), **loader
)
val_evaluator = test_evaluator = dict(
    ann_file='data/digits/annotations/val.json'
)

# The learning rate stays high, so the raw weights stay noisy and their average
# stands for what a decay of the learning rate would bring.
optim_wrapper = dict(optimizer=dict(lr=0.008))
train_cfg = dict(max_epochs=10, val_interval=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50)
]
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=25))
randomness = dict(seed=0)

# A `custom_hooks` list here would drop the other hooks of the base config (its
# PipelineSwitchHook), so the list of the base config is edited in place.
_base_.custom_hooks[0] = dict(
    type='EMAHook',
    decay=0.99,
    tau=50,
    averages=dict(fast=dict(decay=0.9, tau=5)),
    evaluate='all',
    priority=49,
)
_base_.custom_hooks[1].update(
    switch_epoch=8, switch_pipeline=train_pipeline_stage2
)
