"""A resumed run of batches is the run that was not interrupted."""

import copy
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_runs import interleaved, joined, on_all_ranks, order, report, saved
from sampler_setups import setups

from torch_hf.sampling.growth import RatioGrowth, VarianceGrowth
from torch_hf.sampling.sampler import GrowingBatchSampler


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
