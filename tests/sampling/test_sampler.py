"""Every epoch partitions the cases, and a resumed run is the run that was not interrupted."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_runs import interleaved, joined, on_all_ranks, order
from sampler_setups import setups
from torch.utils.data import DataLoader, DistributedSampler

from torch_hf.sampling.batches import head
from torch_hf.sampling.growth import GeometricGrowth
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
