"""Which iterations changed the weights, with every way to change them."""

import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from mmdet_ema.training import steps
from mmdet_ema.training.steps import TELLS_OF_STEPS, WeightChanges

OLD = pytest.mark.skipif(
    not TELLS_OF_STEPS, reason='torch before 2.0 has no step hooks'
)


class Training:
    """Iterations of a model that somebody looks at.

    Whether the weights changed is found out from copies of them.
    """

    def __init__(self, model, *optimizers, accumulation=1):
        self.model, self.optimizers = model, list(optimizers)
        self.parameters = list(model.parameters())
        self.told, self.before = [], 0
        self.changes = WeightChanges(
            lambda: self.parameters, self.note, accumulation
        )

    def note(self):
        self.before += 1

    def run(self, *actions):
        """Run an iteration for each action; return what was seen."""
        found = []
        for action in actions:
            self.changes.begin(self.optimizers)
            copies = [p.detach().clone() for p in self.parameters]
            action()
            seen = self.changes.take()
            assert self.changes.take() is False
            moved = not all(map(torch.equal, copies, self.parameters))
            found.append((seen, moved))
            self.told.append(self.changes.told)
        return found


RIGHT, IDLE = (True, True), (False, False)


def model_and(kind=torch.optim.SGD, **options):
    model = nn.Sequential(nn.Linear(2, 70), nn.Linear(70, 70))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model, kind(model.parameters(), lr=0.1, **options)


def nothing():
    pass


KINDS = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, dict(momentum=0.9, nesterov=True)),
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, dict(foreach=True)),
    (torch.optim.AdamW, dict(capturable=False)),
    (torch.optim.RMSprop, {}),
    pytest.param(torch.optim.SGD, dict(fused=True), marks=OLD),
    pytest.param(torch.optim.AdamW, dict(fused=True), marks=OLD),
]


def make(kind, options):
    try:
        return model_and(kind, **options)
    except (TypeError, RuntimeError) as error:
        pytest.skip(f'this torch has no such optimizer: {error}')


@pytest.mark.parametrize(('kind', 'options'), KINDS)
def test_step(kind, options):
    """A step counts in its iteration; others do not, early and late."""
    model, optimizer = make(kind, options)
    actions = [nothing, optimizer.step, optimizer.step, nothing, nothing] * 5
    expected = [IDLE, RIGHT, RIGHT, IDLE, IDLE] * 5
    assert expected == Training(model, optimizer).run(*actions)


@pytest.mark.parametrize(
    ('kind', 'options'),
    [(torch.optim.SGD, dict(momentum=0.9)), (torch.optim.AdamW, {})],
)
def test_steps_with_a_learning_rate_of_zero(kind, options):
    """The first steps of a warm-up count, though they move nothing."""
    model, optimizer = model_and(kind, **options)

    def step(rate):
        optimizer.param_groups[0]['lr'] = rate
        optimizer.step()

    actions = [lambda: step(0.0), lambda: step(0.0), lambda: step(0.1)] * 5
    expected = [(True, False), (True, False), RIGHT] * 5
    assert expected == Training(model, optimizer).run(*actions)


def test_closure():
    """A step with a closure counts once."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    training = Training(model, optimizer)
    assert [RIGHT] == training.run(lambda: optimizer.step(closure))


def test_several_steps():
    """Several steps of several optimizers in an iteration count once."""
    model, optimizer = model_and()
    other = torch.optim.Adam(model[1].parameters())

    def steps():
        optimizer.step()
        other.step()
        optimizer.step()

    training = Training(model, optimizer, other)
    assert [RIGHT, RIGHT] == training.run(steps, other.step)


class Wrapper:
    """Hands every attribute on to another optimizer, both ways."""

    def __init__(self, optimizer):
        self.__dict__['optimizer'] = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)

    def __setattr__(self, name, value):
        setattr(self.optimizer, name, value)

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_optimizer_that_hands_attributes_on():
    """A wrapper of an optimizer needs nothing of torch's own class."""
    model, optimizer = model_and()
    wrapper = Wrapper(optimizer)
    training = Training(model, wrapper)
    expected = [RIGHT, IDLE, RIGHT]
    assert expected == training.run(wrapper.step, nothing, wrapper.step)
    assert 'step' not in vars(optimizer)


class Lookahead(torch.optim.Optimizer):
    """Moves slow weights every other step, after the step of the fast ones."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.calls = optimizer, 0

    def step(self, closure=None):
        self.optimizer.step()
        self.calls += 1
        if self.calls % 2 == 0:
            for group in self.param_groups:
                for parameter in group['params']:
                    parameter.data.mul_(0.5)


def test_optimizer_inside_an_optimizer():
    """Both of them step, and it counts once."""
    model, optimizer = model_and()
    outer = Lookahead(optimizer)
    training = Training(model, outer)
    expected = [RIGHT, RIGHT, IDLE]
    assert expected == training.run(outer.step, outer.step, nothing)


def by_version(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1)


def by_data(model):
    for parameter in model.parameters():
        parameter.data.sub_(0.1)


def by_new_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data - 0.1


def one_small(model):
    model[0].bias.data[3] += 0.1


def one_large(model):
    model[1].weight.data[5, 5] += 0.1


def loaded(model):
    state = {k: v * 0.5 for k, v in model.state_dict().items()}
    model.load_state_dict(state)


WRITES = [by_version, by_data, by_new_data, one_small, one_large, loaded]


@pytest.mark.parametrize('write', WRITES)
@pytest.mark.parametrize('steps', [True, False])
def test_weights_that_no_optimizer_writes(write, steps):
    """Whoever writes to the weights, and how, it counts each time.

    So it does where an optimizer steps in other iterations.
    """
    model, optimizer = model_and()
    training = Training(model, *[optimizer] * steps)
    first = optimizer.step if steps else lambda: write(model)
    actions = [first, lambda: write(model), nothing] * 8
    assert [RIGHT, RIGHT, IDLE] * 8 == training.run(*actions)


@pytest.mark.parametrize('write', WRITES)
def test_optimizer_that_is_replaced(write):
    """What comes after an optimizer counts from its first iteration on."""
    model, optimizer = model_and()
    training = Training(model, optimizer)
    assert [RIGHT] * 20 == training.run(*[optimizer.step] * 20)
    training.optimizers = [object()]
    actions = [lambda: write(model)] * 20
    assert [RIGHT] * 20 == training.run(*actions)


def test_optimizer_that_nobody_knows():
    """An optimizer counts if it holds weights of the model, else not."""
    model, optimizer = model_and()
    other_model, other = model_and()
    training = Training(model)
    expected = [RIGHT, IDLE, RIGHT]
    assert expected == training.run(optimizer.step, other.step, optimizer.step)
    assert [TELLS_OF_STEPS, False, TELLS_OF_STEPS] == training.told
    assert other_model is not model


def test_writes_without_a_change():
    """Clamping what is in range is no step, after each of which it comes."""
    model, optimizer = model_and()

    @torch.no_grad()
    def clamp():
        for parameter in model.parameters():
            parameter.clamp_(-100, 100)

    actions = [clamp, clamp, optimizer.step] * 8
    expected = [IDLE, IDLE, RIGHT] * 8
    assert expected == Training(model, optimizer).run(*actions)


def test_changes_between_iterations():
    """What happens after the look belongs to the iteration before."""
    model, optimizer = model_and()
    training = Training(model, optimizer)
    for write in WRITES * 3:
        assert [RIGHT] == training.run(optimizer.step)
        write(model)
        assert [IDLE] == training.run(nothing)


def test_nan_that_stays_is_no_change():
    """Weights that are NaN and stand still do not change."""
    model, _ = model_and()
    with torch.no_grad():
        model[0].bias.fill_(float('nan'))
        model[1].weight.fill_(float('nan'))
    assert [IDLE] * 3 == [
        (seen, False) for seen, _ in Training(model).run(*[nothing] * 3)
    ]


@pytest.mark.parametrize('accumulation', [1, 4])
def test_known_steps_cost_no_reading(monkeypatch, accumulation):
    """An optimizer that has proved right is believed, as is a number."""
    model, optimizer = model_and()
    training = Training(model, optimizer, accumulation=accumulation)
    idle = accumulation - 1
    actions = [*[nothing] * idle, optimizer.step] * 12
    training.run(*actions)
    calls = []
    monkeypatch.setattr(
        steps, '_fingerprint', lambda parameters: calls.append(1) or []
    )
    assert [*[IDLE] * idle, RIGHT] * 12 == training.run(*actions)
    assert [] == calls


@pytest.mark.parametrize('write', WRITES)
def test_wrong_accumulation(write):
    """Weights that change more seldom than was said still count."""
    model, _ = model_and()
    training = Training(model, accumulation=2)
    actions = [nothing, nothing, nothing, lambda: write(model)] * 4
    assert [IDLE, IDLE, IDLE, RIGHT] * 4 == training.run(*actions)


def test_no_weights():
    """Without weights nothing ever counts."""
    training = Training(nn.Identity())
    assert [IDLE] == training.run(nothing)


def test_step_that_fails():
    """A step that raises before it changes anything does not count."""
    model, optimizer = model_and()

    def closure():
        raise ValueError('x')

    def failing():
        with pytest.raises(ValueError, match='x'):
            optimizer.step(closure)

    assert [IDLE] == Training(model, optimizer).run(failing)


def test_idle_iterations_are_counted():
    """``idle`` counts iterations without a change before this one."""
    model, optimizer = model_and()
    training, idle = Training(model, optimizer), []
    for action in (nothing, nothing, optimizer.step, nothing, nothing):
        training.run(action)
        idle.append(training.changes.idle)
    assert [0, 1, 2, 0, 1] == idle


@OLD
def test_before_step():
    """The call before a step comes before the weights change, every time."""
    model, optimizer = model_and()
    seen = []
    parameters = list(model.parameters())
    changes = WeightChanges(
        lambda: parameters,
        lambda: seen.append((parameters[1][0].item(), changes.heard)),
    )
    nn.init.zeros_(model[0].bias)
    for _ in range(2):
        changes.begin([optimizer])
        optimizer.step()
        assert changes.heard
    assert [(0.0, False), (pytest.approx(-0.1), False)] == seen
    changes.detach()
    optimizer.step()
    assert 2 == len(seen)


def test_writes_of_this_iteration():
    """``were_written`` tells whether anything wrote since the beginning."""
    model, optimizer = model_and()
    training = Training(model, optimizer)
    optimizer.step()
    training.changes.begin([optimizer])
    assert not training.changes.were_written()
    by_version(model)
    assert training.changes.were_written()


def hooks_of_all_optimizers():
    names = ('_global_optimizer_pre_hooks', '_global_optimizer_post_hooks')
    return [len(getattr(torch_optimizer, name, {})) for name in names]


def test_detach():
    """Afterwards torch and the optimizer are as they were."""
    steps._LISTENERS.clear()
    model, optimizer = model_and()
    attributes = set(vars(optimizer))
    training = Training(model, optimizer)
    training.run(optimizer.step)
    training.changes.detach()
    training.changes.detach()
    assert [0, 0] == hooks_of_all_optimizers()
    assert attributes == set(vars(optimizer))


def test_run_that_stops_leaves_nothing():
    """Without ``detach``, too, nothing is kept alive and nobody listens."""
    model, optimizer = model_and()
    training = Training(model, optimizer)
    training.run(optimizer.step)
    alive = weakref.ref(training)
    changes = weakref.ref(training.changes)
    del training
    gc.collect()
    assert alive() is changes() is None


@OLD
def test_run_that_is_collected_in_the_middle_of_a_step():
    """What an earlier run left may be freed while torch calls its hooks."""
    dropped = [WeightChanges(list, lambda: None) for _ in range(3)]
    model, optimizer = model_and()
    handle = optimizer.register_step_pre_hook(lambda *args: dropped.clear())

    def collect(*args):
        gc.collect()

    other = torch_optimizer.register_optimizer_step_pre_hook(collect)
    training = Training(model, optimizer)
    training.run(optimizer.step)
    handle.remove()
    other.remove()
    training.changes.detach()


GOOD, BAD = 1.0, float('inf')


def scaled(scaler, model, optimizer, value):
    """Return an iteration of mixed precision."""

    def iteration():
        optimizer.zero_grad()
        loss = (model(torch.ones(1, 2)) * value).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return iteration


def cpu_scaler():
    if not hasattr(torch, 'amp') or not hasattr(torch.amp, 'GradScaler'):
        pytest.skip('torch before 2.3 has no gradient scaler for the CPU')
    return torch.amp.GradScaler('cpu', init_scale=4.0)


@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize('options', [{}, dict(fused=True)])
def test_skipped_by_the_scaler(kind, options):
    """Steps that the gradient scaler skips do not count, early or late."""
    scaler = cpu_scaler()
    model, optimizer = make(kind, options)
    values = [BAD, GOOD, GOOD, BAD, BAD, GOOD, float('nan'), GOOD] * 3
    found = Training(model, optimizer).run(
        *[scaled(scaler, model, optimizer, value) for value in values]
    )
    assert [RIGHT if value == GOOD else IDLE for value in values] == found


@pytest.mark.parametrize('fused', [False, True])
def test_one_of_two_is_skipped(fused):
    """Of two optimizers the one that is not skipped counts."""
    scaler = cpu_scaler()
    pairs = [make(torch.optim.SGD, dict(fused=fused)) for _ in range(2)]
    model = nn.ModuleList(m for m, _ in pairs)
    training = Training(model, *(o for _, o in pairs))
    for bad in (0, 1):
        both = [
            scaled(scaler, *pair, BAD if i == bad else GOOD)
            for i, pair in enumerate(pairs)
        ]
        assert [RIGHT] == training.run(lambda both=both: [f() for f in both])


@pytest.mark.parametrize('known', [True, False])
@pytest.mark.parametrize('counts', [1, 2, 3])
def test_accumulation(counts, known):
    """Micro-batches do not count, steps do, as does what is left over."""
    model, optimizer = model_and()
    training = Training(model, optimizer, accumulation=counts if known else 1)
    numbers = itertools.count(1)

    def iteration():
        model(torch.ones(1, 2)).sum().backward()
        number = next(numbers)
        if number % counts == 0 or number == 19:
            optimizer.step()
            optimizer.zero_grad()

    expected = [n % counts == 0 or n == 19 for n in range(1, 20)]
    found = training.run(*[iteration] * 19)
    assert [(changed, changed) for changed in expected] == found
