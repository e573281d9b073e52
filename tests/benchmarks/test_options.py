"""The command line says in one line what is wrong."""

import pytest
import torch

from benchmarks.options import parse
from benchmarks.plan import MODELS, PARTS


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        parse(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_everything_is_measured_by_default():
    """Without words all parts and models are measured."""
    wishes = parse([]).wishes

    assert (tuple(PARTS), MODELS) == (wishes.parts, wishes.models)
    assert not wishes.quick


def test_words_are_taken_in():
    """Parts come in the order of the tables, however they are asked for."""
    options = parse(['--only', 'swap,update', '--threads', '2,1,2', '--quick'])

    assert ('update', 'swap') == options.wishes.parts
    assert (1, 2) == options.wishes.threads
    assert options.wishes.quick


@pytest.mark.parametrize(
    ('words', 'named'),
    [
        (('--only', 'updates'), ('updates', 'update, tensors')),
        (('--models', 'yolo'), ('yolo', 'rtmdet-tiny, yolox-s')),
        (('--threads', '0'), ("'0'", 'such as 1,2')),
        (('--threads', 'two'), ("'two'", 'such as 1,2')),
        (('--device', 'tpu'), ('tpu', "'cpu', 'cuda'")),
        (('--fast',), ('--fast', '--help')),
    ],
)
def test_wrong_word_is_named_with_what_there_is(capsys, words, named):
    """One line has the word, what is allowed and where to read more."""
    line = refused(capsys, *words)

    assert all(part in line for part in named)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_gpu_that_is_not_there_is_refused(capsys):
    """``--device cuda`` needs a GPU that torch can use."""
    assert 'torch sees no GPU' in refused(capsys, '--device', 'cuda')


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_the_cpu_is_measured():
    """The default is what is there."""
    assert ('cpu',) == parse([]).wishes.devices
