"""A small problem, and comparisons to the bit."""

import torch
from torch import nn


def problem():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    return model, torch.randn(16, 3), torch.randn(16, 2)


def bits(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def assert_same_state(a, b):
    assert str(a["param_groups"]) == str(b["param_groups"])
    assert a["state"].keys() == b["state"].keys()
    for key in a["state"]:
        for name, value in a["state"][key].items():
            other = b["state"][key][name]
            assert (
                torch.equal(value, other)
                if isinstance(value, torch.Tensor)
                else str(value) == str(other)
            )
