"""Train the digits classifier on several processes.

    torchrun --nproc-per-node=2 examples/distributed.py

Any number of processes, one included (then plain `python` will do), takes the same steps but for
rounding, which grows with many CG iterations (docs/distributed.md says how fast). A run that is
started again goes on from its last checkpoint; `torchrun --max-restarts=3` does that where a
process was lost. Launch lines, also for several nodes, are in docs/distributed.md as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from cluster import join, load, restore, roll_call, save
from common import make_parser, parse
from data import load_digits, standardise
from digits import make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torch_hf import GrowingBatchSampler, HFOptimizer, PeerError, check_replicas
from torch_hf.plotting import plot_training
from torch_hf.tracking import CSVLogger


def shares(sampler: GrowingBatchSampler, epochs: int) -> Iterator[list[int]]:
    """This rank's share of each batch, from where the sampler stands."""
    for epoch in range(sampler.epoch, epochs):
        sampler.set_epoch(epoch)
        yield from sampler


def train(args: argparse.Namespace) -> None:
    """Take the steps; rank 0 leaves the CSV file and the plot in runs/distributed."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    precision = torch.float64 if args.double else torch.float32
    (x, y), (x_test, y_test) = standardise(*load_digits(args))
    model = make_model().to(args.device, precision)  # from one seed: the same on all ranks
    if args.fsdp:  # each rank holds a part of the model, which the optimizer sees by itself
        fully_shard(model, mesh=init_device_mesh(torch.device(args.device).type, (ranks,)))
    optimizer = HFOptimizer(
        model.parameters(),
        weight_decay=3e-3,
        cg_max_iter=args.cg_max_iter,
        process_group=None if args.fsdp else dist.group.WORLD,
        shard_state=args.shard_state,
    )
    # sizes are those of the ranks' batches together; each rank is handed its share of them
    size = max(args.batch_size or 180, ranks)
    sampler = GrowingBatchSampler(len(x), size, drop_last=True, num_replicas=ranks, rank=rank)
    rows: list[dict[str, Any]] = []
    if saved := load(args.out / "checkpoints"):
        restore(saved, model, optimizer)
        sampler.load_state_dict(saved["sampler"])
        rows = saved["rows"]

    for share in islice(
        shares(sampler, args.epochs), args.max_steps and args.max_steps - len(rows)
    ):
        inputs, targets = x[share].to(precision), y[share]

        def closure(inputs: Any = inputs, targets: Any = targets) -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)  # the same step on all ranks, of the mean over all their cases
        sampler.update(optimizer.last_report)  # this batch is done, whatever was drawn ahead
        rows.append(optimizer.last_report.to_dict())
        if len(rows) % args.save_every == 0:
            check_replicas(optimizer)  # alike to the last bit? it costs one small all-reduce
            owners = {"model": model, "optimizer": optimizer, "sampler": sampler}
            state = {name: owner.state_dict() for name, owner in owners.items()}
            save(args.out / "checkpoints", len(rows), state | {"rows": rows})

    with torch.no_grad():
        accuracy = float((model(x_test.to(precision)).argmax(1) == y_test).double().mean())
    if rank == 0:
        with CSVLogger(args.out / "training.csv") as logger:
            for i, row in enumerate(rows, start=1):
                score = accuracy if i == len(rows) else None
                elapsed = sum(earlier["seconds_total"] for earlier in rows[:i])
                logger.log(row, elapsed=elapsed, test_accuracy=score)
        title = f"Handwritten digits, processes: {ranks}"
        plot_training(args.out / "training.csv", args.out / "training.png", title=title)
        print(f"{len(rows)} steps, test accuracy {accuracy:.2%}; plot: {args.out}/training.png")


def main() -> None:
    """Train; where a rank is lost, say which, and end, for torchrun to start all again."""
    parser = make_parser(__doc__.splitlines()[0], name="distributed", epochs=12)
    add = parser.add_argument
    add("--shard-state", action="store_true", help="cut the optimizer's vectors over the ranks")
    add("--fsdp", action="store_true", help="cut the model over the ranks too")
    add("--double", action="store_true", help="compute in float64")
    add("--cg-max-iter", type=int, help="the most CG iterations in a step, if not chosen by itself")
    add("--save-every", type=int, default=5, help="steps from checkpoint to checkpoint")
    add("--timeout", type=float, default=300, help="seconds that a rank is waited for")
    args = parse(parser)
    torch.set_num_threads(1)
    standby = join(args)
    try:
        train(args)
    except PeerError:
        roll_call(standby, args)  # the error of who misses it
        raise
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
