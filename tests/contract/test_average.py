"""Averages made of the files of a run are those that it could have tracked."""

import numpy as np
import pytest
import torch

from mmdet_ema import CheckpointError
from mmdet_ema.checkpoint.average import average
from mmdet_ema.checkpoint.combination import read_files
from mmdet_ema.checkpoint.profiles import parse_profile
from mmdet_ema.checkpoint.runs import Run as Files
from mmdet_ema.checkpoint.windows import since_restart
from mmdet_ema.cli.main import main
from tests.contract.test_several import more_of
from tests.contract.toy import EMA, STATISTICS, Run, ToyModel

KEEPS = dict(type='EMAHook', decay=0.97, tau=5, posthoc=True)
# raw weights do not depend on what is averaged: another run tracks these
TRACKED = {
    'exact': dict(decay=0.97, tau=5),
    'fast': dict(decay=0.7, tau=1.25),
    'other': dict(decay=0.9, tau=3),
    'inverse': dict(schedule='inverse', decay=0.92),
}
PROFILES = {
    'exact': 'ema:0.97/5',
    'fast': 'ema:0.7/1.25',
    'other': 'ema:0.9/3',
    'inverse': 'inverse(decay=0.92)',
}
EPOCHS = 10


def files_of(run):
    return [str(run.load(n).path) for n in range(1, EPOCHS + 1)]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp('a'), KEEPS, epochs=EPOCHS).train()


@pytest.fixture(scope='module')
def tracked(tmp_path_factory):
    """What another run tracked, of the same weights."""
    spec = dict(EMA, averages=TRACKED)
    other = Run(tmp_path_factory.mktemp('b'), spec, epochs=EPOCHS).train()
    found = more_of(other.load())
    return {name: found[name]['state_dict'] for name in TRACKED}


@pytest.mark.parametrize('name', TRACKED)
def test_as_tracked(run, tracked, name):
    """To the rounding of float32, or within the error that is shown."""
    profile = parse_profile(PROFILES[name])
    files = read_files(files_of(run))
    made = average(files, profile)
    if name in ('exact', 'fast'):
        assert made.fit.error < 1e-9
    else:
        assert 0 < made.fit.error < 0.1
    found = made.state_dict()
    target = Files(files).target(profile)
    for key in ('first.weight', 'head.weight', 'norm.bias', 'low'):
        expected = tracked[name][key].double().numpy()
        start, values = run.trace(key)
        spread = np.sqrt(
            sum(
                (np.asarray(x, float) - expected) ** 2
                for x in [start, *values]
            )
        )
        # Cauchy-Schwarz; float32 rounds each of 40 updates to 6e-8
        allowed = made.fit.error * float(target.norm()) * spread
        allowed += 2e-6 * np.abs(expected).max()
        assert (
            np.abs(found[key].double().numpy() - expected) <= allowed
        ).all()
    assert (found['norm.running_var'] > 0).all()
    assert found['norm.num_batches_tracked'] == 4 * EPOCHS


@pytest.mark.parametrize('posthoc', [True, False])
@pytest.mark.parametrize('late', [dict(begin_epoch=2), dict(begin_iter=6)])
def test_files_from_before_the_averages_begin(tmp_path, late, posthoc):
    """They are left out, and are not taken for the starting weights."""
    averages = None if posthoc else dict(fast=TRACKED['fast'])
    spec = dict(KEEPS, **late, posthoc=posthoc, averages=averages)
    one = Run(tmp_path / 'a', spec, epochs=EPOCHS).train()
    spec = dict(EMA, **late, averages=TRACKED)
    two = Run(tmp_path / 'b', spec, epochs=EPOCHS).train()
    files = read_files(files_of(one))
    made = average(files, parse_profile('ema:0.97/5'))
    assert f'{files[0].path} has no averages yet' in made.notes[0]
    assert made.fit.error < 1e-9
    expected = more_of(two.load())['exact']['state_dict']
    for key, value in expected.items():
        if key not in STATISTICS:
            torch.testing.assert_close(made.state_dict()[key], value)
    assert len(average(files, parse_profile('lawa:10')).terms) == EPOCHS
    assert len(Files(files).files) == EPOCHS


def test_with_an_interval(tmp_path):
    """A run that averages every third step."""
    spec = dict(KEEPS, interval=3)
    one = Run(tmp_path / 'a', spec, epochs=EPOCHS).train()
    spec = dict(EMA, interval=3, averages=TRACKED)
    two = Run(tmp_path / 'b', spec, epochs=EPOCHS).train()
    made = average(read_files(files_of(one)), parse_profile('ema:0.97/5'))
    assert made.fit.error < 1e-9
    expected = more_of(two.load())['exact']['state_dict']
    for key, value in expected.items():
        if key not in STATISTICS:
            torch.testing.assert_close(made.state_dict()[key], value)


def test_scaled_with_the_batch(tmp_path):
    """The decay is that of the run, whatever its batch size."""
    spec = dict(type='EMAHook', decay=0.97, tau=5, scale_decay=True)
    Run(tmp_path, spec, epochs=1, batch=2).train()
    spec['averages'] = dict(mine=dict(decay=0.95))
    path = tmp_path / 'epoch_1.pth'
    saved = Run(tmp_path, spec, epochs=2, batch=4, resume=path).train().load()
    sets = read_files([str(saved.path)])[0].sets
    found = {k: str(x.build_schedule()) for k, x in sets.items() if x.schedule}
    assert found['ema'] == 'exponential(decay=0.97, tau=5.0, kappa=2.0)'
    assert found['mine'].startswith('exponential(decay=0.95, tau=2000.0')


def test_a_file_that_deploys(run, tmp_path, capsys):
    """It loads into the model; the recipe gives the same bytes."""
    out, again = tmp_path / 'out.pth', tmp_path / 'again.pth'
    options = ['-o', str(out), '--profile', 'ema:0.9/3']
    with pytest.raises(SystemExit, match='0'):
        main(['average', *files_of(run), *options])
    model = ToyModel()
    content = torch.load(out, map_location='cpu', weights_only=True)
    model.load_state_dict(content['state_dict'])
    with pytest.raises(SystemExit, match='0'):
        main(['average', '--recipe', str(out), '-o', str(again)])
    assert out.read_bytes() == again.read_bytes()
    assert 'error of the profile' in capsys.readouterr().out


def test_restart(tmp_path):
    """Files from before and after a restart are not one average."""
    spec = dict(KEEPS, restart_epochs=[2])
    run = Run(tmp_path, spec, epochs=3).train()
    paths = [str(run.load(n).path) for n in (1, 2, 3)]
    with pytest.raises(CheckpointError, match='restarted between them'):
        average(read_files(paths), parse_profile('lawa:2'))
    notes = []
    files = since_restart(read_files(paths), notes)
    assert paths[1:] == [contents.path for contents in files]
    assert [f'{paths[0]} is from before the averages were restarted: '] == [
        note.replace('it is left out', '') for note in notes
    ]
    made = average(read_files(paths[1:]), parse_profile('ema:0.97/5'))
    assert made.fit.error < 1e-9


def test_added_on_resume(tmp_path):
    """An average that came later started from the weights of then."""
    Run(tmp_path, dict(EMA), epochs=1).train()
    spec = dict(EMA, averages=dict(late=dict(schedule='constant', decay=0.5)))
    path = tmp_path / 'epoch_1.pth'
    run = Run(tmp_path, spec, epochs=3, resume=path).train()
    files = read_files([str(run.load(n).path) for n in (1, 2, 3)])
    late = [x for x in Files(files).look() if x.name == 'late'][-1]
    profile = late.profile.tolist()
    assert [0] * 4 == profile[:4]
    assert profile[4:7] == [0.5**8, 0.5**8, 0.5**7]


def test_changed_on_resume(tmp_path):
    """A decay that was changed in the run is known from its files."""
    Run(tmp_path, KEEPS, epochs=1).train()
    path = tmp_path / 'epoch_1.pth'
    spec = dict(KEEPS, decay=0.95)
    run = Run(tmp_path, spec, epochs=2, resume=path).train()
    assert 4 == run.load().meta['changed_at']
    path = tmp_path / 'epoch_2.pth'
    run = Run(tmp_path, spec, epochs=3, resume=path).train()
    assert 4 == run.load().meta['changed_at']
    files = Files(read_files([str(run.load(n).path) for n in (1, 2, 3)]))
    averages = [x for x in files.look() if x.name in ('ema', 'posthoc')]
    assert {str(tmp_path / 'epoch_1.pth')} == {
        x.contents.path for x in averages
    }
    said = ' '.join(files.notes)
    assert 2 == said.count('a decay was changed after step 4: its averages')
    made = average(files.files, parse_profile('lawa:2'))
    assert 2 == len(made.terms)


def test_not_changed_on_resume(tmp_path):
    """The same decays are no change, whatever else is."""
    spec = dict(KEEPS, averages=dict(more=dict(decay=0.8)))
    Run(tmp_path, spec, epochs=1).train()
    path = tmp_path / 'epoch_1.pth'
    run = Run(tmp_path, dict(KEEPS), epochs=2, batch=2, resume=path).train()
    assert 'changed_at' not in run.load().meta
    scaled = dict(KEEPS, scale_decay=True)
    path = tmp_path / 'epoch_2.pth'
    run = Run(tmp_path, scaled, epochs=3, batch=4, resume=path).train()
    assert 12 == run.load().meta['changed_at']
