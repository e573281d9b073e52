"""Run as one of several ranks: train with mmengine's ``DeepSpeedStrategy``.

Usage: tests.ranks.run_ranks, with names of ``RUNS``.
"""

import functools
import shutil
import time

import deepspeed
import mmengine._strategy.deepspeed as strategies
import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.runner import FlexibleRunner
from torch import nn

from mmdet_ema import WeightAverager
from tests.for_mmengine.shards_program import (
    BATCH,
    EMA,
    Failing,
    Model,
    Recorder,
    make_runner,
)
from tests.ranks import main as run_main

BF16 = dict(bf16=dict(enabled=True), inputs_to_half=['inputs'])
FP16 = dict(
    fp16=dict(enabled=True, initial_scale_power=4), inputs_to_half=['inputs']
)
SMALL = dict(stage3_param_persistence_threshold=10)
RUNS = dict(
    one=dict(stage=1),
    two=dict(stage=2),
    three=dict(stage=3),
    small=dict(stage=3, zero=SMALL),
    low_one=dict(stage=1, low=True, strategy=BF16),
    low_three=dict(stage=3, low=True, strategy=BF16),
    part_one=dict(stage=1, epochs=2),
    again_one=dict(stage=1, resume='part_one/epoch_2.pth'),
    part_three=dict(stage=3, epochs=2),
    again_three=dict(stage=3, resume='part_three/epoch_2.pth'),
    low_part=dict(stage=3, low=True, strategy=BF16, epochs=2),
    low_again=dict(
        stage=3, low=True, strategy=BF16, resume='low_part/epoch_2.pth'
    ),
    accumulated=dict(
        stage=3, epochs=2, strategy=dict(gradient_accumulation_steps=2)
    ),
    overflowed=dict(
        stage=3, epochs=1, low=True, strategy=FP16, bad='gradient'
    ),
    overflowed_two=dict(
        stage=2, epochs=1, low=True, strategy=FP16, bad='gradient'
    ),
    spoiled=dict(stage=3, epochs=1, bad='weight'),
    alone=dict(stage=3, epochs=1, file=dict(save_optimizer=False)),
    deployed=dict(stage=3, epochs=1, ema=dict(deploy='fast')),
    late=dict(stage=3, epochs=2, ema=dict(begin_epoch=2, averages=None)),
    without=dict(stage=3, epochs=1, ema=dict(enabled=False)),
    afterwards=dict(stage=3, epochs=2, resume='without/epoch_1.pth'),
)


class Low(Model):
    """Without BatchNorm, whose statistics DeepSpeed leaves in float32."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()
        self.head.register_forward_pre_hook(
            lambda head, inputs: inputs[0].to(head.weight.dtype)
        )


class Stepped(Recorder):
    """Gathers what is stepped before and after every step, and metrics."""

    def __init__(self, bad=None):
        super().__init__()
        self.applied, self.bad = [], bad

    def gathered(self, model):
        return gathered(model)

    def parts_of(self, model):
        return parts_of(model)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.bad == 'gradient' and batch_idx == 1 and dist.get_rank() == 1:
            data_batch['inputs'][0, 0] = float('nan')

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        self.applied.append(runner.model.was_step_applied())
        if self.bad == 'weight' and batch_idx == 1 and dist.get_rank() == 1:
            # of the second part of a matrix alone
            runner.model.module.first.weight.ds_tensor[-1] = float('nan')
        super().after_train_iter(runner, batch_idx)


class Mending(Hook):
    """Puts a number back after our hook has seen what is not finite."""

    priority = 'VERY_LOW'

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        part = runner.model.module.first.weight.ds_tensor
        part.nan_to_num_(nan=0.5)


def gathered(engine):
    """What is stepped, whole, by DeepSpeed's own means."""
    found = {}
    model = engine.module
    names = {id(p): n for n, p in model.named_parameters()}
    for parameter in model.parameters():
        whole = None
        if parameter.requires_grad and parameter.dtype != torch.float32:
            whole = deepspeed.utils.safe_get_full_fp32_param(parameter)
            if not hasattr(parameter, 'ds_id'):
                whole = parameter  # averaged is what every rank holds
        if whole is None:
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
        found[names[id(parameter)]] = whole.detach().clone()
    found['tied.weight'] = found['first.weight']
    return {**found, **{n: b.clone() for n, b in model.named_buffers()}}


def parts_of(engine):
    """What this rank holds of each parameter."""
    return [
        getattr(p, 'ds_tensor', p).detach().clone()
        for p in engine.module.parameters()
    ]


def train(
    folder,
    ranks,
    *,
    stage,
    epochs=3,
    low=False,
    resume=None,
    zero=None,
    strategy=None,
    ema=None,
    bad=None,
    file=None,
    metric=None,
):
    """Train; return what was recorded."""
    recorder = Stepped(bad)
    zero = zero or dict(stage3_param_persistence_threshold=0)
    hooks = [{**EMA, **(ema or {})}, recorder]
    runner = make_runner(
        folder,
        epochs,
        ranks,
        Low() if low else Model(),
        hooks + [Mending()] * (bad == 'weight'),
        metric,
        file,
        optim_wrapper=dict(
            type='DeepSpeedOptimWrapper',
            optimizer=dict(type='AdamW', lr=0.01),
        ),
        resume=str(folder.parent / resume) if resume else False,
        launcher='pytorch',
        strategy=dict(
            type='DeepSpeedStrategy',
            config=dict(zero_allow_untested_optimizer=True),
            zero_optimization=dict(stage=stage, **zero),
            train_micro_batch_size_per_gpu=BATCH // ranks,
            gradient_clipping=0.5,
            **(strategy or {}),
        ),
    )
    runner.train()
    hub = runner.message_hub
    (hook,) = [x for x in runner.hooks if type(x).__name__ == 'EMAHook']
    averager = hook._life.averager
    return dict(
        raws=recorder.raws,
        metrics=recorder.metrics,
        applied=recorder.applied,
        ema_distance=hub.get_scalar('train/ema_distance').data[0].tolist()
        if averager
        else [],
        progress=averager.progress() if averager else {},
        bytes=averager.counts()['bytes'] if averager else 0,
    )


def plain():
    """Average a model under ZeRO-3 in a loop of one's own.

    Returns what differs from the formula, in pieces and in a whole state.
    """
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 1))
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 0)
    config = dict(train_micro_batch_size_per_gpu=2)
    # Of parameters that it gathers together DeepSpeed 0.19 waits for the last
    # alone, which is enough for NCCL and not for gloo: here each is alone.
    config['zero_optimization'] = dict(
        stage=3, stage3_param_persistence_threshold=0
    )
    config['zero_allow_untested_optimizer'] = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config
    )
    names = [name for name, _ in model.named_parameters()]

    def whole():
        found = {}
        for name, parameter in zip(names, model.parameters()):
            with deepspeed.zero.GatheredParameters(parameter):
                found[name] = parameter.detach().clone()
        return found

    averager = WeightAverager(engine.module, 'constant', decay=0.5)
    expected = whole()
    for _ in range(3):
        engine.backward(engine(torch.ones(2, 7)).sum())
        engine.step()
        averager.update()
        for name, raw in whole().items():
            expected[name] = 0.5 * expected[name] + 0.5 * raw
    raw = whole()
    outputs = []
    for weights in (expected, raw):
        x = torch.ones(2, 7)
        for i in (0, 1):
            x = x @ weights[f'{i}.weight'].T + weights[f'{i}.bias']
        outputs.append(x)
    seen = []
    with torch.no_grad():
        with averager.applied():
            seen.append(engine(torch.ones(2, 7)))
        seen.append(engine(torch.ones(2, 7)))
    state = averager.state_dict()
    given = [state]
    dist.broadcast_object_list(given)
    averager.restart()
    averager.load_state_dict(given[0])
    again = averager.state_dict()['averages']
    return dict(
        outputs=list(zip(outputs, seen)),
        expected=expected,
        averages=state['averages'],
        again=again,
        back=[n for n, x in whole().items() if not torch.equal(x, raw[n])],
    )


def refused(folder, ranks, **options):
    """Return what is said at the start."""
    try:
        train(folder, ranks, **options)
    except (ValueError, deepspeed.runtime.engine.ZeRORuntimeException) as e:
        return str(e)


def fail(folder):
    """Return what a rank says of it, and what differs in its weights."""
    kept = {}

    class Keeping(Failing):
        def process(self, data_batch, data_samples):
            kept.setdefault('parts', Recorder.parts)
            super().process(data_batch, data_samples)

    class Looking(Hook):
        def before_run(self, runner):
            kept['engine'] = runner.model

    options = dict(stage=3, epochs=1, metric=Keeping())
    options['zero'] = SMALL
    build = FlexibleRunner.register_custom_hooks

    def register(self, hooks):
        build(self, [*hooks, Looking()])

    FlexibleRunner.register_custom_hooks = register
    try:
        train(folder, 2, **options)
    except RuntimeError as error:
        pairs = zip(parts_of(kept['engine']), kept['parts'])
        return str(error), [
            i for i, x in enumerate(pairs) if not torch.equal(*x)
        ]


def main(rank, ranks, folder, *names):
    """Train by each name, one after the other; return what was seen."""
    time.sleep = lambda seconds: None
    # its operators would be compiled first
    deepspeed.ops.__compatible_ops__.clear()
    # torch can, on any CPU
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    dist.init_process_group('gloo')
    # it can be done once in a process
    register = functools.lru_cache(strategies.register_deepspeed_optimizers)
    strategies.register_deepspeed_optimizers = register
    found = {}
    for name in names:
        if name == 'failed':
            found[name] = fail(folder / name)
        elif name == 'plain':
            found[name] = plain()
        elif name.startswith('refused'):
            found[name] = REFUSED[name](folder, rank, ranks)
        else:
            found[name] = train(folder / name, ranks, **RUNS[name])
    return found


def refused_posthoc(folder, rank, ranks):
    ema = dict(posthoc=True)
    return refused(folder / 'r', ranks, stage=3, epochs=1, ema=ema)


def refused_strict(folder, rank, ranks):
    options = dict(ema=dict(strict_load=True), resume='without/epoch_1.pth')
    return refused(folder / 'r', ranks, stage=3, **options)


def refused_moment(folder, rank, ranks):
    """The file of another epoch has got into the folder."""
    given = folder / 'mixed.pth'
    if rank == 0:
        shutil.copytree(folder / 'three' / 'epoch_2.pth', given)
        shutil.copy(folder / 'three' / 'epoch_1.pth' / 'ema.pth', given)
    dist.barrier()
    return refused(folder / 'r', ranks, stage=3, resume='mixed.pth')


def refused_ranks(folder, rank, ranks):
    """What so many ranks wrote, on another number of them."""
    name = '../part_one/epoch_2.pth'
    return refused(folder / 'r', ranks, stage=1, resume=name)


REFUSED = {
    name: value for name, value in globals().items() if name[:8] == 'refused_'
}


if __name__ == '__main__':
    run_main(main)
