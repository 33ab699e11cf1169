"""How steps scale: measured on processes of this machine, and predicted for a cluster by a model.

python benchmarks/scaling.py

Measured with Gloo on the MNIST autoencoder, one thread a process: collectives over sizes, steps of
equally many CG iterations on 1, 2 and 4 processes (more than there are cores: marked), and what
overlapping the gradient's sum with its computation would save (alone: ``--overlap``). The model of
scaling_model.py is fitted to half of the sizes and checked against the others, then its steps
against the measured ones. Predictions for GPUs use published and assumed figures, the options
below. They are a model's, not measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import scaling_ranks
import torch
from common import RESULTS, add_record, environment, results_folder, write_json
from scaling_model import (
    FLOAT,
    KINDS,
    MODES,
    REDUCE,
    REPLICATED,
    SHARDED,
    Hardware,
    Link,
    Work,
    collectives,
    fit,
    memory,
    ring_seconds,
)

Row = dict[str, Any]
MEASURED = "collectives", "alone", "steps", "overlap"
MODELS = (1e7, 1e8, 1e9, 1e10)
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
#: Batches of the predictions, cases or tokens: they grow as training goes on.
BATCHES = tuple(16384 * 4**k for k in range(6))


def plan(world: int, quick: bool) -> dict[str, Any]:
    """What is measured: weak scaling at 128 cases a process, strong at 256 cases in all."""
    ranks = [n for n in (1, 2, 4) if n <= world]
    base = 8 if quick else 128
    weak = [("weak", REPLICATED, n, n * base) for n in ranks]
    strong = [("strong", REPLICATED, n, 2 * base) for n in ranks]
    cut = [("strong", SHARDED, n, 2 * base) for n in ranks if n > 1]
    return {
        "sizes": [1 << k for k in range(10, 17 if quick else 27, 2)],
        "collective_ranks": [n for n in ranks if n > 1],
        "collective_rounds": 2 if quick else 9,
        "alone": [(n, b) for n in ranks for b in (base // 2, 2 * base)],
        "steps": weak + strong + cut,
        "steps_counted": 1 if quick else 2,
        "iterations": 3 if quick else 6,
        "pairs": 6,
        "overlap": [base, 4 * base],
        "overlap_rounds": 2 if quick else 15,
    }


def measure(world: int, wanted: dict[str, Any]) -> dict[str, list[Row]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
            scaling_ranks.work, (world, f"{folder}/store", wanted, out), nprocs=world
        )
        found: dict[str, list[Row]] = json.loads(out.read_text())
        return found


# --- the model and what was measured ---


def fitted(rows: list[Row]) -> tuple[dict[tuple[str, int], Link], list[Row]]:
    """A link for each collective and number of ranks, from every other size; its errors."""
    links, errors = {}, []
    for kind, ranks in sorted({(r["kind"], r["ranks"]) for r in rows}):
        own = [(r["bytes"], r["seconds"]) for r in rows if (r["kind"], r["ranks"]) == (kind, ranks)]
        link = links[kind, ranks] = fit(kind, ranks, own[::2])
        wrong = [abs(ring_seconds(link, kind, n, ranks) / t - 1) for n, t in own[1::2]]
        errors.append(
            {
                "kind": kind,
                "ranks": ranks,
                "alpha_us": 1e6 * link.alpha,
                "gigabytes_per_s": 1e-9 / link.beta if link.beta else None,
                "held_out_median": statistics.median(wrong),
                "held_out_largest": max(wrong),
            }
        )
    return links, errors


def modelled(row: Row, alone: list[Row], links: dict[tuple[str, int], Link], pairs: int) -> Row:
    """Seconds of a measured step as the model has it; computing is interpolated in the batch."""
    ranks, batch = row["ranks"], row["batch"]
    a, b = (r for r in alone if r["ranks"] == ranks)
    at = (batch - a["batch"]) / (b["batch"] - a["batch"])
    part = {k: a[k] + at * (b[k] - a[k]) for k in ("gradient", "product", "evaluation", "vectors")}
    compute = part["gradient"] + row["products"] * part["product"]
    compute += row["evaluations"] * part["evaluation"]
    vectors = row["iterations"] * part["vectors"] / (ranks if row["mode"] == SHARDED else 1)
    sent = collectives(row["mode"], Work(row["iterations"], int(row["evaluations"]), pairs))
    large = small = 0.0
    if ranks > 1:
        size = FLOAT * row["numel"]
        large = sum(sent[k] * ring_seconds(links[k, ranks], k, size, ranks) for k in KINDS)
        small = sent["small"] * ring_seconds(links[REDUCE, ranks], REDUCE, 64, ranks)
    seconds = compute + vectors + large + small
    more = {"compute": compute, "vectors": vectors, "large": large, "small": small}
    return {"modelled": seconds, "error": seconds / row["seconds"] - 1, "parts": more}


def efficiencies(steps: list[Row]) -> None:
    """Weak: one process' seconds over these. Strong: over N times these."""
    for row in steps:
        first = next(r for r in steps if r["name"] == row["name"] and r["ranks"] == 1)
        times = row["ranks"] if row["name"] == "strong" else 1
        row["efficiency"] = first["seconds"] / (times * row["seconds"])


# --- predictions ---


def predictions(gpu: Hardware, work: Work) -> list[Row]:
    rows = []
    for numel in MODELS:
        for mode in MODES:
            for ranks in GPUS:
                for batch in BATCHES:
                    parts = gpu.parts(mode, numel, batch, ranks, work)
                    row = {"numel": numel, "mode": mode, "gpus": ranks, "batch": batch}
                    seconds = sum(parts.values())
                    sent = (parts["large"] + parts["small"]) / seconds
                    row |= {"seconds": seconds, "communication": sent}
                    row["efficiency"] = gpu.efficiency(mode, numel, batch, ranks, work)
                    row["gigabytes"] = memory(mode, numel, ranks, work) / 1e9
                    rows.append(row | {"fits": 1e9 * row["gigabytes"] <= gpu.memory})
    return rows


def turning_points(gpu: Hardware, work: Work) -> list[Row]:
    """Batches a GPU, and GPUs for each batch of growing ones, where communication takes over."""
    return [
        {
            "numel": numel,
            "mode": mode,
            "cases_per_gpu": {n: gpu.turning_batch(mode, numel, n, work) for n in GPUS},
            "gpus": {batch: gpu.turning_ranks(mode, numel, batch, work) for batch in BATCHES},
        }
        for numel in MODELS
        for mode in MODES
    ]


def main() -> None:
    """Measure, fit, check, predict; a table each, JSON and a plot."""
    summary = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=summary)
    add = parser.add_argument
    add("--processes", type=int, choices=(2, 4), default=4, help="the most that are measured")
    add("--again", action="store_true", help="tables and plot from the measurements in results/")
    add("--overlap", action="store_true", help="measure the overlap alone; nothing is written")
    add("--quick", action="store_true", help="small sizes, to see that it runs; nothing is written")
    add_record(parser)
    for field in dataclasses.fields(Hardware):
        add(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    for field in dataclasses.fields(Work):
        add(f"--{field.name}", type=int, default=field.default, help="in a predicted step")
    args = vars(parser.parse_args())
    gpu = Hardware(**{f.name: args[f.name] for f in dataclasses.fields(Hardware)})
    work = Work(**{f.name: args[f.name] for f in dataclasses.fields(Work)})
    run(args, gpu, work)


def run(args: Row, gpu: Hardware, work: Work) -> None:
    import scaling_report as report

    wanted = plan(args["processes"], args["quick"])
    if args["overlap"]:
        wanted |= {"collective_ranks": [], "alone": [], "steps": []}
    about = environment(torch.device("cpu"), 1) | {"cores": cores()}
    if args["again"]:
        saved = json.loads((RESULTS / "scaling-cpu.json").read_text())
        about, found = saved["environment"], {name: saved[name] for name in MEASURED}
    else:
        found = measure(args["processes"], wanted)
    if not args["overlap"]:
        links, errors = fitted(found["collectives"])
        steps = found["steps"]
        for row in steps:
            row |= modelled(row, found["alone"], links, wanted["pairs"])
        efficiencies(steps)
        report.measured(errors, steps, about["cores"])
    report.overlap(found["overlap"])
    if args["overlap"] or args["quick"]:
        return
    predicted, turning = predictions(gpu, work), turning_points(gpu, work)
    report.predicted(predicted, turning)
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))
    content: Row = {"environment": about, **found, "fits": errors}
    content |= {"hardware": dataclasses.asdict(gpu), "work": dataclasses.asdict(work)}
    content |= {"predicted": predicted, "turning_points": turning}
    write_json("scaling", torch.device("cpu"), content, args["record"])
    report.plot(content, results_folder(args["record"]) / "scaling-cpu.png")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
