# SMOKE, one camera and no scanner, on the set that tests/mmdet3d/kitti_data.py
# writes. Data, image size, metric and what a short run needs differ from the
# inherited config.
_base_ = 'mmdet3d::smoke/smoke_dla34_dlaneck_gn-all_4xb8-6x_kitti-mono3d.py'
custom_imports = dict(imports=['mmdet_ema'], allow_failed_imports=False)
# The inherited config has no hooks of its own, so a new list drops none.
custom_hooks = [dict(type='EMAHook', decay=0.9, tau=5, evaluate='both')]

data_root = 'data/kitti_mini/'
model = dict(
    backbone=dict(init_cfg=None),  # nothing is downloaded
    neck=dict(use_dcn=False),  # deformable convolutions crawl on a CPU
)

# The pipelines are inherited too, edited in place.
image_scale = (320, 96)
train_set = _base_.train_dataloader.dataset
train_set.data_root = data_root
train_set.pipeline[4].img_scale = image_scale
val_set = _base_.val_dataloader.dataset
val_set.data_root = data_root
val_set.pipeline[1].img_scale = image_scale
_base_.test_dataloader.dataset = val_set

loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=2, **loader)
val_dataloader = test_dataloader = loader

# The 3D metrics of KITTI need CUDA; the AP of the boxes in the image does not.
val_evaluator = test_evaluator = dict(
    ann_file=data_root + 'kitti_infos_val.pkl', metric='img_bbox'
)
train_cfg = dict(max_epochs=4, val_interval=2)
default_hooks = dict(logger=dict(interval=4), checkpoint=dict(interval=2))
randomness = dict(seed=0)
