"""The peers' learning rates: searched once, off the clock, kept in ``rates.json``.

The search favours the peers. Each has its own time for it, which no race counts; a grid of about
a factor of three, with further options for some, which goes on beyond an end that wins; and the
choice is made on the very task and metric of the race, while ours runs with its defaults.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .peers import PEERS
from .runner import run
from .task import RaceTask, Setting

PATH = Path(__file__).parent / "rates.json"
#: Each trial gets this part of the race's budget, on weights that no race starts from.
PART = 6
SEED = 1_000
FACTOR = math.sqrt(10)
EXTENSIONS = 4


class Rates:
    """What was found so far, by kind of device and size, task and peer."""

    def __init__(self, path: Path = PATH) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, setting: Setting, task: str, peer: str) -> dict[str, Any] | None:
        """The options found, or None."""
        entry = self.found.get(_place(setting), {}).get(task, {}).get(peer)
        return None if entry is None else entry["options"]

    def put(self, setting: Setting, task: str, peer: str, entry: dict[str, Any]) -> None:
        """Keep a search's result, on disk too (a search may be cut short)."""
        self.found.setdefault(_place(setting), {}).setdefault(task, {})[peer] = entry
        self.path.write_text(json.dumps(self.found, indent=1, sort_keys=True) + "\n")


def search(
    task: RaceTask, peer: str, budget: float, setting: Setting, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Try the peer's rates for ``budget`` seconds each; the least training metric wins."""
    spec = PEERS[peer]
    tried: list[dict[str, Any]] = []

    def attempt(rate: float, variant: dict[str, Any]) -> float:
        options = {"lr": float(f"{rate:.3g}"), **variant}
        result = run(task, peer, SEED, budget, device=setting.device, rate=options, points=1)
        value = (result["curve"].get(task.train_metric) or [None])[-1]
        # a run that ended with an exception has no last row
        value = None if "error" in result else value
        tried.append({**options, task.train_metric: value})
        if "error" in result:
            tried[-1]["error"] = result["error"]
        return math.inf if value is None else value

    best: tuple[float, dict[str, Any]] = (math.inf, {"lr": spec.rates[0], **spec.variants[0]})
    for variant in spec.variants:
        values = {rate: attempt(rate, variant) for rate in spec.rates}
        for _ in range(EXTENSIONS if len(spec.rates) > 1 else 0):
            winner = min(values, key=lambda rate: values[rate])
            if math.isinf(values[winner]) and any("error" in entry for entry in tried):
                break  # it cannot run here, whatever the rate
            if winner == max(values) and not math.isinf(values[winner]):
                values[winner * FACTOR] = attempt(winner * FACTOR, variant)
            elif winner == min(values) or math.isinf(values[winner]):
                lower = min(values) / FACTOR
                values[lower] = attempt(lower, variant)
        rate = min(values, key=lambda rate: values[rate])
        if values[rate] < best[0]:
            best = values[rate], {"lr": float(f"{rate:.3g}"), **variant}
    log(f"  {peer} on {task.name}: {best[1]} ({task.train_metric} {best[0]:.4g})")
    spent = {"seconds_each": round(budget, 2), "threads": torch.get_num_threads()}
    return {"options": best[1], **spent, "tried": tried}


def _place(setting: Setting) -> str:
    return setting.device.partition(":")[0] + ("-large" if setting.large else "")
