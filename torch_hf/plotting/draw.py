"""Draw runs from the CSV files that :class:`~torch_hf.tracking.CSVLogger` wrote."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_hf.plotting.panels import STEP, Panel, comparison_panel, training_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    rows = training_panels(csv_path, score)
    if not rows:
        raise ValueError(
            f"{csv_path} must have a column that plot_training draws, got none. Log the run with "
            "CSVLogger."
        )
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
    panel = comparison_panel(csv_paths, column)
    if not panel.curves:
        raise ValueError(
            f"At least one run must have values in column {column!r}, got none in "
            f"{list(csv_paths)}. Choose a column of these files."
        )
    figure = _figure(6.0, 3.8)
    _draw(figure.add_subplot(), panel)
    if title:
        figure.axes[0].set_title(title, fontsize=11)
    _save(figure, png_path)


def _draw(axes: Axes, panel: Panel) -> None:
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
        # lines may pass beneath: a box lets the words be read there
        axes.legend(framealpha=0.85, edgecolor="none", fontsize=8.5)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _scale(axes: Axes, panel: Panel) -> None:
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
    if panel.xlabel == STEP:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    else:
        axes.set_xlim(left=0)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib. Install it: pip install torch_hf[plot]"
        ) from error
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)  # pyplot, and with it a window system, stays out of it
    return figure


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
