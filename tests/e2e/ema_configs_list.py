"""The configs of mmdet 3.3 that use ``EMAHook``, by family."""

import importlib.util
import re
from functools import lru_cache
from pathlib import Path

from mmengine.config import Config

MOT17 = 'crowdhuman-mot17halftrain_test-mot17halfval'
MOT20 = 'crowdhuman-mot20train_test-mot20test'

FAMILIES = {
    'rtmdet': [
        'rtmdet_tiny_8xb32-300e_coco',
        'rtmdet_s_8xb32-300e_coco',
        'rtmdet_m_8xb32-300e_coco',
        'rtmdet_l_8xb32-300e_coco',
        'rtmdet_x_8xb32-300e_coco',
        'rtmdet_x_p6_4xb8-300e_coco',
        'rtmdet_l_swin_b_4xb32-100e_coco',
        'rtmdet_l_swin_b_p6_4xb16-100e_coco',
        'rtmdet_l_convnext_b_4xb32-100e_coco',
        'rtmdet-ins_tiny_8xb32-300e_coco',
        'rtmdet-ins_s_8xb32-300e_coco',
        'rtmdet-ins_m_8xb32-300e_coco',
        'rtmdet-ins_l_8xb32-300e_coco',
        'rtmdet-ins_x_8xb16-300e_coco',
    ],
    'yolox': [
        'yolox_nano_8xb8-300e_coco',
        'yolox_tiny_8xb8-300e_coco',
        'yolox_s_8xb8-300e_coco',
        'yolox_m_8xb8-300e_coco',
        'yolox_l_8xb8-300e_coco',
        'yolox_x_8xb8-300e_coco',
    ],
    'bytetrack': [
        f'bytetrack_yolox_x_8xb4-80e_{MOT17}',
        f'bytetrack_yolox_x_8xb4-80e_{MOT20}',
        f'bytetrack_yolox_x_8xb4-amp-80e_{MOT17}',
        f'bytetrack_yolox_x_8xb4-amp-80e_{MOT20}',
        f'yolox_x_8xb4-amp-80e_{MOT17}',
    ],
    'ocsort': [
        f'ocsort_yolox_x_8xb4-amp-80e_{MOT17}',
        f'ocsort_yolox_x_8xb4-amp-80e_{MOT20}',
    ],
    'strongsort': [
        f'yolox_x_8xb4-80e_{MOT17}',
        f'yolox_x_8xb4-80e_{MOT20}',
    ],
}
NAMES = [f'{f}/{name}.py' for f, names in FAMILIES.items() for name in names]

# What mmengine itself cannot load from the installed package, and why.
UNREADABLE = {
    # its _base_ has a folder too many
    'bytetrack/bytetrack_yolox_x_8xb4-amp-80e_'
    'crowdhuman-mot17halftrain_test-mot17test.py': FileNotFoundError,
    # their _base_ is not in the package
    'sort/faster-rcnn_r50_fpn_8xb2-4e_mot17train_test-mot17train.py': (
        FileNotFoundError
    ),
    'sort/faster-rcnn_r50_fpn_8xb2-8e_mot20halftrain_test-mot20halfval.py': (
        FileNotFoundError
    ),
    'sort/faster-rcnn_r50_fpn_8xb2-8e_mot20train_test-mot20train.py': (
        FileNotFoundError
    ),
    # their _base_ is a config of mmpretrain
    **{
        f'rtmdet/classification/cspnext-{size}_8xb256-rsb-a1-600e_in1k.py': (
            ModuleNotFoundError
        )
        for size in ('tiny', 's', 'm', 'l', 'x')
    },
}


def root():
    """Folder of the configs that mmdet installs."""
    (package,) = importlib.util.find_spec('mmdet').submodule_search_locations
    return Path(package) / '.mim' / 'configs'


def installed():
    """All configs in the package, but for the parts of others."""
    paths = sorted(root().rglob('*.py'))
    return [path for path in paths if '_base_' not in path.parts]


@lru_cache(maxsize=None)
def mentions_ema(path):
    """Whether a config or one it inherits from mentions an EMA hook."""
    if not path.exists() or 'EMAHook' in path.read_text():
        return True
    bases = Config._get_base_files(str(path))
    return any(
        re.match(r'\w+::', base)
        or mentions_ema((path.parent / base).resolve())
        for base in bases
    )


def load(path):
    """Load a config as mmengine does, without its imports."""
    return Config.fromfile(path, import_custom_modules=False)
