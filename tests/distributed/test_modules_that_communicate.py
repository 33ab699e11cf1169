"""Modules whose forward crosses ranks, as ``SyncBatchNorm``'s does; ranks without cases."""

import pytest
import torch
import torch.distributed as dist
from processes import launch
from runs_on_ranks import data, distance, flat, network, train
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer, check_replicas


class Sum(torch.autograd.Function):
    """A sum over ranks whose backward is one, too: differentiable as often as one likes."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, g):
        return Sum.apply(g)


Sum.__module__ = "torch.stand_in"  # as torch's own, whose products are not doubted


class SyncNorm(nn.Module):
    """Statistics of all ranks' cases."""

    def __init__(self, over_ranks):
        super().__init__()
        self.total = Sum.apply if over_ranks else lambda x: x

    def forward(self, x):
        n = self.total(torch.tensor(float(len(x)), dtype=x.dtype))
        mean = self.total(x.sum(0)) / n
        variance = self.total((x - mean).square().sum(0)) / n
        return (x - mean) / (variance + 1e-5).sqrt()


def normed(over_ranks):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), SyncNorm(over_ranks), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


OPTIONS = {
    "gauss-newton": {"preconditioner": "none", "cg_max_iter": 4, "weight_decay": 1e-2},
    "pairs": {"preconditioner": "lbfgs", "cg_max_iter": 12, "cg_tol": 0.0, "weight_decay": 1e-2},
    "hessian": {"preconditioner": "none", "curvature": "hessian", "cg_max_iter": 3}
    | {"damping": 10.0, "weight_decay": 1e-2},
}


def synchronised(rank, group, cut, options):
    cases = torch.arange(60)
    parts = [cases[:cut] if rank == 0 else cases[cut:]]
    return train(normed(True), lambda k: parts, steps=6, process_group=group, **options)


@pytest.mark.parametrize("cut", [30, 20, 8])
@pytest.mark.parametrize("options", OPTIONS)
def test_unequal_shares_follow_one_process_on_the_union(cut, options):
    options = OPTIONS[options]
    truth = train(normed(False), lambda k: [torch.arange(60)], steps=6, **options)
    for run in launch(2, synchronised, cut, options):
        assert distance(run, truth) <= 1e-10


def with_a_remainder(rank, group, cut):
    """A term of the loss that is no convex function of outputs, behind the module."""
    x, y = data()
    over = group is not None
    model = normed(over)
    options = {"process_group": group} if over else {}
    optimizer = HFOptimizer(
        model.parameters(), preconditioner="none", cg_max_iter=3, damping=10.0, **options
    )
    if over:
        x, y = (x[:cut], y[:cut]) if rank == 0 else (x[cut:], y[cut:])

    def closure():
        z = model(x)
        return F.cross_entropy(z, y) + 0.1 * torch.sin(model[:3](x)).mean(), z, len(x)

    for _ in range(4):
        optimizer.step(closure)
    return flat(model)


def test_terms_that_bypass_the_outputs():
    truth = with_a_remainder(0, None, 0)
    for found in launch(2, with_a_remainder, 20):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-10)


def first_gradient(rank, group, cut):
    x, y = data()
    model = normed(True)
    optimizer = HFOptimizer(model.parameters(), process_group=group)
    x, y = (x[:cut], y[:cut]) if rank == 0 else (x[cut:], y[cut:])
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    factors = optimizer.preconditioner.state_dict()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()]), list(factors)


@pytest.mark.parametrize("cut", [20, 8])
def test_the_default_preconditioner_runs_on_the_unions_gradient(cut):
    x, y = data()
    model = normed(False)
    truth = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    truth = torch.cat([g.reshape(-1) for g in truth])
    for found, factors in launch(2, first_gradient, cut):
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)
        assert "base_factor0" in factors


# --- ranks without cases ---


def now_and_then_empty(rank, group, as_batches):
    """Rank 1 has no cases in the third and fourth step."""
    x, y = data()
    model = network()
    optimizer = HFOptimizer(model.parameters(), process_group=group, cg_max_iter=3)
    blocks, found = [], []
    for step in range(6):
        own = slice(rank, None, 2)
        if step in (2, 3):
            own = slice(0, None) if rank == 0 else slice(0, 0)
        xi, yi = x[own], y[own]
        if as_batches:
            batches = [(xi, yi)] if len(xi) else []
            optimizer.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batches=batches)
        else:
            optimizer.step(lambda xi=xi, yi=yi: F.cross_entropy(model(xi), yi))
        state = optimizer.preconditioner.state_dict()
        blocks.append(sum(k.startswith("base_factor") for k in state))
        found.append((optimizer.last_report.loss, optimizer.last_report.batch_cases))
    check_replicas(optimizer)
    return blocks, found, flat(model)


@pytest.mark.parametrize("as_batches", [False, True])
def test_a_rank_without_cases_keeps_the_factors_and_the_step(as_batches):
    (blocks, found, first), (others, same, second) = launch(2, now_and_then_empty, as_batches)
    assert blocks == others and len(set(blocks)) == 1 and blocks[0] > 0
    assert found == same and [cases for _, cases in found] == [60] * 6
    assert torch.equal(first, second)
    x, y = data()
    model = network()
    optimizer = HFOptimizer(model.parameters(), cg_max_iter=3)
    for loss, _ in found:
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        assert optimizer.last_report.loss == pytest.approx(loss, rel=1e-6)


def all_empty(rank, group):
    model = network()
    optimizer = HFOptimizer(model.parameters(), process_group=group)
    before = flat(model)
    with pytest.raises(ValueError, match="at least one case"):
        optimizer.step(lambda b: F.cross_entropy(model(b[0]), b[1]), batches=[])
    return torch.equal(flat(model), before)


def test_ranks_without_any_case_are_an_error():
    assert launch(2, all_empty) == [True, True]


# --- ranks that round differently ---


def another_rounding(rank, group):
    """Rank 1's directions are off in the last bit, as on another GPU."""
    x, y = data()
    model = network()
    optimizer = HFOptimizer(model.parameters(), process_group=group, cg_max_iter=3)
    apply = optimizer.preconditioner.apply

    def rounded(r):
        found = apply(r)
        return torch.nextafter(found, found + 1.0) if rank else found

    optimizer.preconditioner.apply = rounded
    for _ in range(12):
        optimizer.step(lambda: F.cross_entropy(model(x[rank::2]), y[rank::2]))
    check_replicas(optimizer)
    return flat(model)


def test_replicas_stay_the_same_to_the_bit():
    first, second = launch(2, another_rounding)
    assert torch.equal(first, second)
