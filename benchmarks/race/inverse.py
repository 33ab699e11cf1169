"""An inverse problem: a heat equation whose coefficient is to be found from noisy readings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .physics import MLP, derivative
from .task import Metrics, RaceTask, Setting, Tensors

COEFFICIENT = 0.3
NOISE = 1e-3


class Heated(nn.Module):
    """A network for the temperature, and the coefficient, which begins at 1."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.temperature = MLP(2, 30, 30, 30, 1, low=low, high=high)
        self.coefficient = nn.Parameter(torch.ones(1, dtype=low.dtype))

    def forward(self, points: Tensor) -> Tensor:
        return self.temperature(points)

    def residual(self, points: Tensor) -> Tensor:
        """``u_t - k u_xx`` (N, 1) at points (N, 2) of time and place."""
        p = points.detach().requires_grad_()
        slope = derivative(self(p), p)
        u_xx = derivative(slope[:, 1], p)[:, 1:]
        return slope[:, :1] - self.coefficient * u_xx


def heat(setting: Setting, dtype: torch.dtype = torch.float64, resampled: bool = False) -> RaceTask:
    """``u_t = k u_xx`` on the unit square; 60 readings of u with noise of 1e-3 tell of k = 0.3.

    Start and ends are given at 200 points. The test metric is the relative error of k; the noise
    leaves about 1e-3 of it.

    Args:
        setting: As for all tasks.
        dtype: As for all tasks.
        resampled: Every step sees other 1,000 points of the equation.
    """
    count = 10_000 if setting.large else 1_000
    generator = torch.Generator().manual_seed(0)

    def draw(size: int, source: torch.Generator = generator) -> Tensor:
        return torch.rand(size, 2, generator=source, dtype=torch.float64)

    places = draw(60)
    noise = NOISE * torch.randn(60, 1, generator=generator, dtype=torch.float64)
    rim = draw(200)
    rim[:100, 1] = (torch.arange(100) % 2).double()
    rim[100:, 0] = 0.0

    def here(tensor: Tensor) -> Tensor:
        return tensor.to(setting.device, dtype)

    low, high = here(torch.zeros(2)), here(torch.ones(2))
    readings, edges, points = (
        (here(places), here(temperature(places) + noise)),
        (here(rim), here(temperature(rim))),
        here(draw(count)),
    )

    def residuals(model: nn.Module, batch: Tensors) -> Tensors:
        assert isinstance(model, Heated)
        misfits = (model(x) - u for x, u in (edges, readings))
        return model.residual(batch[0]), *misfits

    def loss(model: nn.Module, batch: Tensors) -> tuple[Tensor, Tensors]:
        found = residuals(model, batch)
        return torch.stack([r.square().mean() for r in found]).sum(), found

    def evaluate(model: nn.Module, whole: bool) -> Metrics:
        assert isinstance(model, Heated)
        error = abs(float(model.coefficient.detach()) / COEFFICIENT - 1)
        return {"train_loss": loss(model, (points,))[0].item(), "coefficient_error": error}

    def anew(source: torch.Generator) -> Tensors:
        return (here(draw(count, source)),)

    return RaceTask(
        "heat-resampled" if resampled else "heat",
        "heat equation, unknown coefficient" + (", new points in every step" * resampled),
        lambda: Heated(low, high),
        (points,),
        loss,
        evaluate,
        test_metric="coefficient_error",
        targets=[("coefficient_error", value) for value in (0.1, 0.03, 0.01, 3e-3, 2e-3)],
        budget=30.0,
        dtype=dtype,
        residuals=residuals,
        draw=anew if resampled else None,
        dimensions={"points": count, "readings": len(places)},
    )


def temperature(p: Tensor) -> Tensor:
    """The exact solution (N, 1) at points (N, 2) of time and place."""
    t, x = p[:, :1], p[:, 1:]
    decay = COEFFICIENT * math.pi**2 * t
    first, second = torch.sin(math.pi * x), torch.sin(2 * math.pi * x)
    return torch.exp(-decay) * first + 0.5 * torch.exp(-4 * decay) * second
