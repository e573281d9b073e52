"""Golden files of every format: roles, n, values; into other formats and back.

What is expected was in the memory of the writer: ``golden/README.md``.
"""

import json
import os
import shutil

import pytest
import torch

from mmdet_ema.checkpoint.contents import read_contents
from mmdet_ema.checkpoint.convert import convert
from mmdet_ema.checkpoint.formats import FORMATS
from mmdet_ema.errors import CheckpointError
from tests.checkpoint.golden.small import EXPECTED, HERE

GOLDEN = json.loads(EXPECTED.read_text())
HALVES = [f for f, known in GOLDEN.items() if known.get('raw')]
WRITTEN = [name for name, form in FORMATS.items() if form.write]
# mmdet 2's hooks keep the counter of the start; it is read as in the model
COUNTER = 'norm.num_batches_tracked'
STATISTICS = {'norm.running_mean', 'norm.running_var', COUNTER}
ONE_SET = {'averaged-model', 'plain', 'yolox'}
WITHOUT_N = {'d2go', 'deit', 'plain', 'timm', 'yolox'}


def lists(weights):
    return {
        name: tensor.double().reshape(-1).tolist()
        for name, tensor in weights.tensors.items()
    }


def same_lists(found, expected):
    assert found.keys() == expected.keys()
    wrong = [k for k in found if found[k] != expected[k] and k != COUNTER]
    assert wrong == []


@pytest.mark.parametrize('file', GOLDEN)
def test_format_roles_and_n(file):
    """Each is recognised, and its halves are what they were in memory."""
    known = GOLDEN[file]
    contents = read_contents(str(HERE / file))
    assert contents.format == known['format']
    for half in ('raw', 'ema'):
        if known.get(half) is not None:
            same_lists(lists(contents.sets[half]), known[half])
            expected = 'raw' if half == 'raw' else 'average'
            assert contents.sets[half].role == expected
    if known.get('ema') is not None:
        assert contents.sets['ema'].updates == known['n']
    else:
        assert [x.role for x in contents.sets.values()] == ['unknown']
    assert all(x.evidence for x in contents.sets.values())


@pytest.mark.parametrize('file', [*HALVES, 'plain.safetensors'])
def test_tied_names_share_one_tensor(file):
    """Where they do in the file, also if it keeps one of the names only."""
    for weights in read_contents(str(HERE / file)).sets.values():
        tied, first = (
            next(x for k, x in weights.tensors.items() if k.endswith(name))
            for name in ('tied.weight', 'first.weight')
        )
        # the hooks of mmcv and mmdet 2 make one tensor two
        if not file.startswith(('mmcv1', 'mmdet2')):
            assert tied is first


@pytest.mark.parametrize(
    'file', ['mmcv1_iter_7.pth', 'mmdet2_iter_7.pth', 'bevdet_epoch_1.pth']
)
def test_link_to_the_latest_file(file, tmp_path):
    """One of mmcv; the name of the file itself tells the roles."""
    for path in HERE.glob(file.replace('.pth', '*')):
        shutil.copy(path, tmp_path)
    link = tmp_path / 'latest.pth'
    link.symlink_to(file)
    expected, found = (
        read_contents(str(tmp_path / x)) for x in (file, link.name)
    )
    assert found.format == expected.format
    assert found.notes == expected.notes
    assert [*found.sets] == [*expected.sets]
    for name, weights in expected.sets.items():
        assert found.sets[name].updates == weights.updates
        same_lists(lists(found.sets[name]), lists(weights))


def test_further_averages_have_their_own_schedule():
    """A file of several averages, with what each was made by."""
    contents = read_contents(str(HERE / 'mmdet_ema.pth'))
    main = contents.sets['ema'].schedule
    assert main == 'exponential(decay=0.9, tau=3.0)'
    fast = contents.sets['fast']
    assert fast.schedule == 'exponential(decay=0.5, tau=1.0)'
    assert (fast.updates, fast.steps) == (7, 7)
    assert 0.45 < fast.build_schedule()(7) < 0.5


@pytest.mark.parametrize('to', WRITTEN)
@pytest.mark.parametrize('file', HALVES)
def test_there_and_back(file, to, tmp_path):
    """Through every format: what it can hold comes back, bit for bit."""
    source = tmp_path / file
    shutil.copy(HERE / file, source)
    if file.startswith('bevdet'):
        for other in ('bevdet_epoch_1.pth', 'bevdet_epoch_1_ema.pth'):
            shutil.copy(HERE / other, tmp_path / other)
    before = read_contents(str(source))
    there = str(tmp_path / 'there_epoch_7.pth')
    done = convert(str(source), there, to)
    found = read_contents(there)
    assert found.format == to
    main = before.choose()
    kept = set(found.sets)
    if to in ONE_SET:
        assert kept == {'ema'}
        assert any('weights raw' in words for words in done.lost)
    else:
        assert {'raw', main} <= kept
    n = before.sets[main].updates
    if to in WITHOUT_N:
        said = any(words.startswith('n,') for words in done.lost)
        assert said or to == 'plain' or n is None
    elif n is not None:
        assert found.sets[found.choose()].updates == n
    same_weights(before, found, 'ema', to)
    if to in ONE_SET:
        return
    same_weights(before, found, 'raw', to)
    home = before.format
    back = str(tmp_path / 'home' / os.path.basename(file))
    os.mkdir(tmp_path / 'home')
    if home == 'bevdet':
        back = str(tmp_path / 'home' / 'epoch_1.pth')
    convert(there, back, home)
    again = read_contents(back)
    assert again.format == home
    for half in ('raw', 'ema'):
        same_weights(before, again, half, {to, home})
    if home not in WITHOUT_N and to not in WITHOUT_N:
        assert again.sets['ema'].updates == n


def same_weights(before, after, half, through):
    """Compare by value; mmcv's own hook averages no statistics."""
    ours, theirs = (lists(x.sets[half]) for x in (before, after))
    through = {through} if isinstance(through, str) else through
    left = STATISTICS if 'mmcv1' in through and half == 'ema' else {COUNTER}
    assert ours.keys() == theirs.keys()
    names = [k for k in ours if k not in left and k not in _with(left)]
    assert [k for k in names if ours[k] != theirs[k]] == []


def _with(names):
    return {f'model.{name}' for name in names}  # of a LightningModule


def test_files_of_mmengine_keep_the_rest(tmp_path):
    """Optimizer and meta mean the same there; histories are said to go."""
    out = str(tmp_path / 'a.pth')
    done = convert(str(HERE / 'mmengine.pth'), out, 'mmdet_ema')
    content = torch.load(out, map_location='cpu')
    assert content['optimizer']['state'][0]['momentum_buffer'].shape == (3, 3)
    assert content['meta']['iter'] == 7
    assert any('message_hub' in words for words in done.lost)


def test_an_average_without_raw_weights_is_no_file_of_both(tmp_path):
    """What a format needs and the file has not is said before it is made."""
    out = tmp_path / 'a.pth'
    with pytest.raises(CheckpointError, match='needs raw weights and av'):
        convert(str(HERE / 'yolox.pth'), str(out), 'mmengine')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('file', 'message'),
    [
        ('refused_yolov5.pt', r'classes of YOLOv5.*state_dict\(\)'),
        ('refused_code.pth', "asks for '.*open'.*nothing of the file was run"),
    ],
)
def test_what_would_run_code_is_refused(file, message, tmp_path, monkeypatch):
    """In one line, with what to do; nothing is run."""
    path = str(HERE / file)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        read_contents(path)
    assert '\n' not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_unsafe_reads_pickled_modules(tmp_path):
    """YOLOv5's layout, where its classes can be imported."""
    torch.manual_seed(0)
    model, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    path = tmp_path / 'a.pt'
    torch.save(dict(model=model, ema=ema, updates=9, epoch=0), path)
    with pytest.raises(CheckpointError):
        read_contents(str(path))
    contents = read_contents(str(path), unsafe=True)
    assert contents.sets['ema'].updates == 9
    assert torch.equal(contents.sets['ema'].tensors['weight'], ema.weight)
    assert torch.equal(contents.sets['raw'].tensors['weight'], model.weight)


def _averaged(model):
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    return averaged.state_dict()


@pytest.mark.parametrize(
    ('keys', 'n'),
    [
        (('params', 'params_ema'), None),  # BasicSR
        ((None, 'params_ema'), None),  # Real-ESRGAN
        (('model', 'ema_model'), None),  # DINO-DETR
        (('model', 'ema'), None),  # DiT
        (('model', 'ema.module'), None),  # RT-DETR, without its updates
        ((None, 'ema.module'), None),  # RT-DETR's published files
        (('state_dict', 'ema_state_dict'), None),
        (('net_g', 'net_g_ema'), None),  # beside another network
        (('model_state_dict', 'swa_model'), 1),  # torch's AveragedModel
    ],
)
def test_a_key_tells_which_are_the_averages(keys, n, tmp_path):
    """Of files of any project; without it the raw weights were taken."""
    model = torch.nn.Linear(2, 2)
    raw, average = (
        {k: x + i for k, x in model.state_dict().items()} for i in (0, 1)
    )
    path = tmp_path / 'a.pth'
    content = {'epoch': 3, 'scaler': {'scale': 1.0}, 'args': {'ema': True}}
    content['meta'] = {'CLASSES': ('a', 'b')}
    content.update({'net_d': {'x': raw['bias']}} if 'net_g' in keys else {})
    content.update({} if keys[0] is None else {keys[0]: raw})
    first, *inner = keys[1].split('.')
    held = average
    if n is not None:
        model.load_state_dict(average)
        held = _averaged(model)
    content[first] = {inner[0]: held} if inner else held
    torch.save(content, path)
    contents = read_contents(str(path))
    assert contents.choose() == 'ema'
    assert contents.meta == content['meta']
    ema = contents.sets['ema']
    assert (ema.role, ema.updates) == ('average', n)
    assert f'the key {keys[1]}' in ema.evidence
    same_lists(
        lists(ema), {k: x.reshape(-1).tolist() for k, x in average.items()}
    )
    if keys[0] is None:
        assert contents.raw is None
    else:
        found = lists(contents.raw)
        same_lists(found, {k: x.reshape(-1).tolist() for k, x in raw.items()})


@pytest.mark.parametrize(
    'others',
    [
        {'ema': {'shadow_params': [torch.ones(1)], 'decay': 0.9}},
        {'ema': {'0.99': {'a': torch.ones(1)}, '0.9': {'a': torch.ones(1)}}},
        {'ema_1': {'a': torch.ones(1)}, 'ema_2': {'a': torch.ones(1)}},
        {'ema_state_dict': {'shadow_params': [torch.ones(1)]}},
    ],
)
def test_averages_that_are_not_read_are_said(others, tmp_path):
    """What is read instead may not be what was asked for."""
    path = tmp_path / 'a.pth'
    torch.save({'model': {'a': torch.zeros(1)}, **others}, path)
    contents = read_contents(str(path))
    assert contents.format == 'plain'
    assert [x.split()[1] for x in contents.notes] == [*others]


@pytest.mark.parametrize(
    'others',
    [
        {'grad_ema': {'a': torch.ones(1)}},  # Grokfast's
        {'ema_optimizer': {'a': torch.ones(1)}},
        {'ema_loss': {'a': torch.ones(1)}},
        {'ema': {'a': torch.ones(2, 3)}},
    ],
)
def test_averages_of_something_else(others, tmp_path):
    """They are not taken for weights."""
    path = tmp_path / 'a.pth'
    torch.save({'model': {'a': torch.zeros(1)}, **others}, path)
    contents = read_contents(str(path))
    assert contents.format == 'plain'
    assert [0] == contents.sets[contents.choose()].tensors['a'].tolist()


def test_averages_of_a_part_of_the_model(tmp_path):
    """They are not filled up with raw weights of other names."""
    path = tmp_path / 'a.pth'
    raw, average = {'head.a': torch.zeros(1)}, {'a': torch.ones(1)}
    torch.save({'state_dict': raw, 'state_dict_ema': average}, path)
    contents = read_contents(str(path))
    assert [*contents.sets['ema'].tensors] == ['a']
    assert any('names that no raw weights have' in x for x in contents.notes)


def test_names_that_wrappers_make_one_are_refused(tmp_path):
    """None of the two is lost in silence."""
    path = tmp_path / 'a.pth'
    names = ('module.a', 'module._orig_mod.a')
    torch.save({'state_dict': {x: torch.zeros(1) for x in names}}, path)
    with pytest.raises(CheckpointError, match="two tensors named 'a'"):
        read_contents(str(path))


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ({}, 'no weights in a place that is known .its keys: none'),
        ({'a': 1, 'b': {}}, "its keys: 'a', 'b'"),
        ({'ema_state_dict': {}}, "has no 'steps'"),
        ({'state_dict': {'a': torch.zeros(2).to_sparse()}}, 'sparse'),
        (
            {
                'model': {
                    'a': torch.quantize_per_tensor(
                        torch.zeros(2), 0.1, 0, torch.qint8
                    )
                }
            },
            'sparse or quantized',
        ),
        (
            {'state_dict': {'a': torch.zeros(1)}, 'ema_meta': 3},
            "has no 'steps'",
        ),
    ],
)
def test_other_files_are_refused_in_one_line(content, message, tmp_path):
    """With what is in them instead."""
    path = tmp_path / 'a.pth'
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        read_contents(str(path))
