"""What a step of Kronecker SGD costs, beside dense layers, as the input dimension grows.

python benchmarks/kronecker.py --rounds 5

A step is forward, backward and optimizer on one batch of the two-layer network of arXiv 2305.08001:
m neurons, shifted ReLU, fixed signs on top, squared loss. ``nn.Linear`` and ``nn.Bilinear`` are the
same network with weights of m x d numbers and torch.optim.SGD; a batch's inputs are formed from
the factors in each step. Times are of contenders that take turns in one process; peak memory is of
a process for each (the whole process, reset after set-up).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import kronecker_pairs
import torch
from common import (
    environment,
    interleaved,
    make_parser,
    parse,
    print_table,
    results_folder,
    write_json,
)
from kronecker_report import (
    AT_ONCE,
    BILINEAR,
    HEADER,
    KRONECKER,
    LINEAR,
    MOMENTUM,
    SCAN,
    TREE,
    plot,
    row,
    verdicts,
)
from torch import Tensor, nn

from torch_hf.kronecker import KroneckerFactors, KroneckerSGD, TwoLayerNetwork
from torch_hf.kronecker._memory import available

#: Steps of the Kronecker contenders in a round: several of the larger, deferred updates.
BLOCK = 64
#: A contender whose steps take longer than this is left out where d is larger still.
SLOW = 0.4
Step = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One row: sizes, and who runs."""

    title: str
    n: int
    d: int
    m: int = 4096
    batch: int = 32
    contenders: tuple[str, ...] = (KRONECKER, AT_ONCE, MOMENTUM, LINEAR, BILINEAR)
    shift: float | None = None  # the usual one, sqrt(0.4 log m)


def all_cases(quick: bool) -> list[Case]:
    if quick:
        return [Case("d grows", 100, 2**6, 64), Case("m grows", 100, 2**8, 256, 4, (SCAN, TREE))]
    cases = [Case("d grows", 4000, 4**k) for k in range(5, 11)]
    narrow = (KRONECKER, SCAN, TREE)
    cases += [Case("m grows", 1000, 2**12, 2**k, 4, narrow) for k in (12, 14, 16, 18)]
    few = (SCAN, TREE)  # a shift that leaves some neurons in 10^5 active
    cases += [Case("few active", 1000, 2**12, 2**k, 4, few, shift=4.0) for k in (14, 18)]
    losing = (KRONECKER, LINEAR)
    cases += [Case("n > 2d", n, d, contenders=losing) for n, d in ((4000, 256), (16_000, 1024))]
    return cases


class Data:
    """Factors with points of length 1, and targets."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        width = math.isqrt(case.d)
        self.case, self.device = case, device
        self.a, self.b = (
            nn.functional.normalize(torch.randn(case.n, width, device=device)) for _ in range(2)
        )
        self.targets = torch.randn(case.n, device=device)
        self.signs = torch.randint(0, 2, (case.m,), device=device) * 2.0 - 1.0
        self.signs /= math.sqrt(case.m)
        usual = math.sqrt(0.4 * math.log(case.m))
        self.shift = usual if case.shift is None else case.shift

    def factors(self) -> KroneckerFactors:
        return KroneckerFactors(self.a, self.b)

    def batch(self) -> Tensor:
        return torch.randint(self.case.n, (self.case.batch,), device=self.device)

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return 0.5 * (outputs - self.targets[batch]).square().sum()

    def top(self, z: Tensor) -> Tensor:
        return (z - self.shift).clamp_min(0.0) @ self.signs


def step_of(
    optimizer: torch.optim.Optimizer, data: Data, model: Callable[[Tensor], Tensor]
) -> Step:
    def step() -> None:
        batch = data.batch()
        optimizer.zero_grad()
        data.loss(model(batch), batch).backward()
        optimizer.step()

    return step


def kronecker(data: Data, kind: str) -> Step:
    search = kind if kind in (SCAN, TREE) else "auto"
    network = TwoLayerNetwork(data.factors(), data.case.m, shift=data.shift, search=search)
    options: dict[str, Any] = {"lr": 0.01}
    if kind == MOMENTUM:
        options |= {"momentum": 0.9, "weight_decay": 1e-4}
    optimizer = KroneckerSGD(network.parameters(), defer=0 if kind == AT_ONCE else None, **options)
    if kind in (SCAN, TREE):
        return step_of(optimizer, data, network)
    return step_of(optimizer, data, lambda batch: data.top(network.hidden(batch)))


def linear(data: Data) -> Step:
    layer = nn.Linear(data.case.d, data.case.m, bias=False, device=data.device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)

    def model(batch: Tensor) -> Tensor:
        x = data.a[batch, :, None] * data.b[batch, None, :]
        return data.top(layer(x.flatten(1)))

    return step_of(optimizer, data, model)


def bilinear(data: Data) -> Step:
    width = math.isqrt(data.case.d)
    layer = nn.Bilinear(width, width, data.case.m, bias=False, device=data.device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    return step_of(optimizer, data, lambda batch: data.top(layer(data.a[batch], data.b[batch])))


def make(name: str, data: Data) -> Step:
    if name in (LINEAR, BILINEAR):
        return linear(data) if name == LINEAR else bilinear(data)
    return kronecker(data, name)


def block(name: str, data: Data) -> tuple[Step, int]:
    """A contender's turn in a round, and how many steps it takes."""
    step = make(name, data)
    dense = name in (LINEAR, BILINEAR)
    steps = (1 if data.case.d > 2**12 else 8) if dense else BLOCK // (1 + 3 * (data.case.m > 2**16))
    return lambda: [step() for _ in range(steps)], steps


def fits(name: str, case: Case, device: torch.device) -> bool:
    """Whether dense weights and their gradient take less than three quarters of what is free."""
    return 2 * 4 * case.m * case.d < 0.75 * (available(device) or math.inf)


def measure(
    case: Case, args: argparse.Namespace, slow: dict[str, int]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds a step in each round, and why a contender has none.

    Args:
        case: What is measured.
        args: Of the command line.
        slow: Contenders that were too slow, and the m d at which they were; it is added to.
    """
    data, missing = Data(case, args.device), {}
    groups: list[list[str]] = [[]]
    for name in case.contenders:
        if name in (LINEAR, BILINEAR) and not fits(name, case, args.device):
            missing[name] = f"{2 * 4 * case.m * case.d / 1e9:.0f} GB"
        elif slow.get(name, math.inf) <= case.m * case.d:
            missing[name] = "too slow"
        elif name in (LINEAR, BILINEAR) and 16 * case.m * case.d > 2**32:
            groups.append([KRONECKER, name])  # one large one in memory at a time
        else:
            groups[0].append(name)
    seconds: dict[str, list[float]] = {}
    for names in groups:
        turns = {name: block(name, data) for name in names}
        large = any(name in (LINEAR, BILINEAR) and case.d >= 2**14 for name in names)
        rounds = interleaved(
            {name: run for name, (run, _) in turns.items()},
            rounds=min(3, args.rounds) if large else args.rounds,
            device=args.device,
            warm_up=1,
        )
        for name, times in rounds.items():
            seconds.setdefault(name, [t / turns[name][1] for t in times])
            if name != KRONECKER and len(names) == 2 and names[0] == KRONECKER:
                mine = [t / turns[KRONECKER][1] for t in rounds[KRONECKER]]
                seconds[f"{KRONECKER} beside {name}"] = mine
        del turns
    slow |= {name: case.m * case.d for name, times in seconds.items() if min(times) > SLOW}
    return seconds, missing


def figures(
    case: Case, seconds: dict[str, list[float]], memory: dict[str, float]
) -> dict[str, Any]:
    found: dict[str, Any] = asdict(case) | {"peak_mb": memory, "ms": {}, "rounds_ms": {}}
    for name, times in seconds.items():
        found["ms"][name] = 1e3 * statistics.median(times)
        found["rounds_ms"][name] = [round(1e3 * t, 4) for t in times]
    if LINEAR in seconds:
        mine = seconds.get(f"{KRONECKER} beside {LINEAR}", seconds[KRONECKER])
        pairs = zip(seconds[LINEAR], mine, strict=False)
        found["times_faster"] = statistics.median(t / s for t, s in pairs)
    return found


def flatness(cases: list[Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds a step of Kronecker SGD at each d, all taking turns in the same rounds."""
    turns = {case.d: block(KRONECKER, Data(case, args.device)) for case in cases}
    runs = {str(d): run for d, (run, _) in turns.items()}
    seconds = interleaved(runs, args.rounds, args.device, warm_up=1)
    return [
        {"d": d, "rounds_ms": [round(1e3 * t / steps, 4) for t in seconds[str(d)]]}
        for d, (_, steps) in turns.items()
    ]


# --- peak memory, in a process of its own -----------------------------------------------------


def peak_memory(name: str, case: Case, args: argparse.Namespace) -> list[float] | None:
    """Megabytes at the peak of some steps: of the process, and beyond what torch alone takes."""
    command = [sys.executable, __file__, "--threads", str(args.threads)]
    command += ["--peak-of", json.dumps([name, asdict(case)])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def print_peak(request: str) -> None:
    name, fields = json.loads(request)
    torch.ones(2, requires_grad=True).sum().backward()  # what torch alone takes
    before = resident("VmRSS")
    step = make(name, Data(Case(**fields), torch.device("cpu")))
    ctypes.CDLL(None).malloc_trim(0)  # what set-up has freed goes back
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    for _ in range(3 if name in (LINEAR, BILINEAR) else 20):
        step()
    peak = resident("VmHWM")
    print(json.dumps([peak, peak - before]))


def resident(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+)", status)[0]) / 1024


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parse(parser)
    if args.peak_of:
        print_peak(args.peak_of)
        return
    rows, results, slow = [], [], dict[str, int]()
    for case in all_cases(args.quick):
        seconds, missing = measure(case, args, slow)
        weighed = (KRONECKER,) if args.quick else (KRONECKER, LINEAR)
        measured = [n for n in weighed if n in seconds and args.device.type == "cpu"]
        memory = {name: peak_memory(name, case, args) for name in measured}
        found = figures(case, seconds, {k: v for k, v in memory.items() if v is not None})
        results.append(found | {"not_run": missing})
        rows.append(row(found, missing))
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    flat = flatness([case for case in all_cases(args.quick) if case.title == "d grows"], args)
    about = environment(args.device, args.threads)
    pair_rows, pairs = kronecker_pairs.measure(args)
    print_table("Milliseconds a step (synthetic data, float32)", HEADER, rows)
    print("\n" + "\n".join(verdicts(results, flat)))
    title = "Pairs: milliseconds a step (synthetic data, float32)"
    print_table(title, kronecker_pairs.HEADER, pair_rows)
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))
    if not args.quick:
        content = {"environment": about, "rounds": args.rounds, "cases": results, "flat": flat}
        content["pairs"] = pairs
        write_json("kronecker", args.device, content, args.record)
        plot(results, results_folder(args.record) / f"kronecker-{args.device.type}.png")


if __name__ == "__main__":
    main()
