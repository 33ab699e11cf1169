"""The tables and the picture of benchmarks/scaling.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import print_table
from scaling_model import FULLY, GATHER, REDUCE, REPLICATED, SCATTER, SHARDED, Link, ring_seconds

Row = dict[str, Any]
COLORS = {REDUCE: "#0072B2", SCATTER: "#D55E00", GATHER: "#009E73"}
STYLES = {REPLICATED: "-", SHARDED: "--", FULLY: ":"}
#: Of the predictions that are shown for one batch.
SHOWN_BATCH = 16384 * 4**3
SHADES = ["#9ecae1", "#4292c6", "#2171b5", "#08306b"]


def many(number: float) -> str:
    """10 M, 1 B."""
    return f"{number / 1e9:g} B" if number >= 1e9 else f"{number / 1e6:g} M"


def label(row: Row, cores: int) -> str:
    return f"{row['name']}, {row['mode']}, {row['ranks']}" + ("*" if row["ranks"] > cores else "")


def measured(errors: list[Row], steps: list[Row], cores: int) -> None:
    rows = [
        [
            f"{e['kind']}, {e['ranks']}" + ("*" if e["ranks"] > cores else ""),
            f"{e['alpha_us']:.0f}",
            f"{e['gigabytes_per_s']:.2f}" if e["gigabytes_per_s"] else "",
            f"{100 * e['held_out_median']:.0f}",
            f"{100 * e['held_out_largest']:.0f}",
        ]
        for e in errors
    ]
    header = ["processes", "alpha us", "GB/s", "held-out error %, median", "largest"]
    print_table(f"Collectives, Gloo (*: more processes than the {cores} cores)", header, rows)
    rows = [
        [
            label(r, cores),
            str(r["batch"] * r["ranks"]),
            f"{r['seconds']:.2f}",
            f"{100 * r['efficiency']:.0f}",
            f"{r['modelled']:.2f}",
            f"{100 * r['error']:+.0f}",
            f"{100 * (r['parts']['large'] + r['parts']['small']) / r['modelled']:.0f}",
        ]
        for r in steps
    ]
    header = ["processes", "batch", "seconds", "efficiency %", "model s", "error %", "sent %"]
    print_table(f"Steps of {steps[0]['iterations']} CG iterations, measured", header, rows)


def overlap(found: list[Row]) -> None:
    rows = []
    for r in found:
        cells = [f"{1e3 * r[key]:.1f}" for key in ("alone", "after", "within")]
        saved = f"{100 * (1 - r['within'] / r['after']):+.0f}"
        rows.append([f"{r['what']}, {r['batch']}", *cells, saved])
    header = ["of cases a rank", "alone, ms", "then its sum", "sum meanwhile", "saved %"]
    print_table("Overlap of sums with computation, 2 processes", header, rows)


def predicted(rows: list[Row], turning: list[Row]) -> None:
    batch = SHOWN_BATCH
    shown = [r for r in rows if r["batch"] == batch and r["gpus"] in (8, 64, 1024)]
    table = [
        [
            f"{many(r['numel'])}, {r['mode']}, {r['gpus']}",
            f"{r['gigabytes']:.0f}" + ("" if r["fits"] else " (too much)"),
            f"{r['seconds']:.3g}",
            f"{100 * r['efficiency']:.0f}",
        ]
        for r in shown
    ]
    title = f"Predicted by the model, not measured: a step of {batch:,.0f} cases"
    print_table(title, ["parameters, mode, GPUs", "GB a GPU", "seconds", "efficiency %"], table)
    batches = list(turning[0]["gpus"])
    table = [
        [
            f"{many(t['numel'])}, {t['mode']}",
            f"{t['cases_per_gpu'][8]:,.0f}",
            f"{t['cases_per_gpu'][1024]:,.0f}",
            *(str(t["gpus"][b] or ">16384") for b in batches),
        ]
        for t in turning
    ]
    header = ["parameters, mode", "cases a GPU at 8", "at 1,024", *(f"{b:,}" for b in batches)]
    print_table("Where communication takes over: cases a GPU; GPUs, by batch", header, table)


# --- the picture ---


def plot(content: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    draw_collectives(axes[0, 0], content)
    draw_steps(axes[0, 1], content)
    draw_efficiency(axes[1, 0], content)
    draw_growth(axes[1, 1], content)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"plot in benchmarks/results/{path.name}")


def draw_collectives(axes: Any, content: Row) -> None:
    for f in content["fits"]:
        if f["ranks"] != 2:
            continue
        own = [r for r in content["collectives"] if (r["kind"], r["ranks"]) == (f["kind"], 2)]
        sizes = [r["bytes"] for r in own]
        times = [1e3 * r["seconds"] for r in own]
        color = COLORS[f["kind"]]
        axes.plot(sizes[::2], times[::2], "o", color=color, label=f"{f['kind']}, fitted")
        axes.plot(sizes[1::2], times[1::2], "o", mfc="none", color=color, label="held out")
        rate = f["gigabytes_per_s"]
        link = Link(f["alpha_us"] / 1e6, 1e-9 / rate if rate else 0.0)
        axes.plot(sizes, [1e3 * ring_seconds(link, f["kind"], n, 2) for n in sizes], color=color)
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="ms")
    axes.set_title("Measured: collectives of 2 processes (lines: model)")
    axes.legend(fontsize=8)


def draw_steps(axes: Any, content: Row) -> None:
    steps, cores = content["steps"], content["environment"]["cores"]
    places = range(len(steps))
    axes.barh([p - 0.2 for p in places], [r["seconds"] for r in steps], 0.36, color="#444444")
    left = [0.0] * len(steps)
    parts = {"compute": "#0072B2", "vectors": "#56B4E9", "large": "#D55E00", "small": "#E69F00"}
    names = {"large": "vectors sent", "small": "numbers sent"}
    for part, color in parts.items():
        widths = [r["parts"][part] for r in steps]
        name = f"model: {names.get(part, part)}"
        axes.barh([p + 0.2 for p in places], widths, 0.36, left=left, color=color, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.barh([0], [0], color="#444444", label="measured")
    axes.set_yticks(places, [label(r, cores) for r in steps], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="seconds a step")
    axes.set_title(f"Measured: steps (*: more processes than the {cores} cores)")
    axes.legend(fontsize=8)


def draw_efficiency(axes: Any, content: Row) -> None:
    rows = content["predicted"]
    batch = SHOWN_BATCH
    for numel, color in zip(sorted({r["numel"] for r in rows}), SHADES, strict=True):
        for mode, style in STYLES.items():
            own = [r for r in rows if (r["numel"], r["mode"], r["batch"]) == (numel, mode, batch)]
            own = [r for r in own if r["fits"]]
            if own:
                x, y = [r["gpus"] for r in own], [100 * r["efficiency"] for r in own]
                name = f"{many(numel)}, {mode}"
                axes.plot(x, y, style, marker=".", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="GPUs", ylabel="efficiency, %", ylim=(0, 105))
    axes.set_title(
        f"Predicted, not measured: batch {batch:,.0f}, where memory suffices", fontsize=11
    )
    axes.legend(fontsize=7)


def draw_growth(axes: Any, content: Row) -> None:
    rows = [r for r in content["predicted"] if (r["numel"], r["mode"]) == (1e9, SHARDED)]
    batches = sorted({r["batch"] for r in rows})
    shade = [str(0.75 - 0.75 * i / (len(batches) - 1)) for i in range(len(batches))]
    for batch, color in zip(batches, shade, strict=True):
        own = [r for r in rows if r["batch"] == batch]
        gpus = [r["gpus"] for r in own]
        sent = [100 * r["communication"] for r in own]
        axes.plot(gpus, sent, "-", marker=".", color=color, label=f"batch {batch:,.0f}")
    axes.axhline(50, color="#D55E00", ls=":")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="GPUs", ylabel="communication, % of a step", ylim=(0, 105))
    axes.set_title("Predicted, not measured: 1 B parameters, shard_state", fontsize=11)
    axes.legend(fontsize=8)
