"""Ranks that share growing batches agree on their sizes, however the sizes come about."""

import itertools

import pytest
import torch.distributed as dist
from processes import launch
from runs_on_ranks import data, network
from sampler_runs import interleaved, joined, on_all_ranks, order, report, saved
from torch.nn import functional as F

from torch_hf import GrowingBatchSampler, HFOptimizer, VarianceGrowth, head

CASES, FIRST = 60, 8


def measured_run(rank, group, grow_every, theta=1.0, epochs=3):
    """Trains where the gradient's noise says how the batches grow; what each step used."""
    x, y = data()
    model = network()
    ranks = 1 if group is None else dist.get_world_size(group)
    options = {"num_replicas": ranks, "rank": rank, "curvature_batch_size": 4, "drop_last": True}
    sampler = GrowingBatchSampler(
        CASES, FIRST, VarianceGrowth(theta), grow_every=grow_every, **options
    )
    optimizer = HFOptimizer(
        model.parameters(), process_group=group, cg_max_iter=4, history_size=4, weight_decay=1e-2
    )

    def closure(batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    seen = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for share in sampler:
            batch = x[share], y[share]
            optimizer.step(closure, [batch], [head(batch, sampler.curvature_batch_size)])
            r = optimizer.last_report
            sampler.update(r)
            seen.append((r.batch_cases, r.curvature_cases, r.gradient_variance, sampler.measured))
    return seen


@pytest.mark.parametrize("grow_every", ["step", "epoch"])
def test_measured_sizes_are_the_same_on_all_ranks(grow_every):
    """Not those of one process: the variance is estimated by random signs, by share."""
    first, second = launch(2, measured_run, grow_every)
    assert first == second, "to the last bit"
    assert len({cases for cases, *_ in first}) > 1, "sizes did not grow"
    for (cases, *_), (_, _, _, measured) in zip(first[1:], first, strict=False):
        assert cases <= measured
        assert cases == measured or grow_every == "epoch"


def growth(name):
    return {"measured": VarianceGrowth(), "geometric": 1.3}[name]


@pytest.mark.parametrize("grow_every", ["step", "epoch"])
@pytest.mark.parametrize("rule", ["measured", "geometric"])
def test_a_run_whose_number_of_ranks_changes_sees_the_batches_of_one(rule, grow_every):
    """After each batch the run is resumed by another number of ranks; two epochs."""
    options = {"growth": growth(rule), "grow_every": grow_every, "drop_last": True, "seed": 3}
    noise = [report(variance=(FIRST + i) / 16, norm=1.0, cases=1) for i in range(40)]

    def run(numbers):
        batches, state = [], None
        for step, ranks in enumerate(numbers):
            samplers = on_all_ranks(CASES, FIRST, ranks, **options)
            if state is not None:
                for sampler in samplers:
                    sampler.load_state_dict(saved(state))
            for _ in range(2):  # an epoch that is used up has no batch left
                shares = [next(iter(sampler), None) for sampler in samplers]
                if shares[0] is not None:
                    break
                for sampler in samplers:
                    sampler.set_epoch(sampler.epoch + 1)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            batches.append((samplers[0].epoch, interleaved(shares)))
            curvature = sum(sampler.curvature_batch_size for sampler in samplers)
            assert curvature == len(batches[-1][1]), "all of the batch, by default"
            for sampler in samplers:
                sampler.update(noise[step])
            states = [sampler.state_dict() for sampler in samplers]
            assert all(other == states[0] for other in states)
            state = states[0]
        return batches

    one = run([1] * 10)
    assert len({len(batch) for _, batch in one}) > 1, "sizes did not grow"
    assert one[-1][0] >= 1, "the second epoch was not reached"
    for epoch, batches in itertools.groupby(one, key=lambda item: item[0]):
        cases = joined(batch for _, batch in batches)
        assert cases == order(CASES, 3, epoch)[: len(cases)]
    assert run([1, 2, 3, 4, 5, 8, 7, 1, 6, 2]) == one
    assert run([4] * 5 + [3] * 5) == one
