"""Plots drawn from the rows of a run."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
from tracked_runs import REJECTED, REPORT

from torch_hf.plotting import plot_comparison, plot_training
from torch_hf.tracking import (
    CSVLogger,
    read_texts,
)


@pytest.fixture
def run(tmp_path):
    """A run of six steps, the third of them rejected, the test set seen every other step."""
    with CSVLogger(tmp_path / "run.csv") as logger:
        for step in range(1, 7):
            report = dataclasses.replace(
                REJECTED if step == 3 else REPORT,
                step=step,
                loss=2.0 / step,
                damping=0.5**step,
                batch_cases=64 * step,
            )
            seen = {"test_loss": 2.5 / step, "test_accuracy": 1 - 0.5 / step}
            logger.log(report, elapsed=0.5 * step, **(seen if step % 2 == 0 else {}))
    return logger.path


def assert_png(path, least_bytes=10_000):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > least_bytes


class TestPlots:
    def test_training(self, run, tmp_path):
        plot_training(run, tmp_path / "plots" / "training.png", title="Six steps")
        assert_png(tmp_path / "plots" / "training.png")

    def test_another_optimizers_run(self, tmp_path):
        with CSVLogger(tmp_path / "adam.csv") as logger:
            for step in range(1, 4):
                logger.log({"step": step, "loss": 1 / step, "batch_cases": 32})
        plot_training(logger.path, tmp_path / "adam.png")
        assert_png(tmp_path / "adam.png")

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_losses_a_logarithm_does_not_take(self, tmp_path, value):
        with CSVLogger(tmp_path / "run.csv") as logger:
            logger.log({"step": 1, "loss": 100.0})
            logger.log({"step": 2, "loss": value})
        plot_training(logger.path, tmp_path / "run.png")
        assert_png(tmp_path / "run.png")

    def test_comparison(self, run, tmp_path):
        plot_comparison({"one": run, "two": run}, tmp_path / "two.png", title="Two runs")
        assert_png(tmp_path / "two.png")

    def test_comparison_without_the_column(self, run, tmp_path):
        with pytest.raises(ValueError, match="must have values in column 'speed'"):
            plot_comparison({"one": run}, tmp_path / "two.png", column="speed")

    @pytest.mark.parametrize("text", ["step,loss\n", "note\nhello\n"])
    def test_nothing_to_draw(self, tmp_path, text):
        (tmp_path / "run.csv").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"no rows|must have a column"):
            plot_training(tmp_path / "run.csv", tmp_path / "run.png")

    def test_without_matplotlib_the_error_says_what_to_install(self, run, tmp_path, monkeypatch):
        for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"pip install torch_hf\[plot\]"):
            plot_training(run, tmp_path / "run.png")


def test_why_cg_ended_is_read_from_the_file(tmp_path):
    path = tmp_path / "run.csv"
    with CSVLogger(path) as logger:
        logger.log({"step": 1, "cg_stop": "negative curvature"})
        logger.log({"step": 2})
    assert read_texts(path, "cg_stop") == ["negative curvature", ""]
    assert read_texts(path, "nothing") == ["", ""]
