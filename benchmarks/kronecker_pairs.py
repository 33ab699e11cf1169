"""What a Kronecker step on pairs of two tables costs, beside dense layers.

python benchmarks/kronecker_pairs.py

Random features in the sizes of the Davis data (25,047 of 68 x 442 pairs), and 100,000 of 300 x 400
pairs with a million products each. A step is forward, backward and optimizer, with momentum, of
``layer(batch).relu()`` and a linear layer. ``gram="rows"`` is the same layer without the grid.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import environment, interleaved, make_parser, parse, print_table
from torch import Tensor, nn

from torch_hf.kronecker import KroneckerFactors, KroneckerLinear, KroneckerSGD

GRID, ROWS, LINEAR = "Kronecker, grid", 'Kronecker, gram="rows"', "nn.Linear"
HEADER = ["pairs", "n", "d", "m", "B", "start s", GRID, ROWS, LINEAR, "times", "peak GB"]


@dataclass(frozen=True)
class Case:
    """Tables of a and b rows with p and q features, n pairs, m neurons."""

    name: str
    tables: tuple[int, int]
    widths: tuple[int, int]
    n: int
    m: int
    contenders: tuple[str, ...]
    batch: int = 128


def all_cases(quick: bool) -> list[Case]:
    if quick:
        return [Case("tiny", (6, 8), (4, 5), 40, 4, (GRID, ROWS, LINEAR), batch=8)]
    return [
        Case("Davis", (68, 442), (68, 442), 25_047, 64, (GRID, ROWS, LINEAR)),
        Case("Davis", (68, 442), (68, 442), 25_047, 1024, (GRID, LINEAR)),
        Case("large", (300, 400), (1000, 1000), 100_000, 256, (GRID, LINEAR)),
        Case("large", (300, 400), (1000, 1000), 100_000, 1024, (GRID,)),
    ]


class Data:
    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        tables = zip(case.tables, case.widths, strict=True)
        self.a, self.b = (nn.functional.normalize(torch.randn(k, w)) for k, w in tables)
        chosen = torch.randperm(case.tables[0] * case.tables[1])[: case.n]
        self.rows, self.cols = chosen // case.tables[1], chosen % case.tables[1]
        self.targets = torch.randn(case.n)

    def factors(self) -> KroneckerFactors:
        return KroneckerFactors.from_pairs(self.a, self.b, self.rows, self.cols)


def step_of(name: str, case: Case, data: Data) -> Callable[[], None]:
    top = nn.Linear(case.m, 1)
    hidden: Callable[[Tensor], Tensor]
    if name == LINEAR:
        layer = nn.Linear(case.widths[0] * case.widths[1], case.m, bias=False)

        def hidden(batch: Tensor) -> Tensor:
            x = data.a[data.rows[batch], :, None] * data.b[data.cols[batch], None, :]
            return layer(x.flatten(1))

        params = [*layer.parameters(), *top.parameters()]
        optimizer = torch.optim.SGD(params, lr=0.01, momentum=0.9)
    else:
        factors = data.factors()
        if name == GRID:
            hidden = KroneckerLinear(factors, case.m)
        else:  # a start that costs nothing: steps are what is compared
            hidden = KroneckerLinear(factors, case.m, gram="rows", init="joint", std=0.0)
        optimizer = KroneckerSGD([*hidden.parameters(), *top.parameters()], lr=0.01, momentum=0.9)

    def step() -> None:
        batch = torch.randint(case.n, (case.batch,))
        optimizer.zero_grad()
        outputs = top(hidden(batch).relu())[:, 0]
        (outputs - data.targets[batch]).square().mean().backward()
        optimizer.step()

    return step


def turn(name: str, step: Callable[[], None], case: Case) -> tuple[Callable[[], Any], int]:
    """Enough steps for the deferred work of all contenders to be in them."""
    steps = 32 if name != LINEAR else 8 if case.n < 50_000 and case.m < 512 else 1
    return lambda: [step() for _ in range(steps)], steps


def peak(case_number: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the start and gigabytes of a process that draws it and takes steps."""
    command = [sys.executable, __file__, "--threads", str(args.threads)]
    command += ["--peak-of", str(case_number)] + ["--quick"] * args.quick
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def print_peak(case: Case) -> None:
    data = Data(case)
    began = time.perf_counter()
    step = step_of(GRID, case, data)
    start = time.perf_counter() - began
    for _ in range(40):
        step()
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's peak
    size = 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1e9
    print(json.dumps({"start_s": start, "peak_gb": size}))


def measure(args: argparse.Namespace) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """A row and the figures of each case."""
    rows, results = [], []
    for number, case in enumerate(all_cases(args.quick)):
        data = Data(case)
        turns = {name: turn(name, step_of(name, case, data), case) for name in case.contenders}
        runs = {name: run for name, (run, _) in turns.items()}
        found = interleaved(runs, min(args.rounds, 3), args.device, warm_up=1)
        rounds = {k: [1e3 * t / turns[k][1] for t in times] for k, times in found.items()}
        del turns, runs
        ms = {name: statistics.median(times) for name, times in rounds.items()}
        extra = peak(number, args)
        times = ms[LINEAR] / ms[GRID] if LINEAR in ms else None
        cells = [f"{x:,}" for x in (case.n, case.widths[0] * case.widths[1], case.m, case.batch)]
        cells += [f"{extra['start_s']:.2f}"]
        cells += ["" if name not in ms else f"{ms[name]:.2f}" for name in (GRID, ROWS, LINEAR)]
        cells += ["" if times is None else f"{times:.3g}", f"{extra['peak_gb']:.2f}"]
        rows.append([case.name, *cells])
        results.append({"case": vars(case), "rounds_ms": rounds, "times_faster": times, **extra})
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows, results


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    args = parse(parser)
    if args.peak_of is not None:
        print_peak(all_cases(args.quick)[args.peak_of])
        return
    rows, _ = measure(args)
    print_table("Pairs: milliseconds a step (synthetic data, float32)", HEADER, rows)
    about = environment(args.device, args.threads)
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))


if __name__ == "__main__":
    main()
