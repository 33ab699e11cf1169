"""A state that does not fit is named and changes nothing."""

import copy

import pytest
import torch
from guarantees import assert_same_state, problem
from torch.nn import functional as F

from torch_hf import HFOptimizer

pytestmark = pytest.mark.usefixtures("seeded")


def states():
    model, x, y = problem()
    optimizer = HFOptimizer(model.parameters())
    optimizer.step(lambda: F.mse_loss(model(x), y))
    return optimizer.state_dict()


def renamed(state):
    del state["param_groups"][0]["cg_tol"]


def reshaped(state):
    state["state"][0]["cg_iterate"] = torch.zeros(4, 3)


def repaired(state):
    state["state"][3]["preconditioner.s"] = torch.zeros(2, 9)


def regrouped(state):
    state["param_groups"][0]["params"].pop()


def spoilt(state):
    state["param_groups"][0]["cg_max_iter"] = -1


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (renamed, {}, r"param_groups\[0\] must have the entry 'cg_tol'"),
        (reshaped, {}, r"'cg_iterate' of parameter 0 must have .* shape \(5, 3\), got \(4, 3\)"),
        (repaired, {}, r"'preconditioner.s' of parameter 3 must have .*, got \(2, 9\)"),
        (regrouped, {}, r"hold \[6\] parameters, got \[5\]"),
        (spoilt, {}, "cg_max_iter must be at least 1"),
        (None, {"curvature": "hessian"}, "curvature must be this optimizer's 'hessian', got 'ggn'"),
        (None, {"preconditioner": "none"}, "preconditioner must be .*, got 'LBFGSPreconditioner'"),
        (None, {"history_size": 6}, "history_size must be this optimizer's 6, got 4"),
    ],
)
def test_a_state_that_does_not_fit_is_named(change, options, says):
    state = states()
    if change:
        change(state)
    model, x, y = problem()
    optimizer = HFOptimizer(model.parameters(), **options)
    optimizer.step(lambda: F.mse_loss(model(x), y))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict(state)
    assert_same_state(before, optimizer.state_dict())


def test_a_state_of_adam_is_refused():
    model, x, y = problem()
    adam = torch.optim.Adam(model.parameters())
    F.mse_loss(model(x), y).backward()
    adam.step()
    with pytest.raises(ValueError, match="another optimizer"):
        HFOptimizer(model.parameters()).load_state_dict(adam.state_dict())
