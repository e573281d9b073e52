"""The warm-up where mmcv 1.x has more than mmengine."""

from tests.optimizers.steps import seen
from tests.optimizers.toy import Training


def test_two_runs_of_one_runner(tmp_path):
    """A second run of the same runner is not warmed up again."""
    trained = Training(tmp_path, dict(type='BiasWarmupHook', warmup_iters=4))
    trained.train()
    trained.runner._max_epochs = 3
    trained.train()
    rates = seen(trained.optimizer, 'lr')['weight']
    assert 12 == len(rates)
    assert {0.01} == set(rates[4:])
