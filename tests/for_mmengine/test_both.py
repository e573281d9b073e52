"""``evaluate='all'``: a pass for each set, right for each, seen by none."""

import mmengine
import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric, DumpResults, Evaluator
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.optim import ReduceOnPlateauLR
from mmengine.runner import BaseLoop, ValLoop
from torch import nn

from mmdet_ema import OptionError
from tests.for_mmengine.toy import Run, Score, ToyModel, loader, same, state_of

FAST = dict(schedule='constant', decay=0.5)
EMA = dict(
    type='EMAHook', schedule='constant', decay=0.9, averages=dict(fast=FAST)
)
ALL = dict(EMA, evaluate='all')
SETS = {'ema': 'score', 'raw': 'score_raw', 'fast': 'score_fast'}


def alone_and_all(tmp_path, make):
    """Train with each way to evaluate; return the runs by name."""
    return {
        name: make(tmp_path / name, dict(EMA, evaluate=name)).train()
        for name in (*SETS, 'all')
    }


def scores(run, name='score'):
    return run.scalar(f'val/{name}').tolist()


# Models with a memory


class Remembers(ToyModel):
    """Adds what it said of the batches before, as trackers do."""

    def __init__(self):
        super().__init__()
        self.last, self.past = 0.0, []
        self.register_buffer('held', torch.zeros(()))

    def val_step(self, data):
        found = super().val_step(data)
        before = self.last + 0.5 * sum(self.past) + 0.25 * float(self.held)
        self.last = float(sum(sample['out'].sum() for sample in found))
        self.past.append(self.last)
        self.held.fill_(self.last)
        return [dict(out=sample['out'] + before) for sample in found]


def test_model_that_remembers(tmp_path):
    """No set sees what is in an attribute, list or buffer of another one."""

    def make(folder, hook):
        few = loader(4, batch=2, seed=1)
        return Run(folder, hook, model=Remembers(), val_dataloader=few)

    runs = alone_and_all(tmp_path, make)
    assert scores(runs['all']) == scores(runs['ema'])
    for name, metric in SETS.items():
        # where the run begins there is nothing to remember yet
        assert scores(runs['all'], metric)[0] == scores(runs[name])[0]
    for name in ('ema', 'fast', 'all'):
        changed = same(runs[name].records[-1], runs['raw'].records[-1])
        assert set(changed) <= {'held'}


# Hooks that change the model


class Fuse(Hook):
    """Makes one layer of two for an evaluation; may undo it."""

    priority = 'LOW'

    def __init__(self, undo):
        self.undo = undo
        self.plain = None

    def before_val_epoch(self, runner):
        assert self.plain is None
        model = runner.model
        first, norm = model.first, model.norm
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        fused = nn.Linear(4, 4)
        fused.weight.data = (first.weight * scale[:, None]).detach()
        shift = (first.bias - norm.running_mean) * scale + norm.bias
        fused.bias.data = shift.detach()
        if self.undo:
            self.plain = first, norm
        model.first, model.norm = fused, nn.Identity()

    def after_val_epoch(self, runner, metrics=None):
        if self.undo:
            runner.model.first, runner.model.norm = self.plain
            self.plain = None


def test_fusing_and_undoing_in_training(tmp_path):
    """Each set has its own layers fused; the training does not notice."""

    def make(folder, hook):
        return Run(folder, hook, Fuse(undo=True), max_epochs=3)

    runs = alone_and_all(tmp_path, make)
    for name, metric in SETS.items():
        assert scores(runs['all'], metric) == scores(runs[name])
    found = [x for name in SETS for x in scores(runs[name])]
    assert len(set(found)) == len(found) == 9
    plain = Run(tmp_path / 'plain', max_epochs=3).train()
    assert same(runs['all'].records[-1], plain.records[-1]) == []


def test_fusing_for_good_before_a_validation(tmp_path):
    """Layers that stay fused after one set are not those of the next."""
    Run(tmp_path, EMA).train()
    found = {}
    for name in (*SETS, 'all'):
        hooks = dict(EMA, evaluate=name), Fuse(undo=False)
        options = dict(load_from=str(tmp_path / 'epoch_2.pth'))
        found[name] = Run(tmp_path / name, *hooks, **options).runner.val()
    assert found['all'] == {SETS[name]: found[name]['score'] for name in SETS}


# What hooks are told


class Moments(Hook):
    """Keeps what it is told of a validation."""

    def __init__(self, priority):
        self.priority, self.calls = priority, []

    def before_val_epoch(self, runner):
        self.calls.append('begins')

    def after_val_iter(self, *args, **kwargs):
        self.calls.append('batch')

    def after_val_epoch(self, runner, metrics=None):
        self.calls.append(dict(metrics))


class Metrics(Hook):
    """Hears only of the end of a validation, as one that chooses a file."""

    def __init__(self, priority):
        self.priority, self.calls = priority, []

    def after_val_epoch(self, runner, metrics=None):
        self.calls.append(dict(metrics))


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'NORMAL', 'LOWEST'])
def test_what_hooks_of_any_priority_are_told(tmp_path, priority):
    """A hook that hears a pass begin hears it end; others hear once of all."""
    best = dict(type='CheckpointHook', save_best='score_raw', rule='greater')
    places = ('VERY_HIGH', 'NORMAL', 'LOWEST')
    hooks = [kind(p) for kind in (Metrics, Moments) for p in places]
    hook = dict(ALL, priority=priority)
    options = dict(hooks=dict(checkpoint=best), max_epochs=1)
    run = Run(tmp_path, hook, *hooks, **options).train()
    raw, fast, ema = (
        {x: scores(run, x)[0]} for x in ('score_raw', 'score_fast', 'score')
    )
    all_of_them = {**ema, **raw, **fast}
    for told in hooks[:3]:
        assert told.calls == [all_of_them]
    begins = ['begins', 'batch']
    for told in hooks[3:]:
        assert told.calls == [
            *(*begins, raw),
            *(*begins, fast),
            *(*begins, all_of_them),
        ]
    (path,) = tmp_path.glob('best_score_raw_epoch_1.pth')
    saved, last = run.load(path.name), run.load('epoch_1.pth')
    assert same(saved['state_dict'], last['state_dict']) == []
    assert 'score_raw: ' in run.log


def test_best_of_each_set(tmp_path):
    """One run keeps the best file of each; it tests to the metric."""
    best = dict(
        type='CheckpointHook',
        save_best=[*SETS.values()],
        rule=['greater', 'less', 'greater'],
    )
    options = dict(hooks=dict(checkpoint=best), max_epochs=3)
    run = Run(tmp_path, ALL, **options).train()
    for name, metric in SETS.items():
        found = run.runner.message_hub.get_info(f'best_score_{metric}')
        choose = min if name == 'raw' else max
        assert found == choose(scores(run, metric))
        (path,) = tmp_path.glob(f'best_{metric}_epoch_?.pth')
        hook, file = dict(EMA, evaluate=name), dict(load_from=str(path))
        tested = Run(tmp_path / name, hook, **file).runner.val()
        assert tested['score'] == found


def test_a_plateau_of_the_raw_metric(tmp_path):
    """A scheduler that monitors ``..._raw`` sees each validation once."""
    steps = []
    for hook, metric in ((EMA, 'score'), (ALL, 'score_raw')):
        run = Run(tmp_path / metric, hook, max_epochs=4)
        plateau = ReduceOnPlateauLR(
            run.optimizer, monitor=metric, rule='greater', patience=9
        )
        run.runner.param_schedulers = [plateau]
        run.train()
        steps.append(plateau.last_step)
    assert steps[0] == steps[1] > 0


# Nothing of the training changes


# Ways to evaluate


class LossLoop(BaseLoop):
    """A loop without an evaluator: it reports the loss."""

    def run(self):
        model, total = self.runner.model, 0.0
        self.runner.call_hook('before_val_epoch')
        model.eval()
        with torch.no_grad():
            for batch in self.dataloader:
                data = model.data_preprocessor(batch)
                total += float(model(**data, mode='loss')['loss'])
        self.runner.call_hook('after_val_epoch', metrics=dict(score=total))


class TwoReports(ValLoop):
    """Reports twice, as a loop over two data sets does."""

    def run(self):
        for _ in range(2):
            super().run()


class Silent(ValLoop):
    """Says nothing at the beginning of its epoch."""

    def run(self):
        self.runner.model.eval()
        for i, batch in enumerate(self.dataloader):
            self.run_iter(i, batch)
        metrics = self.evaluator.evaluate(4)
        self.runner.call_hook('after_val_epoch', metrics=metrics)


def with_loop(kind):
    def make(folder, hook):
        run = Run(folder, hook)
        runner, data = run.runner, run.runner.build_dataloader(loader(4))
        options = [data]
        if kind is not LossLoop:
            options.append(Evaluator([Score()]))
        runner._val_loop = kind(runner, *options)
        return run

    return make


def by_iterations(folder, hook):
    loops = dict(by_epoch=False, max_iters=6, val_interval=2)
    return Run(folder, hook, train_cfg=loops, train_dataloader=loader(32))


@pytest.mark.parametrize(
    'make',
    [*map(with_loop, (LossLoop, TwoReports, Silent)), by_iterations],
    ids=['loss', 'two_reports', 'silent', 'iterations'],
)
def test_each_set_has_the_metrics_that_it_has_alone(tmp_path, make):
    """In loops of one's own, and by iterations."""
    runs = alone_and_all(tmp_path, make)
    assert scores(runs['raw']) != scores(runs['ema']) != scores(runs['fast'])
    for name, metric in SETS.items():
        assert scores(runs['all'], metric) == scores(runs[name])
    last = [run.records[-1] for run in runs.values()]
    assert [same(last[0], other) for other in last[1:]] == [[]] * 3


class TestsLate(Hook):
    """Tests in the middle of the training, by a loop not made before."""

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter == 2:
            self.found = runner.test_loop.run()
            runner.model.train()


def test_a_loop_that_is_made_late(tmp_path):
    """It evaluates all sets too."""
    late = TestsLate()
    run = Run(
        tmp_path,
        ALL,
        late,
        test_dataloader=loader(4, seed=1),
        test_cfg=dict(),
        test_evaluator=Evaluator([Score()]),
    ).train()
    assert set(late.found) == {*SETS.values()}
    plain = Run(tmp_path / 'plain', EMA).train()
    assert same(run.records[-1], plain.records[-1]) == []


def test_files_of_metrics(tmp_path):
    """What a metric writes of another set has its name in its own."""
    out = str(tmp_path / 'out.pkl')
    evaluator = Evaluator([Score(), DumpResults(out_file_path=out)])
    Run(tmp_path, ALL, val_evaluator=evaluator, max_epochs=1).train()
    names = {'ema': 'out.pkl', 'raw': 'out_raw.pkl', 'fast': 'out_fast.pkl'}
    assert {x.name for x in tmp_path.glob('*.pkl')} == {*names.values()}
    written = {name: mmengine.load(tmp_path / x) for name, x in names.items()}
    for name, rows in written.items():
        hook = dict(EMA, evaluate=name)
        Run(tmp_path, hook, val_evaluator=evaluator, max_epochs=1).train()
        for mine, other in zip(rows, mmengine.load(out)):
            assert torch.equal(mine['out'], other['out'])
    assert not torch.equal(written['raw'][0]['out'], written['fast'][0]['out'])
    assert evaluator.metrics[1].out_file_path == out


# A pass that breaks off


class Fails(BaseMetric):
    """Fails at one of its batches, once."""

    left, error = 0, RuntimeError

    def process(self, data_batch, data_samples):
        self.results.append(len(data_samples))
        self.left -= 1
        if self.left == 0:
            raise self.error('metric failed')

    def compute_metrics(self, results):
        return dict(count=float(sum(results)))


@pytest.mark.parametrize(
    ('evaluate', 'at', 'error'),
    [
        ('ema', 1, KeyboardInterrupt),
        *(('all', at, RuntimeError) for at in range(1, 7)),
    ],
)
def test_nothing_is_left_of_a_pass_that_breaks_off(
    tmp_path, evaluate, at, error
):
    """Weights, hooks and metrics are as before; the next run is right."""
    few = loader(4, batch=2, seed=1)
    metrics = [Score(), Fails()]
    run = Run(
        tmp_path,
        dict(EMA, evaluate=evaluate),
        val_dataloader=few,
        val_evaluator=Evaluator(metrics),
        max_epochs=1,
    ).train()
    runner, metrics[1].left, metrics[1].error = run.runner, at, error
    raw, order = state_of(run.model), list(runner.hooks)
    with pytest.raises(error, match='metric failed'):
        runner.val_loop.run()
    assert same(state_of(run.model), raw) == []
    assert runner.hooks == order
    assert 'call_hook' not in vars(runner)
    assert [metric.results for metric in metrics] == [[], []]
    metrics[1].left = 0
    assert runner.val_loop.run()['count'] == 4


# What is logged, under which name


def test_decays_by_set_of_weights(tmp_path):
    """Each average's decay is logged; its name says which sets there are."""
    run = Run(tmp_path, ALL).train()
    assert run.scalar('train/ema_decay_fast').tolist() == [0.5] * 8
    assert run.scalar('train/ema_decay').tolist() == [0.9] * 8


def best(names):
    return CheckpointHook(save_best=names, rule='greater')


@pytest.mark.parametrize(
    ('word', 'hook'),
    [
        ('save_best', best('score_raw')),
        ('save_best', best(['score', 'score_raw'])),
        ('monitor', EarlyStoppingHook('score_raw', rule='greater')),
    ],
    ids=['one', 'list', 'stop'],
)
@pytest.mark.parametrize(
    ('evaluate', 'advice'),
    [('ema', "'both'"), (['ema', 'fast'], "['ema', 'fast', 'raw']")],
)
def test_metrics_that_nobody_computes(tmp_path, evaluate, advice, word, hook):
    """They are refused before the training, with what to write."""
    run = Run(tmp_path, dict(EMA, evaluate=evaluate), hook)
    with pytest.raises(ValueError, match=f"{word}='score_raw'") as error:
        run.train()
    assert f"evaluate={advice}, or use {word}='score'" in str(error.value)
    assert run.records == []


@pytest.mark.parametrize('name', ['raw/score', 'score_raw'])
def test_the_main_set_has_the_plain_names(tmp_path, name):
    """A metric of the set that is evaluated alone is asked for without it."""
    run = Run(tmp_path, dict(EMA, evaluate='raw'), best(name))
    message = rf"save_best='{name}'\).*plain names.*save_best='score'"
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.records == []


def test_raw_metrics_do_not_matter_to_a_test(tmp_path):
    """A config that saves the best by them is tested on one set."""
    Run(tmp_path, EMA, max_epochs=1).train()
    best = dict(type='CheckpointHook', save_best='score_raw', rule='greater')
    run = Run(
        tmp_path / 'test',
        EMA,
        hooks=dict(checkpoint=best),
        load_from=str(tmp_path / 'epoch_1.pth'),
        test_dataloader=loader(4),
        test_cfg=dict(),
        test_evaluator=Evaluator([Score()]),
    )
    assert set(run.runner.test()) == {'score'}


class Loss(Score):
    """A metric of which less is better, and mmengine knows it."""

    def compute_metrics(self, results):
        return {'toy/loss': float(np.sum(results))}


@pytest.mark.parametrize('several', [False, True])
def test_names_of_older_configs(tmp_path, several):
    """They mean the same metric; the rule and the best file stay."""
    found = []
    for name in ('raw/toy/loss', 'toy/loss_raw'):
        folder, is_old = tmp_path / name, name.startswith('raw')
        names = ['toy/loss', name] if several else name
        hooks = dict(checkpoint=dict(type='CheckpointHook', save_best=names))
        stop = EarlyStoppingHook(name, patience=9, min_delta=0.0)
        options = dict(hooks=hooks, metric=Loss(), max_epochs=4)
        run = Run(folder, ALL, stop, **options).train()
        assert stop.best_score == min(scores(run, 'toy/loss_raw'))
        found.append({path.name for path in folder.glob('best_*')})
        assert run.log.count('waits for') == (2 if is_old else 0)
    assert found[0] == found[1]
    assert sum('best_toy_loss_raw_epoch_' in x for x in found[0]) == 1


class Twins(Score):
    """Has a metric by the name that another set's would have."""

    def compute_metrics(self, results):
        return dict(score=1.0, score_fast=2.0)


def test_metric_with_the_name_of_another_set(tmp_path):
    """One would hide the other: it is named, and the raw weights are back."""
    run = Run(tmp_path, ALL, metric=Twins())
    with pytest.raises(OptionError, match="'score_fast' is there twice"):
        run.train()
    assert same(state_of(run.model), run.records[-1]) == []


def test_averages_with_a_name_that_coco_has(tmp_path):
    """``bbox_mAP_s`` is that of small boxes."""
    averages = dict(s=FAST)
    with pytest.raises(OptionError, match='bbox_mAP_s'):
        Run(tmp_path, dict(EMA, averages=averages, evaluate='all'))
    Run(tmp_path, dict(EMA, averages=averages, evaluate='s'))
