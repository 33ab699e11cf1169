"""Pairs of products that bidiagonalisation takes to solve a step of Poisson's equation.

python benchmarks/lanczos.py --threads 1

At points of a run by exact steps the same quadratic, with lambda at 1e-14 of the trace, is solved
from the Jacobian, by Golub-Kahan bidiagonalisation and by conjugate gradients. Counted are the
pairs of products until the model's residual ``|R d + r|^2`` is within a tenth of the exact solve's;
CG's after 1,000 iterations is a multiple of that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# The tasks are built from the examples, whose `common` is not the benchmarks'.
sys.path[:1] = [str(ROOT), str(ROOT / "examples")]
sys.path.append(str(ROOT / "benchmarks"))

from benchmarks.common import (  # noqa: E402
    environment,
    make_parser,
    parse,
    print_table,
    write_json,
)
from benchmarks.race.task import Setting  # noqa: E402
from benchmarks.race.tasks import TASKS  # noqa: E402
from torch_hf import HFOptimizer  # noqa: E402
from torch_hf.curvature import GaussNewtonOperator  # noqa: E402
from torch_hf.curvature.joint_root import joint_root  # noqa: E402
from torch_hf.curvature.root_products import RootProducts  # noqa: E402
from torch_hf.solver.exact import ExactSolver  # noqa: E402
from torch_hf.solver.golub_kahan import GolubKahan  # noqa: E402

#: The points are the first of the run with losses at most these.
LOSSES = (torch.inf, 2.5, 2e-2)
#: Lambda in units of the trace of G; what counts as solved, in units of the exact residual.
DAMPING, SOLVED = 1e-14, 1.1
MAX_PAIRS, EVERY, CG_ITERATIONS, TARGET = 300, 5, 1000, 150


def solves(closure: Callable[[], Any], params: Sequence[Tensor], loss: float) -> dict[str, Any]:
    """What the three solvers make of the quadratic at the parameters as they are."""
    operator = GaussNewtonOperator.from_closure(closure, params)
    root, products = joint_root(operator), RootProducts(operator)
    assert root is not None
    exact = ExactSolver(root.rows, root.residual)
    damping = DAMPING * exact.norm

    def left(d: Tensor) -> float:
        return float((root.residual + products.times(d)).square().sum())

    least = left(exact.step(damping))
    size = operator.objective.vector.numel
    run = GolubKahan(
        products.times, products.transposed, size, products.residual, max_pairs=MAX_PAIRS
    )
    while run.pairs < MAX_PAIRS and not run.exhausted:
        run.extend(EVERY)
        found = left(run.step(damping))
        if found <= SOLVED * least:
            break
    return {
        "loss": loss,
        "exact": least,
        "pairs": run.pairs if found <= SOLVED * least else None,
        "cg": left(cg(operator, root.rows.T @ root.residual, damping)) / least,
    }


def cg(product: Callable[[Tensor], Tensor], gradient: Tensor, damping: float) -> Tensor:
    """Plain conjugate gradients from 0, without a test."""
    d, residual = torch.zeros_like(gradient), -gradient
    p, square = residual.clone(), float(gradient.square().sum())
    for _ in range(CG_ITERATIONS):
        q = product(p).add_(p, alpha=damping)
        length = square / float(p @ q)
        d.add_(p, alpha=length)
        residual = residual.sub(q, alpha=length)
        last, square = square, float(residual.square().sum())
        p = p.mul(square / last).add_(residual)
    return d


def main() -> None:
    """Takes the figures, prints and writes them."""
    parser = make_parser(__doc__ or "", rounds=1)
    parser.add_argument("--seeds", type=int, default=2, help="runs")
    args = parse(parser)
    task, rows = TASKS["poisson"](Setting(device=str(args.device))), []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        model = task.make_model().to(args.device, task.dtype)
        params = list(model.parameters())
        optimizer = HFOptimizer(params, solver="exact")

        def closure(model: torch.nn.Module = model) -> Any:
            return task.loss(model, task.train)

        wanted = list(LOSSES)
        while wanted:
            loss = float(closure()[0].detach())
            if loss <= wanted[0]:
                wanted.pop(0)
                rows.append({"seed": seed, **solves(closure, params, loss)})
            optimizer.step(closure)
    print_table(
        f"pairs of products until the residual is within a tenth (target: {TARGET})",
        ["seed", "loss", "exact residual", "pairs", f"CG after {CG_ITERATIONS}, times exact"],
        [
            [
                str(r["seed"]),
                f"{r['loss']:.2g}",
                f"{r['exact']:.1e}",
                str(r["pairs"]),
                f"{r['cg']:.2g}",
            ]
            for r in rows
        ],
    )
    content = {"environment": environment(args.device, args.threads), "target": TARGET}
    write_json("lanczos", args.device, {**content, "points": rows})


if __name__ == "__main__":
    main()
