"""Norms of the implicit weights' gradient, clipping by them, and gradients that were changed."""

import pytest
import torch
from basics import normal
from torch import nn
from torch.testing import assert_close

from torch_hf.kronecker import KroneckerFactors, KroneckerLinear, KroneckerSGD

N, M = 40, 6
ROWS = torch.arange(N) % 4
COLS = torch.arange(N) % 5
DATA = {
    "points": KroneckerFactors(normal(1, N, 5), normal(2, N, 7)),
    "unit points": KroneckerFactors(normal(1, N, 5), normal(2, N, 7), normalize=True),
    "pairs": KroneckerFactors.from_pairs(normal(1, 4, 5), normal(2, 5, 7), ROWS, COLS),
}
BATCH = torch.tensor([3, 8, 3, 21, 12, 3])  # one that recurs


def _pair(factors, top=True):
    torch.manual_seed(0)
    layer = KroneckerLinear(factors, M)
    x, weight = factors.dense(), nn.Parameter(layer.to_dense())
    tops = [nn.Linear(M, 2).double() for _ in range(2)]
    tops[1].load_state_dict(tops[0].state_dict())
    model = lambda batch: tops[0](torch.tanh(layer(batch)))  # noqa: E731
    dense = lambda batch: tops[1](torch.tanh(x[batch] @ weight.T))  # noqa: E731
    return (
        layer,
        model,
        [*layer.parameters(), *tops[0].parameters()],
        dense,
        [
            weight,
            *tops[1].parameters(),
        ],
    )


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("factors", DATA.values(), ids=DATA)
def test_the_norm_is_that_of_dense_weights(factors, active):
    layer, _, params, _, (weight, *_) = _pair(factors)
    optimizer = KroneckerSGD(params, lr=0.1)
    x = factors.dense()
    for batch in (BATCH, BATCH[:3]):  # two that add up
        z = x[batch] @ weight.T
        if active:
            layer.active(batch, 0.2, search="scan").values.pow(3).sum().backward()
            z[z > 0.2].pow(3).sum().backward()
        else:
            layer(batch).pow(3).sum().backward()
            z.pow(3).sum().backward()
    truth = float(nn.utils.clip_grad_norm_([weight], 1e9))
    assert abs(optimizer.gradient_norm() - truth) < 1e-10 * truth


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
@pytest.mark.parametrize("factors", DATA.values(), ids=DATA)
def test_clipped_steps_are_those_of_dense_sgd(factors, options):
    layer, model, params, dense, others = _pair(factors)
    optimizer = KroneckerSGD(params, lr=0.05, max_norm=0.7, **options)
    truth = torch.optim.SGD(others, lr=0.05, **options)
    clipped = 0
    for k in range(60):
        batch = (BATCH * (k + 1)) % N
        for run, outputs in ((optimizer, model(batch)), (truth, dense(batch))):
            run.zero_grad()
            (outputs - 1).square().sum().backward()
        norm = optimizer.gradient_norm()
        clipped += norm > 0.7
        assert abs(norm - float(nn.utils.clip_grad_norm_(others, 0.7))) < 1e-9 * norm
        optimizer.step()
        truth.step()
    assert clipped > 5
    assert_close(layer.to_dense(), others[0].detach(), rtol=0, atol=1e-10)
    assert_close(params[1:], others[1:], rtol=0, atol=1e-10)


def _clip(layer):
    nn.utils.clip_grad_norm_(layer.parameters(), 1e-3)


def _replace(layer):
    layer.coefficients.grad = layer.coefficients.grad * 0.5


def _scale(layer):
    layer.coefficients.grad.mul_(0.5)


@pytest.mark.parametrize("change", [_clip, _replace, _scale])
def test_a_changed_gradient_is_refused(change):
    layer = KroneckerLinear(DATA["points"], M)
    optimizer = KroneckerSGD(layer.parameters(), lr=0.1)
    layer(BATCH).square().sum().backward()
    change(layer)
    before = layer(range(N)).detach()
    for call in (optimizer.step, optimizer.gradient_norm):
        with pytest.raises(RuntimeError, match=r"Clip with KroneckerSGD\(..., max_norm=...\)"):
            call()
    assert torch.equal(layer(range(N)), before)
    optimizer.zero_grad()
    layer(BATCH).square().sum().backward()
    optimizer.step()


def test_what_is_no_change_is_not_refused():
    """Zeroed in place, added up, frozen for a while, scaled by a GradScaler."""
    layer = KroneckerLinear(DATA["points"], M)
    optimizer = KroneckerSGD(layer.parameters(), lr=0.1)
    for to_none in (True, False, False):
        layer(BATCH).square().sum().backward()
        layer(BATCH[:2]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    optimizer.step()
    layer.requires_grad_(False)
    layer(BATCH)
    layer.requires_grad_(True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(layer(BATCH).square().sum()).backward()
    scaler.step(optimizer)


def test_forward_and_active_share_a_step():
    """In one backward pass, and in two whose gradients add up, in either order."""
    factors = DATA["unit points"]
    for kind in ("both", "active first", "forward first"):
        torch.manual_seed(0)
        layer = KroneckerLinear(factors, M)
        weight, x = nn.Parameter(layer.to_dense()), factors.dense()
        optimizer, truth = KroneckerSGD(layer.parameters(), lr=0.1), torch.optim.SGD([weight], 0.1)
        for k in range(20):
            batch, other = (BATCH + k) % N, (BATCH * 3 + k) % N
            optimizer.zero_grad()
            truth.zero_grad()
            losses = {
                "forward": lambda b=batch, layer=layer: layer(b).square().sum(),
                "active": lambda b=other, layer=layer: layer.active(b, 0.3).values.square().sum(),
            }
            if kind == "both":
                (losses["active"]() + losses["forward"]()).backward()
            else:
                for name in sorted(losses, reverse=kind == "forward first"):
                    losses[name]().backward()
            z, zs = x[batch] @ weight.T, x[other] @ weight.T
            (z.square().sum() + zs[zs > 0.3].square().sum()).backward()
            optimizer.step()
            truth.step()
        assert_close(layer.to_dense(), weight.detach(), rtol=0, atol=1e-10)


def test_a_limit_for_one_group_is_refused():
    layers = [KroneckerLinear(DATA["points"], M) for _ in range(2)]
    groups = [{"params": layers[0].parameters()}, {"params": layers[1].parameters(), "max_norm": 1}]
    with pytest.raises(ValueError, match=r"max_norm must be one number.*KroneckerSGD\(groups, max"):
        KroneckerSGD(groups, lr=0.1)
    with pytest.raises(ValueError, match="max_norm must be a finite number of at least 0"):
        KroneckerSGD(layers[0].parameters(), lr=0.1, max_norm=-1.0)
