"""An official config, made small enough to train on the digits set on CPU.

The hooks, the model's parts, the pipelines and the loops stay those of the
config; widths, depths, picture sizes and epochs shrink, and nothing is loaded
from the network.
"""

import json
import math

from mmengine.config import Config, ConfigDict

IMPORT = "custom_imports = dict(imports=['mmdet_ema'])\n"
CLASSES = tuple('0123456789')
WIDTH = 0.25
SIZES = ('img_scale', 'scale', 'size', 'crop_size', 'border')
CHANNELS = ('in_channels', 'out_channels', 'feat_channels')
LOADER = dict(num_workers=0, persistent_workers=False, pin_memory=False)


def untouched(name, folder):
    """An official config with the import as its only change."""
    path = folder / 'untouched.py'
    path.write_text(f"_base_ = 'mmdet::{name}'\n{IMPORT}")
    return Config.fromfile(path)


def small(name, data, folder, epochs=2):
    """Return a small config and write it as ``folder/small.py``."""
    config = untouched(name, folder)
    _shrink_model(config)
    _visit(config, _plain)
    _visit(config, lambda node: _on_digits(node, data))
    for part in ('train', 'val', 'test'):
        loader = config[f'{part}_dataloader']
        loader.update(LOADER)
        loader.batch_size = min(loader.batch_size, 4)
    config.train_cfg = dict(
        by_epoch=True, max_epochs=epochs, val_interval=epochs
    )
    for part in ('val_cfg', 'test_cfg'):
        config[part].pop('fp16', None)  # mmcv's NMS knows no bfloat16
    config.param_scheduler = []  # their warm-up is longer than the run
    config.optim_wrapper.type = 'OptimWrapper'  # the other needs a GPU
    config.optim_wrapper.pop('loss_scale', None)
    config.default_hooks.checkpoint.update(interval=1)
    config.default_hooks.logger.update(interval=1)
    config.randomness = dict(seed=0)
    config.work_dir = str(folder / 'work')
    config.dump(folder / 'small.py')
    return config


def annotate(data):
    """Add to the digits' annotations what masks and videos need."""
    for split in ('train', 'val'):
        path = data / 'annotations' / f'{split}.json'
        content = json.loads(path.read_text())
        content['videos'] = [dict(id=1, name='digits')]
        for i, image in enumerate(content['images']):
            image.update(video_id=1, frame_id=i)
        for item in content['annotations']:
            item.update(
                segmentation=[_ellipse(*item['bbox'])],
                instance_id=item['category_id'],
                mot_conf=1.0,
                visibility=1.0,
            )
        path.write_text(json.dumps(content))


def _ellipse(x, y, w, h, corners=12):
    """Corners of the ellipse in a box: a mask that is not its box."""
    turns = [2 * math.pi * i / corners for i in range(corners)]
    return [
        coordinate
        for t in turns
        for coordinate in (
            x + w * (1 + math.cos(t)) / 2,
            y + h * (1 + math.sin(t)) / 2,
        )
    ]


def _visit(node, change):
    """Call ``change`` on every dict of a config, outermost first."""
    if isinstance(node, (dict, Config)):
        if isinstance(node, dict):
            change(node)
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for item in node:
            _visit(item, change)


def _plain(node):
    """Drop downloads, sizes and what needs a GPU from one dict."""
    if node.get('type') == 'SyncBN':
        node['type'] = 'BN'
    if 'Pretrained' in str(node.get('init_cfg')):
        node['init_cfg'] = None
    for key in SIZES:
        if isinstance(node.get(key), (list, tuple)):
            node[key] = tuple(_tenth(value) for value in node[key])
    if 'random_size_range' in node:
        node['random_size_range'] = (32, 96)
    if 'switch_epoch' in node:
        node['switch_epoch'] = 1
    if 'num_last_epochs' in node:
        node['num_last_epochs'] = 0  # from the second of two epochs on


def _tenth(pixels):
    """A tenth, in steps of 32 pixels, so that every stride fits."""
    rounded = 32 * max(1, round(abs(pixels) / 320))
    return int(math.copysign(rounded, pixels))


def _on_digits(node, data):
    """Put the digits set in the place of COCO, CrowdHuman and MOT."""
    kind = str(node.get('type'))
    if 'num_classes' in node:
        node['num_classes'] = len(CLASSES)
    if kind in ('CocoDataset', 'MOTChallengeDataset'):
        split = 'val' if node.get('test_mode') else 'train'
        key = 'img' if kind == 'CocoDataset' else 'img_path'
        node['data_root'] = f'{data}/'
        node['ann_file'] = f'annotations/{split}.json'
        node['data_prefix'] = {key: f'{split}/'}
        node['metainfo'] = dict(classes=CLASSES)
        node.pop('filter_cfg', None)
    if kind == 'MOTChallengeMetric':  # needs the package trackeval
        node.clear()
        node.update(type='CocoVideoMetric', metric='bbox')
    if 'Coco' in kind and 'Metric' in kind:
        node['ann_file'] = f'{data}/annotations/val.json'


def _shrink_model(config):
    model = config.model
    detector = model.get('detector', model)
    backbone = detector.backbone
    if backbone.type == 'SwinTransformer':
        shrunk = 0.25
        stages = len(backbone.depths)
        backbone.update(
            embed_dims=32,
            depths=[1] * stages,
            num_heads=[2**i for i in range(stages)],
            window_size=4,
        )
    else:
        shrunk = min(1.0, WIDTH / backbone.widen_factor)
        backbone.widen_factor *= shrunk
        backbone.deepen_factor = 0.167
    detector.neck.num_csp_blocks = 1
    for part in (detector.neck, detector.bbox_head):
        for key in CHANNELS:
            part.update(
                {key: _times(part[key], shrunk)} if key in part else {}
            )
    detector.test_cfg.update(score_thr=0.0, nms_pre=20, max_per_img=20)
    if 'tracker' in model:
        _track_everything(model.tracker)


def _times(channels, factor):
    if isinstance(channels, (list, tuple)):
        return [_times(value, factor) for value in channels]
    return int(channels * factor)


def _track_everything(tracker):
    """A detector of two epochs is never sure of anything."""
    if 'obj_score_thrs' in tracker:
        tracker.obj_score_thrs = ConfigDict(high=0.0, low=0.0)
    if 'obj_score_thr' in tracker:
        tracker.obj_score_thr = 0.0
    tracker.init_track_thr = 0.0
