"""Draw runs from the CSV files that :class:`~torch_hf.tracking.CSVLogger` wrote."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_hf.tracking import read_csv, read_texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colour-blind-safe palette of Okabe and Ito (2008), less its yellow, which
# is too faint for a line on white.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_PALETTE = (_BLUE, _ORANGE, _GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: Ratios beyond are drawn at the edge, crossed.
_RATIOS = (-1.0, 2.0)
_GREY = "#888888"

_TIME = "Training time (s)"
_STEP = "Step"


@dataclass(frozen=True)
class _Curve:
    """A line, and how it is drawn: a key of the styles in :func:`_draw`."""

    label: str
    x: list[float]
    y: list[float]
    color: str
    kind: str


@dataclass
class _Panel:
    """Axes to be; ``scale`` is ``"zero"`` (linear, from 0), ``"log"``, ``"auto"``, ``"linear"``."""

    xlabel: str
    ylabel: str
    scale: str
    curves: list[_Curve] = field(default_factory=list)

    def add(self, label: str, x: list[float], y: list[float], color: str, kind: str) -> None:
        """Add a curve of the points that are numbers, if there are any."""
        points = [
            (a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)
        ]
        if points:
            xs, ys = [point[0] for point in points], [point[1] for point in points]
            self.curves.append(_Curve(label, xs, ys, color, kind))


def plot_training(
    csv_path: str | os.PathLike[str],
    png_path: str | os.PathLike[str],
    *,
    score: str = "accuracy",
    title: str = "",
) -> None:
    """Draw one run: loss and score against time, what each step chose against steps.

    Above stand the columns ``loss`` (of each step's batch), ``train_loss`` and
    ``test_loss``, and beside them ``train_<score>`` and ``test_<score>``, against
    seconds of training (column ``elapsed``, else the sum of ``seconds_total``).
    Below stand the batch sizes, the damping λ, the ratio ρ, the CG iterations with
    why they ended, and the seconds by part, against steps. A panel without data is
    left out.

    Args:
        csv_path: A file written by :class:`~torch_hf.tracking.CSVLogger`.
        png_path: The picture; its ending chooses the format (``.png``, ``.pdf``,
            ``.svg``). Missing folders are made.
        score: ``"accuracy"`` is a fraction, drawn in percent; any other column
            is drawn as it stands, its underscores as spaces.
        title: Written above the panels.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The file has no rows.
    """
    columns = _read(csv_path)
    rows = [
        [_loss_panel(columns), _score_panel(columns, score)],
        [_batch_panel(columns), _damping_panel(columns), _ratio_panel(columns)],
        [_cg_panel(columns, read_texts(csv_path, "cg_stop")), _seconds_panel(columns)],
    ]
    rows = [kept for row in rows if (kept := [panel for panel in row if panel.curves])]
    if not rows:
        raise ValueError(f"{csv_path} has none of the columns that plot_training draws")
    figure = _figure(9.6, 3.1 * len(rows) + 0.3 * bool(title))
    if title:
        figure.suptitle(title, fontsize=12)
    # rows with unlike numbers of panels share one finer grid
    fine = math.lcm(*(len(row) for row in rows))
    grid = figure.add_gridspec(len(rows), fine)
    for i, row in enumerate(rows):
        span = fine // len(row)
        for j, panel in enumerate(row):
            _draw(figure.add_subplot(grid[i, j * span : (j + 1) * span]), panel)
    _save(figure, png_path)


def plot_comparison(
    csv_paths: Mapping[str, str | os.PathLike[str]],
    png_path: str | os.PathLike[str],
    *,
    column: str = "test_accuracy",
    title: str = "",
) -> None:
    """Draw one column of several runs against their training time.

    Args:
        csv_paths: The label of each run and its CSV file.
        png_path: The picture, as for :func:`plot_training`.
        column: What to draw; one that ends in ``accuracy`` is drawn in percent.
        title: Written above.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No run is given, or none has the column.
    """
    panel = _Panel(_TIME, _name(column), "linear" if _in_percent(column) else "auto")
    for i, (label, path) in enumerate(csv_paths.items()):
        columns = _read(path)
        if column in columns:
            values = _scaled(columns, column)
            panel.add(label, _elapsed(columns), values, _PALETTE[i % len(_PALETTE)], "marked")
    if not panel.curves:
        raise ValueError(f"no run has values in column {column!r}; runs: {list(csv_paths)}")
    figure = _figure(6.0, 3.8)
    _draw(figure.add_subplot(), panel)
    if title:
        figure.axes[0].set_title(title, fontsize=11)
    _save(figure, png_path)


def _loss_panel(columns: dict[str, list[float]]) -> _Panel:
    panel = _Panel(_TIME, "Loss", "auto")
    time = _elapsed(columns)
    if "loss" in columns:
        panel.add("batch, before the step", time, columns["loss"], _BLUE, "faint")
    for label, color in (("train", _BLUE), ("test", _ORANGE)):
        if f"{label}_loss" in columns:
            panel.add(label, time, columns[f"{label}_loss"], color, "marked")
    return panel


def _score_panel(columns: dict[str, list[float]], score: str) -> _Panel:
    panel = _Panel(_TIME, _name(score), "linear" if _in_percent(score) else "auto")
    for label, color in (("train", _BLUE), ("test", _ORANGE)):
        if f"{label}_{score}" in columns:
            values = _scaled(columns, f"{label}_{score}")
            panel.add(label, _elapsed(columns), values, color, "marked")
    return panel


def _batch_panel(columns: dict[str, list[float]]) -> _Panel:
    panel = _Panel(_STEP, "Batch size (cases)", "auto")
    samples = [("batch_cases", "gradient", _BLUE), ("curvature_cases", "curvature", _ORANGE)]
    if "curvature_cases" not in columns or columns["curvature_cases"] == columns["batch_cases"]:
        samples = [("batch_cases", "Batch size", _BLUE)]
    for column, label, color in samples:
        if column in columns:
            panel.add(label, _steps(columns), columns[column], color, "stairs")
    return panel


def _damping_panel(columns: dict[str, list[float]]) -> _Panel:
    panel = _Panel(_STEP, "Damping λ", "log")
    if "damping" in columns:
        steps, damping = _steps(columns), columns["damping"]
        panel.add("λ", steps, damping, _GREEN, "stairs")
        accepted = columns.get("accepted", [1.0] * len(steps))
        rejected = [math.nan if ok else value for ok, value in zip(accepted, damping, strict=True)]
        panel.add("step rejected", steps, rejected, _ORANGE, "crosses")
    return panel


def _ratio_panel(columns: dict[str, list[float]]) -> _Panel:
    panel = _Panel(_STEP, "Ratio ρ", "linear")
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


def _cg_panel(columns: dict[str, list[float]], stops: list[str]) -> _Panel:
    panel = _Panel(_STEP, "CG iterations", "zero")
    if "cg_iterations" not in columns:
        return panel
    steps, iterations = _steps(columns), columns["cg_iterations"]
    panel.add("CG iterations", steps, iterations, _GREY, "faint")
    for i, reason in enumerate(sorted(set(stops) - {""})):
        ended = [n if s == reason else math.nan for n, s in zip(iterations, stops, strict=True)]
        panel.add(reason, steps, ended, _PALETTE[i % len(_PALETTE)], "dots")
    return panel


def _seconds_panel(columns: dict[str, list[float]]) -> _Panel:
    panel = _Panel(_STEP, "Seconds by part", "zero")
    parts = [c for c in columns if c.startswith("seconds_") and c != "seconds_total"]
    for i, column in enumerate(parts):
        label = column.removeprefix("seconds_")
        color = _PALETTE[i % len(_PALETTE)]
        panel.add(label, _steps(columns), columns[column], color, "stairs")
    return panel


def _draw(axes: Axes, panel: _Panel) -> None:
    styles: dict[str, dict[str, Any]] = {
        "faint": {"linewidth": 0.9, "alpha": 0.55},
        "marked": {"linewidth": 1.6, "marker": "o", "markersize": 3.2},
        "stairs": {"linewidth": 1.4, "drawstyle": "steps-mid"},
        "dots": {"linestyle": "none", "marker": "o", "markersize": 3.2},
        "crosses": {"linestyle": "none", "marker": "x", "markersize": 5.0},
    }
    for curve in panel.curves:
        style = styles[curve.kind]
        axes.plot(curve.x, curve.y, label=curve.label, color=curve.color, **style)
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    _scale(axes, panel)
    if len(panel.curves) > 1 or panel.curves[0].label not in panel.ylabel:
        axes.legend(frameon=False, fontsize=8.5)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _scale(axes: Axes, panel: _Panel) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

    values = [value for curve in panel.curves for value in curve.y]
    low, high = min(values), max(values)
    # below a factor of ten a logarithmic axis has too few ticks to be read
    if low > 0 and (panel.scale == "log" or (panel.scale == "auto" and high >= 10 * low)):
        axes.set_yscale("log")
        if high < 1000 * low:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.scale == "zero" or (panel.scale == "auto" and low >= 0):
        axes.set_ylim(bottom=0)
    if panel.xlabel == _STEP:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    else:
        axes.set_xlim(left=0)


def _read(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    columns = read_csv(path)
    if not columns or not next(iter(columns.values())):
        raise ValueError(f"{path} has no rows; expected a CSV file written by CSVLogger")
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


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install torch_hf[plot]") from error
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)  # pyplot, and with it a window system, stays out of it
    return figure


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
