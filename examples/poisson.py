"""Solve Poisson's equation with a network, by the residual of the equation itself.

python examples/poisson.py

    -(u_xx + u_yy) = 2 π² sin(πx) sin(πy)  on the unit square,  u = 0 on its edges,

whose solution is sin(πx) sin(πy). A physics-informed loss is full-batch, without noise and badly
conditioned, which is what Gauss-Newton steps are for.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from torch_hf import HFOptimizer
from torch_hf.tracking import CSVLogger


def exact(points: Tensor) -> Tensor:
    """The solution at points (n, 2), as (n, 1)."""
    return torch.sin(math.pi * points).prod(dim=1, keepdim=True)


def residual(model: nn.Module, points: Tensor) -> Tensor:
    """By how much the network misses the equation at each point."""
    points = points.detach().requires_grad_()
    # create_graph keeps the derivatives differentiable: the loss is a function of them
    (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
    laplacian = 0.0
    for i in range(2):
        (bend,) = torch.autograd.grad(slope[:, i].sum(), points, create_graph=True)
        laplacian = laplacian + bend[:, i : i + 1]
    return -laplacian - 2 * math.pi**2 * exact(points.detach())


def edge_points(cases: int) -> Tensor:
    """Points on the four sides in turn."""
    points = torch.rand(cases, 2)
    sides = torch.arange(cases) % 4
    points[torch.arange(cases), sides % 2] = (sides // 2).to(points.dtype)
    return points


def main() -> None:
    """Train, and leave the picture and the CSV file in runs/poisson."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--max-steps", type=int, default=60, help="of the optimizer")
    parser.add_argument("--points", type=int, default=900, help="inside of the square")
    parser.add_argument("--seed", type=int, default=0, help="of points and weights")
    parser.add_argument("--out", type=Path, default=Path("runs") / "poisson", help="folder")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_default_dtype(torch.float64)  # the last digits are what it is about
    inside, edge = torch.rand(args.points, 2), edge_points(args.points // 8)
    line = torch.linspace(0, 1, 60)
    grid = torch.cartesian_prod(line, line)
    truth = exact(grid)

    layers = [nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)]
    model = nn.Sequential(*layers)
    optimizer = HFOptimizer(model.parameters())  # every default: the batch has no noise

    def closure() -> Tensor:
        # Two means of squares: both are recognised, and curvature is J^T J of the residuals.
        return residual(model, inside).square().mean() + model(edge).square().mean()

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
            if step % 5 == 0 or step == args.max_steps:
                print(
                    f"step {step:3d}  loss {report.new_loss:.2e}  relative L2 error {error:.1e}  "
                    f"CG {report.cg_iterations:3d}  {seconds:.1f} s"
                )
            if report.converged:
                break  # as low as float64 can tell
    draw(args.out / "solution.png", model, grid, truth)


@torch.no_grad()
def draw(path: Path, model: nn.Module, grid: Tensor, truth: Tensor) -> None:
    """The network's solution, the exact one, and their difference."""
    found = model(grid)
    panels = {"network": found, "exact": truth, "difference": found - truth}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for ax, (name, values) in zip(axes, panels.items(), strict=True):
        square = values.reshape(60, 60).T  # rows are y
        colours = "RdBu" if name == "difference" else "viridis"
        limit = float(square.abs().max())
        low = -limit if name == "difference" else 0.0
        image = ax.imshow(
            square, origin="lower", extent=(0, 1, 0, 1), cmap=colours, vmin=low, vmax=limit
        )
        ax.set(title=name, xlabel="x", ylabel="y")
        figure.colorbar(image, ax=ax)
    figure.savefig(path, dpi=120)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
