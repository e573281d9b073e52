# PointPillars on a small grid, on the set that tests/mmdet3d/kitti_data.py
# writes. Data, grid, metric and what a short run needs differ from the
# inherited config; the layers do not.
_base_ = (
    'mmdet3d::pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-car.py'
)
custom_imports = dict(imports=['mmdet_ema'], allow_failed_imports=False)
# The inherited config has no hooks of its own, so a new list drops none.
custom_hooks = [dict(type='EMAHook', decay=0.95, tau=10, evaluate='both')]

data_root = 'data/kitti_mini/'
area = [0, -10.24, -3, 20.48, 10.24, 1]  # 64 x 64 pillars
pillar = [0.32, 0.32, 4]
# Its BatchNorm statistics take hundreds of steps with the inherited 0.01.
norm = dict(eps=1e-3, momentum=0.1)
model = dict(
    data_preprocessor=dict(
        voxel_layer=dict(
            point_cloud_range=area,
            voxel_size=pillar,
            max_voxels=(2000, 2000),
        )
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

# The pipelines are inherited too, edited in place.
train_set = _base_.train_dataloader.dataset.dataset
train_set.data_root = data_root
train_set.pipeline[2].db_sampler.update(
    data_root=data_root, info_path=data_root + 'kitti_dbinfos_train.pkl'
)
train_set.pipeline[5].point_cloud_range = area
train_set.pipeline[6].point_cloud_range = area
val_set = _base_.val_dataloader.dataset
val_set.data_root = data_root
val_set.pipeline[1].transforms[2].point_cloud_range = area
_base_.test_dataloader.dataset = val_set

loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=2, dataset=dict(times=1), **loader)
val_dataloader = test_dataloader = loader

# The 3D metrics of KITTI need CUDA; the AP of the boxes in the image does not.
val_evaluator = test_evaluator = dict(
    ann_file=data_root + 'kitti_infos_val.pkl', metric='img_bbox'
)
optim_wrapper = dict(optimizer=dict(lr=0.003))
param_scheduler = []
train_cfg = dict(max_epochs=12, val_interval=6)
default_hooks = dict(logger=dict(interval=4), checkpoint=dict(interval=6))
randomness = dict(seed=0)
