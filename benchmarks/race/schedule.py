"""How long each run may take so that a whole race fits in so many minutes."""

from __future__ import annotations

import math
import time

from torch import nn

from .peers import PeerSpec
from .rates import FINAL, PART
from .runner import POINTS
from .task import RaceTask

#: Trials of a usual search's first round, how many of them go beyond an end that wins, and how many
#: are tried again for longer.
TRIALS, BEYOND, FINALS = 7, 3, 2
#: Of the minutes; the rest is for steps that end after the budget, first steps and imports.
PLANNED = 0.8


def search_length(spec: PeerSpec) -> float:
    """How many usual searches a peer's takes."""
    rates = len(spec.rates)
    trials = len(spec.variants) * (rates + (BEYOND if rates > 1 else 0))
    return (trials + FINALS * FINAL) / (TRIALS + FINALS * FINAL)


def fitting(task: RaceTask, device: str, runs: int, searches: float, minutes: float) -> float:
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
            f"{runs} runs with {searches:.3g} searches of rates do not fit in {minutes:g} minutes; "
            "name fewer optimizers or seeds, or give more minutes"
        )
    return math.floor(budget) if budget >= 10 else math.floor(10 * budget) / 10


def _seconds(task: RaceTask, model: nn.Module, everything: bool) -> float:
    start = time.perf_counter()
    task.evaluate(model, everything)
    return time.perf_counter() - start
