"""A ``GradScaler`` in the closure is an error, unless it is disabled."""

import pytest
import torch
from basics import normal
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer

X, Y = normal(1, 10, 3), normal(2, 10, 2)


class Own(torch.amp.GradScaler):
    """Another name for the same."""

    def scaled(self, loss):
        return self.scale(loss)


def backward(scaler, loss, z):
    scaler.scale(loss).backward()
    return loss


def backward_of_a_list(scaler, loss, z):
    for part in scaler.scale([0.5 * loss, 0.5 * loss]):
        part.backward()
    return loss


def returned(scaler, loss, z):
    return scaler.scale(loss)


def with_outputs(scaler, loss, z):
    return scaler.scale(loss), z


def of_one_element(scaler, loss, z):
    scaler.scale(loss.reshape(1)).backward()
    return loss


def under_a_device(scaler, loss, z):
    with torch.device("cpu"):
        return scaler.scale(loss)


FORMS = (backward, backward_of_a_list, returned, with_outputs, of_one_element, under_a_device)


@pytest.mark.parametrize("make", [torch.amp.GradScaler, Own])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("enabled", [True, False])
def test_scaling_is_an_error(form, make, enabled):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    scaler = make("cpu", enabled=enabled)
    optimizer = HFOptimizer(model.parameters())
    before = model.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        z = model(X)
        return form(scaler, F.mse_loss(z, Y), z)

    if enabled:
        with pytest.raises(RuntimeError, match="one that a GradScaler has scaled"):
            optimizer.step(closure)
        assert torch.equal(model.weight, before)
        return
    optimizer.step(closure)
    assert optimizer.last_report.accepted


def test_a_product_with_a_number_of_ones_own_is_none():
    model = nn.Linear(3, 2).double()
    optimizer = HFOptimizer(model.parameters())
    optimizer.step(lambda: F.mse_loss(model(X), Y) * torch.tensor(65536.0))
    assert optimizer.last_report.accepted
