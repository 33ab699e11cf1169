"""Physics-informed tasks, all points in every step: 2-d Poisson, 1-d viscous Burgers, the frame."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from .task import Metrics, RaceTask, Setting, Tensors

VISCOSITY = 0.01 / math.pi


class MLP(nn.Sequential):
    """Tanh units with Glorot's initialisation, a linear output; inputs mapped to [-1, 1]."""

    def __init__(self, *widths: int, low: Tensor, high: Tensor) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layer = nn.Linear(inputs, outputs, dtype=low.dtype)
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.Tanh()]
        super().__init__(*layers[:-1])
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(2 * (points - self.low) / (self.high - self.low) - 1)


def poisson(setting: Setting, dtype: torch.dtype = torch.float64) -> RaceTask:
    """``-(u_xx + u_yy) = 2 pi^2 sin(pi x) sin(pi y)`` on the unit square, u = 0 on its edges."""
    inside, edge = (10_000, 1_000) if setting.large else (900, 100)
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(inside, 2, generator=generator, dtype=torch.float64)
    rim = torch.rand(edge, 2, generator=generator, dtype=torch.float64)
    sides = torch.arange(edge) % 4
    rim[torch.arange(edge), sides % 2] = (sides // 2).double()

    def exact(p: Tensor) -> Tensor:
        return (torch.sin(math.pi * p[:, :1])) * torch.sin(math.pi * p[:, 1:])

    def residual(model: nn.Module, p: Tensor) -> Tensor:
        p = p.requires_grad_()
        (slope,) = torch.autograd.grad(model(p).sum(), p, create_graph=True)
        laplacian = sum(derivative(slope[:, i], p)[:, i : i + 1] for i in range(2))
        return -laplacian - 2 * math.pi**2 * exact(p.detach())

    line = torch.linspace(0, 1, 64, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    return physics_task(
        "poisson",
        "Poisson equation, 2-d",
        (2, 32, 32, 32, 1),
        (torch.zeros(2), torch.ones(2)),
        residual,
        points,
        (rim, torch.zeros(edge, 1, dtype=torch.float64)),
        (grid, exact(grid)),
        setting,
        dtype,
        targets=[("test_error", value) for value in (1e-2, 1e-3, 3e-4, 1e-4)],
        budget=40.0,
    )


def burgers(setting: Setting, dtype: torch.dtype = torch.float64, more: bool = False) -> RaceTask:
    """``u_t + u u_x = nu u_xx``, nu = 0.01/pi, ``u(0, x) = -sin(pi x)``, u = 0 at x = -1 and 1.

    The equation, and the network but for its depth, of Raissi, Perdikaris & Karniadakis (2019).
    With ``more`` it has three times as many points.
    """
    inside, edge = (20_000, 400) if setting.large else (2_000, 150)
    if more:
        inside, edge = 3 * inside, 3 * edge
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor([0.0, -1.0]), torch.tensor([1.0, 1.0])
    uniform = torch.rand(inside + edge, 2, generator=generator, dtype=torch.float64)
    points, rim = (low + (high - low) * uniform).split([inside, edge])
    sides = torch.arange(edge) % 3
    rim[sides == 0, 0] = 0.0  # a third of them each: the start, the left and the right end
    rim[sides == 1, 1] = -1.0
    rim[sides == 2, 1] = 1.0
    values = torch.where(sides[:, None] == 0, -torch.sin(math.pi * rim[:, 1:]), 0.0)

    def residual(model: nn.Module, p: Tensor) -> Tensor:
        p = p.requires_grad_()
        u = model(p)
        (slope,) = torch.autograd.grad(u.sum(), p, create_graph=True)
        u_xx = derivative(slope[:, 1], p)[:, 1:]
        return slope[:, :1] + u * slope[:, 1:] - VISCOSITY * u_xx

    times, places = torch.linspace(0, 1, 51).double(), torch.linspace(-1, 1, 201).double()
    grid = torch.cartesian_prod(times, places)
    return physics_task(
        "burgers-points" if more else "burgers",
        "viscous Burgers equation" + (", three times the points" if more else ""),
        (2, 20, 20, 20, 20, 1),
        (low, high),
        residual,
        points,
        (rim, values),
        (grid, cole_hopf(grid[:, 0], grid[:, 1])[:, None]),
        setting,
        dtype,
        targets=[("test_error", value) for value in (0.3, 0.1, 0.03, 0.01, 3e-3)],
        budget=120.0,
    )


def cole_hopf(t: Tensor, x: Tensor, viscosity: float = VISCOSITY, nodes: int = 120) -> Tensor:
    """Burgers' exact solution from ``-sin(pi x)``, by Gauss-Hermite quadrature.

    Cole's and Hopf's substitution makes it a heat equation, so that u(t, x) is a mean of
    ``-sin(pi y)`` with weights ``exp(-cos(pi y) / (2 pi nu) - (x - y)^2 / (4 nu t))``.
    """
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite.hermgauss(nodes))
    y = x[:, None] - points * (4 * viscosity * t[:, None]).sqrt()
    logits = -torch.cos(math.pi * y) / (2 * math.pi * viscosity) + weights.log()
    return -(torch.softmax(logits, dim=1) * torch.sin(math.pi * y)).sum(dim=1)


def physics_task(
    name: str,
    title: str,
    widths: tuple[int, ...],
    box: tuple[Tensor, Tensor],
    residual: Callable[[nn.Module, Tensor], Tensor],
    points: Tensor,
    boundary: Tensors,
    truth: Tensors,
    setting: Setting,
    dtype: torch.dtype,
    *,
    targets: list[tuple[str, float]],
    budget: float,
) -> RaceTask:
    """Mean squares of the equation's residual inside and of the misfit on the boundary."""
    low, high, points, rim, values, grid, solution = (
        tensor.to(setting.device, dtype) for tensor in (*box, points, *boundary, *truth)
    )

    def residuals(model: nn.Module, batch: Tensors) -> Tensors:
        return residual(model, batch[0].detach()), model(rim) - values

    def loss(model: nn.Module, batch: Tensors) -> tuple[Tensor, Tensors]:
        inside, misfit = residuals(model, batch)
        return inside.square().mean() + misfit.square().mean(), (inside, misfit)

    def evaluate(model: nn.Module, whole: bool) -> Metrics:
        with torch.no_grad():
            distance = torch.linalg.vector_norm(model(grid) - solution)
        return {
            "train_loss": loss(model, (points,))[0].item(),
            "test_error": float(distance / torch.linalg.vector_norm(solution)),
        }

    bits = "" if dtype == torch.float64 else "32"
    return RaceTask(
        name + bits,
        f"{title}, {'float64' if dtype == torch.float64 else 'float32'}",
        lambda: MLP(*widths, low=low, high=high),
        (points,),
        loss,
        evaluate,
        test_metric="test_error",
        targets=targets,
        budget=budget,
        dtype=dtype,
        residuals=residuals,
        dimensions={"points": len(points), "boundary_points": len(rim)},
    )


def derivative(values: Tensor, points: Tensor) -> Tensor:
    """The gradient of each point's value in its coordinates, with its graph."""
    return torch.autograd.grad(values.sum(), points, create_graph=True)[0]
