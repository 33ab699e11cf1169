"""The table, the verdicts and the picture of benchmarks/kronecker.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

KRONECKER, AT_ONCE, MOMENTUM = "Kronecker", "defer=0", "momentum"
SCAN, TREE = "scan", "tree"
LINEAR, BILINEAR = "nn.Linear", "nn.Bilinear"

#: What the package set out to reach: at d, so many times faster than dense SGD.
TARGETS = {2**14: 20, 2**16: 100}

HEADER = ["", "n", "d", "m", "B", KRONECKER, AT_ONCE, MOMENTUM, SCAN, TREE]
HEADER += [LINEAR, "times", BILINEAR, "MB", f"MB {LINEAR}"]


def row(found: dict[str, Any], missing: dict[str, str]) -> list[str]:
    def ms(name: str) -> str:
        value = found["ms"].get(name)
        return missing.get(name, "") if value is None else f"{value:.2f}"

    def megabytes(name: str) -> str:
        value = found["peak_mb"].get(name)
        return "" if value is None else f"{value[1]:,.0f}"

    cells = [found["title"], *(f"{found[key]:,}" for key in ("n", "d", "m", "batch"))]
    cells += [ms(name) for name in (KRONECKER, AT_ONCE, MOMENTUM, SCAN, TREE, LINEAR)]
    times = found.get("times_faster")
    cells += ["" if times is None else f"{times:.3g}", ms(BILINEAR)]
    return [*cells, megabytes(KRONECKER), megabytes(LINEAR)]


def verdicts(results: list[dict[str, Any]], flat: list[dict[str, Any]]) -> list[str]:
    """What was promised, beside what was found."""
    sweep = [r for r in results if r["title"] == "d grows"]
    lines = []
    for r in sweep:
        if r["d"] in TARGETS and "times_faster" in r:
            word = "met" if r["times_faster"] >= TARGETS[r["d"]] else "missed"
            lines.append(
                f"{r['times_faster']:.0f} times faster than dense SGD at d = {r['d']:,}: "
                f"{word} (at least {TARGETS[r['d']]})"
            )
    held = [r["peak_mb"][KRONECKER] for r in sweep if KRONECKER in r["peak_mb"]]
    for what, values in {
        "time, taking turns,": [statistics.median(r["rounds_ms"]) for r in flat],
        "memory beyond torch's own": [peaks[1] for peaks in held],
        "memory of the process": [peaks[0] for peaks in held],
    }.items():
        if len(values) > 1:
            spread = max(values) / min(values) - 1
            word = "met" if spread <= 0.1 else "missed"
            lines.append(f"{what} over all d within {100 * spread:.0f} %: {word} (within 10 %)")
    wide = [r for r in results if r["title"] == "m grows"]
    if len(wide) > 1:
        best = [min(v for k, v in r["ms"].items() if " " not in k) for r in (wide[0], wide[-1])]
        lines.append(
            f"m {wide[-1]['m'] / wide[0]['m']:.0f}-fold: step {best[1] / best[0]:.1f}-fold"
        )
    return lines


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    draw(left, [r for r in results if r["title"] == "d grows"], "d", (KRONECKER, LINEAR, BILINEAR))
    left.set(xlabel="input dimension d", title="n = 4,000 points, m = 4,096 neurons, batch 32")
    wide = [r for r in results if r["title"] == "m grows"]
    draw(right, wide, "m", (KRONECKER, SCAN, TREE))
    first = min(wide[0]["ms"].values())
    widths = [r["m"] for r in wide]
    right.plot(widths, [first * m / widths[0] for m in widths], "k:", label="in proportion to m")
    right.set(xlabel="neurons m", title="n = 1,000 points, d = 4,096, batch 4")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", ylabel="milliseconds a step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, framealpha=0.6)
    figure.savefig(path, dpi=120)


LABELS = {
    KRONECKER: "KroneckerSGD",
    SCAN: "KroneckerSGD, active neurons by scan",
    TREE: "KroneckerSGD, active neurons by tree",
    LINEAR: "nn.Linear, torch.optim.SGD",
    BILINEAR: "nn.Bilinear, torch.optim.SGD",
}


def draw(axes: Any, results: list[dict[str, Any]], key: str, names: tuple[str, ...]) -> None:
    for name in names:
        points = [(r[key], r["ms"][name]) for r in results if name in r["ms"]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=LABELS[name])
