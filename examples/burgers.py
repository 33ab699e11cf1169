"""Solve Burgers' equation with a network, by the residual of the equation itself.

python examples/burgers.py

    u_t + u u_x = ν u_xx,  ν = 0.05/π,  u(0, x) = -sin(πx),  u = 0 at x = -1 and x = 1:

the problem of Raissi, Perdikaris & Karniadakis (2019) at five times their viscosity. A front forms
at x = 0; the picture compares the solution with the exact one, by Cole's and Hopf's transformation.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from torch_hf import HFOptimizer
from torch_hf.tracking import CSVLogger

NU = 0.05 / math.pi


def exact(t: Tensor, x: Tensor) -> Tensor:
    """The solution at times (n,) and places (n,): a mean over a heat kernel, by quadrature."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite.hermgauss(120))
    y = x[:, None] - points * (4 * NU * t[:, None]).sqrt()
    logits = -torch.cos(math.pi * y) / (2 * math.pi * NU) + weights.log()
    return -(logits.softmax(dim=1) * torch.sin(math.pi * y)).sum(dim=1)


def residual(model: nn.Module, points: Tensor) -> Tensor:
    """By how much the network misses the equation at points (t, x)."""
    points = points.detach().requires_grad_()
    u = model(points)
    # create_graph keeps the derivatives differentiable: the loss is a function of them
    (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (bend,) = torch.autograd.grad(slope[:, 1].sum(), points, create_graph=True)
    return slope[:, :1] + u * slope[:, 1:] - NU * bend[:, 1:]


def uniform(cases: int) -> Tensor:
    """Points (t, x) anywhere in the domain."""
    return torch.rand(cases, 2) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])


def boundary(cases: int) -> tuple[Tensor, Tensor]:
    """Points at the start and at both ends in turn, and u there."""
    points, sides = uniform(cases), torch.arange(cases) % 3
    points[sides == 0, 0] = 0.0
    points[sides == 1, 1] = -1.0
    points[sides == 2, 1] = 1.0
    return points, torch.where(sides == 0, -torch.sin(math.pi * points[:, 1]), 0.0)[:, None]


def main() -> None:
    """Train, and leave the picture and the CSV file in runs/burgers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, default=60, help="of the optimizer")
    parser.add_argument("--points", type=int, default=600, help="inside of the domain")
    parser.add_argument("--out", type=Path, default=Path("runs") / "burgers", help="folder")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # the last digits are what it is about
    inside, (rim, values) = uniform(args.points), boundary(max(3, args.points // 10))
    times, places = torch.linspace(0, 1, 101), torch.linspace(-1, 1, 161)
    grid = torch.cartesian_prod(times, places)
    truth = exact(*grid.T)[:, None]

    hidden = [m for _ in range(2) for m in (nn.Linear(20, 20), nn.Tanh())]
    model = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), *hidden, nn.Linear(20, 1))
    optimizer = HFOptimizer(model.parameters())  # every default: the batch has no noise

    def closure() -> Tensor:
        # Two means of squares: both are recognised, and curvature is J^T J of the residuals.
        return residual(model, inside).square().mean() + (model(rim) - values).square().mean()

    seconds = 0.0
    with CSVLogger(args.out / "training.csv") as logger:
        for step in range(1, args.max_steps + 1):
            start = time.perf_counter()
            optimizer.step(closure)
            seconds += time.perf_counter() - start
            with torch.no_grad():
                error = float((model(grid) - truth).norm() / truth.norm())
            report = optimizer.last_report
            logger.log(report, elapsed=seconds, test_relative_error=error)
            if step % 10 == 0 or step == args.max_steps:
                print(
                    f"step {step:3d}  loss {report.new_loss:.2e}  relative L2 error {error:.1e}  "
                    f"CG {report.cg_iterations:3d}  {seconds:.1f} s"
                )
    draw(args.out / "solution.png", model, times, places, truth.reshape(101, 161))


@torch.no_grad()
def draw(path: Path, model: nn.Module, times: Tensor, places: Tensor, truth: Tensor) -> None:
    """The solution over time and place, and three moments beside the exact solution."""
    found = model(torch.cartesian_prod(times, places)).reshape(truth.shape)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    image = axes[0].pcolormesh(times, places, found.T, cmap="RdBu")
    axes[0].set(title="network", xlabel="t", ylabel="x")
    figure.colorbar(image, ax=axes[0], label="u")
    for ax, i in zip(axes[1:], (25, 50, 100), strict=True):
        ax.plot(places, truth[i], "k", linewidth=3, alpha=0.3, label="exact")
        ax.plot(places, found[i], "--", color="#D55E00", label="network")
        ax.set(title=f"t = {float(times[i]):.2f}", xlabel="x")
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
