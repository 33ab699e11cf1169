"""NIST's nonlinear regressions fitted by everybody: digits, and closure calls to six of them."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contenders import make_contender
from .nist import Regression, load_all
from .record import session
from .task import Metrics, RaceTask, Tensors

DIGITS = 6.0
#: Calls after six digits, to see that they stay; steps without a move that end a fit.
AFTER, IDLE = 30, 3
#: All with the options that they come with: there is no search here.
CONTENDERS = ("hf", "lm", "lm:scaled=True", "lm-geodesic", "ssbroyden", "lbfgs:history_size=100")
#: Others' calls are compared with its.
REFERENCE = "lm"


@dataclass
class Fit:
    """What came of one fit.

    Attributes:
        problem, start, optimizer: Which; the starts are 1 and 2, the first the farther one.
        digits: Correct ones of the worst parameter, at the end.
        calls: Evaluations of the model until it was first run where six digits are correct; None
            if it never was, or left again. A Jacobian counts as one.
        spent: Evaluations altogether.
        error: What ended the fit, if that was an exception.
    """

    problem: str
    start: int
    optimizer: str
    digits: float
    calls: int | None
    spent: int
    error: str | None = None


class Coefficients(nn.Module):
    """The parameters of a regression."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.b = nn.Parameter(start.clone())


class Counted:
    """A regression as a task of the race whose evaluations are counted."""

    def __init__(self, problem: Regression, start: int) -> None:
        self.problem = problem
        self.calls = 0
        self.reached: int | None = None
        self.task = RaceTask(
            problem.name,
            problem.name,
            lambda: Coefficients(problem.starts[start - 1]),
            (problem.x, problem.y),
            self._loss,
            self._evaluate,
            dtype=torch.float64,
            residuals=lambda model, batch: (self._responses(model, batch) - batch[1],),
        )

    def digits(self, model: nn.Module) -> float:
        assert isinstance(model, Coefficients)
        return self.problem.digits(model.b.detach())

    def _responses(self, model: nn.Module, batch: Tensors) -> Tensor:
        assert isinstance(model, Coefficients)
        self.calls += 1
        if self.reached is None and self.digits(model) >= DIGITS:
            self.reached = self.calls
        return self.problem.model(model.b, batch[0])

    def _loss(self, model: nn.Module, batch: Tensors) -> tuple[Tensor, Tensor]:
        responses = self._responses(model, batch)
        return F.mse_loss(responses, batch[1]), responses

    def _evaluate(self, model: nn.Module, whole: bool) -> Metrics:
        return {"digits": self.digits(model)}


def fit(problem: Regression, start: int, optimizer: str, max_calls: int) -> Fit:
    """One fit, until six digits have stood the test, nothing moves, or calls are used up."""
    counted = Counted(problem, start)
    torch.manual_seed(0)
    model = counted.task.make_model()
    error, idle, last = None, 0, model.b.detach().clone()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contender, _ = make_contender(optimizer, counted.task, model, 0, {})
            while counted.calls < min(max_calls, (counted.reached or math.inf) + AFTER):
                before = counted.calls
                contender.step(0.0)
                here = model.b.detach().clone()
                idle = idle + 1 if torch.equal(here, last) or counted.calls == before else 0
                last = here
                if idle >= IDLE or not bool(here.isfinite().all()):
                    break
    except Exception as problem_found:
        error = f"{type(problem_found).__name__}: {problem_found}".partition("\n")[0]
    digits = counted.digits(model)
    calls = counted.reached if digits >= DIGITS else None
    return Fit(problem.name, start, optimizer, round(digits, 2), calls, counted.calls, error)


def table(fits: Sequence[Fit]) -> str:
    """Markdown: a row a problem and start, a column an optimizer: digits, and calls to six."""
    names = list(dict.fromkeys(f.optimizer for f in fits))
    rows = dict.fromkeys((f.problem, f.start) for f in fits)
    found = {(f.problem, f.start, f.optimizer): f for f in fits}
    lines = [f"| problem, start | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for problem, start in rows:
        cells = [_cell(found.get((problem, start, name))) for name in names]
        lines.append(f"| {problem}, {start} | {' | '.join(cells)} |")
    for label, values in summary(fits).items():
        lines.append(f"| **{label}** | {' | '.join(values[name] for name in names)} |")
    return "\n".join(lines)


def summary(fits: Sequence[Fit]) -> dict[str, dict[str, str]]:
    """How many came to six digits, and the medians of calls, never counting as infinite."""
    names = dict.fromkeys(f.optimizer for f in fits)
    mine = {
        name: {(f.problem, f.start): f.calls for f in fits if f.optimizer == name} for name in names
    }
    rows: dict[str, dict[str, str]] = {"six digits": {}, "median calls": {}}
    for name, calls in mine.items():
        rows["six digits"][name] = f"{sum(c is not None for c in calls.values())} of {len(calls)}"
        rows["median calls"][name] = _text(_median([c or math.inf for c in calls.values()]))
    if REFERENCE in mine:
        label = f"median of calls over {REFERENCE}'s"
        base = {key: calls for key, calls in mine[REFERENCE].items() if calls is not None}
        rows[label] = {
            name: _text(_median([(calls.get(key) or math.inf) / base[key] for key in base]))
            for name, calls in mine.items()
        }
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, print the table, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--optimizers", nargs="+", default=[*CONTENDERS], metavar="NAME", help="as of race.py")
    add("--problems", nargs="+", metavar="NAME", help="some of the 27")
    add("--max-calls", type=int, default=6_000, help="of the model in one fit")
    add(
        "--data-root",
        type=Path,
        default=Path(os.environ.get("TORCH_HF_DATA", "data")),
        help="its folder nist has NIST's .dat files",
    )
    add("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(arguments)
    folder = args.data_root / "nist"
    if not folder.is_dir():
        parser.error(
            f"no folder {folder}; put the 27 .dat files of NIST's nonlinear regressions there, or "
            "say where they are with --data-root or TORCH_HF_DATA"
        )
    problems = [p for p in load_all(folder) if p.name in (args.problems or [p.name])]
    fits = [
        fit(problem, start, name, args.max_calls)
        for problem in problems
        for start in (1, 2)
        for name in args.optimizers
    ]
    print(table(fits))
    for failed in (f for f in fits if f.error):
        print(f"{failed.problem}, {failed.start}, {failed.optimizer}: {failed.error}")
    if args.output is not None:
        done = session("python benchmarks/nist.py", "cpu", torch.get_num_threads())
        rows = ",\n  ".join(json.dumps(asdict(f)) for f in fits)
        args.output.write_text(
            f'{{\n "sessions": [{json.dumps(done)}],\n "fits": [\n  {rows}\n ]\n}}\n'
        )


def _cell(found: Fit | None) -> str:
    if found is None:
        return "–"
    return f"{found.digits:.1f}, {found.calls if found.calls is not None else '–'}"


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.inf


def _text(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"
