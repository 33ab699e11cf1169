"""Puts the figures of README and docs where they belong, from the JSON files of the benchmarks.

python benchmarks/figures.py           # write them
python benchmarks/figures.py --check   # complain if a page and a JSON file disagree

A page has a pair of marks, `<!-- generated: NAME -->` and `<!-- end -->`; what is between them is
replaced by what the function of that name makes of the JSON. It needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"<!-- generated: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
#: Task and metric of the README's table, and the record; the metric is a key of its summary, a
#: target in `seconds_to`, or "test", the task's test metric.
OVERVIEW = (
    ("Poisson equation by its residual", "training loss", "poisson-cpu-seconds", "train_loss"),
    ("Burgers equation by its residual", "training loss", "burgers-cpu-seconds", "train_loss"),
    ("smooth regression", "training loss", "regression-cpu-seconds", "train_loss"),
    ("fast advection by its residual", "training loss", "advection-cpu-seconds", "train_loss"),
    ("Helmholtz equation by its residual", "training loss", "helmholtz-cpu-seconds", "train_loss"),
    (
        "heat equation, unknown coefficient, resampled points",
        "error of the coefficient",
        "heat-resampled-cpu-seconds",
        "test",
    ),
    (
        "Poisson equation in 5 dimensions, 10,065 parameters",
        "training loss",
        "poisson5d-cpu-seconds",
        "train_loss",
    ),
    ("a flow fitted to trajectories", "training loss", "neural-ode-cpu-seconds", "train_loss"),
    ("LSTM on sums of waves", "training loss", "lstm-cpu-seconds", "train_loss"),
    ("recurrent network, adding problem", "test error", "adding-cpu-seconds", "test"),
    ("MNIST autoencoder", "test error", "autoencoder-cpu-seconds", "test"),
    ("Curves autoencoder", "test error", "curves-cpu", "test"),
    ("spoken digits, new speakers", "test error", "speech-cpu-seconds", "test"),
    ("CIFAR-10, a part, CNN", "seconds to training loss 1", "cifar10-cpu-seconds", "train_loss 1"),
    ("CIFAR-10, a part, CNN", "test error", "cifar10-cpu-seconds", "test"),
    ("MNIST, CNN", "seconds to 98 % accuracy", "mnist-cpu-seconds", "test_error 0.02"),
    ("MNIST, CNN", "test error", "mnist-cpu-seconds", "test"),
)
DENSE = {
    "gpu-autoencoder": ("autoencoder-cuda", "test_error"),
    "gpu-poisson": ("poisson-cuda", "train_loss"),
    "dense-poisson": ("poisson-cpu-seconds", "train_loss"),
    "dense-burgers": ("burgers-cpu-seconds", "train_loss"),
    "dense-regression": ("regression-cpu-seconds", "train_loss"),
    "dense-helmholtz": ("helmholtz-cpu-seconds", "train_loss"),
    "dense-advection": ("advection-cpu-seconds", "train_loss"),
    "dense-allen-cahn": ("allen-cahn-cpu-seconds", "train_loss"),
    "dense-poisson5d": ("poisson5d-cpu-seconds", "train_loss"),
    "dense-neural-ode": ("neural-ode-cpu-seconds", "train_loss"),
    "dense-lstm": ("lstm-cpu-seconds", "train_loss"),
    "dense-adding": ("adding-cpu-seconds", "train_loss"),
    "dense-heat-fixed": ("heat-cpu-seconds", "test"),
    "dense-heat": ("heat-resampled-cpu-seconds", "test"),
    "small-mnist": ("mnist-cpu-seconds", "test"),
    "small-mnist10k": ("mnist10k-cpu-seconds", "test"),
    "small-cifar10": ("cifar10-cpu-seconds", "train_loss"),
    "small-cifar10-test": ("cifar10-cpu-seconds", "test"),
    "small-speech": ("speech-cpu-seconds", "test"),
    "small-autoencoder": ("autoencoder-cpu-seconds", "test"),
}
#: How the pages call them.
NAMES = {
    "hf": "ours",
    "hf:solver=cg": "ours, by CG alone",
    "hf:weight_decay=0.0001": "ours, weight_decay=1e-4",
    "hf:weight_decay=0.001": "ours, weight_decay=1e-3",
    "lbfgs": "L-BFGS",
    "engd": "energy natural gradient",
    "lm": "Levenberg-Marquardt",
    "lm-geodesic": "geodesic Levenberg-Marquardt",
    "lm:scaled=True": "scaled Levenberg-Marquardt",
    "ssbroyden": "self-scaled Broyden",
    "adam": "Adam",
    "adam-lbfgs": "Adam, then L-BFGS",
    "soap": "SOAP",
    "muon": "Muon",
    "sgd": "SGD",
    "kron": "PSGD (Kron)",
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def overview() -> str:
    """Ours and the best of the others, the better one in bold."""
    rows = []
    for task, metric, record, wanted in OVERVIEW:
        content = load(f"race-{record}")
        key = content["task"]["test_metric"] if wanted == "test" else wanted
        values = {row["optimizer"]: value_of(row, key) for row in content["summary"]}
        ours = values["hf"]
        others = {n: v for n, v in values.items() if not n.startswith("hf") and v is not None}
        best = min(others, key=lambda name: others[name])
        shown = [number(ours), number(others[best])]
        wins = ours is not None and ours <= others[best]
        shown[0 if wins else 1] = f"**{shown[0 if wins else 1]}**"
        budget = f"{max(r['budget'] for r in content['runs']):g}"
        clock = "CPU s" if content["task"].get("clock") == "cpu" else "s"
        rows.append([f"{task}, {budget} {clock}", metric, shown[0], f"{shown[1]} {called(best)}"])
    return table(["task, budget a run", "metric", "ours", "best other"], rows)


def dense(record: str, wanted: str) -> str:
    """A row an optimizer: the metric at parts of the budget and at the end, its range, steps."""
    content = load(f"race-{record}")
    key = content["task"]["test_metric"] if wanted == "test" else wanted
    order = sorted(content["summary"], key=lambda row: value_of(row, key) or float("inf"))
    rows = []
    for row in order:
        name = called(row["optimizer"])
        low, high = row[f"{key}_range"]
        rows.append(
            [
                f"**{name}**" if name.startswith("ours") else name,
                *(number(row["at"][share][key]) for share in ("1/10", "1/3")),
                number(row[key]),
                f"{number(low)} to {number(high)}",
                f"{row['steps']:.0f}",
            ]
        )
    return table(["optimizer", "at 1/10", "at 1/3", "at the end", "seeds", "steps"], rows)


def swap() -> str:
    """One call of L-BFGS beside a loop of steps."""
    content = load("swap-cpu")
    rows = [
        [
            f"`{name}`",
            f"{end['steps']:,.0f}",
            f"{end['calls']:,.0f}",
            number(end["loss"]),
            number(end["error"]),
            f"{end['seconds']:.0f}",
        ]
        for name, end in content["ends"].items()
    ]
    header = ["", "iterations or steps", "closure calls", "loss", "relative error", "CPU seconds"]
    return table(header, rows)


def paper(record: str, train: str) -> str:
    """The ablations: the end, and when plain HF's end was reached."""
    rows = []
    for row in load(record)["summary"]:
        if row["optimizer"] in ("hf-plain", "hf-pairs", "hf-growing", "hf-both", "hf"):
            reached = row["seconds_to_end_of"]["hf-plain"]
            when = "not reached" if reached is None else f"{reached:.1f}"
            shown = [f"{row[key]:.3g}" for key in (train, "test_error")]
            rows.append([f"`{row['optimizer']}`", *shown, when])
    header = ["", train.replace("_", " "), "test error", "seconds to the end of `hf-plain`"]
    return table(header, rows)


def products() -> str:
    """A Gauss-Newton product in units of a gradient, by package."""
    content = load("products-cpu")
    tasks = list(content["tasks"].values())
    names = [name for name in tasks[0]["contenders"] if name != "gradient"]
    rows = [
        [name, *(f"{task['contenders'][name]['ratio']:.2f}" for task in tasks)] for name in names
    ]
    return table(["", *content["tasks"]], rows)


def step_time() -> str:
    """Where the seconds of a step go, without the first step."""
    steps = load("step-cpu")["time"]["steps"][1:]
    total = sum(step["seconds_total"] for step in steps)
    parts = ("products", "preconditioner", "evaluations", "gradient", "other")
    shares = {part: sum(step[f"seconds_{part}"] for step in steps) / total for part in parts}
    rows = [[part, f"{100 * share:.1f} %"] for part, share in shares.items()]
    return table(["part", "of the seconds"], rows)


def step_memory() -> str:
    """Peak memory of a step, by pairs and batches, beside that of a gradient."""
    rows = [
        [
            f"{entry['pairs']}",
            f"{entry['split']}",
            *(f"{entry[key] / 1e6:,.0f} MB" for key in ("bytes", "gradient")),
        ]
        for entry in load("step-cpu")["memory"]
    ]
    return table(["pairs", "batches", "step", "forward and backward alone"], rows)


def nist() -> str:
    """Fits with six digits, and model evaluations until then beside those of dense LM."""
    calls: dict[str, dict[tuple[str, int], float]] = {}
    for fit in load("nist-cpu")["fits"]:
        mine = calls.setdefault(fit["optimizer"], {})
        mine[fit["problem"], fit["start"]] = fit["calls"] or math.inf
    base = {key: n for key, n in calls["lm"].items() if n < math.inf}
    rows = []
    for name, mine in calls.items():
        arrived = sum(n < math.inf for n in mine.values())
        beside = statistics.median(mine[key] / n for key, n in base.items())
        shown = f"{beside:.2g}" if beside < math.inf else "–"
        rows.append([called(name), f"{arrived} of {len(mine)}", shown])
    header = [
        "",
        "fits with six digits",
        "model evaluations, dense Levenberg-Marquardt = 1, median",
    ]
    return table(header, rows)


def gpu_products() -> str:
    """Of each network on a GPU: a product, and a CG iteration launched or replayed."""
    rows = [
        [
            row["network"],
            f"{row['gradient_ms']:.1f} ms",
            f"{row['product_in_gradients']:.2f}",
            f"{row['launches_of_iteration_eager'] / row['launches_of_gradient']:.1f}",
            *(_milliseconds(row[f"ms_of_iteration_{how}"]) for how in ("eager", "replayed")),
        ]
        for row in load("gpu-cuda")["products"]
        if "error" not in row
    ]
    header = ["network", "gradient", "product, in gradients", "launches of a CG iteration, in a"]
    header[-1] += " gradient's"
    return table([*header, "CG iteration, launched", "replayed"], rows)


def _milliseconds(value: float) -> str:
    return f"{value:.1f} ms" if value > 0 else "lost in noise"


def pairs() -> str:
    """What the pairs are worth to CG; everything relative to CG without them."""
    rows = []
    for name, task in load("cg-work-cpu")["tasks"].items():
        s = task["summary"]
        deeper = ", ".join(f"{s['deeper'][k]:.2f}" for k in ("1", "3", "5", "9"))
        keys = ("products_to_match", "seconds_to_match", "whole_solve_seconds")
        rows.append([name, deeper, *(f"{s[key]:.2f}" for key in keys)])
    return table(
        [
            "",
            "decrease of q with pairs over without, after 1, 3, 5, 9 products (above 1: pairs are "
            "better)",
            "products to the same value (below 1: pairs are better)",
            "seconds to it (below 1: pairs are better)",
            "seconds of the whole solve (below 1: pairs are better)",
        ],
        rows,
    )


def value_of(row: dict[str, Any], key: str) -> float | None:
    return row[key] if key in row else row["seconds_to"][key]


def called(optimizer: str) -> str:
    if optimizer in NAMES:
        return NAMES[optimizer]
    base, _, options = optimizer.partition(":")
    sizes = [o.partition("=")[2] for o in options.split(":") if o.startswith("batch_size=")]
    return NAMES.get(base, base) + "".join(f", batches of {size}" for size in sizes)


def number(value: float | None) -> str:
    """Two digits; never without a value."""
    if value is None:
        return "never"
    text = f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.2g}"
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", text).replace("e+", "e")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


MAKERS: dict[str, Callable[[], str]] = {
    "overview": overview,
    "swap": swap,
    "products": products,
    "step-time": step_time,
    "step-memory": step_memory,
    "paper-curves": lambda: paper("race-curves-cpu-seconds", "train_error"),
    "paper-speech": lambda: paper("race-speech-cpu", "train_loss"),
    "pairs": pairs,
    "gpu-products": gpu_products,
    "nist": nist,
    **{name: (lambda r=record: dense(*r)) for name, record in DENSE.items()},
}


def filled(text: str) -> str:
    """A page with its generated parts made anew."""
    return MARKED.sub(
        lambda mark: f"<!-- generated: {mark[1]} -->\n\n{MAKERS[mark[1]]()}\n\n<!-- end -->", text
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    args = parser.parse_args()
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if not args.check:
                page.write_text(new, encoding="utf-8")
    if stale and args.check:
        sys.exit(
            f"{', '.join(stale)}: figures differ from benchmarks/results. Type `make figures`."
        )
    print(f"written: {', '.join(stale) or 'nothing, all pages are up to date'}")


if __name__ == "__main__":
    main()
