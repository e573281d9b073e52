# A narrow ATSS on the set that `python demo/digits.py data/digits` writes. For
# mmdet 2, whose configs cannot inherit the installed ones by name.
custom_imports = dict(imports=['mmdet_ema'], allow_failed_imports=False)
custom_hooks = [
    dict(
        type='EMAHook',
        decay=0.99,
        tau=50,
        averages=dict(fast=dict(decay=0.9, tau=5)),
        evaluate='all',
        priority='NORMAL',
    )
]

norm = dict(type='BN')
model = dict(
    type='ATSS',
    backbone=dict(
        type='ResNet',
        depth=18,
        stem_channels=16,
        base_channels=16,
        out_indices=(1, 2, 3),
        norm_cfg=norm,
        norm_eval=False,
    ),
    neck=dict(
        type='FPN', in_channels=[32, 64, 128], out_channels=48, num_outs=3
    ),
    bbox_head=dict(
        type='ATSSHead',
        num_classes=10,
        in_channels=48,
        feat_channels=48,
        stacked_convs=2,
        norm_cfg=dict(type='GN', num_groups=8),
        anchor_generator=dict(
            type='AnchorGenerator',
            ratios=[1.0],
            octave_base_scale=4,
            scales_per_octave=1,
            strides=[8, 16, 32],
        ),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]
        ),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(type='ATSSAssigner', topk=9),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=100,
        score_thr=0.02,
        nms=dict(type='nms', iou_threshold=0.6),
        max_per_img=20,
    ),
)

size = (128, 128)
pixels = dict(type='Normalize', mean=[100] * 3, std=[50] * 3, to_rgb=False)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', img_scale=size),
    dict(type='RandomFlip', flip_ratio=0.0),
    pixels,
    dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels']),
]
test_transforms = [
    dict(type='Resize'),
    pixels,
    dict(type='ImageToTensor', keys=['img']),
    dict(type='Collect', keys=['img']),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=size, transforms=test_transforms),
]

data_root = 'data/digits/'
digits = dict(type='CocoDataset', classes=[*'0123456789'])
train_set = dict(
    ann_file=data_root + 'annotations/train.json',
    img_prefix=data_root + 'train/',
    pipeline=train_pipeline,
    **digits,
)
val_set = dict(
    ann_file=data_root + 'annotations/val.json',
    img_prefix=data_root + 'val/',
    pipeline=test_pipeline,
    **digits,
)
data = dict(
    workers_per_gpu=0,
    train_dataloader=dict(samples_per_gpu=8),
    val_dataloader=dict(samples_per_gpu=25),
    test_dataloader=dict(samples_per_gpu=25),
    train=train_set,
    val=val_set,
    test=val_set,
)

# The learning rate stays high, so the raw weights stay noisy and their average
# stands for what a decay of the learning rate would bring.
optimizer = dict(type='AdamW', lr=0.002, weight_decay=0.05)
optimizer_config = dict(grad_clip=dict(max_norm=10))
lr_config = dict(
    policy='fixed', warmup='linear', warmup_iters=50, warmup_ratio=0.01
)
runner = dict(type='EpochBasedRunner', max_epochs=10)
evaluation = dict(interval=2, metric='bbox')
checkpoint_config = dict(interval=2)
log_config = dict(interval=25, hooks=[dict(type='TextLoggerHook')])

# What mmdet 2 wants to be told by every config.
log_level = 'INFO'
workflow = [('train', 1)]
dist_params = dict(backend='gloo')
load_from = resume_from = None
