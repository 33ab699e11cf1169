"""CSV rows, TensorBoard scalars, the progress bar's postfix, and the plots drawn from rows."""

from __future__ import annotations

import csv
import logging
import math

import pytest
import torch
from tracked_runs import REJECTED, REPORT

from torch_hf import HFOptimizer
from torch_hf.tracking import (
    CSVLogger,
    log_report,
    log_scalars,
    progress_postfix,
    read_csv,
)


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class TestCSVLogger:
    def test_columns_are_the_reports_and_the_extras(self, tmp_path):
        with CSVLogger(tmp_path / "new" / "run.csv") as logger:
            logger.log(REPORT, epoch=1)
        (row,) = rows_of(logger.path)
        expected = {**REPORT.to_dict(), "epoch": 1}
        assert list(row) == list(expected)
        assert row == {key: "" if value is None else str(value) for key, value in expected.items()}

    def test_a_row_is_on_disk_before_log_returns(self, tmp_path):
        with CSVLogger(tmp_path / "run.csv") as logger:
            for rows in (1, 2, 3):
                logger.log(REPORT)
                assert len(rows_of(logger.path)) == rows

    def test_a_later_column_widens_the_file(self, tmp_path):
        with CSVLogger(tmp_path / "run.csv") as logger:
            logger.log({"step": 1, "note": 'with "quotes", and\nlines'})
            logger.log({"step": 2}, test_accuracy=0.5)
            logger.log({"step": 3})
        columns = read_csv(logger.path)
        assert list(columns) == ["step", "note", "test_accuracy"]
        assert columns["step"] == [1, 2, 3]
        assert rows_of(logger.path)[0]["note"] == 'with "quotes", and\nlines'
        assert columns["test_accuracy"] == pytest.approx([math.nan, 0.5, math.nan], nan_ok=True)
        assert [path.name for path in tmp_path.iterdir()] == ["run.csv"]

    @pytest.mark.parametrize(("append", "steps"), [(True, [1, 2]), (False, [2])])
    def test_append_continues_and_otherwise_replaces(self, tmp_path, append, steps):
        for report in (REPORT, REJECTED):
            with CSVLogger(tmp_path / "run.csv", append=append) as logger:
                logger.log(report)
        assert read_csv(logger.path)["step"] == steps

    def test_a_closed_logger_says_so(self, tmp_path):
        with CSVLogger(tmp_path / "run.csv") as logger:
            pass
        logger.close()
        with pytest.raises(ValueError, match="closed"):
            logger.log(REPORT)

    def test_an_error_inside_keeps_the_rows(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), CSVLogger(tmp_path / "run.csv") as logger:
            logger.log(REPORT)
            raise KeyboardInterrupt
        assert len(rows_of(tmp_path / "run.csv")) == 1


def test_read_csv_gives_numbers(tmp_path):
    with CSVLogger(tmp_path / "run.csv") as logger:
        logger.log(REPORT)
        logger.log(REJECTED)
    columns = read_csv(logger.path)
    assert columns["accepted"] == [1, 0]
    assert columns["damping"] == [1e-2, 1e-2]
    assert math.isnan(columns["cg_stop"][0])


def test_read_csv_of_an_empty_file(tmp_path):
    (tmp_path / "run.csv").touch()
    with pytest.raises(ValueError, match="empty"):
        read_csv(tmp_path / "run.csv")


def test_log_scalars_writes_the_numbers_at_the_step():
    written = {}

    class Writer:
        def add_scalar(self, tag, scalar_value, global_step=None):
            written[tag] = (scalar_value, global_step)

    log_scalars(Writer(), REPORT, test_accuracy=0.5, unknown=None)
    assert written["hf/damping"] == (1e-2, 1)
    assert written["hf/accepted"] == (1.0, 1)
    assert written["hf/test_accuracy"] == (0.5, 1)
    assert not {"hf/cg_stop", "hf/unknown", "hf/gradient_variance", "hf/step"} & set(written)


def test_progress_postfix():
    assert progress_postfix(REPORT) == {
        "loss": "1.5",
        "batch": "64",
        "λ": "0.01",
        "ρ": "0.90",
        "CG": "12",
    }
    rejected = progress_postfix(REJECTED)
    assert rejected["rejected"] == "the loss rose"
    assert "ρ" not in rejected


def test_a_rejected_step_is_logged_as_a_warning(caplog):
    model = torch.nn.Linear(2, 1)
    optimizer = HFOptimizer(model.parameters())
    x = torch.ones(3, 2)
    logger = logging.getLogger("torch_hf.test")
    with caplog.at_level(logging.INFO, logger.name):
        for scale in (1.0, math.nan):
            optimizer.step(lambda scale=scale: (model(x) - scale).square().mean())
            log_report(logger, optimizer.last_report)
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING"]
    assert caplog.messages[0].startswith("step 1: loss ")
    assert "rejected: the loss before the step is nan" in caplog.messages[1]
