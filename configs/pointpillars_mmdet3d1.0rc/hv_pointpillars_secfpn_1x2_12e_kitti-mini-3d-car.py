# PointPillars of mmdet3d 1.0.0rc6 (mmcv 1.x) on a small grid, on the set that
# tests/mmdet3d/kitti_data.py writes. Optimizer, cyclic learning rate and
# momentum, clipped gradients and layers are those of the inherited config.
import mmdet3d

_base_ = (
    f'{mmdet3d.__path__[0]}/.mim/configs/pointpillars/'
    'hv_pointpillars_secfpn_6x8_160e_kitti-3d-car.py'
)
custom_imports = dict(imports=['mmdet_ema'], allow_failed_imports=False)
# The inherited config has no hooks of its own, so a new list drops none.
custom_hooks = [dict(type='EMAHook', decay=0.95, tau=10, evaluate='both')]
optimizer = dict(constructor='EMAOptimizerConstructor')

data_root = 'data/kitti_mini/'
class_names = ['Car']
area = [0, -10.24, -3, 20.48, 10.24, 1]  # 64 x 64 pillars
pillar = [0.32, 0.32, 4]
# Its BatchNorm statistics take hundreds of steps with the inherited 0.01.
norm = dict(eps=1e-3, momentum=0.1)
model = dict(
    voxel_layer=dict(
        point_cloud_range=area, voxel_size=pillar, max_voxels=(2000, 2000)
    ),
    voxel_encoder=dict(
        point_cloud_range=area,
        voxel_size=pillar,
        norm_cfg=dict(type='BN1d', **norm),
    ),
    middle_encoder=dict(output_shape=[64, 64]),
    backbone=dict(norm_cfg=dict(type='BN', **norm)),
    neck=dict(norm_cfg=dict(type='BN', **norm)),
    bbox_head=dict(
        anchor_generator=dict(ranges=[[*area[:2], -1.78, *area[3:5], -1.78]])
    ),
)

# A list replaces the inherited one, so the pipelines are written out.
points = dict(
    type='LoadPointsFromFile', coord_type='LIDAR', load_dim=4, use_dim=4
)
sampler = dict(
    data_root=data_root,
    info_path=data_root + 'kitti_dbinfos_train.pkl',
    rate=1.0,
    prepare=dict(filter_by_difficulty=[-1], filter_by_min_points=dict(Car=5)),
    sample_groups=dict(Car=15),
    classes=class_names,
)
train_pipeline = [
    points,
    dict(type='LoadAnnotations3D', with_bbox_3d=True, with_label_3d=True),
    dict(type='ObjectSample', db_sampler=sampler, use_ground_plane=True),
    dict(type='RandomFlip3D', flip_ratio_bev_horizontal=0.5),
    dict(
        type='GlobalRotScaleTrans',
        rot_range=[-0.78539816, 0.78539816],
        scale_ratio_range=[0.95, 1.05],
    ),
    dict(type='PointsRangeFilter', point_cloud_range=area),
    dict(type='ObjectRangeFilter', point_cloud_range=area),
    dict(type='PointShuffle'),
    dict(type='DefaultFormatBundle3D', class_names=class_names),
    dict(type='Collect3D', keys=['points', 'gt_bboxes_3d', 'gt_labels_3d']),
]
test_pipeline = [
    points,
    dict(
        type='MultiScaleFlipAug3D',
        img_scale=(1333, 800),
        pts_scale_ratio=1,
        flip=False,
        transforms=[
            dict(type='PointsRangeFilter', point_cloud_range=area),
            dict(
                type='DefaultFormatBundle3D',
                class_names=class_names,
                with_label=False,
            ),
            dict(type='Collect3D', keys=['points']),
        ],
    ),
]
train_set = dict(
    data_root=data_root,
    ann_file=data_root + 'kitti_infos_train.pkl',
    pipeline=train_pipeline,
)
val_set = dict(
    data_root=data_root,
    ann_file=data_root + 'kitti_infos_val.pkl',
    pipeline=test_pipeline,
)
data = dict(
    samples_per_gpu=2,
    workers_per_gpu=0,
    train=dict(times=1, dataset=train_set),
    val=val_set,
    test=val_set,
)

runner = dict(max_epochs=12)
# The averages after each epoch of training, in training's own losses.
workflow = [('train', 1), ('val', 1)]
# The AP in 3D wants a GPU; that of the boxes in the image does not.
evaluation = dict(interval=6, metric='img_bbox')
checkpoint_config = dict(interval=6)
log_config = dict(interval=4)  # the text log and TensorBoard are inherited
