"""How long each run may take so that a whole race fits in so many minutes."""

from __future__ import annotations

import math
import time

from torch import nn

from .rates import FINAL, PART
from .runner import POINTS
from .task import RaceTask

#: Trials of a search's first round, and how many are tried again for longer.
TRIALS, FINALS = 7, 2
#: Of the minutes; the rest is for steps that end after the budget, first steps and imports.
PLANNED = 0.8


def fitting(task: RaceTask, device: str, runs: int, searches: int, minutes: float) -> float:
    """Seconds of training a run, such that searches, runs and evaluations end in time.

    Raises:
        ValueError: Less than a second is left for each.
    """
    model = task.make_model().to(device)
    task.evaluate(model, False)  # the first is slower than those to come
    part, whole = (_seconds(task, model, everything) for everything in (False, True))
    left = PLANNED * 60 * minutes - runs * (POINTS * part + whole)
    budget = left / (runs + searches * (TRIALS + FINALS * FINAL) / PART)
    if budget < 1:
        raise ValueError(
            f"{runs} runs with {searches} searches of rates do not fit in {minutes:g} minutes; "
            "name fewer optimizers or seeds, or give more minutes"
        )
    return math.floor(budget) if budget >= 10 else math.floor(10 * budget) / 10


def _seconds(task: RaceTask, model: nn.Module, everything: bool) -> float:
    start = time.perf_counter()
    task.evaluate(model, everything)
    return time.perf_counter() - start
