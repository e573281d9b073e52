"""The training runs of the study: small detectors, many averages in each.

An average does not influence the training, so that the averages of one run
are what as many runs with one decay each would give.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Tuple

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmdet_ema.checkpoint.format import META, MORE, WEIGHTS
from mmdet_ema.checkpoint.windows import suited_schedule

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / 'demo'))
from digits import write_digits  # noqa: E402
from trees import write_trees  # noqa: E402

CONFIG = ROOT / 'configs' / 'rtmdet' / 'rtmdet_digits_1xb8-10e.py'
FILES = 12
SIZE = 64
# windows as shares of the run
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
AUTO = 0.1
# with the fast one of posthoc=True, a tenth of it, and the files, it gives
# every window from 2 % of the run on
MAIN = 0.2
METRIC = 'coco/bbox_mAP'


@dataclass(frozen=True)
class Setting:
    """A data set, a course of the learning rate, and a length.

    Attributes:
        name: Of the setting.
        title: Of its tables.
        seeds: Runs.
        cosine: Whether the learning rate falls to nothing; else it stays.
        trees: Whether the data are the trees; else the digits.
        images: Training images of the digits.
        steps: Optimizer steps of a run.
        batch: Pictures a step.
    """

    name: str
    title: str
    seeds: int
    cosine: bool = False
    trees: bool = False
    images: int = 800
    steps: int = 480
    batch: int = 4

    @property
    def data(self) -> Path:
        """The folder of the set."""
        kind = 'trees' if self.trees else f'digits_{self.images}'
        return ROOT / 'data' / 'study' / kind

    def folder(self, seed: int) -> Path:
        """The folder of a run."""
        return ROOT / 'work_dirs' / 'study' / self.name / f'seed_{seed}'

    def parts(self) -> Dict[str, Tuple[Path, str]]:
        """Return folder and split to choose by, and of what is held out."""
        if self.trees:
            held_out = (self.data, 'shift')
        else:
            name = f'{self.data.name}_held_out'
            held_out = (self.data.with_name(name), 'val')
        return {'validation': (self.data, 'val'), 'held out': held_out}


SETTINGS = {
    x.name: x
    for x in (
        Setting('digits', 'Digits, the learning rate stays', 5),
        Setting('falling', 'Digits, the learning rate falls', 5, cosine=True),
        # 480 steps find no tree
        Setting(
            *('trees', 'Trees, the learning rate falls', 1, True, True),
            steps=4800,
        ),
        # for the tests: seconds
        Setting('short', 'Digits, for seconds', 1, images=20, steps=60),
    )
}


def write_data(setting: Setting) -> None:
    """Write the data of a setting, unless they are there."""
    if setting.trees:
        write_trees(setting.data)
        return
    scenes = min(200, setting.images)
    own = dict(size=SIZE, val_scans=(1400, 1600))
    write_digits(setting.data, setting.images, scenes, **own)
    # other scenes, of other scans
    held_out = setting.parts()['held out'][0]
    own = dict(size=SIZE, val_scans=(1600, 1797), seed=1)
    write_digits(held_out, 1, scenes, **own)


def average_of(share: float, steps: int) -> Dict[str, Any]:
    """Return the options of an average over a share of the run."""
    window = max(share * steps, 2)
    options: Dict[str, Any] = suited_schedule(window, steps).options
    return options


def averages(steps: int) -> Dict[str, Any]:
    """Return the averages of a run besides the main one, by name."""
    found: Dict[str, Any] = {'default': dict(decay=0.9999, tau=2000)}
    for share in SHARES:
        if share != MAIN:
            found[name_of(share)] = average_of(share, steps)
    found[name_of(AUTO)] = dict(decay='auto')
    # copies until the last quarter begins, and then their mean
    begin = steps - steps // 4
    swa = dict(type='power', power=1.0, update_after_step=begin)
    found['swa'] = dict(schedule=swa)
    return found


def name_of(share: float) -> str:
    """Return the name of the average over a share of the run."""
    return f'share_{round(100 * share)}'


def config_of(setting: Setting, seed: int) -> Config:
    """Return the config of a run."""
    cfg = Config.fromfile(str(CONFIG))
    cfg.work_dir = str(setting.folder(seed))
    cfg.randomness = dict(seed=seed)
    cfg.log_level = 'WARNING'
    _make_small(cfg)
    steps = setting.steps
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=steps, val_interval=steps
    )
    cfg.train_dataloader.update(
        batch_size=setting.batch,
        sampler=dict(type='InfiniteSampler', shuffle=True),
        batch_sampler=None,
    )
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=steps // FILES,
        save_optimizer=False,
        save_param_scheduler=False,
    )
    # no hook changes the data in the last epochs
    cfg.pop('train_pipeline_stage2')
    cfg.pop('stage2_num_epochs')
    cfg.custom_hooks = [
        dict(
            type='EMAHook',
            posthoc=True,
            averages=averages(steps),
            **average_of(MAIN, steps),
        )
    ]
    if setting.trees:
        _use_trees(cfg)
    warmup = cfg.param_scheduler[0]
    cfg.param_scheduler = [warmup]
    if setting.cosine:
        rest = dict(begin=warmup.end, T_max=steps - warmup.end, end=steps)
        cfg.param_scheduler.append(
            dict(
                type='CosineAnnealingLR', by_epoch=False, eta_min=1e-5, **rest
            )
        )
    roots = {'train': (setting.data, 'train')}
    roots['val'] = roots['test'] = setting.parts()['validation']
    for loader, (root, split) in roots.items():
        use_part(cfg, loader, root, split)
    return cfg


def _make_small(cfg: Config) -> None:
    """Leave one level of RTMDet, of stride 8: a step takes 0.1 s of a core."""
    wide = 128
    cfg.model.backbone.update(
        arch_ovewrite=[[64, 128, 3, True, False], [128, 256, 3, True, True]],
        out_indices=(2,),
        widen_factor=wide / 256,
    )
    cfg.model.neck = dict(
        type='ChannelMapper',
        in_channels=[wide],
        out_channels=wide,
        kernel_size=1,
        norm_cfg=dict(type='BN'),
    )
    cfg.model.bbox_head.update(
        in_channels=wide,
        feat_channels=wide,
        stacked_convs=1,
        anchor_generator=dict(
            type='MlvlPointGenerator', offset=0, strides=[8]
        ),
    )
    cfg.optim_wrapper.optimizer.lr = 0.004


def _use_trees(cfg: Config) -> None:
    cfg.model.bbox_head.num_classes = 1
    cfg.model.test_cfg.update(nms_pre=300, max_per_img=100)
    load, resize = cfg.train_pipeline[:2], cfg.train_pipeline[3:]
    crop = dict(type='RandomCrop', crop_size=(128, 128))
    flip = dict(type='RandomFlip', prob=0.5)
    cfg.train_dataloader.dataset.pipeline = [*load, crop, flip, *resize]
    for name in ('train', 'val', 'test'):
        loader = cfg[f'{name}_dataloader']
        loader.dataset.metainfo = dict(classes=['Tree'])
        if name != 'train':
            loader.batch_size = 10


def use_part(cfg: Config, loader: str, root: Path, split: str) -> None:
    """Let a loader of a config, and its evaluator, take a part of the data."""
    annotations = f'annotations/{split}.json'
    cfg[f'{loader}_dataloader'].dataset.update(
        data_root=f'{root}/',
        ann_file=annotations,
        data_prefix=dict(img=f'{split}/'),
    )
    if loader != 'train':
        cfg[f'{loader}_evaluator'].ann_file = str(root / annotations)


def train(setting: Setting, seed: int) -> None:
    """Train a run; keep its files as ``posthoc=True`` alone writes them.

    The averages that it tracked go into ``tracked.pth``: what is combined
    afterwards must not see them.
    """
    folder = setting.folder(seed)
    tracked = folder / 'tracked.pth'
    if tracked.exists():
        return
    # what an interrupted run has left
    shutil.rmtree(folder, ignore_errors=True)
    cfg = config_of(setting, seed)
    # mmengine keeps one visualizer for a name, and its folder
    cfg.visualizer.name = str(folder)
    Runner.from_cfg(cfg).train()
    kept: Dict[str, Any] = {}
    for path in sorted(folder.glob('iter_*.pth')):
        content = torch.load(path, map_location='cpu', weights_only=True)
        more = content[MORE]
        content[MORE] = {'posthoc': more.pop('posthoc')}
        if content[META]['num_steps'] == setting.steps:
            kept = {name: state[WEIGHTS] for name, state in more.items()}
        _save(content, path)
    assert kept, 'the last file is missing'
    _save(kept, tracked)


def _save(content: Any, path: Path) -> None:
    beside = path.with_suffix('.part')
    torch.save(content, beside)
    beside.replace(path)
