"""Train with the hook, the same way under whichever framework there is.

Both toys have the same model, data and optimizer; a file of either is read
into the same parts.
"""

from logging.handlers import BufferingHandler

import numpy as np
import pytest
import torch

from tests import oracle
from tests.conftest import MMCV1
from tests.toy import RecordingSGD, same, state_of

if MMCV1:
    from mmcv.parallel import MMDistributedDataParallel
    from mmcv.runner import DistEvalHook, Hook

    from tests.for_mmcv1 import toy
else:
    from mmengine.hooks import Hook

    from tests.for_mmengine import toy

__all__ = [
    'EMA',
    'STATISTICS',
    'Hook',
    'RankModel',
    'RecordingSGD',
    'Run',
    'Saved',
    'Spoil',
    'ToyModel',
    'assert_estimated',
    'newest',
    'ramp',
    'same',
    'state_of',
    'train_rank',
]

ToyModel = toy.ToyModel
EMA = dict(type='EMAHook', decay=0.9, tau=3)
STATISTICS = ['norm.running_mean', 'norm.running_var']


def ramp(n):
    return oracle.ramp(n, 0.9, 3)


class Saved:
    """A file of a run: both halves by name, and what is said of them."""

    def __init__(self, path):
        self.path = path
        # the framework's own files hold more than weights
        self.content = torch.load(path, **({} if MMCV1 else UNSAFE))
        self.averages = self.content['state_dict']
        self.part = self.content
        if MMCV1:
            messages = self.content['meta'].get('hook_msgs', {})
            self.part = messages.get('EMAHook', {})
        self.has_part = 'ema_state_dict' in self.part
        if self.has_part:
            ema = dict(self.part['ema_state_dict'])
            self.steps, self.meta = (
                int(ema.pop('steps')),
                self.part['ema_meta'],
            )
            self.raws = {name[len('module.') :]: x for name, x in ema.items()}

    def write(self):
        """Write what the content has become; return the path."""
        torch.save(self.content, self.path)
        return self.path


UNSAFE = dict(weights_only=False)


class Spoil(Hook):
    """Spoils the statistics of every iteration."""

    def before_train_iter(self, runner, batch_idx=0, data_batch=None):
        model = getattr(runner.model, 'module', runner.model)
        model.norm.running_mean.fill_(50)


def estimated(weights, inputs):
    """Mean and unbiased variance of what the layer sees, in float64."""
    weight, bias = (
        weights[f'first.{x}'].double().numpy() for x in ('weight', 'bias')
    )
    seen = inputs.astype(float) @ weight.T + bias
    return [seen.mean(0), seen.var(0, ddof=1)]


def assert_estimated(weights, inputs):
    for name, value in zip(STATISTICS, estimated(weights, inputs)):
        np.testing.assert_allclose(weights[name], value, rtol=2e-6, atol=1e-6)


def newest(folder):
    """Return what a tool resumes from; None if there is nothing."""
    if MMCV1:
        from mmdet.utils import find_latest_checkpoint

        return find_latest_checkpoint(str(folder))
    name = folder / 'last_checkpoint'
    return name.read_text() if name.exists() else None


class RankModel(ToyModel):
    """gloo reduces no bfloat16."""

    def __init__(self):
        super().__init__()
        self.low = torch.nn.Parameter(torch.ones(4))


def train_rank(folder, *hooks, model, epochs=2, resume=None, **options):
    """Train on one of several ranks, with other data on each; return the run.

    Args:
        folder: Where the files of all are.
        *hooks: Its hooks.
        model: The model.
        epochs: When it ends.
        resume: A file that is resumed, or True for the newest, if any.
        **options: Options of the toy's own run.
    """
    if MMCV1:
        options.setdefault('runner', dict(max_epochs=epochs))
        options.setdefault('evaluation', dict(kind=DistEvalHook, interval=1))
        wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
        run = toy.Run(
            folder,
            *hooks,
            model=model,
            wrapped=wrapped,
            loader=toy.loader(seed=torch.distributed.get_rank()),
            **options,
        )
        return run.train(newest(folder) if resume is True else resume)
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
    more = dict(launcher='pytorch', cfg=dict(model_wrapper_cfg=wrapper))
    if 'kind' in options:  # FlexibleRunner
        more = dict(strategy=dict(type='DDPStrategy', model_wrapper=wrapper))
    if resume not in (None, True):
        more['load_from'] = str(resume)
    return toy.Run(
        folder,
        *hooks,
        model=model,
        train_dataloader=toy.loader(32),
        max_epochs=epochs,
        resume=resume is not None,
        **more,
        **options,
    ).train()


class _Watch(Hook):
    """Lets a run of mmengine see what is evaluated."""

    def __init__(self, run):
        self.run = run

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == 0:
            self.run.see(getattr(runner.model, 'module', runner.model))


class Run:
    """A run of the toy with some hooks, of two epochs of four iterations.

    Args:
        work_dir: Where its files are; those of an earlier run are resumed.
        *hooks: Its hooks.
        epochs: When it ends.
        iters: When it ends, where it counts no epochs.
        every: Iterations between evaluations and files then; all by default.
        keep: How many files it keeps, apart from the best one.
        accumulation: Iterations to one step.
        batch: Samples in a batch, of 16.
        resume: A file that training resumes from; True for the newest.
        load: A file that it starts from.
        model: The model.
        on_evaluation: Called in each pass of an evaluation.
        best: The metric that chooses the best file.
        rule: Whether it should be 'greater' or 'less'.
    """

    def __init__(
        self,
        work_dir,
        *hooks,
        epochs=2,
        iters=None,
        every=None,
        keep=-1,
        accumulation=1,
        batch=4,
        resume=None,
        load=None,
        on_evaluation=None,
        best=None,
        rule='greater',
        **options,
    ):
        self._said = BufferingHandler(10**6)
        self.work_dir, self._files = work_dir, {}
        self.seen, self._on_evaluation = [], on_evaluation
        self._length = iters or epochs
        self._unit = 'iter' if iters else 'epoch'
        by_iter = dict(by_epoch=False, interval=every or iters)
        checkpoint = dict(interval=1, max_keep_ckpts=keep)
        if iters:
            checkpoint.update(by_iter)
        if MMCV1:
            resume = newest(work_dir) if resume is True else resume
            self._files = dict(resume=resume, load=load)
            options.update(
                runner=dict(type='IterBasedRunner', max_iters=iters)
                if iters
                else dict(max_epochs=epochs),
                loader=toy.loader(batch=batch),
                logger=toy.quiet(self._said),
            )
            evaluation = dict(test_fn=self._evaluate)
            options.setdefault('checkpoint', checkpoint)
            if iters:
                evaluation.update(by_iter)
            if best:
                evaluation.update(save_best=best, rule=rule)
            options.setdefault('evaluation', evaluation)
            if accumulation > 1:
                kind = 'GradientCumulativeOptimizerHook'
                options['optimizer_config'] = dict(
                    type=kind, cumulative_iters=accumulation
                )
        else:
            hooks = (*hooks, _Watch(self))
            checkpoint['type'] = 'CheckpointHook'
            if iters:
                options['train_cfg'] = dict(
                    by_epoch=False,
                    max_iters=iters,
                    val_interval=every or iters,
                )
            if best:
                checkpoint.update(save_best=best, rule=rule)
            options.setdefault('hooks', dict(checkpoint=checkpoint))
            options.update(
                max_epochs=epochs,
                train_dataloader=toy.loader(batch=batch),
                accumulative_counts=accumulation,
            )
            options['resume'] = bool(resume)
            given = load if resume is True else resume or load
            if given:
                options['load_from'] = str(given)
        self.toy = toy.Run(work_dir, *hooks, **options)
        if not MMCV1:
            self.toy.runner.logger.addHandler(self._said)
        self.model, self.trace = self.toy.model, self.toy.trace

    def train(self):
        """Train; return this run."""
        self.toy.train(**self._files)
        return self

    def _evaluate(self, model, loader):
        """Be mmcv's ``test_fn``."""
        self.see(getattr(model, 'module', model))
        return self.toy.recorder.test(model, loader)

    def see(self, model):
        """Keep what an evaluation sees, with the steps done."""
        self.seen.append((len(self.records), state_of(model)))
        if self._on_evaluation is not None:
            self._on_evaluation()

    @property
    def start(self):
        """State of the model when training starts."""
        return self.toy.recorder.start

    @property
    def records(self):
        """States of the model after every optimizer step."""
        return self.toy.records

    def load(self, number=None, prefix=''):
        """Read the file of an epoch or iteration, by default the last."""
        number = self._length if number is None else number
        return Saved(self.work_dir / f'{prefix}{self._unit}_{number}.pth')

    @property
    def log(self):
        """The log in one line, levels included."""
        said = (f'{x.levelname} {x.getMessage()}' for x in self._said.buffer)
        return ' '.join(' '.join(said).split())

    def refuse(self, error, match):
        """Training is refused in one line, before a weight is loaded."""
        loaded = []
        load = self.model._load_from_state_dict
        self.model._load_from_state_dict = lambda *a: loaded.append(load(*a))
        with pytest.raises(error, match=match) as caught:
            self.train()
        assert '\n' not in str(caught.value)
        assert not loaded
        assert not self.records
        return str(caught.value)

    def read(self, path, resume):
        """Read a file and get ready to train; return the averages, if any.

        May be called again with another file.
        """
        runner = self.toy.runner
        self._said.flush()
        if MMCV1:
            if resume:
                runner.resume(str(path))
                moments = 'before_run', 'before_train_epoch'
                for moment in (*moments, 'before_train_iter'):
                    runner.call_hook(moment)
            else:
                runner.load_checkpoint(str(path))
        else:
            assert runner.train_loop  # it is made when it is asked for
            runner._has_loaded, runner._load_from = False, str(path)
            runner._resume = resume
            runner.call_hook('before_run')
            runner.load_or_resume()
            runner.call_hook('before_train')
        hooks = (x for x in runner.hooks if type(x).__name__ == 'EMAHook')
        averager = next(hooks)._life.averager
        return dict(averager.named_averages()) if averager else None

    def wrong(self, saved, decay_of, keys=None, chosen=None):
        """Names of the averages of a file that are not the oracle's.

        All are looked at by default, and all records are averaged.
        """
        averages = saved.averages
        if keys is not None:
            averages = {key: averages[key] for key in keys}
        return self.toy.wrong(averages, decay_of, chosen)
