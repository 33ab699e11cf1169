"""Where the time of a step goes, and its memory, on the MNIST autoencoder with 20 pairs.

python benchmarks/step.py --steps 6

Every step makes the same number of CG iterations, more than there are pairs (``cg_tol`` is 0, the
first lambda small): left to itself, CG ends early on so easy a problem, and the pairs stay few.
Time is by the parts of ``StepReport.seconds``. Memory is measured in a process for each row: its
peak over two steps, or over one forward and backward pass, above what it held with model and data
in place and its libraries loaded; on CUDA it is that of the tensors alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import (
    Task,
    autoencoder,
    environment,
    make_parser,
    parse,
    print_table,
    write_json,
)
from torch import Tensor

from torch_hf import HFOptimizer, split_batch
from torch_hf.report import StepReport
from torch_hf.solver.cg import KEEP_RATIO

BATCH, PARTS, PAIRS = 4000, 4, 20
#: The most that everything besides products, gradients and loss evaluations may take of a step.
OVERHEAD = 0.15
SHOWN = ("gradient", "products", "evaluations", "preconditioner", "other")
MEGABYTE = 1e6
HIGH_WATER = Path("/proc/self/status")  # on Linux


def take_steps(task: Task, args: argparse.Namespace, batches: Any = None) -> list[StepReport]:
    optimizer = HFOptimizer(
        task.model.parameters(),
        preconditioner="lbfgs" if args.pairs else "none",
        history_size=args.pairs or PAIRS,
        damping=1e-4,
        cg_max_iter=args.cg_iterations,
        cg_tol=0.0,
    )

    def on_batch(batch: tuple[Tensor, Tensor]) -> Tensor:
        return task.loss(task.model(batch[0]), batch[1])

    reports = []
    for _ in range(args.steps):
        optimizer.step(task.closure if batches is None else on_batch, batches)
        assert optimizer.last_report is not None
        reports.append(optimizer.last_report)
    return reports


# --- time ---


def overhead(seconds: Iterable[dict[str, float]]) -> float:
    """The share of all that is not products, gradients or loss evaluations."""
    rows = list(seconds)
    rest = sum(row["preconditioner"] + row["other"] for row in rows)
    return rest / sum(row["total"] for row in rows)


def time_row(name: str, r: StepReport | None, seconds: dict[str, float]) -> list[str]:
    counts = [r.cg_iterations, r.products, r.evaluations] if r else ["", "", ""]
    shares = [f"{100 * seconds[part] / seconds['total']:.1f}" for part in SHOWN]
    return [
        name,
        *map(str, counts),
        f"{seconds['total']:.2f}",
        *shares,
        f"{100 * overhead([seconds]):.1f}",
    ]


def time_steps(args: argparse.Namespace) -> dict[str, Any]:
    """The first step has no pairs yet, so it is shown and not counted."""
    reports = take_steps(autoencoder(BATCH, args.device), args)
    seconds = [dict(r.seconds) for r in reports]
    counted = seconds[1:]
    total = {part: sum(row[part] for row in counted) for part in counted[0]}
    rows = [time_row(f"step {r.step}", r, row) for r, row in zip(reports, seconds, strict=True)]
    least = {part: min(row[part] for row in counted) for part in SHOWN}
    least["total"] = sum(least.values())
    rows += [time_row("2 and after", None, total), time_row("least of each", None, least)]
    shares = [f"{part} %" for part in (*SHOWN, "overhead")]
    header = ["", "CG", "products", "losses", "seconds", *shares]
    print_table(f"A step's time, batch {BATCH:,}, {PAIRS} pairs", header, rows)
    share = overhead(counted)
    verdict = "met" if share <= OVERHEAD else "missed"
    print(f"\noverhead: preconditioner and other; {share:.1%}, target {OVERHEAD:.0%}: {verdict}")
    return {
        "steps": [r.to_dict() for r in reports],
        "overhead": share,
        "target": OVERHEAD,
        "overhead_of_least": overhead([least]),
    }


# --- memory ---


class Peak:
    """Bytes from here on, above those held now: of the process, or of the device's tensors."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif HIGH_WATER.exists():
            HIGH_WATER.with_name("clear_refs").write_text("5")  # the mark falls to the present
        self.before = self._now()

    def bytes(self) -> int:
        return self._now() - self.before

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if HIGH_WATER.exists():
            lines = HIGH_WATER.read_text().splitlines()
            return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(args: argparse.Namespace) -> dict[str, int]:
    """In a process of its own: the peak of one kind of work above model and data."""
    task = autoencoder(args.batch, args.device)
    take_steps(autoencoder(2, args.device), args)  # libraries take memory of their own on first use
    peak = Peak(args.device)
    if args.measure == "gradient":
        task.closure()
        return {"bytes": peak.bytes(), "parameters": task.numel}
    size = args.batch // args.split
    batches = split_batch((task.x, task.y), size) if args.split > 1 else None
    reports = take_steps(task, args, batches)
    iterations = max(r.cg_iterations for r in reports)
    return {
        "bytes": peak.bytes(),
        "parameters": task.numel,
        "iterations": iterations,
        "kept": kept_iterates(iterations),
    }


def kept_iterates(iterations: int) -> int:
    """How many of CG's iterates are kept: at ceil(1.3^j), and the last."""
    exponents = range(math.ceil(math.log(iterations) / math.log(KEEP_RATIO)) + 1)
    return len({min(math.ceil(KEEP_RATIO**j), iterations) for j in exponents})


def in_a_process(args: argparse.Namespace, measure: str, **options: int) -> dict[str, int]:
    """Freed blocks go back to the system at once, so that the peak is of what was in use."""
    command = [sys.executable, __file__, "--measure", measure, "--device", str(args.device)]
    command += ["--threads", str(args.threads), "--steps", "2"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    given = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(command, env=given, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, int] = json.loads(run.stdout)
    return result


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each kind of step beside what is promised, 3 gradients + (4M + kept + 8) vectors."""
    found = []
    for split in (1, PARTS):
        gradient = in_a_process(args, "gradient", batch=BATCH // split)
        for pairs in (PAIRS, 0):
            options = {"batch": BATCH, "split": split, "pairs": pairs}
            step = in_a_process(args, "step", cg_iterations=PAIRS + 2, **options)
            vector = 4 * step["parameters"]
            promise = 3 * gradient["bytes"] + (4 * pairs + step["kept"] + 8) * vector
            met = step["bytes"] <= promise
            more = {"gradient": gradient["bytes"], "promise": promise, "met": met}
            found.append({**options, **step, **more})
    return found


def memory_rows(found: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for f in found:
        batches = f"{f['split']} x {f['batch'] // f['split']:,}"
        sizes = [f"{f[key] / MEGABYTE:,.0f}" for key in ("gradient", "bytes", "promise")]
        vectors = (f["bytes"] - f["gradient"]) / (4 * f["parameters"])
        verdict = "met" if f["met"] else "missed"
        rows.append([f"{batches}, {f['pairs']} pairs", *sizes, f"{vectors:.0f}", verdict])
    return rows


def main() -> None:
    parser = make_parser(__doc__, rounds=1)
    add = parser.add_argument
    add("--steps", type=int, default=6, help="how many, the first not counted")
    add("--cg-iterations", type=int, default=30, help="of each timed step")
    for name, default in {"batch": BATCH, "split": 1, "pairs": PAIRS}.items():
        add(f"--{name}", type=int, default=default, help=argparse.SUPPRESS)
    add("--time-only", action="store_true", help="leave out the memory, which takes minutes")
    add("--measure", choices=("gradient", "step"), help=argparse.SUPPRESS)
    args = parse(parser)
    if args.measure:
        print(json.dumps(measure(args)))
        return
    if args.device.type == "cuda":  # so that the host's clock sees each kernel where it belongs
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    timed = time_steps(args)
    found = [] if args.time_only else memory(args)
    header = ["batches", "gradient MB", "step MB", "promised MB", "step's extra / P", ""]
    title = "Peak memory of a step (promise: 3 gradients + (4M + kept + 8) P)"
    if found:
        print_table(f"{title}, P = {found[0]['parameters']:,}", header, memory_rows(found))
    about = environment(args.device, args.threads)
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))
    content = {"environment": about, "batch": BATCH, "time": timed, "memory": found}
    write_json("step", args.device, content, args.record)


if __name__ == "__main__":
    main()
