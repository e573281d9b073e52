"""What is averaged, copied, shared or left, and what is tied."""

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, prune

from mmdet_ema.averaging import OptionError, WeightAverager
from mmdet_ema.averaging.tensors import Role, count_roles, select, unmatched
from tests.averaging.models import Mixed, Unsaved, holder, state_of
from tests.averaging.trees import memory_of, trees

BAD = float('nan')


def names_of(entries):
    """Return the names of each entry, unsaved ones in brackets."""
    return [
        tuple(x if x in entry.saved else f'({x})' for x in entry.names)
        for entry in entries
    ]


def roles_of(model, **options):
    """Return the role of every name."""
    return {
        name: entry.role.value
        for entry in select(model, **options)
        for name in entry.names
    }


def test_roles():
    """Parameters and float buffers are averaged, integers are copied."""
    expected = dict.fromkeys(state_of(Mixed()), 'averaged')
    expected['norm.num_batches_tracked'] = 'copied'
    expected['counts'] = expected['mask'] = 'copied'
    expected['frozen.weight'] = expected['frozen.bias'] = 'shared'
    assert expected == roles_of(Mixed())


def test_roles_without_buffers():
    """``update_buffers=False`` copies float buffers too."""
    copied = {
        name
        for name, role in roles_of(Mixed(), update_buffers=False).items()
        if role == 'copied'
    }
    assert copied == {
        'float_buffer',
        'counts',
        'mask',
        'norm.running_mean',
        'norm.running_var',
        'norm.num_batches_tracked',
    }


def test_order():
    """Entries come in the order of the ``state_dict``."""
    model = Mixed()
    firsts = [entry.name for entry in select(model)]
    order = [n for n in model.state_dict() if n != 'tied.weight']
    assert order == firsts


def test_nothing_changes():
    """Selecting neither copies nor changes the model's tensors."""
    model = Mixed()
    before = state_of(model)
    pointers = [t.data_ptr() for t in model.state_dict().values()]
    entries = select(model)
    after = model.state_dict()
    assert pointers == [t.data_ptr() for t in after.values()]
    assert all(torch.equal(before[k], after[k]) for k in before)
    raws = {id(entry.raw) for entry in entries}
    assert all(id(p) in raws for p in model.parameters())


def test_same_object():
    """One parameter under several names is one entry."""
    shared = nn.Parameter(torch.ones(3))
    model = nn.Module()
    model.a, model.b, model.c = holder(w=shared), holder(w=shared), holder()
    model.c.again = shared
    assert [('a.w', 'b.w', 'c.again')] == names_of(select(model))


def test_same_data():
    """Two parameters over one storage are one entry with both owners."""
    first = nn.Parameter(torch.ones(3), requires_grad=False)
    second = nn.Parameter(torch.ones(3))
    second.data = first.data
    (entry,) = select(holder(a=first, b=second))
    assert (first, second) == entry.parameters
    assert entry.raw is second
    assert Role.AVERAGED is entry.role


def test_buffer_tied_to_a_parameter():
    """A buffer over a parameter's memory is part of its entry."""
    weight = nn.Parameter(torch.ones(2, 2))
    model = holder(view=weight.detach(), weight=weight)
    (entry,) = select(model)
    assert Role.AVERAGED is entry.role
    assert {'view', 'weight'} == set(entry.names)
    weight.requires_grad_(False)
    assert Role.SHARED is select(model)[0].role


@pytest.mark.parametrize(
    'view',
    [
        lambda flat: flat[3:9],
        lambda flat: flat.view(2, 6),
        lambda flat: flat[::2],
        lambda flat: flat.view(3, 4).t(),
        lambda flat: flat.view(torch.int32)[2:5],
    ],
)
def test_tensors_that_overlap_in_part(view):
    """They are refused in one line with both names, before any change."""
    flat = torch.arange(12.0)
    model = holder(
        left=nn.Parameter(flat), other=torch.ones(3), right=view(flat)
    )
    with pytest.raises(OptionError, match=r'^left and right share') as error:
        WeightAverager(model)
    assert '\n' not in str(error.value)
    # what nobody trains and no average is put into may overlap
    model = holder(
        left=nn.Parameter(flat, requires_grad=False),
        right=nn.Parameter(flat[3:9], requires_grad=False),
    )
    assert {'shared'} == set(roles_of(model).values())


@pytest.mark.parametrize(
    'repeated',
    [
        torch.tensor([[1.0], [2.0]]).expand(2, 1000),
        torch.arange(6.0).unfold(0, 3, 1),
        nn.Parameter(torch.ones(1).expand(3)),
    ],
)
def test_tensor_that_repeats_its_memory(repeated):
    """Nothing can write into it: it is its own average, trained or not."""
    model = holder(x=repeated, w=nn.Parameter(torch.ones(2)))
    averager = WeightAverager(model)
    averager.update()
    with averager.applied():
        assert torch.equal(repeated, model.x)
    assert torch.equal(repeated, dict(averager.named_averages())['x'])
    assert 8 == averager.counts()['bytes']


ODD = {
    'coo': lambda: torch.eye(3).to_sparse(),
    'csr': lambda: torch.eye(3).to_sparse_csr(),
    'quantized': lambda: torch.quantize_per_tensor(
        torch.ones(3), 0.5, 0, torch.qint8
    ),
    'conjugate': lambda: torch.ones(3, dtype=torch.cfloat).conj(),
    'negative': lambda: torch.ones(3, dtype=torch.cfloat).conj().imag,
}


@pytest.mark.parametrize('kind', ODD)
@pytest.mark.parametrize('parameter', [True, False])
@pytest.mark.filterwarnings('ignore:Sparse CSR:UserWarning')
def test_tensor_that_is_not_plain(kind, parameter):
    """Sparse ones and the like are their own averages; nobody trains them."""
    odd = ODD[kind]()
    if parameter:
        odd = nn.Parameter(odd, requires_grad=False)
    model = holder(x=odd, w=nn.Parameter(torch.ones(2)))
    assert dict(x='shared', w='averaged') == roles_of(model)
    averager = WeightAverager(model)
    averager.update()
    with averager.applied():
        assert model.x is odd
    assert torch.Size([3]) == dict(averager.named_averages())['x'].shape[:1]
    assert 8 == averager.counts()['bytes']
    averager.load_state_dict(averager.state_dict())


def test_sparse_tensor_that_is_trained():
    """It is refused by name."""
    model = holder(x=nn.Parameter(ODD['coo']()))
    with pytest.raises(ValueError, match='x is trained and sparse'):
        select(model)


def test_slices_of_one_flat_buffer():
    """Slices that do not overlap are tensors of their own."""
    flat = torch.zeros(10)
    model = holder(
        a=nn.Parameter(flat[:4]),
        b=nn.Parameter(flat[4:7].view(3, 1), requires_grad=False),
        c=flat[7:],
    )
    assert [('a',), ('b',), ('c',)] == names_of(select(model))
    assert ['averaged', 'shared', 'averaged'] == [
        entry.role.value for entry in select(model)
    ]


def test_gap_between_columns():
    """Columns of one matrix overlap nowhere, and what is between is nothing.

    NaN there is no bad step, and no reason to copy a buffer.
    """
    matrix = torch.full((4, 3), BAD)
    matrix[:, :2] = 1
    model = holder(a=nn.Parameter(matrix[:, 0]), b=nn.Parameter(matrix[:, 1]))
    assert WeightAverager(model).update()
    buffers = holder(a=matrix[:, 0], b=matrix[:, 1])
    assert {'averaged'} == set(roles_of(buffers).values())


def test_non_persistent_buffers():
    """Buffers that are not saved are left alone."""
    model = nn.Module()
    model.register_buffer('kept', torch.ones(2))
    model.register_buffer('left', torch.ones(2), persistent=False)
    assert [('kept',)] == names_of(select(model))


@pytest.mark.parametrize('bad', [BAD, float('inf'), float('-inf')])
def test_buffer_with_inf(bad):
    """A float buffer with NaN or Inf is copied and never a bad step."""
    model = holder(
        mask=torch.tensor([0.0, bad]), w=nn.Parameter(torch.ones(1))
    )
    assert dict(mask='copied', w='averaged') == roles_of(model)
    assert WeightAverager(model).update()


def test_complex_tensors():
    """They are averaged, too."""
    phase = torch.ones(1, dtype=torch.complex64)
    model = holder(phase=nn.Parameter(phase), mean=phase.clone())
    assert {'averaged'} == set(roles_of(model).values())


def copied_floats(model, **options):
    """Names of the float tensors that are copied."""
    return {
        entry.name
        for entry in select(model, **options)
        if entry.role is Role.COPIED and entry.raw.is_floating_point()
    }


def quantized():
    """A layer with observers of weights and activations."""
    layer = nn.Sequential(nn.Linear(3, 2)).train()
    layer.qconfig = quantization.get_default_qat_qconfig('x86')
    return quantization.prepare_qat(layer)


MEANLESS = {
    'spectral norm': (
        lambda: parametrizations.spectral_norm(nn.Linear(3, 2)),
        {'parametrizations.weight.0._u', 'parametrizations.weight.0._v'},
    ),
    'old spectral norm': (
        lambda: nn.utils.spectral_norm(nn.Linear(3, 2)),
        {'weight_u', 'weight_v'},
    ),
    'orthogonal': (
        lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
        {'parametrizations.weight.0.base'},
    ),
    'weight norm': (lambda: nn.utils.weight_norm(nn.Linear(3, 2)), set()),
    'pruned': (
        lambda: prune.l1_unstructured(nn.Linear(3, 2), 'weight', 2),
        {'weight_mask'},
    ),
    'pruned twice': (
        lambda: prune.random_structured(
            prune.l1_unstructured(nn.Linear(3, 2), 'weight', 2), 'weight', 1, 1
        ),
        {'weight_mask'},
    ),
    'norm': (lambda: nn.BatchNorm2d(3), set()),
}


@pytest.mark.parametrize('kind', MEANLESS)
@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_buffers_without_a_mean_are_copied(kind):
    """Unit vectors and masks are copied; the weights beside are averaged."""
    make, expected = MEANLESS[kind]
    assert expected == copied_floats(make())
    prefixed = nn.ModuleDict(dict(layer=make()))
    assert {f'layer.{name}' for name in expected} == copied_floats(prefixed)
    roles = roles_of(make())
    assert all(
        'averaged' == roles[name] for name, _ in make().named_parameters()
    )


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_observers_are_copied():
    """Ranges and scales of quantization are copied, not averaged."""
    model = quantized()
    floats = {n for n, x in model.named_buffers() if x.is_floating_point()}
    # some versions of torch do not save eps
    saved = floats & model.state_dict().keys()
    assert len(saved) >= 6
    assert saved == copied_floats(model)


def test_named_tensors_are_copied():
    """``copied`` takes patterns of names, of parameters too."""
    model = nn.ModuleDict(dict(a=nn.BatchNorm1d(2), b=nn.BatchNorm1d(2)))
    model.register_buffer('queue', torch.ones(3))
    found = copied_floats(model, copied=['queue', 'a.running_*', '*.bias'])
    expected = {'queue', 'a.running_mean', 'a.running_var', 'a.bias', 'b.bias'}
    assert expected == found
    assert ['c.*'] == unmatched(select(model), ['a.*', 'c.*', 'queue'])


@pytest.mark.parametrize(
    ('layer', 'name'),
    [
        (lambda: nn.LazyLinear(3), '1.weight'),
        (lambda: nn.LazyBatchNorm1d(), '1.weight'),
    ],
)
def test_lazy_modules(layer, name):
    """A parameter without a shape is refused by name, with the remedy."""
    model = nn.Sequential(nn.Linear(2, 4), layer())
    with pytest.raises(ValueError, match='one forward pass') as error:
        select(model)
    assert f'{name} has no shape yet' in str(error.value)
    model(torch.ones(2, 2))
    assert '1.weight' in roles_of(model)


class WithExtraState(nn.Linear):
    """Saves something that is neither parameter nor buffer."""

    def __init__(self, extra):
        super().__init__(1, 1)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize('extra', [{'scale': 3}, 'x', None, torch.ones(3)])
def test_extra_state(extra):
    """Extra state of a module is left alone."""
    expected = [('weight',), ('bias',)]
    assert expected == names_of(select(WithExtraState(extra)))


class Renamed(nn.Linear):
    """Saves its weight under another name."""

    def __init__(self):
        super().__init__(2, 2)
        self._register_state_dict_hook(self._rename)

    @staticmethod
    def _rename(module, state, prefix, metadata):
        state[prefix + 'kernel'] = state.pop(prefix + 'weight')


def test_state_dict_hook_that_renames():
    """A tensor has the name under which it is saved."""
    model = nn.Sequential(Renamed())
    entries = select(model)
    assert [('0.bias',), ('0.kernel',)] == names_of(entries)
    assert entries[1].raw is model[0].weight


def test_parameter_that_is_not_saved():
    """A parameter that is not saved is averaged all the same."""
    model = nn.Sequential(Unsaved())
    entries = select(model)
    expected = [('0.bias',), ('0.x',), ('(0.weight)',)]
    assert expected == names_of(entries)
    assert Role.AVERAGED is entries[2].role


class Converted(nn.Linear):
    """Saves something made of its weight."""

    def __init__(self, convert):
        super().__init__(2, 2)
        self.convert = convert
        self._register_state_dict_hook(self._convert)

    @staticmethod
    def _convert(module, state, prefix, metadata):
        weight = state[prefix + 'weight'].detach()
        state[prefix + 'weight'] = module.convert(weight)


@pytest.mark.parametrize(
    'copy', [torch.clone, torch.Tensor.half, torch.Tensor.double]
)
def test_state_dict_hook_that_copies(copy):
    """A copy stands for the model's own tensor, under all of its names."""
    model = nn.ModuleList([Converted(copy), Converted(copy)])
    with torch.no_grad():
        model[0].weight[0, 0] = float('nan')
    model[1].weight = model[0].weight
    entries = select(model)
    expected = [('0.weight', '1.weight'), ('0.bias',), ('1.bias',)]
    assert sorted(expected) == sorted(names_of(entries))
    live = {t.data_ptr() for t in model.parameters()}
    assert live == {entry.raw.data_ptr() for entry in entries}


def test_state_dict_hook_that_computes():
    """Other values that a hook puts there are no live tensor."""
    model = Converted(lambda weight: weight * 2)
    entries = select(model)
    assert [('bias',), ('(weight)',)] == names_of(entries)
    assert entries[1].raw is model.weight


def test_empty_model():
    """A model without tensors has no entries."""
    assert [] == select(nn.Sequential(nn.ReLU()))


def test_counts():
    """Counts a role, and bytes, are those of the tensors that change."""
    model = Mixed()
    state = model.state_dict()
    size = 0
    for name, value in state.items():
        frozen = name.startswith('frozen') or name == 'tied.weight'
        width = 4 if value.dtype == torch.bfloat16 else value.element_size()
        size += 0 if frozen else value.numel() * width
    expected = dict(averaged=11, copied=3, shared=2, bytes=size)
    assert expected == count_roles(select(model))


@settings(max_examples=300, deadline=None)
@given(model=trees())
def test_random_trees(model):
    """Every saved name appears once, sees its tensor, and no byte is twice."""
    state = model.state_dict(keep_vars=True)
    entries = select(model)
    saved = [(e.raw, name) for e in entries for name in e.saved]
    assert sorted(state) == sorted(name for _, name in saved)
    for raw, name in saved:
        assert torch.equal(state[name].detach(), raw.detach())
        if raw.numel():
            assert state[name].data_ptr() == raw.data_ptr()
    spans = [memory_of(entry.raw) for entry in entries]
    assert sum(map(len, spans)) == len(set().union(*spans))
    owned = set().union(*(memory_of(t) for t in state.values()))
    assert owned <= set().union(*spans)


@settings(max_examples=200, deadline=None)
@given(model=trees())
def test_random_roles(model):
    """What shares memory with a trainable parameter is averaged."""
    state = model.state_dict(keep_vars=True)
    parameters = [t for t in state.values() if isinstance(t, nn.Parameter)]
    trained = [t for t in parameters if t.requires_grad]
    moving = set().union(*map(memory_of, trained)) if trained else set()
    roles = roles_of(model)
    for name, tensor in state.items():
        if memory_of(tensor) & moving:
            assert 'averaged' == roles[name]
        elif not tensor.is_floating_point():
            assert 'copied' == roles[name]
