"""The first step under TF32 says so, once; nobody else is bothered."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.curvature import precision
from torch_hf.optimizer import hf

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MATMUL = "torch.backends.cuda.matmul.fp32_precision"
CONV = "torch.backends.cudnn.conv.fp32_precision"


@pytest.fixture
def ampere(monkeypatch):
    """A device with TF32, as far as questions go."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def heard(device=CUDA, dtype=torch.float32, modules=()):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        precision.warn_of_tf32(device, dtype, modules)
    return "".join(str(w.message) for w in caught)


@pytest.mark.parametrize(
    ("matmul", "modules", "named"),
    [
        ("ieee", [nn.Linear(1, 1)], []),
        ("ieee", [nn.Linear(1, 1), nn.Conv2d(1, 1, 1)], [CONV]),
        ("ieee", [nn.GRU(1, 1)], ["torch.backends.cudnn.rnn.fp32_precision"]),
        ("tf32", [nn.Linear(1, 1)], [MATMUL]),
        ("tf32", [nn.Conv1d(1, 1, 1)], [MATMUL, CONV]),
    ],
)
def test_settings_that_matter_to_the_modules_are_named(ampere, matmul, modules, named):
    torch.backends.cuda.matmul.fp32_precision = matmul
    said = heard(modules=modules)
    assert all(f"{name} = 'tf32'" in said for name in named)
    assert said.count("fp32_precision") == len(named)


def test_where_there_is_no_tf32_nothing_is_said(ampere, monkeypatch):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert heard()
    assert not heard(dtype=torch.float64)
    assert not heard(device=CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not heard()


def test_the_first_step_looks_once_and_an_error_there_changes_nothing(monkeypatch):
    model, x = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), torch.randn(8, 3)
    optimizer = HFOptimizer(model.parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    asked = []

    def warn(device, dtype, modules):
        asked.append((device, dtype, model in modules))
        raise UserWarning("as an error")

    monkeypatch.setattr(hf, "warn_of_tf32", warn)
    with pytest.raises(UserWarning):
        optimizer.step(lambda: F.mse_loss(model(x), x[:, :2]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for _ in range(2):
        optimizer.step(lambda: F.mse_loss(model(x), x[:, :2]))
    assert asked == [(CPU, torch.float32, True)]
