"""Follow a run: rows of a CSV file, TensorBoard scalars, a progress bar's postfix."""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, TextIO

from torch_hf.report import StepReport

Record = StepReport | Mapping[str, object]


class ScalarWriter(Protocol):
    """What :func:`log_scalars` needs of ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> object:
        """Record one number under a name."""


class CSVLogger:
    """Writes one row a step, each on disk before :meth:`log` returns.

    The columns are those of :meth:`StepReport.to_dict` and whatever else a row
    brings; a column that first appears in a later row is added to the header,
    and the earlier rows stay blank there.

    Args:
        path: The file; missing folders are made.
        append: Continue an existing file, as a resumed run does, instead of
            replacing it.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "run.csv"
        >>> with CSVLogger(path) as logger:
        ...     logger.log({"step": 1, "loss": 0.5})
        ...     logger.log({"step": 2, "loss": 0.25}, test_accuracy=0.9)
        >>> read_csv(path)
        {'step': [1.0, 2.0], 'loss': [0.5, 0.25], 'test_accuracy': [nan, 0.9]}
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns = _header(self.path) if append and self.path.exists() else []
        self._file = self.path.open("a" if self._columns else "w", newline="", encoding="utf-8")

    def log(self, report: Record, **extra: object) -> None:
        """Write one step.

        Args:
            report: ``optimizer.last_report``, or any mapping of column to
                value, so that another optimizer's steps can be logged alike.
            **extra: More columns, such as ``test_accuracy``; None is a blank.

        Raises:
            ValueError: The logger is closed.
        """
        if self._file.closed:
            raise ValueError(
                f"The CSVLogger of {self.path} must be open, got a closed one. Log inside its with "
                "block."
            )
        row = {**_row(report), **extra}
        new = [column for column in row if column not in self._columns]
        if new:
            self._widen(new)
        csv.DictWriter(self._file, self._columns, restval="").writerow(row)
        self._file.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> CSVLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _widen(self, new: list[str]) -> None:
        """Rewrite the file under a longer header, beside it first: a crash loses no row."""
        self._file.close()
        with _opened(self.path) as old:
            rows = list(csv.DictReader(old))
        self._columns = [*self._columns, *new]
        longer = self.path.with_name(self.path.name + ".tmp")
        with longer.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        longer.replace(self.path)
        self._file = self.path.open("a", newline="", encoding="utf-8")


def read_csv(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """The columns of a file that :class:`CSVLogger` wrote, as numbers.

    Args:
        path: The file.

    Returns:
        Column to values, one a row. True and false become 1 and 0; a blank or a
        text becomes nan.

    Raises:
        ValueError: The file has no header.
    """
    with _opened(Path(path)) as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames
        if names is None:
            raise ValueError(
                f"{path} must be a CSV file written by CSVLogger, got an empty file. Log at least "
                "one step."
            )
        rows = list(reader)
    return {column: [_number(row[column]) for row in rows] for column in names}


def read_texts(path: str | os.PathLike[str], column: str) -> list[str]:
    """One column of such a file as text, such as ``cg_stop``; blanks where there is none.

    Args:
        path: A file that :class:`CSVLogger` wrote.
        column: Its name.
    """
    with _opened(Path(path)) as file:
        return [row.get(column) or "" for row in csv.DictReader(file)]


def log_report(logger: logging.Logger, report: StepReport, level: int = logging.INFO) -> None:
    """Write one step in a line to Python's logging; a rejected one as a warning.

    Args:
        logger: Such as ``logging.getLogger(__name__)``.
        report: ``optimizer.last_report``.
        level: Of steps that were accepted.

    Example:
        >>> import logging, sys
        >>> logger = logging.getLogger("doctest")
        >>> logger.addHandler(logging.StreamHandler(sys.stdout))
        >>> logger.setLevel(logging.INFO)
        >>> from torch_hf.report import StepReport, Stop
        >>> log_report(logger, StepReport(1, 2.0, 1.5, True, 0.9, 1e-2, 0.5, 1.0, 12,
        ...            Stop.PROGRESS, 13, 2, 64, 64, "double_backward"))
        step 1: loss 2 -> 1.5, batch 64, λ 0.01, ρ 0.90, CG 12 (relative progress below cg_tol)
    """
    postfix = progress_postfix(report)
    ratio = f", ρ {postfix['ρ']}" if "ρ" in postfix else ""
    logger.log(
        level if report.accepted else logging.WARNING,
        "step %d: loss %.4g -> %s, batch %s, λ %s%s, CG %s (%s)%s",
        report.step,
        report.loss,
        postfix["loss"],
        postfix["batch"],
        postfix["λ"],
        ratio,
        postfix["CG"],
        report.cg_stop,
        f"; rejected: {report.reason}" if not report.accepted else "",
    )


def log_scalars(
    writer: ScalarWriter,
    report: StepReport,
    *,
    prefix: str = "hf/",
    **extra: float | None,
) -> None:
    """Write one step's numbers to TensorBoard (``pip install torch_hf[logging]``).

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or anything with its
            ``add_scalar``.
        report: ``optimizer.last_report``.
        prefix: What the tags begin with.
        **extra: More scalars, such as ``test_accuracy``.
    """
    for tag, value in {**report.to_dict(), **extra}.items():
        if isinstance(value, (bool, int, float)) and tag != "step":
            writer.add_scalar(prefix + tag, float(value), report.step)


def progress_postfix(report: StepReport) -> dict[str, str]:
    """One step in short, for the ``set_postfix`` of a tqdm bar.

    Args:
        report: ``optimizer.last_report``.

    Returns:
        Label to text: loss after the step (before it where nobody computed that), batch size,
        damping, reduction ratio, CG iterations, and the reason where the step was rejected.

    Example:
        >>> from torch_hf.report import StepReport, Stop
        >>> report = StepReport(1, 2.0, 1.5, True, 0.9, 1e-2, 0.5, 1.0, 12, Stop.PROGRESS,
        ...                     13, 2, 64, 64, "double_backward")
        >>> progress_postfix(report)
        {'loss': '1.5', 'batch': '64', 'λ': '0.01', 'ρ': '0.90', 'CG': '12'}
    """
    loss = report.loss if math.isnan(report.new_loss) else report.new_loss
    postfix = {
        "loss": f"{loss:.4g}",
        "batch": str(report.batch_cases),
        "λ": f"{report.damping:.2g}",
    }
    if math.isfinite(report.reduction_ratio):
        postfix["ρ"] = f"{report.reduction_ratio:.2f}"
    if report.solver != "kronecker":
        postfix["CG"] = str(report.cg_iterations)
    if not report.accepted:
        postfix["rejected"] = report.reason or str(report.cg_stop)
    return postfix


def _row(report: Record) -> dict[str, object]:
    return dict(report.to_dict() if isinstance(report, StepReport) else report)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A CSV file to read, with fields of any length: ``csv`` refuses those above 131,072."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            yield file
    finally:
        csv.field_size_limit(before)


def _header(path: Path) -> list[str]:
    with _opened(path) as file:
        return next(csv.reader(file), [])


def _number(text: str | None) -> float:
    if text in ("True", "False"):
        return float(text == "True")
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
