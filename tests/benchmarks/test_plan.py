"""The plan has every case that the tables need."""

from benchmarks.peers import LABELS, PEERS
from benchmarks.plan import BYTES, MODELS, PARTS, TENSORS, Wishes, plan
from benchmarks.tables import TITLES

ALL = Wishes(tuple(PARTS), MODELS, ('cpu', 'cuda'), (1, 2))


def cases(part, wishes=ALL):
    found = [case for process in plan(wishes) for case in process]
    return [case for case in found if case.part == part]


def test_update_has_every_model_thread_and_cache():
    """Five models, one and two threads, cold and hot caches."""
    expected = {
        (model, threads, cache)
        for model in MODELS
        for threads in (1, 2)
        for cache in ('cold', 'hot')
    }

    found = {
        (case.model, case.threads, case.setting)
        for case in cases('update')
        if case.device == 'cpu'
    }

    assert expected == found


def test_update_has_every_competitor():
    """Both classes of OpenMMLab, both ways; torch, two packages, the floor."""
    expected = set(PEERS) - {'ours-host'}

    assert all(expected == set(case.competitors) for case in cases('update'))


def test_curves_have_all_points():
    """1 to 3,000 tensors at 16 MiB, and 1 to 256 MiB at 300 tensors."""
    on_cpu = [case for case in cases('tensors') if case.device == 'cpu']

    assert [f'{n}x{16 * 2**20}' for n in TENSORS] * 2 == [
        case.model for case in on_cpu
    ]
    assert TENSORS[0] == 1
    assert TENSORS[-1] == 3000
    assert (2**20, 256 * 2**20) == (BYTES[0], BYTES[-1])


def test_gpu_has_one_number_of_threads():
    """Threads of the CPU make no odds to a GPU."""
    found = [c for p in plan(ALL) for c in p if c.device == 'cuda']

    assert {1} == {case.threads for case in found}


def test_every_part_is_planned_and_has_a_title():
    """On a machine with a GPU no part is empty, no table nameless."""
    found = {case.part for process in plan(ALL) for case in process}

    assert set(PARTS) == found == set(TITLES)


def test_every_competitor_has_a_label():
    """No table meets a competitor that it cannot name."""
    found = {n for p in plan(ALL) for case in p for n in case.competitors}

    assert found <= set(LABELS)


def test_process_has_one_part_device_and_number_of_threads():
    """Threads and visible devices are set once a process."""
    for process in plan(ALL):
        keys = {(case.part, case.device, case.threads) for case in process}
        assert len(keys) == 1


def test_wishes_narrow_the_plan():
    """Only the parts and models that are asked for are measured."""
    wishes = Wishes(('swap',), ('yolox-s',), ('cpu',), (2,))

    (process,) = plan(wishes)

    assert [('swap', 'yolox-s', 2)] == [
        (case.part, case.model, case.threads) for case in process
    ]


def test_quick_takes_few_rounds():
    """A try takes five rounds at most; a full run at least seven."""
    quick = Wishes(('update',), MODELS, ('cpu',), (1,), quick=True)

    assert quick.limits.most == 5
    assert ALL.limits.least == 7
