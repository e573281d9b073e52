"""Every way in which mmengine runs a model, through its real Runner.

Also run elsewhere: two ranks in ``tests/contract``, ``FlexibleRunner`` in
``test_flexible_runner.py``, accumulation and several optimizers in
``test_numbers.py``.
"""

import numpy as np
import pytest
import torch
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.runner import autocast
from torch import nn

from tests import needs, oracle
from tests.for_mmengine.toy import Run, Score, ToyModel, loader, same, state_of

try:
    from mmdet.engine.hooks import MeanTeacherHook
    from mmdet.engine.runner import TeacherStudentValLoop
except ImportError:  # a stack without mmdet
    MeanTeacherHook = TeacherStudentValLoop = None

EMA = dict(type='EMAHook', decay=0.9, tau=3)
TOLERANCE = 1e-6  # float32 rounding, over some ten updates
WRAPPER = dict(type='MMDistributedDataParallel', device_ids=None)


def ramp(n):
    return oracle.ramp(n, 0.9, 3)


def wrong(run, name):
    """Tensors of a checkpoint that differ from the formula."""
    saved = run.load(name)
    assert saved['ema_state_dict']['steps'] == len(run.records)
    return run.wrong(saved['state_dict'], ramp)


def moved(run, name):
    """Whether average, raw weights and start are three different things."""
    saved, key = run.load(name), 'head.weight'
    average = saved['state_dict'][key]
    raw = saved['ema_state_dict'][f'module.{key}']
    start = run.recorder.start[key]
    pairs = (average, raw), (average, start), (raw, start)
    return not any(torch.equal(a, b) for a, b in pairs)


class Looks(Hook):
    """Keeps the epoch and the weights of every validation."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.seen = []

    def before_val_epoch(self, runner):
        done = runner.train_loop.epoch, runner.train_loop.iter
        self.seen.append((*done, state_of(runner.model)))

    def wrong(self, run):
        """Validations that did not run on the averages."""
        return [
            (epoch, iteration)
            for epoch, iteration, state in self.seen
            if run.wrong(state, ramp, range(iteration))
        ]


# torch.compile


def in_float32():
    """The compiler rounds bfloat16 less often, which is seen in it."""
    model = ToyModel()
    model.low = nn.Parameter(torch.ones(4))
    return model


@needs.compile
@pytest.mark.parametrize(
    ('compiled', 'model'),
    [
        (True, in_float32),
        (dict(backend='aot_eager'), ToyModel),
    ],
    ids=['inductor', 'bfloat16'],
)
def test_compiled_run(tmp_path, compiled, model):
    """With ``cfg.compile`` the weights are averaged as without."""
    torch.compiler.reset()
    options = dict(cfg=dict(compile=compiled))
    run = Run(tmp_path / 'fast', EMA, model=model(), **options).train()
    assert 'Model has been "compiled"' in run.log
    assert moved(run, 'epoch_2.pth')
    assert wrong(run, 'epoch_2.pth') == {}
    if model is ToyModel:
        return
    plain = Run(tmp_path / 'plain', EMA, model=model()).train()
    left, right = (r.load('epoch_2.pth') for r in (plain, run))
    for part in ('state_dict', 'ema_state_dict'):
        assert left[part].keys() == right[part].keys()
        for key, value in left[part].items():
            # the compiler fuses float32 operations: other rounding, 8 steps
            torch.testing.assert_close(
                right[part][key], value, rtol=1e-5, atol=1e-6, msg=key
            )


@needs.compile
def test_compiled_submodule(tmp_path):
    """Names with ``_orig_mod.`` in the middle are averaged like others."""
    torch.compiler.reset()
    model = ToyModel()
    model.head = torch.compile(model.head)
    run = Run(tmp_path, EMA, model=model).train()
    saved = run.load('epoch_2.pth')
    key = 'head._orig_mod.weight'
    assert wrong(run, 'epoch_2.pth') == {}
    assert not torch.equal(saved['state_dict'][key], run.recorder.start[key])
    assert not torch.equal(
        saved['state_dict'][key], saved['ema_state_dict'][f'module.{key}']
    )


# Less memory, less precision


def test_activation_checkpointing(tmp_path):
    """With ``cfg.activation_checkpointing`` all is equal, bit for bit."""

    class Reentrant(ToyModel):
        """The reentrant checkpoint needs an input that has a gradient."""

        def forward(self, inputs, mode='tensor'):
            return super().forward(inputs.requires_grad_(), mode)

    calls = []

    def run(name, **options):
        model = Reentrant()
        forward = model.head.forward
        model.head.forward = lambda x: calls.append(name) or forward(x)
        return Run(tmp_path / name, EMA, model=model, **options).train()

    plain = run('plain')
    modules = dict(activation_checkpointing=['head'])
    other = run('checkpointed', cfg=modules)
    # every training forward runs twice; validation has no backward pass
    assert calls.count('checkpointed') == calls.count('plain') + 8
    left, right = (r.load('epoch_2.pth') for r in (plain, other))
    for part in ('state_dict', 'ema_state_dict'):
        assert same(left[part], right[part]) == []
    assert wrong(other, 'epoch_2.pth') == {}


class BFloat16(OptimWrapper):
    """Autocasts to bfloat16, as ``AmpOptimWrapper`` would on a GPU."""

    def optim_context(self, model):
        return autocast(device_type='cpu', dtype=torch.bfloat16)


def watch_dtypes(model):
    found = set()
    model.head.register_forward_hook(
        lambda module, args, output: found.add(output.dtype)
    )
    return found


def test_bfloat16_autocast(tmp_path):
    """Under bfloat16 autocast the float32 weights have right averages."""
    model = ToyModel()
    found = watch_dtypes(model)
    run = Run(tmp_path, EMA, model=model)
    run.runner.optim_wrapper = BFloat16(run.optimizer)
    run.train()
    assert torch.bfloat16 in found
    assert wrong(run, 'epoch_2.pth') == {}
    assert run.load('epoch_2.pth')['state_dict']['low'].dtype is torch.float32


class Overflowing(ToyModel):
    """Some of its losses overflow in the backward pass."""

    def forward(self, inputs, mode='tensor'):
        out = super().forward(inputs, mode)
        if mode == 'loss':
            self.calls = getattr(self, 'calls', 0) + 1
            if self.calls in (2, 5):
                out['loss'] = out['loss'] * float('inf')
        return out


@needs.cpu_scaler
@pytest.mark.parametrize('clip', [None, dict(max_norm=100.0)])
def test_amp_wrapper_with_a_scaler_of_the_cpu(tmp_path, monkeypatch, clip):
    """``AmpOptimWrapper`` in bfloat16: skipped steps are not averaged.

    Stands in for a GPU: mmengine is told that there is one, and torch's
    scaler is the one for the CPU. float16 does not run here at all.
    """
    monkeypatch.setattr(
        amp_optimizer_wrapper, 'is_cuda_available', lambda: True
    )
    monkeypatch.setattr(
        amp_optimizer_wrapper,
        'GradScaler',
        lambda **options: torch.amp.GradScaler('cpu', **options),
    )
    model = Overflowing()
    found = watch_dtypes(model)
    run = Run(tmp_path, EMA, model=model, max_epochs=3)
    run.runner.optim_wrapper = AmpOptimWrapper(
        loss_scale=dict(init_scale=4.0),
        dtype='bfloat16',
        optimizer=run.optimizer,
        clip_grad=clip,
    )
    run.train()
    assert torch.bfloat16 in found
    assert len(run.records) == 12 - 2
    assert wrong(run, 'epoch_3.pth') == {}


# Loops


def epochs(work_dir, count, *hooks, **options):
    """A run by epochs; validates ever more often."""
    loops = dict(by_epoch=True, max_epochs=count, val_interval=3)
    loops['dynamic_intervals'] = [(4, 1)]
    return Run(work_dir, EMA, *hooks, train_cfg=loops, **options)


def iterations(work_dir, count, *hooks, **options):
    """A run by iterations; saves every third, validates ever more often."""
    loops = dict(by_epoch=False, max_iters=count, val_interval=6)
    loops['dynamic_intervals'] = [(7, 1)]
    checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=3)
    options.update(train_dataloader=loader(40), train_cfg=loops)
    return Run(
        work_dir, EMA, *hooks, hooks=dict(checkpoint=checkpoint), **options
    )


@pytest.mark.parametrize(
    ('make', 'count', 'place', 'expected', 'file'),
    [
        (epochs, 5, 0, [3, 4, 5], 'epoch_5.pth'),
        (iterations, 9, 1, [6, 7, 8, 9], 'iter_9.pth'),
    ],
    ids=['epochs', 'iterations'],
)
def test_intervals_that_change(tmp_path, make, count, place, expected, file):
    """Validations that become denser all run on the averages."""
    looks = Looks()
    run = make(tmp_path, count, looks).train()
    assert [moment[place] for moment in looks.seen] == expected
    assert looks.wrong(run) == []
    assert wrong(run, file) == {}


@pytest.mark.parametrize(
    ('make', 'part', 'whole', 'file'),
    [(epochs, 2, 3, 'epoch_3.pth'), (iterations, 6, 9, 'iter_9.pth')],
    ids=['epochs', 'iterations'],
)
def test_resume_auto(tmp_path, make, part, whole, file):
    """What ``--resume auto`` sets goes on exactly from the latest file."""
    auto = dict(resume=True, load_from=None)
    left = make(tmp_path / 'whole', whole).train().load(file)
    make(tmp_path / 'part', part).train()
    right = make(tmp_path / 'part', whole, **auto).train().load(file)
    for half in ('state_dict', 'ema_state_dict'):
        assert same(left[half], right[half]) == []


# Hooks of mmengine and mmdet beside ours


class Worse(Score):
    """A score that falls with every validation."""

    def __init__(self):
        super().__init__()
        self.value = 10.0

    def compute_metrics(self, results):
        self.value -= 1.0
        return dict(score=self.value, weights=float(np.sum(results)))


@pytest.mark.parametrize(
    ('monitor', 'evaluate'), [('score', 'ema'), ('score_raw', 'both')]
)
def test_early_stopping(tmp_path, monitor, evaluate):
    """A run that stops early saves the averages of the steps it took."""
    stop = EarlyStoppingHook(monitor, rule='greater', patience=2)
    hook = dict(EMA, evaluate=evaluate)
    looks = Looks()
    run = Run(
        tmp_path, hook, stop, looks, max_epochs=9, metric=Worse()
    ).train()
    # under 'both' each validation has a pass on the raw weights before
    passes = 2 if evaluate == 'both' else 1
    assert len(looks.seen) == 3 * passes
    looks.seen = looks.seen[passes - 1 :: passes]
    assert len(run.records) == 12
    assert looks.wrong(run) == []
    assert wrong(run, 'epoch_3.pth') == {}
    assert same(state_of(run.model), run.records[-1]) == []


def test_published_file_holds_the_averages(tmp_path):
    """``published_keys`` leaves a small file that deploys the averages."""
    hooks = dict(
        checkpoint=dict(
            type='CheckpointHook',
            interval=1,
            save_best='score',
            rule='greater',
            published_keys=['meta', 'state_dict'],
        )
    )
    run = Run(tmp_path, EMA, hooks=hooks).train()
    assert wrong(run, 'epoch_2.pth') == {}
    (last,) = tmp_path.glob('epoch_2-*.pth')
    (best,) = tmp_path.glob('best_score_epoch_?-*.pth')
    for path in (last, best):
        published = run.load(path.name)
        whole = run.load(f'{path.stem.rpartition("-")[0]}.pth')
        assert published.keys() == {'meta', 'state_dict'}
        assert same(published['state_dict'], whole['state_dict']) == []
        assert not torch.equal(
            published['state_dict']['head.weight'],
            whole['ema_state_dict']['module.head.weight'],
        )


class TeacherAndStudent(ToyModel):
    """SoftTeacher's layout: a frozen teacher that follows a student."""

    def __init__(self):
        super().__init__()
        self.student = ToyModel()
        self.teacher = ToyModel().requires_grad_(False)
        self.semi_test_cfg = dict(predict_on='teacher')
        for name in ('first', 'norm', 'tied', 'head', 'frozen', 'low'):
            delattr(self, name)

    def init_weights(self):
        self.student.init_weights()

    def forward(self, inputs, mode='tensor'):
        self.teacher.eval()
        if mode != 'loss':
            chosen = getattr(self, self.semi_test_cfg['predict_on'])
            return chosen(inputs, mode)
        with torch.no_grad():
            aim = torch.stack([d['out'] for d in self.teacher(inputs)])
        out = torch.stack([d['out'] for d in self.student(inputs)])
        loss = self.student(inputs, mode)['loss']
        return dict(loss=loss + 0.1 * (out - aim).square().mean())


def semi_supervised(folder, *hooks, priority='NORMAL', **options):
    """A run with mmdet's teacher hook before ours, and mmdet's loop."""
    teacher = MeanTeacherHook(momentum=0.2, **options)
    teacher.priority = priority
    model, loop = TeacherAndStudent(), dict(type=TeacherStudentValLoop)
    return Run(folder, teacher, *hooks, model=model, val_cfg=loop).train()


@needs.mmdet
@pytest.mark.parametrize('skip_buffer', [True, False])
@pytest.mark.parametrize('priority', ['NORMAL', 'VERY_LOW'])
def test_mean_teacher(tmp_path, skip_buffer, priority):
    """MeanTeacherHook's teacher is left alone; the student is averaged.

    Whichever of the two hooks comes first, and in mmdet's own loop, which
    validates both: the teacher as it is, the student averaged.
    """
    options = dict(priority=priority, skip_buffer=skip_buffer)
    looks = Looks()
    alone = semi_supervised(tmp_path / 'alone', **options)
    run = semi_supervised(tmp_path / 'beside', EMA, looks, **options)
    start, live = run.recorder.start, state_of(run.model)
    assert same(state_of(alone.model), live) == []
    assert len(run.scalar('val/teacher/score')) == 2
    assert len(run.scalar('val/student/score')) == 2
    saved, (*_, shown) = run.load('epoch_2.pth'), looks.seen[-1]
    parameters = dict(run.model.named_parameters(remove_duplicate=False))
    for key, value in saved['state_dict'].items():
        if key in parameters and key.startswith('teacher.'):
            assert torch.equal(value, live[key]), key
            assert torch.equal(shown[key], live[key]), key
        elif key.startswith('student.'):
            assert {} == run.wrong({key: value}, ramp)
            assert torch.equal(shown[key], value.to(shown[key].dtype)), key
    key = 'head.weight'
    for who in ('student', 'teacher'):
        name = f'{who}.{key}'
        assert not torch.equal(start[name], live[name])
    assert not torch.equal(
        saved['state_dict'][f'student.{key}'], live[f'student.{key}']
    )


@needs.mmdet
def test_both_weights_of_teacher_and_student(tmp_path):
    """Under 'both' the loop's two evaluations have raw metrics each."""
    runs = {
        name: semi_supervised(tmp_path / name, dict(EMA, evaluate=name))
        for name in ('ema', 'raw', 'both')
    }
    for who in ('teacher', 'student'):
        for name, end in (('ema', ''), ('raw', '_raw')):
            expected = list(runs[name].scalar(f'val/{who}/score'))
            found = runs['both'].scalar(f'val/{who}/score{end}')
            assert list(found) == expected, (who, name)


@needs.mmdet
def test_teacher_with_copied_buffers_is_shown_as_it_is(tmp_path):
    """``update_buffers=False`` shows a frozen teacher's own statistics."""
    looks = Looks()
    hook = dict(EMA, update_buffers=False)
    run = semi_supervised(tmp_path, hook, looks, skip_buffer=False)
    (*_, shown), live = looks.seen[-1], state_of(run.model)
    teacher = [key for key in live if key.startswith('teacher.')]
    assert [k for k in teacher if not torch.equal(shown[k], live[k])] == []
