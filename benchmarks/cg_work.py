"""What the pairs are worth to CG: the quadratic's decrease at equal products, with and without.

python benchmarks/cg_work.py --data-root data

A run trains with the L-BFGS pairs. In each of its steps the same quadratic is also solved without
them, from the same start and up to the same test; the run goes on from the solution with pairs.
Both solves are timed. The base is the identity, as in arXiv 1309.1508: only the pairs differ.
"""

from __future__ import annotations

import bisect
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# The tasks are built from the examples, whose `common` is not the benchmarks'.
sys.path[:1] = [str(ROOT), str(ROOT / "examples")]
sys.path.append(str(ROOT / "benchmarks"))

import torch_hf.optimizer.hf  # noqa: E402
from benchmarks.common import (  # noqa: E402
    environment,
    make_parser,
    parse,
    print_table,
    results_folder,
    write_json,
)
from benchmarks.race.contenders import HF, OURS, Options  # noqa: E402
from benchmarks.race.task import Missing, Setting  # noqa: E402
from benchmarks.race.tasks import TASKS  # noqa: E402
from benchmarks.style import OURS as COLOUR  # noqa: E402
from torch_hf.solver.cg import CGResult, conjugate_gradients  # noqa: E402

#: The method with pairs and growing batches; on full batches there is nothing to grow.
WITH_PAIRS: Options = OURS["hf-both"]
PRODUCTS = (1, 3, 5, 9, 20, 44, 96, 162)  # of the numbers that are kept


class Comparison:
    """Takes the place of CG in the optimizer: solves twice, keeps the figures of both."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def __call__(
        self, operator: Callable[[Tensor], Tensor], gradient: Tensor, **options: Any
    ) -> CGResult:
        alone = {**options, "preconditioner": None, "observe": None}
        plain, plain_seconds = timed(lambda: conjugate_gradients(operator, gradient, **alone))
        pairs, pairs_seconds = timed(lambda: conjugate_gradients(operator, gradient, **options))
        self.rows.append(
            {
                "without": {"curve": curve(plain), "seconds": plain_seconds},
                "with": {"curve": curve(pairs), "seconds": pairs_seconds},
            }
        )
        return pairs


def timed(function: Callable[[], CGResult]) -> tuple[CGResult, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def curve(result: CGResult) -> list[tuple[int, float]]:
    """CG iterations and the quadratic there, where iterates are kept."""
    return [(iterate.iteration, iterate.value) for iterate in result.iterates]


def compare(
    name: str, setting: Setting, steps: int, options: Options = WITH_PAIRS
) -> list[dict[str, Any]]:
    """The solves of a run's steps but the first, which has no pairs yet."""
    task = TASKS[name](setting)
    torch.manual_seed(0)
    contender = HF(task, task.make_model(), 0, options)
    comparison = Comparison()
    try:
        torch_hf.optimizer.hf.conjugate_gradients = comparison  # type: ignore[assignment]
        for step in range(steps):
            contender.step(step / steps)
    finally:
        torch_hf.optimizer.hf.conjugate_gradients = conjugate_gradients
    return comparison.rows[1:]


def ratios_at(rows: Sequence[dict[str, Any]], products: int) -> list[float]:
    """The quadratic's value with pairs over that without, of the steps where both went so far.

    Above 1: the pairs are deeper. A solve that has ended keeps its last value.
    """
    found = []
    for row in rows:
        values = [value_at(row[key]["curve"], products) for key in ("with", "without")]
        longest = max(row[key]["curve"][-1][0] for key in ("with", "without"))
        if longest >= products and all(v is not None and v < 0 for v in values):
            found.append(values[0] / values[1])
    return found


def value_at(points: Sequence[tuple[int, float]], products: int) -> float | None:
    place = bisect.bisect_right([iteration for iteration, _ in points], products)
    return points[place - 1][1] if place else None


def to_match(row: dict[str, Any]) -> tuple[float, float]:
    """Products and seconds that the solve with pairs needs for the value that the other ended with.

    To a thousandth, in units of the other's; infinite where it ends above that.
    """
    plain, pairs = row["without"], row["with"]
    last, value = plain["curve"][-1]
    whole = pairs["curve"][-1][0]
    reached = next((i for i, q in pairs["curve"] if q <= 0.999 * value), math.inf)
    return reached / last, pairs["seconds"] * reached / whole / plain["seconds"]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    products, seconds = zip(*map(to_match, rows), strict=True)
    return {
        "steps": len(rows),
        "deeper": {n: median(ratios_at(rows, n)) for n in PRODUCTS},
        "iterations_without": median([r["without"]["curve"][-1][0] for r in rows]),
        "iterations_with": median([r["with"]["curve"][-1][0] for r in rows]),
        "products_to_match": median(products),
        "seconds_to_match": median(seconds),
        "last_value": median(
            [r["with"]["curve"][-1][1] / r["without"]["curve"][-1][1] for r in rows]
        ),
        "whole_solve_seconds": median(
            [r["with"]["seconds"] / r["without"]["seconds"] for r in rows]
        ),
    }


def median(numbers: Sequence[float]) -> float | None:
    return statistics.median(numbers) if numbers else None


def text(number: float | None) -> str:
    return "" if number is None else "never" if math.isinf(number) else f"{number:.2f}"


def plot(found: dict[str, Any], folder: Path) -> Path:
    """The quadratic over products: with pairs in units of without, quartiles and median."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), squeeze=False)
    for ax, (name, entry) in zip(axes[0], found.items(), strict=True):
        numbers = sorted({i for r in entry["rows"] for i, _ in r["without"]["curve"]})
        shown = [(n, ratios_at(entry["rows"], n)) for n in numbers if n]
        shown = [(n, r) for n, r in shown if len(r) >= max(2, len(entry["rows"]) // 4)]
        x = [n for n, _ in shown]
        low, mid, high = (
            [statistics.quantiles(r, n=4, method="inclusive")[k] for _, r in shown]
            for k in range(3)
        )
        ax.axhline(1.0, color="0.4", linewidth=0.8)
        ax.fill_between(x, low, high, alpha=0.25, color=COLOUR, label="middle half of the steps")
        ax.plot(x, mid, color=COLOUR, label="median")
        ax.set(xscale="log", title=name, xlabel="products in the solve")
    axes[0][0].set_ylabel("decrease with pairs over without\n(above 1: pairs are better)")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    path = folder / "cg-work-cpu.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--tasks", nargs="+", default=["autoencoder", "speech", "poisson"])
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--pairs", type=int, help="kept, if not the default's number")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="of the data sets")
    args = parse(parser)
    options = {**WITH_PAIRS, "history_size": args.pairs} if args.pairs else WITH_PAIRS
    found: dict[str, Any] = {}
    for name in args.tasks:
        try:
            rows = compare(name, Setting(args.data_root), args.steps, options)
        except Missing as error:
            print(f"{name}: left out, {error}")
            continue
        found[name] = {"summary": summary(rows), "rows": rows}
    if not found:
        return
    summaries = {name: entry["summary"] for name, entry in found.items()}
    print_table(
        "Decrease of q with pairs over without, at equal products (above 1: pairs are better)",
        ["task", "steps", *map(str, PRODUCTS)],
        [
            [n, str(s["steps"]), *(text(s["deeper"][p]) for p in PRODUCTS)]
            for n, s in summaries.items()
        ],
    )
    columns = ["products_to_match", "seconds_to_match", "last_value", "whole_solve_seconds"]
    print_table(
        "With pairs over without: to the same value, whole solve (below 1: pairs are better)",
        ["task", "iterations without", "with", *(c.replace("_", " ") for c in columns)],
        [
            [
                n,
                text(s["iterations_without"]),
                text(s["iterations_with"]),
                *(text(s[c]) for c in columns),
            ]
            for n, s in summaries.items()
        ],
    )
    write_json(
        "cg-work",
        args.device,
        {"environment": environment(args.device, args.threads), "tasks": found},
        args.record,
    )
    print(f"plot in {plot(found, results_folder(args.record))}")


if __name__ == "__main__":
    main()
