"""The swap: one long call of L-BFGS, and a loop of steps on the same closure.

python benchmarks/swap.py

Poisson's equation by its residual: 2 x 16 tanh, 337 parameters, 200 points inside and 80 on the
edges, float64, the same weights for both. CPU seconds of one thread.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, make_parser, parse, print_table, results_folder, write_json
from style import OTHERS, OURS
from torch import Tensor, nn

from torch_hf import HFOptimizer

POINTS = 60  # of a curve


class Problem:
    """Network, points and losses; every call of the closure is counted and timed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)]
        self.model = nn.Sequential(*layers).double()
        self.inside, self.edge = torch.rand(200, 2).double(), torch.rand(80, 2).double()
        side = torch.arange(80) % 4
        self.edge[torch.arange(80), side % 2] = (side // 2).double()
        self.calls, self.start = 0, time.process_time()
        self.curve: list[dict[str, float]] = []

    def closure(self) -> Tensor:
        """As ``torch.optim.LBFGS`` takes it."""
        self.model.zero_grad()
        loss = self.residual().square().mean() + self.model(self.edge).square().mean()
        loss.backward()
        self.calls += 1
        return loss

    def residual(self) -> Tensor:
        """By how much the network misses the equation at each point."""
        points = self.inside.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.model(points).sum(), points, create_graph=True)
        laplacian = torch.zeros(())
        for i in range(2):
            (bend,) = torch.autograd.grad(slope[:, i].sum(), points, create_graph=True)
            laplacian = laplacian + bend[:, i : i + 1]
        return -laplacian - 2 * math.pi**2 * solution(self.inside)

    def keep(self, loss: float, steps: int) -> None:
        """A point of the curve."""
        seconds = time.process_time() - self.start
        point = {"seconds": seconds, "calls": self.calls, "steps": steps, "loss": loss}
        self.curve.append({**point, "error": self.error()})

    @torch.no_grad()
    def error(self) -> float:
        """Relative error of the solution on a grid."""
        line = torch.linspace(0, 1, 40).double()
        grid = torch.cartesian_prod(line, line)
        return float((self.model(grid) - solution(grid)).norm() / solution(grid).norm())


def solution(points: Tensor) -> Tensor:
    return torch.sin(math.pi * points).prod(dim=1, keepdim=True)


def lbfgs(iterations: int) -> list[dict[str, float]]:
    """One call; its closure keeps a point now and then."""
    problem = Problem()
    optimizer = torch.optim.LBFGS(
        problem.model.parameters(),
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        history_size=100,
        line_search_fn="strong_wolfe",
    )
    due, best = 1.0, math.inf

    def closure() -> Tensor:
        nonlocal due, best
        loss = problem.closure()
        best = min(best, float(loss.detach()))
        if problem.calls >= due:
            problem.keep(best, problem.calls)
            due *= 1.2
        return loss

    optimizer.step(closure)
    state = optimizer.state[next(problem.model.parameters())]
    problem.keep(best, state["n_iter"])
    return problem.curve


def hf(steps: int) -> list[dict[str, float]]:
    """A loop of steps with every default."""
    problem = Problem()
    optimizer = HFOptimizer(problem.model.parameters())
    for step in range(1, steps + 1):
        optimizer.step(problem.closure)
        problem.keep(optimizer.last_report.new_loss, step)
        if optimizer.last_report.converged:
            break
    return problem.curve


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Loss against CPU seconds, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    axes.set(xscale="log", yscale="log", xlabel="CPU seconds, one thread", ylabel="loss")
    styles = {"HFOptimizer": (OURS, 2.4), "torch.optim.LBFGS": (OTHERS[0], 1.6)}
    for name, curve in curves.items():
        colour, width = styles[name]
        x, y = ([point[key] for point in curve] for key in ("seconds", "loss"))
        axes.plot(x, y, label=name, color=colour, linewidth=width)
    axes.set_title("Poisson's equation by its residual, 337 parameters, float64", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--iterations", type=int, default=50000, help="max_iter of L-BFGS")
    parser.add_argument("--steps", type=int, default=100, help="of ours")
    parser.set_defaults(threads=1)
    args = parse(parser)
    curves = {"HFOptimizer": hf(args.steps), "torch.optim.LBFGS": lbfgs(args.iterations)}
    ends: dict[str, Any] = {name: curve[-1] for name, curve in curves.items()}
    columns = ["steps", "calls", "loss", "error", "seconds"]
    print_table(
        "One call of L-BFGS, and steps of ours",
        ["optimizer", *columns],
        [[name, *(f"{end[key]:.3g}" for key in columns)] for name, end in ends.items()],
    )
    plot(curves, results_folder(args.record) / "swap-cpu.png")
    content = {"environment": environment(args.device, args.threads), "ends": ends}
    kept = {name: thinned(curve) for name, curve in curves.items()}
    write_json("swap", args.device, {**content, "curves": kept}, args.record)


def thinned(curve: list[dict[str, float]]) -> dict[str, list[float]]:
    """Columns of at most ``POINTS`` points, four digits each."""
    every = max(1, math.ceil(len(curve) / POINTS))
    kept = [*curve[:-1:every], curve[-1]]
    return {key: [float(f"{point[key]:.4g}") for point in kept] for key in curve[0]}


if __name__ == "__main__":
    main()
