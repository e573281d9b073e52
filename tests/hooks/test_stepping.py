"""Steps that an optimizer really took, with every way not to take one."""

import pytest
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn

from mmdet_ema.hooks.stepping import StepCounter


def model_and(kind=torch.optim.SGD, **options):
    model = nn.Linear(2, 1)
    return model, kind(model.parameters(), lr=0.1, **options)


def counter(*optimizers):
    return StepCounter(optimizers, lambda: None)


def backward(model, value=1.0):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


KINDS = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, dict(momentum=0.9, nesterov=True)),
    (torch.optim.SGD, dict(fused=True)),
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, dict(fused=True)),
    (torch.optim.AdamW, dict(foreach=True)),
    (torch.optim.RMSprop, {}),
]


@pytest.mark.parametrize(('kind', 'options'), KINDS)
def test_step(kind, options):
    """A step counts once, with every kind of optimizer."""
    model, optimizer = model_and(kind, **options)
    steps = counter(optimizer)
    assert steps.take() is False
    backward(model)
    optimizer.step()
    assert steps.take() is True
    assert steps.take() is False


def test_closure():
    """A step with a closure counts once."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    steps = counter(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert [True, False] == [steps.take(), steps.take()]


def test_several_steps():
    """Several steps before a look count once."""
    model, optimizer = model_and()
    steps = counter(optimizer)
    backward(model)
    optimizer.step()
    optimizer.step()
    assert [True, False] == [steps.take(), steps.take()]


def test_several_optimizers():
    """Whichever of several optimizers steps, it counts once."""
    pairs = [model_and(), model_and(torch.optim.AdamW)]
    steps = counter(*(optimizer for _, optimizer in pairs))
    for chosen in ([0], [1], [0, 1], []):
        for index in chosen:
            model, optimizer = pairs[index]
            backward(model)
            optimizer.step()
        assert bool(chosen) is steps.take()


def test_no_optimizer():
    """Without optimizers nothing ever counts."""
    assert counter().take() is False


def test_step_that_fails():
    """A step that raises does not count."""
    _, optimizer = model_and()
    steps = counter(optimizer)

    def closure():
        raise ValueError('x')

    with pytest.raises(ValueError, match='x'):
        optimizer.step(closure)
    assert steps.take() is False


def test_before_step():
    """The call before a step comes before the weights change, every time."""
    model, optimizer = model_and()
    nn.init.zeros_(model.weight)
    seen = []
    steps = StepCounter(
        [optimizer], lambda: seen.append(model.weight[0, 0].item())
    )
    for _ in range(2):
        backward(model)
        optimizer.step()
    assert [0.0, pytest.approx(-0.1)] == seen
    steps.detach()
    optimizer.step()
    assert 2 == len(seen)


def test_detach():
    """Afterwards the optimizer is as it was."""
    model, optimizer = model_and()
    steps = counter(optimizer)
    steps.detach()
    steps.detach()
    backward(model)
    optimizer.step()
    assert steps.take() is False
    assert 0 == len(optimizer._optimizer_step_pre_hooks)
    assert 0 == len(optimizer._optimizer_step_post_hooks)


def test_other_hooks_stay():
    """Hooks of others on the optimizer are left alone."""
    model, optimizer = model_and()
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    counter(optimizer).detach()
    backward(model)
    optimizer.step()
    assert [1] == calls


AMP = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, dict(fused=True)),
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, dict(fused=True)),
]


@pytest.mark.parametrize(('kind', 'options'), AMP)
def test_skipped_by_the_scaler(kind, options):
    """A step that the gradient scaler skips does not count; the next does."""
    model, optimizer = model_and(kind, **options)
    fused = options.get('fused', False)
    assert fused is bool(
        getattr(optimizer, '_step_supports_amp_scaling', False)
    )
    steps, called = counter(optimizer), []
    optimizer.register_step_post_hook(lambda *args: called.append(1))
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    found = []
    for value in (1.0, float('inf'), 1.0, float('nan'), 1.0):
        optimizer.zero_grad()
        before = model.weight.detach().clone()
        loss = (model(torch.ones(1, 2)) * value).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = not torch.equal(before, model.weight.detach())
        stepped = steps.take()
        assert moved is stepped
        found.append(stepped)
    assert [True, False, True, False, True] == found
    # The scaler calls a fused optimizer also when it skips.
    assert (5 if fused else 3) == len(called)


@pytest.mark.parametrize('fused', [False, True])
def test_one_of_two_is_skipped(fused):
    """Of two optimizers the one that is not skipped counts."""
    pairs = [model_and(fused=fused), model_and(fused=fused)]
    steps = counter(*(optimizer for _, optimizer in pairs))
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    for bad in (0, 1):
        for index, (model, optimizer) in enumerate(pairs):
            optimizer.zero_grad()
            value = float('inf') if index == bad else 1.0
            scaler.scale((model(torch.ones(1, 2)) * value).sum()).backward()
            scaler.step(optimizer)
        scaler.update()
        assert steps.take() is True


@pytest.mark.parametrize('counts', [1, 2, 3])
def test_accumulation(counts):
    """Micro-batches of mmengine's wrapper do not count, steps do."""
    model, optimizer = model_and()
    wrapper = OptimWrapper(optimizer, accumulative_counts=counts)
    wrapper.initialize_count_status(model, 0, 7)
    steps, found = counter(optimizer), []
    for _ in range(7):
        with wrapper.optim_context(model):
            loss = model(torch.ones(1, 2)).sum()
        wrapper.update_params(loss)
        found.append(steps.take())
    assert [n % counts == 0 or n == 7 for n in range(1, 8)] == found


def test_the_wrapper_of_mmengine_is_followed():
    """The wrappers of mmengine step the optimizer that is listened to."""
    _, optimizer = model_and()
    steps = counter(optimizer)
    OptimWrapper(optimizer).step()
    assert steps.take() is True
    assert issubclass(AmpOptimWrapper, OptimWrapper)
