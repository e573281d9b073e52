"""Write golden files of projects that are not on the package index.

Their layouts, key by key, as their own code writes them; the averages are
taken here, by the formula. Run
``python -m tests.checkpoint.golden.make_layouts``.
"""

import argparse
import copy
import math
import pickle
import sys
import types

import torch

from tests.checkpoint.golden.small import HERE, STEPS, Small, note, train


def trained():
    """Return raw weights and averages by name, and the optimizer's state."""
    model = Small()
    average = copy.deepcopy(model.state_dict())
    n = 0

    def update():
        nonlocal n
        n += 1
        decay = 0.9 * (1 - math.exp(-n / 3))
        for name, value in model.state_dict().items():
            if value.is_floating_point() and name != 'tied.weight':
                average[name] = decay * average[name] + (1 - decay) * value
        average['tied.weight'] = average['first.weight']

    optimizer = train(model, update)
    return model.state_dict(), average, optimizer.state_dict()


def main():
    """Write one file (of BEVDet two) a project."""
    raw, ema, optimizer = trained()
    # d2go walks parameters and buffers, where a tied tensor has one name
    once = {k: x for k, x in ema.items() if k != 'tied.weight'}
    prefixed = {f'module.{k}': x for k, x in ema.items()}
    args = argparse.Namespace(model='small', model_ema=True)
    files = {
        'd2go.pth': (
            dict(model=raw, ema_state=once, iteration=6),
            dict(format='d2go', writer='d2go', n=None),
        ),
        'torchvision.pth': (
            dict(
                model=raw,
                optimizer=optimizer,
                epoch=0,
                args=args,
                model_ema={'n_averaged': torch.tensor(STEPS), **prefixed},
            ),
            dict(format='torchvision', writer='torchvision', n=STEPS),
        ),
        'deit.pth': (
            dict(
                model=raw,
                optimizer=optimizer,
                lr_scheduler={},
                epoch=0,
                model_ema=ema,
                scaler={},
                args=args,
            ),
            dict(format='deit', writer='DeiT', n=None),
        ),
        'rtdetr.pth': (
            dict(
                date='2024-01-01T00:00:00',
                last_epoch=0,
                model=raw,
                optimizer=optimizer,
                ema=dict(module=ema, updates=STEPS),
            ),
            dict(format='rtdetr', writer='RT-DETR', n=STEPS),
        ),
        'yolox.pth': (
            dict(
                start_epoch=1,
                model=ema,
                optimizer=optimizer,
                best_ap=0.5,
                curr_ap=0.5,
            ),
            dict(format='yolox', writer='YOLOX', n=None),
        ),
        'bevdet_epoch_1.pth': (
            dict(
                meta=dict(epoch=1, iter=STEPS, CLASSES=('a', 'b')),
                state_dict=raw,
                optimizer=optimizer,
            ),
            dict(format='bevdet', writer='BEVDet', n=STEPS),
        ),
        'bevdet_epoch_1_ema.pth': (
            dict(epoch=1, state_dict=ema, updates=STEPS),
            dict(format='bevdet', writer='BEVDet', n=STEPS),
        ),
        'ddp.pth': (
            dict(
                state_dict={f'module._orig_mod.{k}': x for k, x in raw.items()}
            ),
            dict(format='plain', writer='a script', n=None),
        ),
    }
    for name, (content, known) in files.items():
        torch.save(content, HERE / name)
        known.update(real=False, ema=ema, raw=raw)
        if known['format'] == 'yolox':
            del known['raw']
        if known['format'] == 'plain':
            del known['ema'], known['raw']
        note(name, **known)
    legacy = dict(state_dict=raw, meta=dict(CLASSES=('a', 'b')))
    path = HERE / 'legacy.pth'
    torch.save(legacy, path, _use_new_zipfile_serialization=False)
    note(path.name, format='plain', writer='torch < 1.6', n=None, real=True)
    refused()


def refused():
    """Write what is refused: a pickle of classes, and one that runs code."""
    module = types.ModuleType('models.yolo')
    kind = type('DetectionModel', (Small,), {'__module__': 'models.yolo'})
    module.DetectionModel = kind
    sys.modules.update({'models': types.ModuleType('models')})
    sys.modules['models.yolo'] = module
    content = dict(epoch=0, model=kind().half(), ema=kind().half(), updates=7)
    torch.save(content, HERE / 'refused_yolov5.pt')

    class Call:
        def __reduce__(self):
            return open, ('ran', 'w')

    content = dict(state_dict={'a': torch.zeros(2)}, other=Call())
    torch.save(content, HERE / 'refused_code.pth', pickle_module=pickle)


if __name__ == '__main__':
    main()
