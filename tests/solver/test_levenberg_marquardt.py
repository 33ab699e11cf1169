"""The search over lambda where the loss has no curvature, or where lambda begins at 0."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.solver.levenberg_marquardt import column_scale

pytestmark = pytest.mark.usefixtures("seeded")
X = torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = X[:, :3].sin()
FAR = 100 * X[:, :1].sign()


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


#: Model, loss and targets: in the linear zone of Huber's loss there is a slope but no curvature.
CASES = {
    "no curvature": (lambda: nn.Linear(4, 1), F.huber_loss, FAR),
    "none in one output": (network, F.huber_loss, torch.cat([Y[:, :2], FAR], 1)),
    "curvature": (network, F.mse_loss, Y),
    "rank one": (network, lambda z, y: F.mse_loss(z, y).sqrt(), Y),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("damping", [None, 0.0, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_steps_are_never_stuck(name, damping, dtype, scale):
    make, loss, targets = CASES[name]
    model, x, y = make().to(dtype), X.to(dtype), targets.to(dtype)
    optimizer = HFOptimizer(model.parameters(), damping=damping, solver="exact")
    losses = []
    for _ in range(8):
        optimizer.step(lambda: scale * loss(model(x), y))
        losses.append(optimizer.last_report.loss)
    assert losses[-1] < 0.9 * losses[0]
    assert sum(b < a for a, b in pairwise(losses)) >= 5


def test_columns_of_zero_are_scaled_by_one():
    scale = column_scale(torch.tensor([4.0, 0.0, 4.0, 0.0]))
    assert scale[[1, 3]].tolist() == [1.0, 1.0]
    assert scale[0] == scale[2] > 0
