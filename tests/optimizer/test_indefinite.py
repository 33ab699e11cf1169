"""Losses that are not convex, with the Hessian: negative curvature is used, not fled from."""

from __future__ import annotations

import math

import pytest
import torch

import torch_hf as hf


def _gaussian_process(seed, inputs):
    generator = torch.Generator().manual_seed(seed)
    X = 4 * torch.rand(30, inputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(30, generator=generator, dtype=torch.float64)
    y = torch.sin(3 * X[:, 0]) + 0.3 * X[:, 1:].square().sum(1) + 0.3 * noise
    y = (y - y.mean()) / y.std()
    logs = torch.zeros(inputs + 2, dtype=torch.float64, requires_grad=True)
    squares = (X[:, None] - X[None]) ** 2

    def loss():
        lengths, size, noise = logs[:inputs].exp(), logs[inputs].exp(), logs[inputs + 1].exp()
        K = size**2 * torch.exp(-0.5 * (squares / lengths**2).sum(-1))
        L = torch.linalg.cholesky(K + (noise**2 + 1e-6) * torch.eye(30, dtype=torch.float64))
        a = torch.cholesky_solve(y[:, None], L)[:, 0]
        return (0.5 * y @ a + L.diagonal().log().sum()) / 30 + 0.5 * math.log(2 * math.pi)

    return [logs], loss


def _cox(seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(100, 5, generator=generator, dtype=torch.float64)
    events = (torch.rand(100, generator=generator) < 0.7).double()
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)

    def loss():
        h = X @ w
        return -((h - torch.logcumsumexp(h, 0)) * events).sum() / events.sum()

    return [w], loss


def _saddle(x, y):
    p = torch.tensor([x, y], dtype=torch.float64, requires_grad=True)
    return [p], lambda: p[0] ** 2 - p[1] ** 2 + p[1] ** 4


def _factors(scale):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (12, 10, 12, 10)]
    A = draw[0] @ draw[1].T
    U, V = (scale * x for x in draw[2:])
    U.requires_grad_(), V.requires_grad_()
    return [U, V], lambda: 0.5 * (U @ V.T - A).square().mean()


#: The problem; the closure calls within which it reaches L-BFGS's minimum (or the known one).
PROBLEMS = {
    **{f"gp 3 parameters, seed {s}": (lambda s=s: _gaussian_process(s, 1), None) for s in range(4)},
    "gp 5 parameters": (lambda: _gaussian_process(1, 3), None),
    "cox": (lambda: _cox(0), None),
    "saddle": (lambda: _saddle(1.0, 1e-3), -0.25),
    "near the saddle's ridge": (lambda: _saddle(1.0, 1e-8), -0.25),
    "factors from near zero": (lambda: _factors(1e-3), 0.0),
}


def _lbfgs(params, loss):
    optimizer = torch.optim.LBFGS(
        params, max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )
    losses = []

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        return value

    optimizer.step(closure)
    return losses


@pytest.mark.parametrize(("make", "lowest"), PROBLEMS.values(), ids=PROBLEMS)
def test_it_reaches_the_minimum_in_few_closure_calls(make, lowest):
    params, loss = make()
    start = loss().item()
    most = 60
    if lowest is None:
        losses = _lbfgs(params, loss)
        lowest = min(losses)
        enough = lowest + 1e-6 * (start - lowest)
        most = 2 * next(i for i, value in enumerate(losses, 1) if value <= enough)
        params, loss = make()
    enough = lowest + 1e-6 * (start - lowest)
    optimizer = hf.HFOptimizer(params, curvature="hessian")
    calls = []

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        calls.append(value.item())
        return value

    while len(calls) < most and loss().item() > enough:
        before = loss().item()
        optimizer.step(closure)
        assert loss().item() <= before
    assert loss().item() <= enough
    assert optimizer.last_report.damping < 1e3
