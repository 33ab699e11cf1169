"""The record of a task's races: one JSON file, written after every run, added to by later ones."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..machine import processor, version
from .contenders import split_name
from .runner import SHARES, Run

PACKAGES = ("torch", "torch_hf", "pytorch-optimizer", "singd")
#: Times to their final training metric are shown, and the test metric there: the paper's headline,
#: and the usual choice.
REFERENCES = ("hf-plain", "adam")


class Record:
    """Runs on one task, and the sessions that they were made in.

    Args:
        path: The file.
        keep: Read what it holds, to add to it.
    """

    def __init__(self, path: Path, keep: bool = True) -> None:
        self.path = path
        content = json.loads(path.read_text()) if keep and path.is_file() else {}
        self.about: dict[str, Any] = content.get("task", {})
        self.sessions: list[dict[str, Any]] = content.get("sessions", [])
        self.runs: list[Run] = content.get("runs", [])

    def has(self, optimizer: str, seed: int, budget: float) -> bool:
        """Whether there is such a run, errors not counted."""
        return any(_key(r) == (optimizer, seed, budget) and "error" not in r for r in self.runs)

    def add(self, run: Run) -> None:
        """Put in a run, in place of one with the same seed and budget; write the file."""
        self.runs = [r for r in self.runs if _key(r) != _key(run)]
        self.runs.append({**run, "session": len(self.sessions) - 1})
        self.write()

    def write(self) -> None:
        """One line a run, so that a difference between two files can be read."""
        head = {"task": self.about, "sessions": self.sessions, "summary": summary(self)}
        body = ",\n".join(json.dumps(r) for r in self.runs)
        text = json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n' + body + "\n ]\n}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".part")
        aside.write_text(text)
        os.replace(aside, self.path)  # whole, or as it was

    def of(self, optimizer: str) -> list[Run]:
        """An optimizer's runs at the largest budget."""
        return [r for r in self.runs if r["optimizer"] == optimizer and r["budget"] == self.budget]

    @property
    def budget(self) -> float:
        """The largest; shorter races stay in the file and out of the table."""
        return max((r["budget"] for r in self.runs), default=0.0)

    @property
    def optimizers(self) -> list[str]:
        """In the order they came."""
        return list(dict.fromkeys(r["optimizer"] for r in self.runs if r["budget"] == self.budget))


def session(command: str, device: str, threads: int, clock: str = "wall") -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    cuda = torch.device(device).type == "cuda"
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "threads": threads,
        "clock": clock,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def summary(record: Record) -> list[dict[str, Any]]:
    """A row an optimizer: medians over seeds at the budget, and of the times to each target.

    A seed that does not come to a target counts as never (so a median may be None), and so does
    one that ended with an error.
    """
    about, rows = record.about, []
    train, test = about["train_metric"], about["test_metric"]
    targets = [*map(tuple, about.get("targets", []))]
    named = [name for name in record.optimizers if split_name(name)[0] in REFERENCES]
    ends = {name: _end(record, name) for name in named}
    for name in record.optimizers:
        runs = record.of(name)
        row: dict[str, Any] = {"optimizer": name, "seeds": len(runs)}
        row["error"] = next((r["error"] for r in runs if "error" in r), None)
        row["steps"] = median(final(r, "steps") for r in runs)
        for metric in (train, test):
            values = [final(r, metric) for r in runs]
            row[metric] = median(values)
            row[f"{metric}_range"] = _range(values)
        row["at"] = {
            share: {
                metric: median(value_at(r, metric, part * record.budget) for r in runs)
                for metric in (train, test)
            }
            for share, part in SHARES.items()
        }
        row["best_test"] = median(best(r, test) for r in runs)
        row["seconds_to"] = {
            f"{metric} {value:g}": median(seconds_to(r, metric, value) for r in runs)
            for metric, value in targets
        }
        reached = {
            other: [seconds_to(r, train, end) for r in runs]
            for other, end in ends.items()
            if end is not None
        }
        row["seconds_to_end_of"] = {other: median(times) for other, times in reached.items()}
        row["test_at_end_of"] = {
            other: median(value_at(r, test, t) for r, t in zip(runs, times, strict=True))
            for other, times in reached.items()
        }
        rows.append(row)
    return rows


def final(run: Run, metric: str) -> float | None:
    """The value at the budget; None if the run had an error, or there is no number."""
    column = run["curve"].get(metric) or [None]
    return None if "error" in run else column[-1]


def best(run: Run, metric: str) -> float | None:
    """The least value on the curve, where one would have stopped who watched it."""
    values = [value for value in run["curve"].get(metric, []) if value is not None]
    return None if "error" in run else min(values, default=None)


def seconds_to(run: Run, metric: str, target: float) -> float | None:
    """When the metric first came to the target; its logarithm is a line between two points."""
    seconds, values = run["curve"].get("seconds", []), run["curve"].get(metric, [])
    before: tuple[float, float] | None = None
    for t, value in zip(seconds, values, strict=True):
        if value is None:
            continue
        if value <= target:
            if before is None or value <= 0 or before[1] <= value:
                return t
            part = math.log(before[1] / target) / math.log(before[1] / value)
            return before[0] + part * (t - before[0])
        before = (t, value)
    return None


def value_at(run: Run, metric: str, seconds: float | None) -> float | None:
    """The metric at that time; its logarithm is a line between two points; None if never."""
    times, values = run["curve"].get("seconds", []), run["curve"].get(metric, [])
    before: tuple[float, float] | None = None
    for t, value in zip(times, values, strict=True):
        if seconds is None or value is None:
            continue
        if t >= seconds:
            if before is None or t == before[0] or min(value, before[1]) <= 0:
                return value
            return before[1] * (value / before[1]) ** ((seconds - before[0]) / (t - before[0]))
        before = (t, value)
    return None


def median(values: Any) -> float | None:
    """The middle one, None counted as never; None if that is the middle one."""
    found = sorted(math.inf if value is None else value for value in values)
    if not found:
        return None
    middle = statistics.median(found)
    return middle if math.isfinite(middle) else None


def _end(record: Record, optimizer: str) -> float | None:
    return median(final(r, record.about["train_metric"]) for r in record.of(optimizer))


def _range(values: Sequence[float | None]) -> list[float] | None:
    found = [value for value in values if value is not None]
    return [min(found), max(found)] if found else None


def _key(run: Mapping[str, Any]) -> tuple[str, int, float]:
    return run["optimizer"], run["seed"], run["budget"]
