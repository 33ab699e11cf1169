"""Harder physics-informed tasks: Allen-Cahn, Helmholtz, fast advection, Poisson in 5 dimensions."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from .physics import derivative, physics_task
from .task import RaceTask, Setting

DIFFUSION = 1e-4  # of the Allen-Cahn equation
WAVES = (1, 4)  # half-waves of the Helmholtz equation's solution in x and y
SPEED = 30.0  # of the advection
#: 10,065 parameters, as in Dangel, Müller & Zeinhofer (2024) for Poisson in 5 dimensions.
WIDTHS_5D = (5, 64, 64, 48, 48, 1)


def allen_cahn(setting: Setting, dtype: torch.dtype = torch.float64) -> RaceTask:
    """``u_t = 1e-4 u_xx + 5 u - 5 u^3``, ``u(0, x) = x^2 cos(pi x)``, u = -1 at x = -1 and 1.

    The equation of Raissi, Perdikaris & Karniadakis (2019); its fronts are 0.01 wide.
    """
    inside, edge = (20_000, 400) if setting.large else (2_000, 150)
    low, high = (0.0, -1.0), (1.0, 1.0)
    points = uniform(inside, low, high)
    rim = uniform(edge, low, high, seed=1)
    _on_start_and_sides(rim, -1.0, 1.0)
    start = rim[:, 1:].square() * torch.cos(math.pi * rim[:, 1:])  # -1 at both ends

    def residual(model: nn.Module, p: Tensor) -> Tensor:
        p = p.requires_grad_()
        u = model(p)
        slope = derivative(u, p)
        u_xx = derivative(slope[:, 1], p)[:, 1:]
        return slope[:, :1] - DIFFUSION * u_xx - 5 * u + 5 * u**3

    times, places, values = allen_cahn_solution()
    return physics_task(
        "allen-cahn",
        "Allen-Cahn equation",
        (2, 20, 20, 20, 20, 1),
        (torch.tensor(low), torch.tensor(high)),
        residual,
        points,
        (rim, start),
        (torch.cartesian_prod(times, places), values.reshape(-1, 1)),
        setting,
        dtype,
        targets=[("test_error", value) for value in (0.5, 0.1, 0.03, 0.01, 1e-3)],
        budget=60.0,
    )


def allen_cahn_solution(intervals: int = 1024, steps: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """Times (51,), places (129,) and the solution there (51, 129), right to about 1e-6.

    ``u + 1`` vanishes at both ends, so it is a series of sines; in time Runge and Kutta's method of
    fourth order.
    """
    x = np.linspace(-1, 1, intervals + 1)
    waves = (math.pi / 2 * np.arange(intervals + 1)) ** 2

    def change(v: np.ndarray) -> np.ndarray:
        odd = np.concatenate([v, -v[-2:0:-1]])
        bend = np.fft.irfft(-waves * np.fft.rfft(odd), n=2 * intervals)[: intervals + 1]
        u = v - 1
        slope = DIFFUSION * bend + 5 * u - 5 * u**3
        slope[[0, -1]] = 0.0
        return slope

    v, h = x**2 * np.cos(math.pi * x) + 1, 1 / steps
    kept = [v]
    for i in range(steps):
        a = change(v)
        b = change(v + h / 2 * a)
        c = change(v + h / 2 * b)
        v = v + h / 6 * (a + 2 * b + 2 * c + change(v + h * c))
        if (i + 1) % (steps // 50) == 0:
            kept.append(v)
    every = intervals // 128
    found = torch.from_numpy(np.stack(kept)[:, ::every] - 1)
    return torch.linspace(0, 1, 51).double(), torch.from_numpy(x[::every].copy()), found


def helmholtz(setting: Setting, dtype: torch.dtype = torch.float64) -> RaceTask:
    """``u_xx + u_yy + u = q`` on [-1, 1]^2, ``u = sin(pi x) sin(4 pi y)``, zero on the edges.

    The problem of Wang, Teng & Perdikaris (2021).
    """
    inside, edge = (20_000, 1_000) if setting.large else (1_500, 200)
    low, high = (-1.0, -1.0), (1.0, 1.0)
    rim = uniform(edge, low, high, seed=1)
    sides = torch.arange(edge) % 4
    rim[torch.arange(edge), sides % 2] = 2 * (sides // 2).double() - 1

    def exact(p: Tensor) -> Tensor:
        a, b = WAVES
        return torch.sin(a * math.pi * p[:, :1]) * torch.sin(b * math.pi * p[:, 1:])

    def residual(model: nn.Module, p: Tensor) -> Tensor:
        p = p.requires_grad_()
        u = model(p)
        factor = 1 - math.pi**2 * sum(a**2 for a in WAVES)
        return laplacian(u, p) + u - factor * exact(p.detach())

    line = torch.linspace(-1, 1, 64, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    return physics_task(
        "helmholtz",
        "Helmholtz equation, 2-d",
        (2, 30, 30, 30, 1),
        (torch.tensor(low), torch.tensor(high)),
        residual,
        uniform(inside, low, high),
        (rim, torch.zeros(edge, 1, dtype=torch.float64)),
        (grid, exact(grid)),
        setting,
        dtype,
        targets=[("test_error", value) for value in (0.1, 1e-2, 1e-3, 1e-4)],
        budget=40.0,
    )


def advection(setting: Setting, dtype: torch.dtype = torch.float64) -> RaceTask:
    """``u_t + 30 u_x = 0``, ``u(0, x) = sin x``: a speed at which PINNs are known to fail.

    As in Krishnapriyan et al. (2021), with values at the left end in place of periodic ones.
    """
    inside, edge = (20_000, 1_000) if setting.large else (1_500, 200)
    low, high = (0.0, 0.0), (1.0, 2 * math.pi)
    rim = uniform(edge, low, high, seed=1)
    rim[::2, 0] = 0.0
    rim[1::2, 1] = 0.0

    def exact(p: Tensor) -> Tensor:
        return torch.sin(p[:, 1:] - SPEED * p[:, :1])

    def residual(model: nn.Module, p: Tensor) -> Tensor:
        p = p.requires_grad_()
        slope = derivative(model(p), p)
        return slope[:, :1] + SPEED * slope[:, 1:]

    lines = (torch.linspace(a, b, 64, dtype=torch.float64) for a, b in zip(low, high, strict=True))
    grid = torch.cartesian_prod(*lines)
    return physics_task(
        "advection",
        "advection at speed 30",
        (2, 30, 30, 30, 1),
        (torch.tensor(low), torch.tensor(high, dtype=torch.float64)),
        residual,
        uniform(inside, low, high),
        (rim, exact(rim)),
        (grid, exact(grid)),
        setting,
        dtype,
        targets=[("test_error", value) for value in (0.5, 0.1, 1e-2, 1e-3)],
        budget=40.0,
    )


def poisson5d(setting: Setting, dtype: torch.dtype = torch.float64) -> RaceTask:
    """``-laplacian u = pi^2 sum sin(pi x_i)`` on the unit cube in 5 dimensions, 10,065 parameters.

    The solution ``sum sin(pi x_i)`` is given on the faces. Dense steps end about here: the Jacobian
    takes 280 MB, a matrix of parameters by parameters 810 MB.
    """
    inside, edge = (10_000, 2_000) if setting.large else (3_000, 500)
    low, high = (0.0,) * 5, (1.0,) * 5
    rim = uniform(edge, low, high, seed=1)
    faces = torch.arange(edge) % 10
    rim[torch.arange(edge), faces % 5] = (faces // 5).double()

    def exact(p: Tensor) -> Tensor:
        return torch.sin(math.pi * p).sum(dim=1, keepdim=True)

    def residual(model: nn.Module, p: Tensor) -> Tensor:
        p = p.requires_grad_()
        return -laplacian(model(p), p) - math.pi**2 * exact(p.detach())

    tests = uniform(4_000, low, high, seed=2)
    return physics_task(
        "poisson5d",
        "Poisson equation, 5-d",
        WIDTHS_5D,
        (torch.tensor(low), torch.tensor(high)),
        residual,
        uniform(inside, low, high),
        (rim, exact(rim)),
        (tests, exact(tests)),
        setting,
        dtype,
        targets=[("test_error", value) for value in (0.1, 1e-2, 1e-3, 1e-4)],
        budget=120.0,
    )


def laplacian(values: Tensor, points: Tensor) -> Tensor:
    """Sum of the second derivatives (N, 1) of values (N, 1) in points (N, D), with its graph."""
    slope = derivative(values, points)
    bends: list[Tensor] = [
        derivative(slope[:, i], points)[:, i : i + 1] for i in range(points.shape[1])
    ]
    return torch.stack(bends).sum(dim=0)


def uniform(count: int, low: tuple[float, ...], high: tuple[float, ...], seed: int = 0) -> Tensor:
    """Points (count, D) of a box in float64, always the same."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(count, len(low), generator=generator, dtype=torch.float64)
    first, last = torch.tensor(low).double(), torch.tensor(high).double()
    return first + (last - first) * unit


def _on_start_and_sides(rim: Tensor, left: float, right: float) -> None:
    sides = torch.arange(len(rim)) % 3
    rim[sides == 0, 0] = 0.0
    rim[sides == 1, 1] = left
    rim[sides == 2, 1] = right
