"""What a Gauss-Newton product costs, in gradients, beside other packages.

python benchmarks/products.py --rounds 20

A gradient is the forward and the backward pass on the same model and batch. Each contender is set
up once, as in a run of conjugate gradients, and then gives one product a round.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from common import (
    Task,
    autoencoder,
    cnn,
    compared,
    environment,
    interleaved,
    make_parser,
    parse,
    print_table,
    write_json,
)
from torch import Tensor

from torch_hf.curvature import GaussNewtonOperator

GRADIENT = "gradient"
REFERENCE = "torch_hf, double_backward"
#: The most that a product of ``engine="auto"`` may cost, in gradients.
TARGETS = {"MNIST autoencoder": 1.45, "CNN": 1.3}

Product = Callable[[Tensor], Tensor]


def contenders(task: Task) -> dict[str, Product]:
    """Each package's product as a map of flat vectors; those not installed are left out."""
    products: dict[str, Product] = {}
    for engine in ("auto", "double_backward"):
        operator = GaussNewtonOperator.from_closure(task.closure, task.params, engine)
        products[f"torch_hf, {engine}"] = operator
    for name, make in {"curvlinops": curvlinops, "BackPACK": backpack}.items():
        try:
            products[name] = make(task)
        except ImportError as missing:
            print(f"{name} is left out: {missing}")
    return products


def curvlinops(task: Task) -> Product:
    from curvlinops import GGNLinearOperator

    data = [(task.x, task.y)]
    operator = GGNLinearOperator(
        task.model, task.loss, task.params, data, check_deterministic=False
    )
    return lambda v: operator @ v


def backpack(task: Task) -> Product:
    """Through a kept graph, as in its own Hessian-free code; lists in and out, without copies."""
    from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist

    params = task.params
    outputs = task.model(task.x)
    loss = task.loss(outputs, task.y)
    sizes = [p.numel() for p in params]

    def product(v: Tensor) -> Tensor:
        pieces = [piece.view(p.shape) for piece, p in zip(v.split(sizes), params, strict=True)]
        found = ggn_vector_product_from_plist(loss, outputs, params, pieces)
        return torch.cat([t.reshape(-1) for t in found])

    return product


def differences(products: dict[str, Product], v: Tensor) -> dict[str, float]:
    """How far each product is from the reference, relative to its length."""
    truth = products[REFERENCE](v)
    length = truth.norm()
    return {name: float((product(v) - truth).norm() / length) for name, product in products.items()}


def measure(task: Task, rounds: int) -> dict[str, dict[str, float]]:
    products = contenders(task)
    v = torch.randn(task.numel, device=task.x.device)
    apart = differences(products, v)
    timed = {name: lambda f=product: f(v) for name, product in products.items()}
    seconds = interleaved({GRADIENT: task.closure, **timed}, rounds, task.x.device)
    figures = compared(seconds, GRADIENT)
    for name, difference in apart.items():
        figures[name]["difference"] = difference
    return figures


def row(name: str, figures: dict[str, float], target: float) -> list[str]:
    verdict = ""
    if name == "torch_hf, auto":
        verdict = f"{'met' if figures['ratio'] <= target else 'missed'} (at most {target})"
    times = [f"{figures[key]:.1f}" for key in ("median_ms", "min_ms")]
    ratios = [f"{figures[key]:.2f}" for key in ("ratio", "ratio_min")]
    apart = f"{figures['difference']:.0e}" if "difference" in figures else ""
    return [name, *times, *ratios, apart, verdict]


def main() -> None:
    args = parse(make_parser(__doc__, rounds=20))
    warnings.filterwarnings("ignore", module="torch.jit")  # the peers' way to load what they use
    tasks = {"MNIST autoencoder": (autoencoder, 1000), "CNN": (cnn, 256)}
    header = ["", "median ms", "min ms", "ratio", "of minima", "difference", "target"]
    rows, results = [], {}
    for name, (make, batch) in tasks.items():
        task = make(batch, args.device)
        figures = measure(task, args.rounds)
        results[name] = {"parameters": task.numel, "batch": batch, "contenders": figures}
        rows.append([f"{name}, P = {task.numel:,}, batch {batch:,}"] + [""] * (len(header) - 1))
        rows += [
            [f"  {c[0]}", *c[1:]] for c in (row(k, f, TARGETS[name]) for k, f in figures.items())
        ]
    about = environment(args.device, args.threads)
    print_table("Gauss-Newton product over gradient (synthetic data)", header, rows)
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"ratio: median over {args.rounds} interleaved rounds; difference: from {REFERENCE}")
    content = {"environment": about, "rounds": args.rounds, "tasks": results}
    write_json("products", args.device, content, args.record)


if __name__ == "__main__":
    main()
