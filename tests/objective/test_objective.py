"""A closure as an objective: its forms, batches, trial points, randomness and gradients."""

import pytest
import torch
from closures import BATCHES, X, Y, network, total
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer


def test_after_a_step_grad_is_the_gradient_at_the_old_parameters():
    model = network()
    model.never_called = nn.Linear(2, 2).double()
    reached = [p for layer in (model[0], model[2]) for p in layer.parameters()]
    slopes = torch.autograd.grad(total_of_layers(model), reached)
    optimizer = HFOptimizer(model.parameters(), weight_decay=0.1)

    def closure():
        optimizer.zero_grad()
        loss = total_of_layers(model)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in reached]
    optimizer.step(closure)
    assert optimizer.last_report.accepted
    assert not any(torch.equal(p, old) for p, old in zip(reached, before, strict=True))
    for p, slope in zip(reached, slopes, strict=True):
        torch.testing.assert_close(p.grad, slope, rtol=1e-12, atol=0)
    assert all(p.grad is None for p in model.never_called.parameters())


def total_of_layers(model):
    z = model[2](model[1](model[0](X)))
    return F.mse_loss(z, Y) + 0.5 * F.huber_loss(z, Y)


def test_maximize_is_the_negated_loss_minimised():
    down, up = network(), network()
    lower = HFOptimizer(down.parameters(), weight_decay=0.1)
    higher = HFOptimizer(up.parameters(), weight_decay=0.1, maximize=True)
    for _ in range(3):
        loss = lower.step(lambda: total(down))
        gain = higher.step(lambda: -total(up))
        assert gain == -loss
        assert higher.last_report.loss == lower.last_report.loss
        for p, q in zip(down.parameters(), up.parameters(), strict=True):
            assert torch.equal(p, q)
            assert torch.equal(q.grad, -p.grad)


def test_maximize_with_batches_returns_the_closures_own_value():
    model = network()
    whole = -total(model).item()
    optimizer = HFOptimizer(model.parameters(), maximize=True)

    def closure(batch):
        z = model(batch[0])
        return -F.mse_loss(z, batch[1]) - 0.5 * F.huber_loss(z, batch[1])

    assert optimizer.step(closure, BATCHES).item() == pytest.approx(whole, rel=1e-13)
    assert -total(model).item() > whole
