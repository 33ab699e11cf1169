"""What a record shows: a table on screen or in Markdown, and a plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..style import OTHERS, OURS, VARIANTS
from .contenders import split_name
from .record import Record, median, summary, value_at
from .runner import SHARES, Run

MARKS = ("<!-- tables of the race: begin -->\n", "<!-- tables of the race: end -->")


def table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Header and rows, the best final training metric first, those that could not run last."""
    about = record.about
    train, test = about["train_metric"], about["test_metric"]
    rows = sorted(summary(record), key=lambda row: _order(row[train]))
    ends = list(rows[0]["seconds_to_end_of"]) if rows else []
    targets = [key for key in rows[0]["seconds_to"] if _reached(rows, key)] if rows else []
    header = ["optimizer", "seeds", "steps", *(_words(m) for m in (train, test))]
    header.append(f"best {_words(test)}")
    header += [f"{_words(metric)} at {share}" for metric in (train, test) for share in SHARES]
    header += [f"s to {_words(key)}" for key in targets]
    for name in ends:
        header += [f"s to {name}'s end", f"{_words(test)} there"]
    cells = []
    for row in rows:
        if row["error"] is not None and row[train] is None:
            cells.append([row["optimizer"], str(row["seeds"]), *["–"] * (len(header) - 2)])
            continue
        line = [row["optimizer"], str(row["seeds"]), _number(row["steps"], whole=True)]
        line += [_number(row[key]) for key in (train, test, "best_test")]
        line += [_number(row["at"][share][metric]) for metric in (train, test) for share in SHARES]
        line += [_number(row["seconds_to"][key]) for key in targets]
        for name in ends:
            line += [_number(row[k][name]) for k in ("seconds_to_end_of", "test_at_end_of")]
        cells.append(line)
    return header, cells


def errors(record: Record) -> list[str]:
    """A line for each optimizer that could not run."""
    rows = [row for row in summary(record) if row["error"]]
    return [f"{row['optimizer']}: {row['error']}" for row in rows]


def as_text(record: Record) -> str:
    """Title and table, the first column to the left and numbers to the right."""
    header, rows = table(record)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [title(record), ""]
    for row in [header, ["-" * width for width in widths], *rows]:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first, *(c.rstrip().rjust(len(c)) for c in others)]))
    return "\n".join([*lines, *(["", *errors(record)] if errors(record) else [])])


def as_markdown(record: Record) -> str:
    """The same for a page of the documentation, with what it was measured on."""
    header, rows = table(record)
    lines = [
        f"### {title(record)}",
        "",
        measured(record),
        "",
        f"| {' | '.join(header)} |",
        f"| --- |{' ---: |' * (len(header) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"![{title(record)}](../benchmarks/results/{record.path.stem}.png)",
    ]
    if errors(record):
        lines += ["", "Could not run:", "", *(f"- {line}" for line in errors(record))]
    return "\n".join(lines) + "\n"


def write_csv(record: Record, path: Path) -> None:
    """A row a point of a curve: optimizer, seed, budget, and the curve's columns."""
    columns = list(dict.fromkeys(key for run in record.runs for key in run["curve"]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["optimizer", "seed", "budget", *columns])
        for run in record.runs:
            curve = run["curve"]
            for i in range(len(curve.get("seconds", []))):
                cells = [curve[key][i] if key in curve else None for key in columns]
                writer.writerow([run["optimizer"], run["seed"], run["budget"], *cells])


def measured(record: Record) -> str:
    """On what, and by which commands, the runs of the table were made."""
    shown = (run for name in record.optimizers for run in record.of(name))
    sessions = [record.sessions[i] for i in sorted({run["session"] for run in shown})]
    places: dict[str, list[str]] = {}
    for s in sessions:
        clock = ", CPU seconds" if s.get("clock") == "cpu" else ""
        threads = "1 thread" if s["threads"] == 1 else f"{s['threads']} threads"
        place = f"{s['device']}, {threads}{clock}, torch {s['torch']}"
        places.setdefault(place, []).append(f"`{s['command']}`")
    lines = [f"{place}; {', then '.join(dict.fromkeys(c))}" for place, c in places.items()]
    return ". Then: ".join(lines)


def placed(page: str, tables: str) -> str:
    """The page with these tables between its marks, in place of what was there."""
    before, _, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise ValueError(f"the file has no lines {MARKS[0].strip()} and {MARKS[1]}")
    return f"{before}{MARKS[0]}\n{tables}\n{MARKS[1]}{after}"


def title(record: Record) -> str:
    """Task and budget."""
    unit = "CPU s" if record.about.get("clock") == "cpu" else "s"
    return f"{record.about['title']}: medians at {record.budget:g} {unit}"


def plot(record: Record, path: Path) -> None:
    """Training and test metric against seconds, all logarithmic: medians with the seeds' range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = list(dict.fromkeys((record.about["train_metric"], record.about["test_metric"])))
    figure, row = pyplot.subplots(
        1, len(metrics), figsize=(5.4 * len(metrics), 4.2), layout="constrained", squeeze=False
    )
    looks = _looks(record.optimizers)
    for axes, metric in zip(row[0], metrics, strict=True):
        _draw(axes, record, metric, looks)
    figure.suptitle(record.about["title"], fontsize=11)
    seeds = max((len(record.of(name)) for name in record.optimizers), default=0)
    figure.supxlabel(
        f"lines: medians of {seeds} seed{'s' * (seeds != 1)}; bands: their range; dotted: parts of "
        "the budget at which the table looks",
        fontsize=8,
    )
    handles, labels = row[0][0].get_legend_handles_labels()
    if handles:  # nobody may have been able to run
        figure.legend(handles, labels, fontsize=8, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and line of each optimizer; ours, with any options, has one colour in every plot."""
    ours = [name for name in names if split_name(name)[0] == "hf"]
    others = [name for name in names if name not in ours]
    looks: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(sorted(ours, key=lambda name: name != "hf")):
        width = 2.4 if i == 0 else 1.5
        style = VARIANTS[i % len(VARIANTS)]
        looks[name] = {"color": OURS, "linewidth": width, "linestyle": style, "zorder": 3}
    for i, name in enumerate(others):
        style = VARIANTS[i // len(OTHERS) % len(VARIANTS)]
        looks[name] = {"color": OTHERS[i % len(OTHERS)], "linewidth": 1.2, "linestyle": style}
    return looks


def _draw(axes: Any, record: Record, metric: str, looks: dict[str, dict[str, Any]]) -> None:
    # the scales first: limits set on a linear axis would be wrong for a logarithmic one
    axes.set(xscale="log", yscale="log", xlabel=_clock(record), ylabel=_words(metric))
    grid = [record.budget * 0.01 ** (1 - i / 60) for i in range(61)]
    for name, look in looks.items():
        curves = [values for run in record.of(name) if (values := resampled(run, metric, grid))]
        if not curves:
            continue
        middle, low, high = ([f(v) for v in zip(*curves, strict=True)] for f in (_middle, min, max))
        axes.plot(grid, middle, label="ours" if name == "hf" else name, **look)
        axes.fill_between(grid, low, high, color=look["color"], alpha=0.12, linewidth=0)
    for share, part in SHARES.items():
        axes.axvline(part * record.budget, color="black", linestyle=":", linewidth=0.8)
        place, style = (part * record.budget, 0.98), {"fontsize": 8, "va": "top"}
        axes.annotate(f" {share}", place, xycoords=("data", "axes fraction"), **style)
    start = [r["curve"][metric][0] for r in record.runs if r["curve"].get(metric)]
    if start and start[0]:
        axes.autoscale_view()
        axes.set_ylim(top=2 * start[0])  # what diverged would leave no room for the others
    axes.grid(alpha=0.3)


def _clock(record: Record) -> str:
    return ("CPU seconds" if record.about.get("clock") == "cpu" else "seconds") + " of training"


def resampled(run: Run, metric: str, grid: Sequence[float]) -> list[float]:
    """The metric at each time, between two points on a line in its logarithm; NaN where unknown."""
    if not run["curve"].get("seconds", []) or metric not in run["curve"]:
        return []
    found = [value_at(run, metric, t) for t in grid]
    return [math.nan if value is None else value for value in found]


def _middle(values: Sequence[float]) -> float:
    found = median(None if math.isnan(v) else v for v in values)
    return math.nan if found is None else found


def _reached(rows: Sequence[dict[str, Any]], key: str) -> bool:
    return any(row["seconds_to"].get(key) is not None for row in rows)


def _order(value: float | None) -> float:
    return math.inf if value is None else value


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None, whole: bool = False) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if whole else f"{value:.3g}"
