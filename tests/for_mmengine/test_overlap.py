"""``overlap=True`` in mmengine's runner: the same run, to the last bit.

On a CPU it has no effect; the streams of a GPU are in averaging/test_gpu.py.
"""

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper

from tests import needs
from tests.for_mmengine.toy import (
    RecordingSGD,
    Run,
    ToyModel,
    loader,
    same,
    state_of,
)

EMA = dict(type='EMAHook', decay=0.9, tau=3)
# Logging asks for the averages' distance; here it seldom does.
QUIET = dict(logger=dict(type='LoggerHook', interval=100))
PARTS = ('state_dict', 'ema_state_dict')


def both(tmp_path, hook=EMA, prepare=lambda: {}, **options):
    """Train the same twice, with and without; both runs."""
    runs = []
    for overlap in (True, False):
        folder = tmp_path / f'overlap_{overlap}'
        torch.manual_seed(0)
        settings = {'hooks': QUIET, **options, **prepare()}
        extra = settings.pop('extra', ())
        run = Run(folder, dict(hook, overlap=overlap), *extra, **settings)
        runs.append(run.train())
    return runs


def check_equal(beside, plain):
    """Compare weights after every step, and every file, bit for bit."""
    pairs = list(zip(beside.records, plain.records))
    assert [same(*pair) for pair in pairs] == [[]] * len(plain.records)
    names = sorted(path.name for path in plain.work_dir.glob('*.pth'))
    assert names == sorted(p.name for p in beside.work_dir.glob('*.pth'))
    assert names
    for name in names:
        left, right = beside.load(name), plain.load(name)
        assert [same(left[part], right[part]) for part in PARTS] == [[], []]
        assert left['ema_meta'] == right['ema_meta']


@pytest.mark.parametrize(
    'more',
    [
        {},
        dict(interval=3, update_buffers=False, device='cpu'),
        dict(evaluate='both', begin_iter=3),
    ],
    ids=str,
)
def test_equals_the_run_without(tmp_path, more):
    """Weights, averages, BatchNorm's buffers and scores are the same.

    The start says that on a CPU the option has no effect; without, not.
    """
    hook = {k: v for k, v in {**EMA, **more}.items() if v is not None}
    beside, plain = both(tmp_path, hook, max_epochs=3)
    check_equal(beside, plain)
    said = ['overlap=True has no effect' in x.log for x in (beside, plain)]
    assert [True, False] == said
    for name in ('val/score', 'train/loss'):
        assert beside.scalar(name).tolist() == plain.scalar(name).tolist()
    moved = plain.load('epoch_3.pth')['state_dict']['norm.running_mean']
    assert moved.abs().min() > 0


@needs.told_of_steps
@pytest.mark.parametrize('first', [True, False])
def test_resume(tmp_path, first):
    """A run that is resumed with or without overlap equals the whole one."""
    whole = Run(tmp_path / 'whole', EMA, max_epochs=4, hooks=QUIET).train()
    part = tmp_path / 'part'
    options = dict(hooks=QUIET, max_epochs=2)
    Run(part, dict(EMA, overlap=first), **options).train()
    options.update(max_epochs=4, resume=True)
    resumed = Run(part, dict(EMA, overlap=not first), **options).train()
    for name in ('epoch_3.pth', 'epoch_4.pth'):
        left, right = whole.load(name), resumed.load(name)
        assert [same(left[part], right[part]) for part in PARTS] == [[], []]


class SaveInMidRun(Hook):
    """Writes files while an update may be under way, and in validation."""

    priority = 'VERY_LOW'

    def after_train_iter(self, runner, batch_idx, **more):
        name = f'iter_{runner.iter + 1}.pth'
        runner.save_checkpoint(str(runner.work_dir), name)

    def after_val_iter(self, runner, batch_idx, **more):
        runner.save_checkpoint(str(runner.work_dir), 'middle.pth')


def test_files_of_mid_run(tmp_path):
    """Files that other hooks write at any moment are the plain run's."""
    check_equal(*both(tmp_path, prepare=lambda: dict(extra=[SaveInMidRun()])))


class PoisonedSGD(RecordingSGD):
    """Leaves NaN in a weight after some steps; recovers in the next."""

    bad = ()

    def step(self, closure=None):
        n = len(self.records) + 1
        parameters = self.param_groups[0]['params']
        if n - 1 in self.bad:
            for parameter, kept in zip(parameters, self.kept):
                parameter.data.copy_(kept)
                parameter.grad = None
        loss = super().step(closure)
        self.kept = [p.detach().clone() for p in parameters]
        if n in self.bad:
            parameters[0].data.view(-1)[0] = float('nan')
            self.records[-1] = state_of(self.model)
        return loss


def poisoned(*bad):
    """Return options of a run whose steps ``bad`` leave NaN."""
    model = ToyModel()
    optimizer = PoisonedSGD(model.parameters(), lr=0.002).watch(model)
    optimizer.bad = bad
    return dict(model=model, optim_wrapper=OptimWrapper(optimizer))


@pytest.mark.parametrize(
    'bad',
    [
        *((3,), (7,), (8,), (4,)),
        # the same NaN as before is no change that shows in the weights
        *(
            pytest.param(bad, marks=needs.told_of_steps)
            for bad in ((3, 4), (3, 4, 6), (1, 2))
        ),
    ],
    ids=str,
)
def test_bad_steps(tmp_path, bad):
    """Steps with NaN are left out, counted and named as without overlap.

    Also the last before a validation, a file, and the end of the training.
    """
    beside, plain = both(tmp_path, prepare=lambda: poisoned(*bad))
    left, right = (run.load('epoch_2.pth') for run in (beside, plain))
    for run in (beside, plain):
        assert f'iteration {bad[0]} left NaN or Inf' in run.log
        assert run.scalar('train/ema_skipped')[-1] == len(bad)
    if 8 in bad:
        for file in (left, right):
            assert file['ema_state_dict'].pop('module.low').isnan().any()
    assert [same(left[part], right[part]) for part in PARTS] == [[], []]
    assert left['ema_meta'] == right['ema_meta']
    assert left['ema_meta']['num_skipped'] == len(bad)
    assert all(torch.isfinite(v).all() for v in left['state_dict'].values())


@needs.told_of_steps
def test_tenth_bad_step_is_reported(tmp_path):
    """Of bad steps in a row the tenth is named by its own iteration."""
    bad = tuple(range(3, 13))
    options = dict(train_dataloader=loader(64))
    for run in both(tmp_path, prepare=lambda: poisoned(*bad), **options):
        assert 'iteration 3 left NaN or Inf' in run.log
        assert 'iteration 12 left NaN or Inf' in run.log


def test_bad_step_stops_the_run_if_told(tmp_path):
    """Under 'raise' the run stops at once and names the iteration."""
    hook = dict(EMA, overlap=True, nonfinite='raise')
    run = Run(tmp_path, hook, hooks=QUIET, **poisoned(3))
    with pytest.raises(
        FloatingPointError, match=r'iteration 3: .* NaN or Inf'
    ):
        run.train()
