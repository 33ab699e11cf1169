"""What benchmarks/scaling.py measures in the processes: collectives, steps, overlap."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import autoencoder
from scaling_model import GATHER, REDUCE, SCATTER
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from torch_hf import HFOptimizer
from torch_hf.curvature import GaussNewtonOperator

CPU = torch.device("cpu")


def work(rank: int, world: int, store: str, plan: dict[str, Any], out: Path) -> None:
    """One process; all take the same plan in the same order, those not needed wait."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    groups = {n: dist.new_group(range(n)) for n in (1, 2, 4) if n <= world}
    found: dict[str, list[Any]] = {"collectives": [], "alone": [], "steps": [], "overlap": []}
    for ranks in plan["collective_ranks"]:
        if rank < ranks:
            found["collectives"] += time_collectives(groups[ranks], ranks, plan)
        dist.barrier()
    for ranks, batch in plan["alone"]:  # beside others that work, but without them
        if rank < ranks:
            dist.barrier(groups[ranks])
            found["alone"].append({"ranks": ranks, **time_steps(batch, None, False, plan)})
        dist.barrier()
    for name, mode, ranks, total in plan["steps"]:
        if rank < ranks:
            row = time_steps(total // ranks, groups[ranks], mode == "shard_state", plan)
            found["steps"].append({"name": name, "mode": mode, "ranks": ranks, **row})
        dist.barrier()
    for batch in plan["overlap"]:
        if rank < 2:
            found["overlap"].extend(time_overlap(batch, groups[2], plan))
        dist.barrier()
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def slowest(seconds: float, group: Any) -> float:
    """A round lasts as long as its slowest rank."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    return float(value)


def median_seconds(run: Callable[[], Any], rounds: int, group: Any) -> float:
    times = []
    for i in range(rounds + 1):
        dist.barrier(group)
        start = time.perf_counter()
        run()
        seconds = slowest(time.perf_counter() - start, group)
        if i:  # the first warms up
            times.append(seconds)
    return statistics.median(times)


def time_collectives(group: Any, ranks: int, plan: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for size in plan["sizes"]:
        whole, part = torch.ones(size // 4), torch.ones(size // 4 // ranks)
        kinds: dict[str, Callable[[], Any]] = {
            REDUCE: lambda x=whole: dist.all_reduce(x, group=group),
            SCATTER: lambda x=whole, y=part: dist.reduce_scatter_tensor(y, x, group=group),
            GATHER: lambda x=whole, y=part: dist.all_gather_into_tensor(x, y, group=group),
        }
        for kind, run in kinds.items():
            seconds = median_seconds(run, plan["collective_rounds"], group)
            rows.append({"kind": kind, "ranks": ranks, "bytes": size, "seconds": seconds})
    return rows


def time_steps(batch: int, group: Any, sharded: bool, plan: dict[str, Any]) -> dict[str, Any]:
    """Medians over steps of equally many CG iterations, the first not counted."""
    task = autoencoder(batch, CPU)
    optimizer = HFOptimizer(
        task.model.parameters(),
        damping=1e-2,
        preconditioner="lbfgs",  # what the model counts
        cg_tol=0.0,
        cg_max_iter=plan["iterations"],
        history_size=plan["pairs"],
        process_group=group,
        shard_state=sharded,
    )
    reports, totals = [], []
    for i in range(plan["steps_counted"] + 1):
        if group is not None:
            dist.barrier(group)
        start = time.perf_counter()
        optimizer.step(task.closure)
        seconds = time.perf_counter() - start
        if i:
            totals.append(slowest(seconds, group) if group is not None else seconds)
            reports.append(optimizer.last_report)
    each = {
        "gradient": [r.seconds["gradient"] for r in reports],
        "product": [r.seconds["products"] / r.products for r in reports],
        "evaluation": [r.seconds["evaluations"] / r.evaluations for r in reports],
        "vectors": [
            (r.seconds["preconditioner"] + r.seconds["other"]) / r.cg_iterations for r in reports
        ],
        "seconds": totals,
    }
    return {
        "batch": batch,
        "numel": task.numel,
        "iterations": reports[0].cg_iterations,
        "products": statistics.median(r.products for r in reports),
        "evaluations": statistics.median(r.evaluations for r in reports),
        **{name: statistics.median(values) for name, values in each.items()},
    }


def time_overlap(batch: int, group: Any, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A gradient, and a product, with its sum over two ranks after it and piece by piece within."""
    task = autoencoder(batch, CPU)
    wrapped = DistributedDataParallel(task.model, process_group=group, bucket_cap_mb=1)

    def gradient(model: Any) -> Tensor:
        task.model.zero_grad()
        task.loss(model(task.x), task.y).backward()
        return torch.cat([p.grad.view(-1) for p in task.params])

    outputs = task.model(task.x)
    product = GaussNewtonOperator(task.loss(outputs, task.y), outputs, task.params)
    v = torch.randn(task.numel)

    def product_by_pieces() -> None:
        """Each parameter's part is sent as soon as backward has it."""
        sums: list[Any] = []

        def send(part: Tensor) -> Tensor:
            part = part.clone(memory_format=torch.contiguous_format)
            sums.append(dist.all_reduce(part, group=group, async_op=True))
            return part

        hooks = [p.register_hook(send) for p in task.params]
        product(v)
        assert len(sums) == len(task.params)
        for hook, sent in zip(hooks, sums, strict=True):
            hook.remove()
            sent.wait()

    def then_sum(found: Tensor) -> None:
        dist.all_reduce(found, group=group)

    ways = {
        "gradient": (
            lambda: gradient(task.model),
            lambda: then_sum(gradient(task.model)),
            lambda: gradient(wrapped),
        ),
        "product": (lambda: product(v), lambda: then_sum(product(v)), product_by_pieces),
    }
    rows = []
    for what, contenders in ways.items():
        times: list[list[float]] = [[] for _ in contenders]
        for i in range(plan["overlap_rounds"] + 1):  # taking turns, so that noise hits all alike
            for run, found in zip(contenders, times, strict=True):
                dist.barrier(group)
                start = time.perf_counter()
                run()
                seconds = slowest(time.perf_counter() - start, group)
                if i:
                    found.append(seconds)
        alone, after, within = map(statistics.median, times)
        rows.append(
            {"what": what, "batch": batch, "alone": alone, "after": after, "within": within}
        )
    return rows
