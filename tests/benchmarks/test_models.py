"""The tensors of the benchmark are those of mmdet's own models."""

import pytest
import torch

from benchmarks import models, retinanet


@pytest.mark.parametrize('name', models.SHAPES)
def test_tensors_are_those_of_the_real_model(name):
    """Names, shapes, dtypes, kinds and ties are those of mmdet's model."""
    pytest.importorskip('mmdet')

    expected = list(models.rows_of(models.build_real(name)))

    assert expected == models.SHAPES[name]
    # modules are made in another order
    assert sorted(expected) == sorted(models.rows_of(models.build(name)))


def test_plain_retinanet_trains_every_weight():
    """Every trained weight gets a gradient, and all are finite."""
    model = models.build('retinanet-r50')
    tensors = model.state_dict(keep_vars=True)

    retinanet.forward(tensors, torch.rand(1, 3, 64, 64)).backward()

    for parameter in model.parameters():
        assert parameter.requires_grad == (parameter.grad is not None)
        assert parameter.grad is None or parameter.grad.isfinite().all()
