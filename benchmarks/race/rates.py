"""The peers' learning rates and dampings: searched once, off the clock, kept in ``rates.json``.

The search favours the peers. Each has its own time for it, which no race counts; a grid of about
a factor of three, with further options for some, which goes on beyond an end that wins; and the
choice is made on the very task and metric of the race, while ours runs with its defaults.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .peers import PEERS, PeerSpec
from .runner import run
from .task import RaceTask, Setting

PATH = Path(__file__).parent / "rates.json"
#: Each trial gets this part of the race's budget, on weights that no race starts from.
PART = 6
SEED = 1_000
EXTENSIONS = 4
#: How many times longer the two best are tried again.
FINAL = 3


class Rates:
    """What was found so far, by kind of device and size, task and peer.

    Args:
        path: The file.
        aside: Where what is found from now on is kept, if not in that file.
    """

    def __init__(self, path: Path = PATH, aside: Path | None = None) -> None:
        self.path = aside or path
        self.sources = [path, aside] if aside else [path]
        self.found: dict[str, Any] = {}
        self._read()

    def get(self, setting: Setting, task: str, peer: str, seconds: float) -> dict[str, Any] | None:
        """The options found, or None; trials much shorter than these seconds do not count."""
        entry = self.found.get(setting.kind, {}).get(task, {}).get(peer)
        return entry["options"] if entry and entry["seconds_each"] >= seconds / 2 else None

    def put(self, setting: Setting, task: str, peer: str, entry: dict[str, Any]) -> None:
        """Keep a search's result, on disk too (a search may be cut short)."""
        self._read()  # another search may have written since
        self.found.setdefault(setting.kind, {}).setdefault(task, {})[peer] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1, sort_keys=True) + "\n")

    def _read(self) -> None:
        for source in self.sources:
            if not source.is_file():
                continue
            for kind, tasks in json.loads(source.read_text()).items():
                for task, peers in tasks.items():
                    self.found.setdefault(kind, {}).setdefault(task, {}).update(peers)


def search(
    task: RaceTask, peer: str, budget: float, setting: Setting, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Try the peer's rates for ``budget`` seconds each, the two best again for longer.

    The least training metric wins. What is best in a short run is often too large in a long one;
    hence the final.
    """
    torch.manual_seed(SEED)
    trials = Trials(task, peer, setting)
    for variant in PEERS[peer].variants:
        _climb(trials, PEERS[peer], variant, budget)
    best = sorted((t for t in trials.done if t.value < math.inf), key=lambda t: t.value)[:2]
    if len(best) > 1:
        finals = [trials(t.options, FINAL * budget) for t in best]
        # a final that went wrong, as on a machine that was disturbed, leaves the first round's
        best = sorted([t for t in finals if t.value < math.inf] or best, key=lambda t: t.value)
    winner = best[0] if best else trials.done[0]
    log(f"  {peer} on {task.name}: {winner.options} ({task.train_metric} {winner.value:.4g})")
    spent = {"seconds_each": round(budget, 2), "threads": torch.get_num_threads()}
    return {"options": winner.options, **spent, "tried": [t.entry for t in trials.done]}


@dataclass
class Trial:
    """What came of some options: the training metric, infinite if it did not fall."""

    options: dict[str, Any]
    value: float
    entry: dict[str, Any]


class Trials:
    """Runs of a peer on a task, from weights that no race starts from."""

    def __init__(self, task: RaceTask, peer: str, setting: Setting) -> None:
        self.task, self.peer, self.setting = task, peer, setting
        self.done: list[Trial] = []
        # whatever is above this has diverged, though it may still be a number
        model = task.make_model().to(setting.device)
        self.start = task.evaluate(model, False)[task.train_metric]

    def __call__(self, options: dict[str, Any], budget: float) -> Trial:
        """Train for so many seconds."""
        result = run(
            *(self.task, self.peer, SEED, budget),
            device=self.setting.device,
            rate=options,
            points=1,
            clock=self.setting.clock,
        )
        metric = self.task.train_metric
        found = None if "error" in result else (result["curve"].get(metric) or [None])[-1]
        value = found if found is not None and found < self.start else math.inf
        entry = {**options, "seconds": round(budget, 2), metric: found}
        if "error" in result:
            entry["error"] = result["error"]
        self.done.append(Trial(options, value, entry))
        return self.done[-1]


def _climb(trials: Trials, spec: PeerSpec, variant: dict[str, Any], budget: float) -> None:
    """Try the rates, and go on where an end is the best, or below if the lowest diverged."""

    def attempt(rate: float) -> float:
        return trials({spec.searched: float(f"{rate:.3g}"), **variant}, budget).value

    values = {rate: attempt(rate) for rate in spec.rates}
    if len(spec.rates) == 1 or all("error" in trial.entry for trial in trials.done):
        return
    for _ in range(EXTENSIONS):
        best = min(values, key=lambda rate: values[rate])
        # where the lowest diverged, a better one may have come to nothing by chance
        if math.isinf(values[min(values)]) or best == min(values):
            rate = min(values) / spec.factor
        elif best == max(values):
            rate = best * spec.factor
        else:
            return
        values[rate] = attempt(rate)
