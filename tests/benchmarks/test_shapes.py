"""The tensors of the benchmark are those of mmdet's own models."""

from collections import Counter

import pytest
import torch

from benchmarks.modules import build_module
from benchmarks.retinanet import RetinaNet
from benchmarks.shapes import float_bytes, read_shapes, records_of

MODELS = ('rtmdet-tiny', 'yolox-s', 'retinanet-r50', 'swin-l')


@pytest.fixture(scope='module')
def theirs():
    pytest.importorskip('mmdet')
    from benchmarks.write_shapes import build_models

    return build_models()


@pytest.mark.parametrize('name', MODELS)
def test_file_lists_every_tensor_of_the_model(theirs, name):
    """shapes.json says of each tensor what mmdet's model says."""
    from benchmarks.write_shapes import describe

    assert describe(theirs[name]) == read_shapes()[name]


@pytest.mark.parametrize('name', MODELS)
def test_rebuilt_module_has_the_tensors_of_the_model(theirs, name):
    """Names, order, shapes, dtypes, kinds and ties are those of mmdet."""
    rebuilt = build_module(records_of(name))

    assert facts(theirs[name]) == facts(rebuilt)


@pytest.mark.parametrize('name', MODELS)
def test_rebuilt_module_has_the_norms_of_the_model(theirs, name):
    """BatchNorm is a BatchNorm again: an average may treat it apart."""
    rebuilt = build_module(records_of(name))

    assert norms(theirs[name]) == norms(rebuilt)


def test_plain_retinanet_has_the_weights_of_mmdets():
    """Shapes and what is frozen are the same; names differ."""
    expected = Counter(
        (record.shape, record.kind == 'parameter')
        for record in read_shapes()['retinanet-r50']
        if record.kind in ('parameter', 'frozen')
    )

    found = Counter(
        (tuple(p.shape), p.requires_grad) for p in RetinaNet().parameters()
    )

    assert expected == found


def test_toy_has_a_thousand_tensors():
    """The toy is 1,000 float32 tensors of 1 KiB, in nested modules."""
    toy = build_module(records_of('toy-1000'))

    assert 1000 == len(list(toy.parameters()))
    assert 1000 * 1024 == float_bytes(records_of('toy-1000'))


def test_size_is_read_from_the_name():
    """``<tensors>x<bytes>`` is so many tensors of so many bytes in all."""
    records = records_of('3x3072')

    assert [(256,)] * 3 == [record.shape for record in records]


def test_values_are_the_same_at_every_call():
    """Two modules of the same records hold the same values."""
    left, right = (build_module(records_of('3x3072')) for _ in range(2))

    for a, b in zip(left.parameters(), right.parameters()):
        assert torch.equal(a, b)
        assert a.abs().min() > 0


def facts(model):
    named = dict(
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    )
    first = {}
    return {
        name: (
            tuple(tensor.shape),
            tensor.dtype,
            tensor.requires_grad,
            name in model.state_dict(),
            first.setdefault(id(tensor), name),
        )
        for name, tensor in sorted(named.items())
    }


def norms(model):
    kinds = torch.nn.modules.batchnorm._BatchNorm
    return {n for n, m in model.named_modules() if isinstance(m, kinds)}
