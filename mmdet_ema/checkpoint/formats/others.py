"""Other projects: which key holds what, under which prefix, and where n is.

A row of :data:`LAYOUTS` is a format. Keys are given as a path: ``('ema',
'module')`` is ``content['ema']['module']``, ``()`` the content itself. The
last formats are of nobody knows whom: a pair of which one key says that it
holds averages, and one ``state_dict``.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Mapping, Optional, Set, Tuple

import torch
from torch import nn

from mmdet_ema.checkpoint.contents import (
    AVERAGE,
    RAW,
    UNKNOWN,
    Content,
    Contents,
    Format,
    Weights,
    Written,
    as_count,
    complete,
    is_weights,
    meta_of,
    rest_of,
    weights_of,
)
from mmdet_ema.checkpoint.format import WEIGHTS
from mmdet_ema.checkpoint.pickles import walk
from mmdet_ema.checkpoint.recipe import KEY
from mmdet_ema.errors import CheckpointError

Path = Tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Where a project keeps what.

    Attributes:
        name: As ``--to`` takes it.
        writer: What writes it, for people.
        average: Path of the averages.
        evidence: Why these are the averages.
        raw: Path of the raw weights; None where they are not kept.
        count: Path of n; None where it is not kept.
        prefix: What the names of averages begin with.
        raw_prefix: What those of raw weights begin with.
        also: Keys that must be there too, with what a new file has in them.
        deployed: Which weights the project's own tools load.
        tensor_count: Whether n is a tensor, as that of a module.
        notes: Sentences on what a user should know.
    """

    name: str
    writer: str
    average: Path
    evidence: str
    raw: Optional[Path] = None
    count: Optional[Path] = None
    prefix: str = ''
    raw_prefix: str = ''
    also: Mapping[str, Any] = field(default_factory=dict)
    deployed: str = 'raw'
    tensor_count: bool = False
    notes: Tuple[str, ...] = ()

    def recognise(self, content: Content, path: str) -> bool:
        """Return whether everything is where this project keeps it."""
        weights = _at(content, self.average)
        if not is_weights(weights):
            return False
        if self.prefix and not any(
            isinstance(x, str) and x.startswith(self.prefix) for x in weights
        ):
            return False
        if self.raw is not None:
            raw = _at(content, self.raw)
            if self.raw and not is_weights(raw):
                return False
        counted = self.count is None or _at(content, self.count) is not None
        return counted and all(key in content for key in self.also)

    def read(self, content: Content, path: str) -> Contents:
        """Return what is in a file."""
        count = None if self.count is None else _at(content, self.count)
        count = as_count(count)
        average = weights_of(
            _at(content, self.average),
            self.prefix,
            _text(self.average),
            role=AVERAGE,
            evidence=self.evidence,
            updates=count,
        )
        sets, notes = {'ema': average}, list(self.notes)
        if self.raw is not None:
            raw = weights_of(
                _at(content, self.raw),
                self.raw_prefix,
                _text(self.raw),
                role=RAW,
                evidence=self.evidence,
            )
            if raw.tensors:
                sets = {'raw': raw, 'ema': average}
                notes += complete(average, raw)
        used = {x[0] for x in (self.average, self.raw, self.count) if x}
        rest = rest_of(content, *used) if self.average else {}
        deployed = self.deployed if self.deployed in sets else 'ema'
        return Contents(
            *(path, self.name, self.writer, sets, deployed), {}, rest, notes
        )

    def write(self, contents: Contents, out: str) -> Written:
        """Return what this project would have written."""
        raw = None
        if self.raw is None:
            name = contents.average
            if name is None:
                raise CheckpointError(
                    f'{contents.path!r} ({contents.format}) has no averages, '
                    f'which is what a file of {self.writer} holds; it has: '
                    f'{", ".join(contents.sets)}.'
                )
            average = contents.sets[name]
        else:
            raw, average = contents.both()
        content: Dict[str, Any] = {} if self.average else OrderedDict()
        # what is in the file stays, if it came from such a file
        content.update({**self.also, **contents.rest})
        if raw is not None and self.raw is not None:
            _put(content, self.raw, raw.state_dict(self.raw_prefix))
        if self.count is not None:
            n: Any = average.updates or 0
            n = torch.tensor(n) if self.tensor_count else n
            _put(content, self.count[:-1], {self.count[-1]: n})
        _put(content, self.average, average.state_dict(self.prefix))
        meta = ', '.join(contents.meta)
        return content, [f'meta ({meta})'] if meta else []


LAYOUTS = (
    Layout(
        'lightning',
        "Lightning's WeightAveraging",
        average=('state_dict',),
        raw=('current_model_state',),
        count=('averaging_state', 'n_averaged'),
        evidence='Lightning saves swapped, with current_model_state beside',
        deployed='ema',
        tensor_count=True,
    ),
    Layout(
        'timm',
        "timm's train.py",
        average=('state_dict_ema',),
        raw=('state_dict',),
        evidence='timm writes state_dict (raw) and state_dict_ema',
        deployed='ema',
        notes=('timm does not save n.',),
    ),
    Layout(
        'torchvision',
        "torchvision's references",
        average=('model_ema',),
        prefix='module.',
        raw=('model',),
        count=('model_ema', 'n_averaged'),
        evidence='torchvision writes model (raw) and model_ema',
        tensor_count=True,
    ),
    Layout(
        'deit',
        'DeiT, ConvNeXt',
        average=('model_ema',),
        raw=('model',),
        evidence='DeiT and ConvNeXt write model (raw) and model_ema',
        notes=('DeiT does not save n.',),
    ),
    Layout(
        'rtdetr',
        'RT-DETR, D-FINE, DEIM',
        average=('ema', 'module'),
        raw=('model',),
        count=('ema', 'updates'),
        evidence='RT-DETR and D-FINE write model (raw) and ema.module',
        deployed='ema',
    ),
    Layout(
        'd2go',
        'd2go, EMA for detectron2',
        average=('ema_state',),
        raw=('model',),
        evidence='d2go writes model (raw) and ema_state',
        notes=('d2go does not save n.',),
    ),
    Layout(
        'yolox',
        'YOLOX',
        average=('model',),
        also={'start_epoch': 0, 'optimizer': None},
        evidence='YOLOX saves the averages alone, unless its EMA is off',
        deployed='ema',
        notes=(
            'YOLOX keeps neither raw weights nor n, and computes n from the '
            'epoch.',
        ),
    ),
    Layout(
        'ema-pytorch',
        'ema-pytorch',
        average=(),
        prefix='ema_model.',
        raw=(),
        raw_prefix='online_model.',
        count=('step',),
        also={'initted': torch.tensor(True)},
        evidence='ema-pytorch writes online_model.* and ema_model.*',
        deployed='ema',
        tensor_count=True,
        notes=(
            "n is the calls of ema-pytorch's update(); the file does not "
            'tell update_every.',
        ),
    ),
    Layout(
        'averaged-model',
        "torch's AveragedModel",
        average=(),
        prefix='module.',
        count=('n_averaged',),
        evidence='AveragedModel writes n_averaged and module.*',
        deployed='ema',
        tensor_count=True,
    ),
)


def _at(content: Any, path: Path) -> Any:
    for key in path:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _put(content: Dict[str, Any], path: Path, value: Dict[str, Any]) -> None:
    """Put a dict at a path; what is there already stays."""
    *folders, last = path or ('',)
    for key in folders:
        content = content.setdefault(key, {})
    if not path:
        content.update(value)
    elif isinstance(content.get(last), dict):
        content[last].update(value)
    else:
        content[last] = value


def _text(path: Path) -> str:
    return '.'.join(path) or 'the file'


def _has_modules(content: Content, path: str) -> bool:
    return any(isinstance(content.get(k), nn.Module) for k in ('model', 'ema'))


def _read_modules(content: Content, path: str) -> Contents:
    said = 'YOLOv5 writes model (raw) and ema, both in half precision'
    sets: Dict[str, Weights] = {}
    for name, key, role in (('raw', 'model', RAW), ('ema', 'ema', AVERAGE)):
        if isinstance(content.get(key), nn.Module):
            state = content[key].state_dict()
            sets[name] = weights_of(state, role=role, evidence=said)
    notes = []
    if 'ema' in sets:
        count = as_count(content.get('updates'))
        sets['ema'].updates = sets['ema'].steps = count
    else:
        said = 'a stripped file holds the averages as model'
        sets = {'weights': replace(sets['raw'], role=UNKNOWN, evidence=said)}
        notes.append('the file has no ema: strip_optimizer() moved it, or off')
    deployed = 'ema' if 'ema' in sets else 'weights'
    return Contents(
        *(path, 'yolov5', 'YOLOv5 or ultralytics', sets, deployed),
        notes=notes,
    )


_PLACES = (
    *(WEIGHTS, 'model', 'model_state_dict', 'network', 'network_weights'),
    *('weights', 'params', 'net', 'model_state'),
)
_AVERAGES = {'ema', 'swa', 'average', 'averaged'}
# by parameter, too, and no weights
_OF_OTHERS = {
    *('grad', 'grads', 'gradient', 'gradients', 'loss', 'losses', 'optim'),
    *('optimizer', 'square', 'squared', 'variance', 'fisher'),
}


def _says_average(key: Any) -> bool:
    words = re.split('[^a-z]+', key.lower()) if isinstance(key, str) else ()
    return not _AVERAGES.isdisjoint(words) and _OF_OTHERS.isdisjoint(words)


def _names(weights: Any, prefix: str = '') -> Set[Tuple[str, Tuple[int, ...]]]:
    """Return names and shapes of tensors; empty if it is no dict of them."""
    if not is_weights(weights) or not all(isinstance(x, str) for x in weights):
        return set()
    tensors = weights_of(weights, prefix).tensors
    return {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _pair(content: Content) -> Optional[Layout]:
    """Return where averages are that only their key tells, as ``params_ema``.

    Beside them may be one dict with the same tensors: the raw weights.
    """
    paths = [
        path
        for key in content
        if _says_average(key)
        for path in ((key,), (key, 'module'), (key, WEIGHTS), (key, 'model'))
        if _names(_at(content, path))
    ]
    if len(paths) != 1:
        return None
    (path,) = paths
    counted = 'n_averaged' in _at(content, path)  # torch's AveragedModel
    prefix = 'module.' if counted else ''
    names = _names(_at(content, path), prefix)
    others = {
        key: _names(value)
        for key, value in content.items()
        if not _says_average(key)
    }
    raw = [key for key, found in others.items() if names <= found]
    if not names or len(raw) > 1 or (not raw and any(others.values())):
        return None
    said = f'the key {_text(path)} says so'
    return Layout(
        *('pair', 'unknown', path),
        evidence=f'{said}, and {raw[0]} has the same names' if raw else said,
        raw=(raw[0],) if raw else None,
        count=(*path, 'n_averaged') if counted else None,
        prefix=prefix,
        deployed='ema',
    )


def _is_pair(content: Content, path: str) -> bool:
    return _pair(content) is not None


def _read_pair(content: Content, path: str) -> Contents:
    layout = _pair(content)
    assert layout is not None  # _is_pair() says so
    contents = layout.read(content, path)
    contents.meta = meta_of(content)  # of a hook for OpenMMLab, maybe
    contents.rest.pop('meta', None)
    return contents


def _place(content: Content) -> Optional[str]:
    found = [key for key in _PLACES if is_weights(content.get(key))]
    return found[0] if found else None


def _is_plain(content: Content, path: str) -> bool:
    return _place(content) is not None or is_weights(content)


def _read_plain(content: Content, path: str) -> Contents:
    place = _place(content)
    half = content if place is None else content[place]
    meta = meta_of(content)
    name, role, said = 'weights', UNKNOWN, 'the file does not tell'
    made: Any = meta.get(KEY)
    made = made.get('holds') if isinstance(made, dict) else None
    if isinstance(made, dict) and made.get('role') in (RAW, AVERAGE):
        role, said = made['role'], 'its recipe says so'
        name = str(made.get('name', name))
    weights = weights_of(half, what=place or 'the file', role=role)
    weights.evidence = said
    if role == AVERAGE and isinstance(made.get('updates'), int):
        weights.updates = made['updates']
    rest = rest_of(content, place, 'meta') if place else {}
    notes = [
        f'what {key} holds is not read, and may be averages of {place}'
        for key, value in rest.items()
        if _says_average(key)
        and any(isinstance(x, torch.Tensor) for _, x in walk(value))
    ]
    what = 'mmdet_ema' if role != UNKNOWN else 'unknown'
    sets = {name: weights}
    return Contents(path, 'plain', what, sets, name, meta, rest, notes)


def _write_plain(contents: Contents, out: str) -> Written:
    weights = contents.sets[contents.choose()]
    return {'meta': dict(contents.meta), WEIGHTS: weights.state_dict()}, []


FORMATS = [
    *(
        Format(
            *(x.name, x.writer, x.recognise, x.read, x.write),
            holds='one' if x.raw is None else 'both',
            has_n=x.count is not None,
        )
        for x in LAYOUTS
    ),
    # only with unsafe=True: else the file is refused
    Format('yolov5', 'YOLOv5 or ultralytics', _has_modules, _read_modules),
    Format('pair', 'any project whose keys tell', _is_pair, _read_pair),
    Format(
        *('plain', 'one state_dict, of any project', _is_plain, _read_plain),
        _write_plain,
        holds='one',
        has_n=None,  # n and the role are in the recipe
        has_schedule=True,
    ),
]
