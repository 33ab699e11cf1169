"""One run: a contender on a task for so many seconds, its metrics taken off the clock."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .contenders import Contender, evaluated, make_contender
from .task import RaceTask

POINTS = 20
FIRST_POINT = 0.01  # of the budget
#: Parts of the budget at which the table looks too, beside the whole.
SHARES = {"1/10": 0.1, "1/3": 1 / 3}

Run = dict[str, Any]


class Stopwatch:
    """Seconds of training; stands still between steps."""

    def __init__(self, device: str, clock: str = "wall") -> None:
        self.seconds, self.device, self.clock = 0.0, torch.device(device), clock

    def time(self, contender: Contender, progress: float) -> float:
        """Seconds of one step."""
        self._wait()
        start = self._now()
        contender.step(progress)
        self._wait()
        passed = self._now() - start
        self.seconds += passed
        return passed

    def _now(self) -> float:
        return time.process_time() if self.clock == "cpu" else time.perf_counter()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def run(
    task: RaceTask,
    name: str,
    seed: int,
    budget: float,
    *,
    device: str = "cpu",
    rate: Mapping[str, Any] | None = None,
    points: int = POINTS,
    clock: str = "wall",
) -> Run:
    """Train for ``budget`` seconds; an exception ends the run and is its result.

    A step that ends after the budget does not count: the parameters go back to those before it.
    The curve is measured at the first step's end after each of ``points`` times, equally far
    apart in logarithm, and after the marks of the table; its last row is the state at the budget,
    on the whole training set.
    """
    training = Training(task, name, seed, budget, device, rate, points, clock)
    training.advance()
    return training.result


class Training:
    """A run that can be held and go on, with random numbers of its own.

    Attributes:
        result: The run so far.
        done: Whether the budget is used up, or an exception ended the run.
    """

    def __init__(
        self,
        task: RaceTask,
        name: str,
        seed: int,
        budget: float,
        device: str = "cpu",
        rate: Mapping[str, Any] | None = None,
        points: int = POINTS,
        clock: str = "wall",
    ) -> None:
        gc.collect()
        self.result: Run = {"task": task.name, "optimizer": name, "seed": seed, "budget": budget}
        self.done = False
        self._rows: list[dict[str, float]] = []
        self._watch = Stopwatch(device, clock)
        torch.manual_seed(seed)
        model = task.make_model().to(device)
        self.result["parameters"] = sum(p.numel() for p in model.parameters())
        self._steps = self._all_steps(task, model, name, seed, budget, rate or {}, points)
        self._random = _random_state(self._watch.device)

    def advance(self, seconds: float = math.inf) -> None:
        """Train for so many seconds more, at least one step."""
        goal = self._watch.seconds + seconds
        _set_random_state(self._watch.device, self._random)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the peers' packages; ours is in the reports
            try:
                while self._watch.seconds < goal:
                    next(self._steps)
            except StopIteration:
                self.done = True
            except Exception as error:
                line = str(error).strip().partition("\n")[0]
                self.result["error"] = f"{type(error).__name__}: {line}"
                self.done = True
        self.result["curve"] = _columns(self._rows)
        self._random = _random_state(self._watch.device)

    def _all_steps(
        self,
        task: RaceTask,
        model: nn.Module,
        name: str,
        seed: int,
        budget: float,
        rate: Mapping[str, Any],
        points: int,
    ) -> Iterator[None]:
        contender, self.result["options"] = make_contender(name, task, model, seed, rate)
        yield from _train(task, model, contender, self._watch, budget, points, self._rows)


def take_turns(trainings: Sequence[Training], seconds: float) -> None:
    """Trainings that take turns of so many seconds, so that what disturbs one disturbs all."""
    while any(not training.done for training in trainings):
        for training in trainings:
            if not training.done:
                training.advance(seconds)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def warm_up(
    task: RaceTask,
    name: str,
    *,
    device: str = "cpu",
    rate: Mapping[str, Any] | None = None,
) -> None:
    """One step on a network thrown away: imports, thread pools and kernels are not the race's."""
    torch.manual_seed(0)
    model = task.make_model().to(device)
    # what is wrong is the run's to say
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        make_contender(name, task, model, 0, rate or {})[0].step(0.0)


def _train(
    task: RaceTask,
    model: nn.Module,
    contender: Contender,
    watch: Stopwatch,
    budget: float,
    points: int,
    rows: list[dict[str, float]],
) -> Iterator[None]:
    """Steps until the budget is used up; it yields after each."""
    due = [budget * FIRST_POINT ** (1 - i / max(points - 1, 1)) for i in range(points)]
    due = sorted([*due, *(budget * share for share in SHARES.values())])
    steps, longest, shown = 0, 0.0, evaluated(contender, model)
    if points > 1:
        rows.append(_row(task, shown, contender, 0.0, 0))
    while True:
        # a copy before every step would cost too much; a first step may take any time
        near = steps == 0 or watch.seconds + 2 * longest >= budget
        before = (_snapshot(shown), watch.seconds, contender.notes()) if near else None
        longest = max(longest, watch.time(contender, watch.seconds / max(budget, 1e-9)))
        steps += 1
        if watch.seconds >= budget or _lost(model):
            break
        if points > 1 and watch.seconds >= due[0]:
            rows.append(_row(task, shown, contender, watch.seconds, steps))
            due = [t for t in due if t > watch.seconds] or [budget]
        yield
    notes, seconds = contender.notes(), watch.seconds
    if before is None and watch.seconds > budget and rows:
        rows.append(rows[-1])  # a step longer than any before: the last point stands
        return
    if before is not None and watch.seconds > budget:
        state, seconds, notes = before
        shown.load_state_dict(state)
        steps -= 1
    metrics = task.evaluate(shown, True)
    rows.append({"seconds": seconds, "steps": steps, **metrics, **notes})


def _row(
    task: RaceTask, model: nn.Module, contender: Contender, seconds: float, steps: int
) -> dict[str, float]:
    model.eval()
    metrics = task.evaluate(model, False)
    model.train()
    return {"seconds": seconds, "steps": steps, **metrics, **contender.notes()}


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


@torch.no_grad()
def _lost(model: nn.Module) -> bool:
    """Whether parameters are no numbers any more: nothing comes after that."""
    return not all(bool(p.sum().isfinite()) for p in model.parameters())


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float | None]]:
    """Rows as columns, six digits each; None for what is missing or not finite."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return {key: [_rounded(row.get(key)) for row in rows] for key in keys}


def _rounded(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
