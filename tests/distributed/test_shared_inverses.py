"""Inverses of Kronecker factors that ranks share out among themselves."""

import math

import pytest
import runs_on_ranks as runs
import torch
from processes import launch
from reference import flat
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer, PeerError
from torch_hf.preconditioner import kfac
from torch_hf.preconditioner.kfac import shared_out


def train(rank, group, least, fail_on=-1):
    """Parameters after five steps, and how many blocks this rank inverted at a time."""
    made, original = [], kfac.inverses

    def counted(blocks, damping, traces):
        made.append(len(blocks))
        if rank == fail_on:
            raise FloatingPointError("no digits left")
        return original(blocks, damping, traces)

    kfac.LEAST_SHARED, kfac.inverses = least, counted
    torch.manual_seed(0)
    layers = [nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)]
    model = nn.Sequential(*layers).double()
    optimizer = HFOptimizer(model.parameters(), process_group=group, solver="cg", cg_max_iter=4)
    x, y = runs.data()
    for step in range(5):
        mine = runs.share(runs.union(step), rank, group.size())
        optimizer.step(lambda mine=mine: F.cross_entropy(model(x[mine]), y[mine]))
    return flat(model.parameters()).tolist(), made


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_run_is_the_same_and_each_rank_inverts_its_share(ranks):
    alone = launch(ranks, train, math.inf)
    shared = launch(ranks, train, 0.0)
    assert all(values == shared[0][0] for values, _ in shared)
    assert shared[0][0] == pytest.approx(alone[0][0], rel=1e-10)  # another order in memory
    assert {n for _, made in alone for n in made} == {3}
    for counts in zip(*(made for _, made in shared), strict=True):
        assert sum(counts) == 3
        assert max(counts) <= math.ceil(3 / min(ranks, 3)) + 1


def failing(rank, group):
    try:
        train(rank, group, 0.0, fail_on=1)
    except (FloatingPointError, PeerError) as error:
        return type(error).__name__, str(error)
    return "none", ""


def test_an_inversion_that_raises_on_one_rank_ends_the_step_on_all():
    first, second = launch(2, failing)
    assert first[0] == "PeerError" and "no digits left" in first[1]
    assert second[0] == "FloatingPointError"


def test_a_failed_inversion_is_told_as_a_matrix():
    """Where damping never makes a factor positive definite, its inverse is a diagonal."""
    assert launch(2, _singular) == [True, True]


def _singular(rank, group):
    from torch_hf.distributed import Reducer
    from torch_hf.statistics.kronecker_factors import LayerFactors

    kfac.LEAST_SHARED = 0.0
    bad = torch.full((3, 3), 4.0).double() - 3.9 * torch.eye(3).double()
    bad[0, 1] = bad[1, 0] = 1e12
    blocks = [LayerFactors(0, -1, torch.eye(2).double(), bad), LayerFactors(1, -1, bad, bad)]
    traces = kfac.traces_of(blocks)
    truth = kfac.inverses(blocks, [1e-9] * 2, traces)
    found = kfac.inverses_of_ranks(blocks, [1e-9] * 2, traces, Reducer(group, torch.device("cpu")))
    v = torch.arange(3).double()
    return all(
        torch.equal(f.left @ v, t.left @ v if t.left.ndim == 2 else t.left * v)
        for f, t in zip(found, truth, strict=True)
    )


def test_costs_are_shared_out_evenly():
    costs = [float(n**3) for n in (785, 1001, 501, 251, 31, 251, 501, 1001)]
    owners = shared_out(costs, 4)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(4)]
    assert max(loads) <= max(max(costs), 1.34 * sum(costs) / 4)
