# SMOKE, one camera and no scanner, made small: images of 320 x 96, random
# weights to begin with, and no deformable convolutions, which crawl on a CPU.
import mmdet3d

_base_ = (
    f'{mmdet3d.__path__[0]}/.mim/configs/smoke/'
    'smoke_dla34_pytorch_dlaneck_gn-all_8x4_6x_kitti-mono3d.py'
)
model = dict(
    backbone=dict(init_cfg=None),
    neck=dict(use_dcn=False),
    # Low scores cost nothing: SMOKE drops boxes below 0.25, which few steps
    # have to reach.
    bbox_head=dict(loss_cls=dict(alpha=8.0)),
)
optimizer = dict(lr=0.005)

data_root = 'data/kitti_mini/'
scale = dict(type='AffineResize', img_scale=(320, 96), down_ratio=4)
pixels = dict(type='Normalize', mean=[100.0] * 3, std=[50.0] * 3, to_rgb=True)
names = dict(
    type='DefaultFormatBundle3D',
    class_names=['Pedestrian', 'Cyclist', 'Car'],
)
inputs = ['img', 'gt_bboxes', 'gt_labels', 'gt_bboxes_3d', 'gt_labels_3d']
train_pipeline = [
    dict(type='LoadImageFromFileMono3D'),
    dict(
        type='LoadAnnotations3D',
        with_bbox=True,
        with_label=True,
        with_attr_label=False,
        with_bbox_3d=True,
        with_label_3d=True,
        with_bbox_depth=True,
    ),
    dict(type='RandomFlip3D', flip_ratio_bev_horizontal=0.5),
    dict(type='RandomShiftScale', shift_scale=(0.2, 0.4), aug_prob=0.3),
    scale,
    pixels,
    names,
    dict(type='Collect3D', keys=[*inputs, 'centers2d', 'depths']),
]
transforms = [
    scale,
    pixels,
    dict(names, with_label=False),
    dict(type='Collect3D', keys=['img']),
]
test_pipeline = [
    dict(type='LoadImageFromFileMono3D'),
    dict(
        type='MultiScaleFlipAug',
        img_scale=scale['img_scale'],
        flip=False,
        transforms=transforms,
    ),
]


def part_of(split, pipeline):
    """Return the settings of a half of the data."""
    return dict(
        data_root=data_root,
        ann_file=f'{data_root}kitti_infos_{split}_mono3d.coco.json',
        info_file=f'{data_root}kitti_infos_{split}.pkl',
        img_prefix=data_root,
        pipeline=pipeline,
    )


data = dict(
    samples_per_gpu=2,
    workers_per_gpu=0,
    train=part_of('train', train_pipeline),
    val=part_of('val', test_pipeline),
    test=part_of('val', test_pipeline),
)
log_config = dict(hooks=[dict(type='TextLoggerHook')])
