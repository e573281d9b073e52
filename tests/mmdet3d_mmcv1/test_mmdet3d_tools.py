"""Training, resuming and ``tools/test.py`` of mmdet3d 1.0 (mmcv 1.x)."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch

from tests import oracle
from tests.mmcv1_tools.conftest import (
    check_against_the_formula,
    differing,
    load,
)
from tests.mmdet3d_mmcv1.conftest import (
    EPOCHS,
    HOOK,
    PLAIN,
    SMOKE,
    STEPS,
    hooks,
    predictions,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        importlib.util.find_spec('mmdet3d') is None,
        reason='mmdet3d 1.0 is not installed',
    ),
]

# a float32 average takes one rounding of 6e-8 a step
AN_EPOCH = STEPS // EPOCHS


def rows_of(work_dir, name='recorded.pt'):
    """Read the raw weights before the first and after each step."""
    return torch.load(work_dir / name)


def test_averages_are_those_of_the_formula(trained):
    """The plain keys hold the formula's average, the EMA part the raw."""
    _, work_dir, _ = trained
    saved, rows = load(work_dir / f'epoch_{EPOCHS}.pth'), rows_of(work_dir)
    assert all(len(row) == STEPS + 1 for row in rows.values())
    assert saved['ema_state_dict']['steps'] == STEPS
    check_against_the_formula(saved, rows)


def test_val_in_the_workflow_sees_the_averages(trained):
    """After each epoch ``val`` runs on the averages of that moment."""
    _, work_dir, _ = trained
    rows = rows_of(work_dir)
    seen = torch.load(work_dir / 'val.pt')
    assert len(seen) == EPOCHS
    for epoch, weights in enumerate(seen, start=1):
        for name in ('bbox_head.conv_cls.weight', 'neck.deblocks.0.1.weight'):
            row = rows[name][: epoch * AN_EPOCH + 1]
            expected = oracle.average(
                row[0], row[1:], lambda n: oracle.ramp(n, 0.9, 5)
            )
            found = weights[name].numpy()
            assert oracle.relative_error(found, expected) <= STEPS * 6e-8
            assert not np.array_equal(found, row[-1])


def cyclic(start, ratios, up=0.4):
    """Two cosine halves, as mmdet3d's schedules have them, a value a step."""
    turn = int(up * STEPS)
    ends = [(1, ratios[0], 0, turn), (ratios[0], ratios[1], turn, STEPS)]
    return [
        start
        * (
            b
            + (a - b) * (math.cos(math.pi * (i - low) / (high - low)) + 1) / 2
        )
        for a, b, low, high in ends
        for i in range(low, high)
    ]


def test_cycles_and_scalars_are_in_tensorboard(trained):
    """Rate and momentum go round; the decay is logged at every step."""
    accumulator = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator'
    )
    _, work_dir, _ = trained
    events = accumulator.EventAccumulator(str(work_dir / 'tf_logs'))
    events.Reload()

    def scalars(name):
        # the validation after the last step has a step of its own
        found = {event.step: event.value for event in events.Scalars(name)}
        return [found[step] for step in range(1, STEPS + 1)]

    expected = {
        'learning_rate': cyclic(0.001, (10, 1e-4)),
        'momentum': cyclic(0.95, (0.85 / 0.95, 1)),
        'train/ema_decay': [oracle.ramp(n, 0.9, 5) for n in range(1, 17)],
    }
    for name, values in expected.items():
        assert np.allclose(scalars(name), values, rtol=1e-5), name
    assert all(value > 0 for value in scalars('train/grad_norm'))
    assert len(events.Scalars('val/loss_val')) == EPOCHS
    names = set(events.Tags()['scalars'])
    kitti = {name for name in names if name.startswith('val/KITTI')}
    assert kitti
    assert {f'{x}_raw' for x in kitti if not x.endswith('_raw')} <= names


def test_constructor_and_report(trained):
    """Groups of the constructor, and the report, in the same run."""
    _, work_dir, printed = trained
    assert 'EMA: exponential(decay=0.9, tau=5' in printed
    assert f'steps: {STEPS} planned' in printed
    groups = load(work_dir / f'epoch_{EPOCHS}.pth')['optimizer']
    decays = {group['weight_decay'] for group in groups['param_groups']}
    # 0.01 is meant for 64 samples a step; these steps have 2
    assert decays == {0.0, 0.01 * 2 / 64}


def test_resumed_training_equals_the_uninterrupted_one(tools, trained):
    """The second half, resumed from a file in between, ends as the whole."""
    _, whole, _ = trained
    config = tools.config('rest', hooks(HOOK))
    part, _ = tools.train(config, '--resume-from', whole / 'epoch_2.pth')
    name = f'epoch_{EPOCHS}.pth'
    left, right = load(whole / name), load(part / name)
    assert differing(left, right) == []
    assert left['ema_meta'] == right['ema_meta']


def test_test_tool_tests_the_averages(tools, trained):
    """Predictions are those of the training's validation, without us."""
    _, work_dir, _ = trained
    config, file = tools.config('plain', PLAIN), f'epoch_{EPOCHS}.pth'
    found, printed = tools.test(config, work_dir / file, 'of_averages')
    assert np.array_equal(found, predictions(tools.folder / 'whole'))
    for words in ('unexpected key', 'missing keys', 'mmdet_ema'):
        assert words not in printed


def test_metrics_of_both_are_logged(trained):
    """KITTI's AP is there for averages and for raw weights."""
    _, work_dir, _ = trained
    (path,) = work_dir.glob('*.log.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {name for line in lines for name in line if 'KITTI' in name}
    raw = {name for name in found if name.endswith('_raw')}
    assert raw == {f'{name}_raw' for name in found - raw}
    assert raw


def test_goes_on_from_the_two_files_of_bevdets_hook(tools):
    """``MEGVIIEMAHook`` takes averages and n from the second file.

    The raw weights are those of the training without us, before and after.
    """
    config = tools.config('without', PLAIN + hooks(''), epochs=2)
    plain, printed = tools.train(config)
    assert 'mmdet_ema' not in printed
    rows = rows_of(plain)

    def decay(n):
        return oracle.ramp(10560 + n, 0.99)

    averages = {
        name: oracle.average(row[0], row[1 : AN_EPOCH + 1], decay)
        for name, row in rows.items()
    }
    weights = {k: torch.from_numpy(v).float() for k, v in averages.items()}
    second = dict(epoch=0, state_dict=weights, updates=10560 + AN_EPOCH)
    path = plain / 'epoch_1_ema.pth'
    torch.save(second, path)
    hook = (
        "dict(type='MEGVIIEMAHook', init_updates=10560, decay=0.99, "
        f"priority='NORMAL', resume={str(path)!r})"
    )
    config = tools.config('megvii', PLAIN + hooks(hook), epochs=2)
    rest, printed = tools.train(config, '--resume-from', plain / 'epoch_1.pth')
    assert 'the averages and n are those of' in printed
    saved = load(rest / 'epoch_2.pth')
    assert saved['ema_state_dict']['steps'] == 2 * AN_EPOCH
    check_against_the_formula(saved, rows, decay)


def test_monocular_detector(tools):
    """SMOKE trains, resumes and is tested; its averages are the formula's."""
    small = dict(epochs=2, base=SMOKE)
    config = tools.config('smoke', hooks(HOOK), **small)
    whole, _ = tools.train(config)
    saved = load(whole / 'epoch_2.pth')
    check_against_the_formula(saved, rows_of(whole))
    config = tools.config('smoke_on', hooks(HOOK), **small)
    part, _ = tools.train(config, '--resume-from', whole / 'epoch_1.pth')
    assert differing(saved, load(part / 'epoch_2.pth')) == []
    config = tools.config('smoke_plain', **small)
    found, _ = tools.test(config, whole / 'epoch_2.pth', 'smoke_of_averages')
    # another process may take other float32 kernels
    expected = predictions(tools.folder / 'smoke')
    np.testing.assert_allclose(found, expected, rtol=1e-5)
