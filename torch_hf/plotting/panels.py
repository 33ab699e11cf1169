"""What the pictures of a run show: curves from the columns of its CSV file, panel by panel."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from torch_hf.tracking import read_csv, read_texts

# The colour-blind-safe palette of Okabe and Ito (2008), less its yellow, which
# is too faint for a line on white.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_PALETTE = (_BLUE, _ORANGE, _GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#888888"

#: Ratios beyond are drawn at the edge, crossed.
_RATIOS = (-1.0, 2.0)

_TIME = "Training time (s)"
STEP = "Step"


@dataclass(frozen=True)
class Curve:
    """A line, and how it is drawn: a key of the styles in :mod:`torch_hf.plotting.draw`."""

    label: str
    x: list[float]
    y: list[float]
    color: str
    kind: str


@dataclass
class Panel:
    """Axes to be; ``scale`` is ``"zero"`` (linear, from 0), ``"log"``, ``"auto"``, ``"linear"``."""

    xlabel: str
    ylabel: str
    scale: str
    curves: list[Curve] = field(default_factory=list)

    def add(self, label: str, x: list[float], y: list[float], color: str, kind: str) -> None:
        """Add a curve of the points that are numbers, if there are any."""
        points = [
            (a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)
        ]
        if points:
            xs, ys = [point[0] for point in points], [point[1] for point in points]
            self.curves.append(Curve(label, xs, ys, color, kind))


def training_panels(csv_path: str | os.PathLike[str], score: str) -> list[list[Panel]]:
    """Rows of panels about one run; a panel or a row without data is left out.

    Raises:
        ValueError: The file has no rows.
    """
    columns = _read(csv_path)
    rows = [
        [_loss_panel(columns), _score_panel(columns, score)],
        [_batch_panel(columns), _damping_panel(columns), _ratio_panel(columns)],
        [_cg_panel(columns, read_texts(csv_path, "cg_stop")), _seconds_panel(columns)],
    ]
    return [kept for row in rows if (kept := [panel for panel in row if panel.curves])]


def comparison_panel(csv_paths: Mapping[str, str | os.PathLike[str]], column: str) -> Panel:
    """One column of several runs against their training time.

    Raises:
        ValueError: A file has no rows.
    """
    panel = Panel(_TIME, _name(column), "linear" if _in_percent(column) else "auto")
    for i, (label, path) in enumerate(csv_paths.items()):
        columns = _read(path)
        if column in columns:
            values = _scaled(columns, column)
            panel.add(label, _elapsed(columns), values, _PALETTE[i % len(_PALETTE)], "marked")
    return panel


def _loss_panel(columns: dict[str, list[float]]) -> Panel:
    panel = Panel(_TIME, "Loss", "auto")
    time = _elapsed(columns)
    if "loss" in columns:
        panel.add("batch, before the step", time, columns["loss"], _BLUE, "faint")
    for label, color in (("train", _BLUE), ("test", _ORANGE)):
        if f"{label}_loss" in columns:
            panel.add(label, time, columns[f"{label}_loss"], color, "marked")
    return panel


def _score_panel(columns: dict[str, list[float]], score: str) -> Panel:
    panel = Panel(_TIME, _name(score), "linear" if _in_percent(score) else "auto")
    for label, color in (("train", _BLUE), ("test", _ORANGE)):
        if f"{label}_{score}" in columns:
            values = _scaled(columns, f"{label}_{score}")
            panel.add(label, _elapsed(columns), values, color, "marked")
    return panel


def _batch_panel(columns: dict[str, list[float]]) -> Panel:
    panel = Panel(STEP, "Batch size (cases)", "auto")
    samples = [("batch_cases", "gradient", _BLUE), ("curvature_cases", "curvature", _ORANGE)]
    if "curvature_cases" not in columns or columns["curvature_cases"] == columns["batch_cases"]:
        samples = [("batch_cases", "Batch size", _BLUE)]
    for column, label, color in samples:
        if column in columns:
            panel.add(label, _steps(columns), columns[column], color, "stairs")
    return panel


def _damping_panel(columns: dict[str, list[float]]) -> Panel:
    panel = Panel(STEP, "Damping λ", "log")
    if "damping" in columns:
        steps, damping = _steps(columns), columns["damping"]
        panel.add("λ", steps, damping, _GREEN, "stairs")
        accepted = columns.get("accepted", [1.0] * len(steps))
        rejected = [math.nan if ok else value for ok, value in zip(accepted, damping, strict=True)]
        panel.add("step rejected", steps, rejected, _ORANGE, "crosses")
    return panel


def _ratio_panel(columns: dict[str, list[float]]) -> Panel:
    panel = Panel(STEP, "Ratio ρ", "linear")
    if "reduction_ratio" in columns:
        low, high = _RATIOS
        shown = [min(max(r, low), high) for r in columns["reduction_ratio"]]
        panel.add("ρ", _steps(columns), shown, _GREEN, "stairs")
        beyond = [
            s if r != s and not math.isnan(r) else math.nan
            for r, s in zip(columns["reduction_ratio"], shown, strict=True)
        ]
        panel.add(f"outside of {low:g} to {high:g}", _steps(columns), beyond, _ORANGE, "crosses")
    return panel


def _cg_panel(columns: dict[str, list[float]], stops: list[str]) -> Panel:
    panel = Panel(STEP, "CG iterations", "zero")
    if "cg_iterations" not in columns:
        return panel
    steps, iterations = _steps(columns), columns["cg_iterations"]
    panel.add("CG iterations", steps, iterations, _GREY, "faint")
    for i, reason in enumerate(sorted(set(stops) - {""})):
        ended = [n if s == reason else math.nan for n, s in zip(iterations, stops, strict=True)]
        panel.add(reason, steps, ended, _PALETTE[i % len(_PALETTE)], "dots")
    return panel


def _seconds_panel(columns: dict[str, list[float]]) -> Panel:
    panel = Panel(STEP, "Seconds by part", "zero")
    parts = [c for c in columns if c.startswith("seconds_") and c != "seconds_total"]
    for i, column in enumerate(parts):
        label = column.removeprefix("seconds_")
        color = _PALETTE[i % len(_PALETTE)]
        panel.add(label, _steps(columns), columns[column], color, "stairs")
    return panel


def _read(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    columns = read_csv(path)
    if not columns or not next(iter(columns.values())):
        raise ValueError(
            f"{path} must be a CSV file written by CSVLogger, got no rows. Log at least one step."
        )
    return columns


def _elapsed(columns: dict[str, list[float]]) -> list[float]:
    if "elapsed" in columns:
        return columns["elapsed"]
    return list(accumulate(columns.get("seconds_total", _steps(columns))))


def _steps(columns: dict[str, list[float]]) -> list[float]:
    rows = len(next(iter(columns.values())))
    return columns.get("step", [float(i + 1) for i in range(rows)])


def _in_percent(column: str) -> bool:
    return column.endswith("accuracy")


def _name(column: str) -> str:
    name = column.replace("_", " ").capitalize()
    return f"{name} (%)" if _in_percent(column) else name


def _scaled(columns: dict[str, list[float]], column: str) -> list[float]:
    factor = 100.0 if _in_percent(column) else 1.0
    return [factor * value for value in columns[column]]
