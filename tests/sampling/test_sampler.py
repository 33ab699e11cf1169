"""Every epoch partitions the cases, and a resumed run is the run that was not interrupted."""

import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_runs import interleaved, joined, on_all_ranks, order, report, saved
from torch.utils.data import DataLoader, DistributedSampler

from torch_hf.sampling.batches import head
from torch_hf.sampling.growth import GeometricGrowth, Growth, RatioGrowth, VarianceGrowth
from torch_hf.sampling.sampler import GrowingBatchSampler


def plain_sizes(n, size_of, ranks=1, drop_last=False):
    """The sizes of an epoch's global batches, from the words of the documentation."""
    sizes, tail = [], 0
    for number in itertools.count():
        full = size_of(number)
        left = n - sum(sizes)
        if left < full:
            tail = left
            break
        sizes.append(full)
    if tail and not drop_last:
        if tail < ranks:
            sizes[-1] += tail
        else:
            sizes.append(tail)
    return sizes


def chunks(indices, sizes):
    ends = list(itertools.accumulate(sizes))
    return [indices[end - size : end] for size, end in zip(sizes, ends, strict=True)]


@st.composite
def setups(draw, max_ranks=4):
    ranks = draw(st.integers(1, max_ranks))
    n = draw(st.integers(ranks, 40))
    batch_size = draw(st.integers(ranks, n))
    options = {
        "growth": draw(st.sampled_from([1, 1.2, 1.5, 2.0])),
        "max_batch_size": draw(st.none() | st.integers(batch_size, n + 5)),
        "grow_every": draw(st.sampled_from(["epoch", "step"])),
        "shuffle": draw(st.booleans()),
        "drop_last": draw(st.booleans()),
        "seed": draw(st.integers(0, 5)),
    }
    return n, batch_size, ranks, options


@settings(max_examples=300, deadline=None)
@given(setups())
def test_each_epoch_partitions_the_cases_over_batches_and_ranks(setup):
    n, batch_size, ranks, options = setup
    samplers = on_all_ranks(n, batch_size, ranks, **options)
    cap = min(options["max_batch_size"] or n, n)
    steps = 0
    for epoch in range(4):

        def size(number, epoch=epoch, steps=steps):
            times = epoch if options["grow_every"] == "epoch" else steps + number
            return min(round(batch_size * options["growth"] ** times), cap)

        sizes = plain_sizes(n, size, ranks, options["drop_last"])
        for sampler in samplers:
            sampler.set_epoch(epoch)
        lengths = {len(sampler) for sampler in samplers}
        assert lengths == {len(sizes)}
        rows = list(zip(*samplers, strict=True))
        for shares in rows:
            counts = sorted(map(len, shares))
            assert counts[0] >= 1 and counts[-1] - counts[0] <= 1
        indices = order(n, options["seed"], epoch) if options["shuffle"] else list(range(n))
        assert [interleaved(shares) for shares in rows] == chunks(indices[: sum(sizes)], sizes)
        assert sum(sizes) == n or options["drop_last"]
        steps += len(sizes)


@given(st.integers(0, 12), st.sampled_from([1.0, 1.2, 1.7]))
def test_an_epoch_is_the_same_whichever_came_before(epoch, growth):
    walked, direct = (GrowingBatchSampler(100, 3, growth) for _ in range(2))
    for earlier in range(epoch):
        walked.set_epoch(earlier)
        list(walked)
    for sampler in walked, direct:
        sampler.set_epoch(epoch)
    assert list(walked) == list(direct)
    assert walked.batch_size == direct.batch_size == min(round(3 * growth**epoch), 100)


def test_the_order_is_that_of_distributed_sampler():
    theirs = DistributedSampler(range(23), num_replicas=1, rank=0, seed=7)
    ours = GrowingBatchSampler(range(23), 4, seed=7)
    for epoch in range(3):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert joined(ours) == list(theirs)


def test_steps_are_counted_over_epochs_also_without_set_epoch():
    sampler = GrowingBatchSampler(20, 2, 1.5, grow_every="step", shuffle=False)
    sizes = []
    for _ in range(3):
        expected = len(sampler)
        batches = list(sampler)
        assert len(batches) == expected
        assert joined(batches) == list(range(20))
        sizes.append([len(batch) for batch in batches])
    assert sizes == [[2, 3, 4, 7, 4], [15, 5], [20]]


def test_growth_ends_at_the_largest_size_and_never_overflows():
    sampler = GrowingBatchSampler(1000, 10, 2.0, max_batch_size=300, curvature_batch_size=5)
    sampler.set_epoch(10**6)
    assert (sampler.batch_size, sampler.curvature_batch_size) == (300, 300)
    assert GeometricGrowth(1.0).scheduled(7, 10**9) == 7


# Current sizes


def test_sizes_are_those_of_the_batch_in_hand():
    sampler = GrowingBatchSampler(
        200, 4, 1.5, grow_every="step", curvature_batch_size=2, curvature_growth=2.0
    )
    assert (sampler.batch_size, sampler.curvature_batch_size) == (4, 2)
    seen = []
    for batch in itertools.islice(DataLoader(range(200), batch_sampler=sampler), 5):
        assert len(batch) == sampler.batch_size
        seen.append(sampler.curvature_batch_size)
    assert seen == [2, 4, 8, 14, 20]  # of 4, 6, 9, 14, 20 cases


def test_the_curvature_sample_is_the_whole_batch_by_default():
    sampler = GrowingBatchSampler(100, 10, 2.0)
    sampler.set_epoch(2)
    assert sampler.batch_size == sampler.curvature_batch_size == 40


@given(st.integers(1, 5), st.integers(0, 4), st.data())
def test_heads_of_the_shares_are_the_head_of_the_batch(ranks, epoch, data):
    size = data.draw(st.integers(ranks, 30))
    first = data.draw(st.integers(ranks, size))
    options = {"curvature_batch_size": first, "growth": 1.1}
    heads = []
    for sampler in on_all_ranks(60, size, ranks, **options):
        sampler.set_epoch(epoch)
        share = torch.tensor(next(iter(sampler)))
        heads.append(head(share, sampler.curvature_batch_size).tolist())
    wanted = min(round(first * 1.3**epoch), min(round(size * 1.1**epoch), 60))
    assert interleaved(heads) == order(60, 0, epoch)[:wanted]


# Measured growth

MEASURED = {  # variance, gradient norm, cases of the batch -> cases asked for (theta = 1/4)
    "quiet": (10.0, 2.0, 64, 64),
    "at the bound": (16.0, 2.0, 64, 64),
    "loud": (20.0, 2.0, 64, 80),
    "rounded up": (20.1, 2.0, 64, 81),
    "beyond all": (1e9, 2.0, 64, 1000),
    "no gradient": (1.0, 0.0, 64, 1000),
    "nothing at all": (0.0, 0.0, 64, 64),
    "not finite": (float("nan"), 2.0, 64, 64),
    "infinite": (float("inf"), 2.0, 64, 64),
}


@pytest.mark.parametrize("variance, norm, cases, wanted", MEASURED.values(), ids=MEASURED.keys())
def test_the_norm_test_asks_for_the_size_that_passes(variance, norm, cases, wanted):
    sampler = GrowingBatchSampler(1000, 64, VarianceGrowth(0.25), grow_every="step")
    sampler.update(report(variance, norm, cases))
    assert sampler.batch_size == wanted
    assert len(sampler) == len(list(sampler)) == -(-1000 // wanted)
    sampler.update(report(0.0, 1.0, wanted))
    assert sampler.batch_size == wanted, "a size never shrinks"


def test_measured_sizes_hold_from_the_next_epoch():
    sampler = GrowingBatchSampler(1000, 64, VarianceGrowth(0.25))
    sampler.update(report(20.0, 2.0, 64))
    sampler.set_epoch(0)
    assert sampler.batch_size == 64
    sampler.set_epoch(1)
    assert sampler.batch_size == 80
    sampler.set_epoch(0)
    assert sampler.batch_size == 80


def test_the_variance_is_asked_for_only_by_the_rule_that_reads_it():
    for growth, asked in ((VarianceGrowth(), True), (1.2, False)):
        sampler = GrowingBatchSampler(100, 10, growth)
        last_report = report()
        sampler.update(last_report)
        assert last_report.requests.gradient_variance is asked
        assert sampler.batch_size == 10


RATIOS = {  # rho -> the factor on the size
    "as promised": (1.0, 1.0025),
    "more than promised": (1.7, 1.0025),
    "half of it": (0.5, 1.015),
    "worse": (-3.0, 1.0275),
    "undefined": (float("nan"), 1.0275),
}


@pytest.mark.parametrize("ratio, factor", RATIOS.values(), ids=RATIOS.keys())
def test_batches_grow_as_far_as_a_step_falls_short_of_its_promise(ratio, factor):
    sampler = GrowingBatchSampler(10**6, 1000, RatioGrowth(), grow_every="step")
    for k in range(300):
        assert sampler.batch_size == pytest.approx(min(1000 * factor**k, 10**6), abs=0.501)
        sampler.update(dataclasses.replace(report(), reduction_ratio=ratio))


def test_a_small_batch_grows_by_fractions_of_a_case_and_ends_at_the_cap():
    sampler = GrowingBatchSampler(
        400, 20, RatioGrowth(least=0.0, rate=0.1), grow_every="step", max_batch_size=50
    )
    sizes = []
    for _ in range(120):
        sampler.update(dataclasses.replace(report(), reduction_ratio=0.9))
        sizes.append(sampler.batch_size)
    assert sizes == [min(round(20 * 1.01**k), 50) for k in range(1, 121)]


def test_the_curvature_sample_keeps_its_part_of_the_batch():
    options = {"growth": RatioGrowth(), "grow_every": "step", "curvature_growth": None}
    ours = on_all_ranks(5000, 40, 3, curvature_batch_size=10, **options)
    whole = GrowingBatchSampler(5000, 40, **options)
    for _ in range(100):
        for sampler in (*ours, whole):
            sampler.update(dataclasses.replace(report(), reduction_ratio=0.0))
        wanted = round(ours[0].batch_size / 4)
        assert sum(sampler.curvature_batch_size for sampler in ours) == wanted
        assert whole.curvature_batch_size == whole.batch_size
    assert wanted > 80


class Doubling(Growth):
    """A user's own rule: double whenever a step was not accepted."""

    def measured(self, report, size):
        return size if report.accepted else 2 * size


def test_a_rule_may_be_ones_own():
    sampler = GrowingBatchSampler(100, 10, Doubling(), grow_every="step")
    failed = dataclasses.replace(report(), accepted=False)
    for wanted in (20, 40, 80, 100):
        sampler.update(failed)
        sampler.update(report())
        assert sampler.batch_size == wanted


def test_a_size_never_shrinks_and_an_update_consumes_only_what_was_drawn():
    class AsReported(Growth):
        def measured(self, report, size):
            return report.batch_cases

    def fresh():
        return GrowingBatchSampler(20, 5, AsReported(), grow_every="step")

    sampler, resumed = fresh(), fresh()
    for cases in (15, 1):
        sampler.update(report(cases=cases))
        assert sampler.batch_size == 15
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == list(sampler)
    assert [len(batch) for batch in resumed] == [15, 5]


# Resuming


def walk(sampler, epochs, ahead, consume):
    """Yield batches as a loader that draws ``ahead`` batches more than it has handed out."""
    for epoch in epochs:
        sampler.set_epoch(epoch)
        batches, drawn = iter(sampler), []
        drawn.extend(itertools.islice(batches, ahead))
        while drawn or not ahead:
            try:
                drawn.append(next(batches))
            except StopIteration:
                if not drawn:
                    break
            yield epoch, drawn.pop(0)
            consume()


GROWTHS = {
    "epoch": {"growth": 1.5},
    "step": {"growth": 1.2, "grow_every": "step"},
    "measured, epoch": {"growth": VarianceGrowth(), "grow_every": "epoch"},
    "measured, step": {"growth": VarianceGrowth(), "grow_every": "step"},
    "measured by ratio": {"growth": RatioGrowth(0.05, 0.5), "grow_every": "step"},
    "dropped": {"growth": 1.1, "grow_every": "step", "drop_last": True},
}


RUNS = [(name, True, ahead) for name in GROWTHS for ahead in (0, 1, 5)]
RUNS += [(name, False, 0) for name in GROWTHS if not name.startswith("measured")]


@pytest.mark.parametrize("growth, updates, ahead", RUNS)
def test_resuming_at_every_point_goes_on_as_uninterrupted(growth, updates, ahead):
    options = GROWTHS[growth]

    def run(state, epochs):
        sampler = GrowingBatchSampler(50, 3, seed=1, **options)
        if state is not None:
            sampler.load_state_dict(saved(state))
        done, steps = [], state["steps"] + state["batches"] if state else 0

        def consume():
            nonlocal steps
            steps += 1
            if updates:  # the noise grows with the steps taken: 3, 3, 3, 4, 4, ... cases
                sampler.update(report(variance=(3 + steps // 3) / 16, norm=1.0, cases=1))
            done[-1] += (sampler.state_dict(), sampler.batch_size)

        for item in walk(sampler, epochs, ahead, consume):
            done.append(item)
        return done

    whole = run(None, range(3))
    assert {epoch for epoch, *_ in whole} == {0, 1, 2}
    assert len({len(batch) for _, batch, *_ in whole}) > 2, "sizes did not grow"
    for cut, (epoch, _, state, _) in enumerate(whole):
        assert run(state, range(epoch, 3)) == whole[cut + 1 :]


def test_a_state_with_measured_sizes_in_whole_numbers_is_taken():
    sampler = GrowingBatchSampler(50, 3, RatioGrowth(0.5), grow_every="step")
    sampler.update(report())
    state = sampler.state_dict() | {"measured": 7, "measured_before": 3}
    sampler.load_state_dict(state)
    assert sampler.state_dict() == state
    assert type(sampler.state_dict()["measured"]) is float


@settings(max_examples=200, deadline=None)
@given(setups(), st.integers(1, 4), st.data())
def test_a_state_serves_any_number_of_ranks(setup, other, data):
    n, batch_size, ranks, options = setup
    batch_size = max(batch_size, other) if other <= n else batch_size
    options["max_batch_size"] = None
    other = min(other, batch_size)
    samplers = on_all_ranks(n, batch_size, ranks, **options)
    epoch = data.draw(st.integers(0, 2))
    for sampler in samplers:
        sampler.set_epoch(epoch)
    cut = data.draw(st.integers(0, len(samplers[0])))
    rows = list(itertools.islice(zip(*samplers, strict=True), cut))
    states = [sampler.state_dict() for sampler in samplers]
    assert all(state == states[0] for state in states)
    resumed = on_all_ranks(n, batch_size, other, **options)
    for sampler in resumed:
        sampler.load_state_dict(saved(states[0]))
    lengths = [len(sampler) for sampler in resumed]
    rest = list(zip(*resumed, strict=True))
    assert lengths == [len(rest)] * other
    seen = [index for shares in rows + rest for index in interleaved(shares)]
    indices = order(n, options["seed"], epoch) if options["shuffle"] else list(range(n))
    assert seen == indices[: len(seen)]
    if not options["drop_last"]:  # only a rest that is too small for the new ranks is left out
        assert n - len(seen) < (other if not rest else 1)


def test_set_epoch_before_or_after_loading():
    sampler = GrowingBatchSampler(20, 4, shuffle=False)
    sampler.set_epoch(1)
    batches = list(sampler)
    partly = iter(sampler)
    next(partly)
    state = sampler.state_dict()
    for before, after, wanted in ((0, 1, batches[1:]), (1, 1, batches[1:]), (1, 2, None)):
        other = GrowingBatchSampler(20, 4, shuffle=False)
        other.set_epoch(before)
        other.load_state_dict(state)
        assert other.epoch == 1
        other.set_epoch(after)
        assert list(other) == (wanted or list(other))
        assert joined(other) == list(range(20)), "the iteration after is whole"


def test_a_state_of_a_finished_epoch_has_nothing_left_of_it():
    sampler = GrowingBatchSampler(20, 4)
    whole = list(sampler)
    other = GrowingBatchSampler(20, 4)
    other.load_state_dict(sampler.state_dict())
    assert (other.epoch, len(other), list(other)) == (0, 0, [])
    assert list(other) == whole
    other.load_state_dict(sampler.state_dict())
    other.set_epoch(1)
    assert len(other) == len(list(other)) == 4  # 5 cases a batch


def test_iterators_that_are_opened_and_left_lose_nothing():
    sampler, plain = (GrowingBatchSampler(20, 4, grow_every="step") for _ in range(2))
    whole = list(plain)
    iter(sampler)
    batches = iter(sampler)
    head_of_run = [next(batches), next(batches)]
    state = sampler.state_dict()
    sampler.load_state_dict(state)
    iter(sampler)
    assert head_of_run + list(sampler) == whole


def test_iterators_do_not_disturb_each_other():
    sampler = GrowingBatchSampler(20, 4)
    first, second = iter(sampler), iter(sampler)
    assert [next(first) for _ in range(3)] == [next(second) for _ in range(3)]


def test_length_of_the_running_iteration_stands():
    for grow_every in ("epoch", "step"):
        sampler = GrowingBatchSampler(40, 3, 1.5, grow_every=grow_every)
        length = len(sampler)
        assert [len(sampler) for _ in sampler] == [length] * length


def test_a_sampler_can_be_copied_while_it_runs():
    sampler = GrowingBatchSampler(20, 4)
    batches = iter(sampler)
    next(batches)
    other = copy.deepcopy(sampler)
    assert other.state_dict() == sampler.state_dict()
    other.load_state_dict(other.state_dict())
    assert list(other) == list(batches)


# Data loaders


def collect(loader, sampler, epochs, update, stop=None):
    """Numbers of the batches seen, and the sampler's state after each."""
    seen = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        for batch in loader:
            if update:
                sampler.update(report(variance=(4 + len(seen)) / 16, norm=1.0, cases=1))
            seen.append((epoch, batch.tolist()))
            if len(seen) == stop:
                return seen
    return seen


def test_workers_that_draw_ahead_resume_by_update():
    def fresh():
        sampler = GrowingBatchSampler(60, 4, 1.1, grow_every="step")
        return DataLoader(range(60), batch_sampler=sampler, num_workers=2), sampler

    whole = collect(*fresh(), range(2), update=True)
    for cut in (1, 4, len(whole) - 2):
        loader, sampler = fresh()
        assert collect(loader, sampler, range(2), update=True, stop=cut) == whole[:cut]
        state = saved(sampler.state_dict())
        assert state["ahead"], "the workers have drawn ahead"
        loader, sampler = fresh()
        sampler.load_state_dict(state)
        rest = collect(loader, sampler, range(state["epoch"], 2), update=True)
        assert rest == whole[cut:]


def stateful(n, batch_size, workers):
    module = pytest.importorskip("torchdata.stateful_dataloader")
    sampler = GrowingBatchSampler(n, batch_size, 1.2, grow_every="step")
    options = {"batch_sampler": sampler, "num_workers": workers}
    return module.StatefulDataLoader(range(n), **options), sampler


set_vital = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it


@set_vital
@pytest.mark.parametrize("update", [False, True], ids=["drawn", "update"])
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader_resumes_exactly(workers, update):
    epochs = range(3)
    whole = collect(*stateful(30, 4, workers), epochs, update)
    for cut in range(1, len(whole)) if workers == 0 else (1, 3, len(whole) - 2):
        loader, sampler = stateful(30, 4, workers)
        assert collect(loader, sampler, epochs, update, stop=cut) == whole[:cut]
        state, epoch = loader.state_dict(), whole[cut - 1][0]
        loader, sampler = stateful(30, 4, workers)
        loader.load_state_dict(state)
        assert collect(loader, sampler, epochs[epoch:], update) == whole[cut:]


@set_vital
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader_goes_on_after_a_finished_epoch(workers):
    loader, sampler = stateful(30, 8, workers)
    first = collect(loader, sampler, [0], update=False)
    state = loader.state_dict()
    second = collect(loader, sampler, [1], update=False)
    assert sorted(joined(batch for _, batch in second)) == list(range(30))
    assert len(second) < len(first)
    loader, sampler = stateful(30, 8, workers)
    loader.load_state_dict(state)
    assert collect(loader, sampler, [1], update=False) == second
    loader, sampler = stateful(30, 8, workers)
    loader.load_state_dict(state)
    again = joined(batch.tolist() for batch in loader)
    assert again == joined(batch for _, batch in first), "without set_epoch the order stays"


# Wrong input

TEN = {"data_source": 10, "batch_size": 4}
WRONG = {
    "size zero": ({"batch_size": 0}, ValueError, "batch_size must be from 1 to 10"),
    "size fraction": ({"batch_size": 2.5}, TypeError, "batch_size must be of type int, but is 2.5"),
    "size truth": ({"batch_size": True}, TypeError, "batch_size must be of type int"),
    "size too large": (
        {"batch_size": 11},
        ValueError,
        "batch_size must be from 1 to 10 (num_replicas to the number of cases), but is 11",
    ),
    "size below ranks": (
        {"batch_size": 2, "num_replicas": 3, "rank": 0},
        ValueError,
        "batch_size must be from 3 to 10 (num_replicas to the number of cases), but is 2",
    ),
    "no cases": ({"data_source": []}, ValueError, "data_source (its length, or itself) must be at"),
    "no length": ({"data_source": iter([])}, TypeError, "data_source (its length, or itself) must"),
    "shrinking": ({"growth": 0.9}, ValueError, "growth, unless it is a Growth, must be at least 1"),
    "growth nan": ({"growth": float("nan")}, ValueError, "must be at least 1.0, but is nan"),
    "growth inf": ({"growth": float("inf")}, ValueError, "must be at least 1.0, but is inf"),
    "growth word": ({"growth": "fast"}, TypeError, "unless it is a Growth, must be of type float"),
    "growth class": ({"growth": VarianceGrowth}, TypeError, "growth, unless it is a Growth, must"),
    "cap": ({"max_batch_size": 3}, ValueError, "max_batch_size must be at least 4 (batch_size)"),
    "cap zero": ({"max_batch_size": 0}, ValueError, "max_batch_size must be at least 4"),
    "curvature": (
        {"curvature_batch_size": 5},
        ValueError,
        "curvature_batch_size must be from 1 to 4 (num_replicas to batch_size), but is 5",
    ),
    "curvature zero": ({"curvature_batch_size": 0}, ValueError, "curvature_batch_size must be"),
    "curvature growth": ({"curvature_growth": 0.5}, ValueError, "curvature_growth must be at lea"),
    "grow_every": (
        {"grow_every": "batch"},
        ValueError,
        "grow_every must be 'epoch' or 'step', but is 'batch'",
    ),
    "seed": ({"seed": 1.5}, TypeError, "seed must be of type int, but is 1.5"),
    "rank alone": (
        {"rank": 0},
        ValueError,
        "give num_replicas and rank, or neither: num_replicas=None, rank=0",
    ),
    "replicas alone": ({"num_replicas": 2}, ValueError, "give num_replicas and rank, or neither"),
    "rank too large": (
        {"num_replicas": 2, "rank": 2},
        ValueError,
        "rank must be from 0 to 1 (num_replicas - 1), but is 2",
    ),
    "rank negative": ({"num_replicas": 2, "rank": -1}, ValueError, "rank must be from 0 to 1"),
    "no replicas": ({"num_replicas": 0, "rank": 0}, ValueError, "num_replicas must be at least 1"),
}


@pytest.mark.parametrize("options, error, message", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named(options, error, message):
    with pytest.raises(error) as caught:
        GrowingBatchSampler(**TEN | options)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["least", "rate"])
def test_parts_of_the_growth_are_not_negative(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 0.0, but is"):
        RatioGrowth(**{name: value})


@pytest.mark.parametrize("theta", [0, -1.0, float("nan"), float("inf")])
def test_theta_is_positive(theta):
    with pytest.raises(ValueError, match="theta must be at least 1e-09, but is"):
        VarianceGrowth(theta)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s: s.set_epoch(-1), ValueError, "epoch must be at least 0, but is -1"),
        (lambda s: s.set_epoch("1"), TypeError, "epoch must be of type int, but is '1'"),
        (lambda s: s.update(None), TypeError, "update takes optimizer.last_report after a step"),
        (lambda s: s.load_state_dict(None), TypeError, "state must be what state_dict() returned"),
    ],
)
def test_a_wrong_call_is_named(call, error, message):
    sampler = GrowingBatchSampler(**TEN)
    before = sampler.state_dict()
    with pytest.raises(error) as caught:
        call(sampler)
    assert message in str(caught.value)
    assert sampler.state_dict() == before


STATES = {
    "cases": 11,
    "first_batch_size": 5,
    "by_step": True,
    "shuffle": False,
    "drop_last": True,
    "seed": 3,
    "epoch": -1,
    "steps": 1.5,
    "batches": None,
    "position": "4",
    "ahead": 3,
    "measured": [4],
    "measured_before": -4,
    "counts_updates": 2,
}


@pytest.mark.parametrize("missing", [False, True], ids=["other", "missing"])
@pytest.mark.parametrize("name, value", STATES.items(), ids=STATES.keys())
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(name, value, missing):
    sampler = GrowingBatchSampler(**TEN)
    next(iter(sampler))
    before = sampler.state_dict()
    state = before | {name: value}
    if missing:
        del state[name]
    assert before.keys() == STATES.keys()
    with pytest.raises(ValueError, match=f"state entry '{name}' is .*, but this sampler has"):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == before
