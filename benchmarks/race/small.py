"""Tasks that need no data set: the adding problem and a small ill-conditioned regression."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .task import RaceTask, Setting, Tensors, supervised


def adding(setting: Setting) -> RaceTask:
    """The adding problem of Hochreiter & Schmidhuber (1997), a plain tanh network, full batch.

    Predicting the mean has a squared error of 1/6.
    """
    steps, cases, units = (100, 20_000, 100) if setting.large else (30, 4_000, 40)
    train, test = adding_data(cases, steps, seed=0), adding_data(2_000, steps, seed=1)
    return supervised(
        "adding",
        f"adding problem, {steps} steps",
        lambda: Recurrent(2, units),
        tuple(tensor.to(setting.device) for tensor in train),
        tuple(tensor.to(setting.device) for tensor in test),
        F.mse_loss,
        {"error": lambda outputs, targets: (outputs - targets).square().mean(dim=1)},
        test_metric="test_error",
        targets=[("test_error", value) for value in (0.1, 0.01, 1e-3, 1e-4)],
        budget=120.0,
        structurally_damped=structurally_damped,
    )


def adding_data(cases: int, steps: int, seed: int) -> Tensors:
    """Sequences ``(N, T, 2)`` of a number in [0, 1] and a mark; targets ``(N, 1)``.

    Two steps are marked, one in each half; the target is the sum of their numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(cases, steps, generator=generator)
    half = steps // 2
    first = torch.randint(half, (cases, 1), generator=generator)
    second = torch.randint(half, steps, (cases, 1), generator=generator)
    marks = torch.zeros(cases, steps).scatter_(1, torch.cat([first, second], dim=1), 1.0)
    return torch.stack([numbers, marks], dim=2), (numbers * marks).sum(dim=1, keepdim=True)


class Recurrent(nn.Module):
    """``h' = tanh(W h + V x + b)``, the last h read out; W orthogonal at the start.

    Written with linear layers and not ``nn.RNN``, whose fused kernel for GPUs has no second
    derivative.
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, units)
        self.again = nn.Linear(units, units, bias=False)
        self.read = nn.Linear(units, 1)
        nn.init.orthogonal_(self.again.weight)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.read(self.states(sequences)[-1])

    def states(self, sequences: Tensor) -> list[Tensor]:
        """The hidden states after each step, ``(N, units)`` each."""
        entering, states = self.enter(sequences), []
        state = entering.new_zeros(len(sequences), self.again.in_features)
        for t in range(sequences.shape[1]):
            state = torch.tanh(self.again(state) + entering[:, t])
            states.append(state)
        return states


def structurally_damped(
    model: nn.Module, batch: Tensors, weight: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss with ``weight`` times half the squared change of the hidden states; all outputs.

    Summed over steps and units, a mean over cases. Value and gradient of the second term are zero;
    its Gauss-Newton matrix is that of structural damping (Martens & Sutskever 2011, section 3).
    The states are outputs one by one: stacked, they make a product twice as dear.
    """
    assert isinstance(model, Recurrent)
    states = model.states(batch[0])
    outputs = model.read(states[-1])
    loss = F.mse_loss(outputs, batch[1])
    for state in states:
        change = F.mse_loss(state, state.detach(), reduction="sum")
        loss = loss + 0.5 * weight * change / len(state)
    return loss, (outputs, *states)


def regression(setting: Setting, dtype: torch.dtype = torch.float64) -> RaceTask:
    """Least squares of a 2-20-20-1 tanh network (501 parameters), nearly without noise.

    Noise of 1e-4 in 400 values of ``sin(3 x) cos(5 y) + 1/2 exp(-4 (x - y)^2)`` on the unit square;
    the test set has none.
    """
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2_400, 2, generator=generator, dtype=torch.float64)
    values = regression_function(points)
    noise = torch.randn(400, 1, generator=generator, dtype=torch.float64)
    train, test = (points[:400], values[:400] + 1e-4 * noise), (points[400:], values[400:])
    variance = float(test[1].var())
    bits = "" if dtype == torch.float64 else "32"

    def relative(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean(dim=1) / variance

    return supervised(
        "regression" + bits,
        "regression, 501 parameters" + (", float32" if bits else ""),
        lambda: regression_model().to(dtype),
        tuple(tensor.to(setting.device, dtype) for tensor in train),
        tuple(tensor.to(setting.device, dtype) for tensor in test),
        F.mse_loss,
        {"error": relative},
        test_metric="test_error",
        targets=[("train_loss", value) for value in (1e-4, 1e-5, 1e-6, 1e-7, 2e-8)],
        budget=15.0,
        dtype=dtype,
    )


def regression_function(points: Tensor) -> Tensor:
    x, y = points[:, :1], points[:, 1:]
    return torch.sin(3 * x) * torch.cos(5 * y) + 0.5 * torch.exp(-4 * (x - y).square())


def regression_model() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    ).double()
