"""What a run on several processes needs beside its training: joining them, and checkpoints."""

from __future__ import annotations

import argparse
import io
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim import Optimizer

FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def join(args: argparse.Namespace) -> Any:
    """Enter the group of all processes, of this one where torchrun did not start us."""
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get(FRESH_STORE) != "1":
        # in torch 2.15 the processes that are started again would find the addresses of the dead
        raise SystemExit(f"For --max-restarts set {FRESH_STORE}=1 in torchrun's environment.")
    limit = timedelta(seconds=args.timeout)
    if args.device.startswith("cuda"):  # each process of a node takes a GPU
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if "cuda" in args.device else "gloo", timeout=limit, **alone)
    return dist.new_group(backend="gloo")  # for a roll call where the first group has failed


def roll_call(group: Any, args: argparse.Namespace) -> None:
    """Name the ranks that do not come; Gloo's barrier does, on rank 0's log.

    They are waited for as long again as the collective that failed, and rank 0 by the others
    longer than that: torchrun ends all as soon as one ends.
    """
    waits = timedelta(seconds=args.timeout * (2 if dist.get_rank() == 0 else 4))
    dist.monitored_barrier(group, timeout=waits, wait_all_ranks=True)


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write a checkpoint, each rank its share; only a complete one gets its name.

    Every rank must call it. A kill at any moment leaves the checkpoint before, or this one.
    """
    part, done = folder / f"{step:08d}.part", folder / f"{step:08d}"
    dcp.save(state, checkpoint_id=part)  # returns when the files of all ranks are on the disk
    if dist.get_rank() == 0:
        older = [path for path in folder.iterdir() if path not in (part, done)]
        part.replace(done)
        for path in older:
            shutil.rmtree(path)
    dist.barrier()


def load(folder: Path) -> dict[str, Any] | None:
    """Read the last complete checkpoint, however many ranks wrote it; None if there is none.

    Tensors come whole, into each process' host memory; a model that does not fit there wants
    ``dcp.load`` into its own DTensors instead.
    """
    if dist.get_rank() == 0:
        for path in folder.glob("*.part"):  # of a run that was killed while it wrote
            shutil.rmtree(path)
    dist.barrier()
    if not (found := sorted(folder.glob("*"))):
        return None
    whole = io.BytesIO()
    dcp_to_torch_save(found[-1], whole)
    whole.seek(0)
    state: dict[str, Any] = torch.load(whole, map_location="cpu", weights_only=True)
    return state


def restore(saved: dict[str, Any], model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Put what :func:`load` read into a model, plain or fully sharded, and its optimizer."""
    set_model_state_dict(model, saved["model"], options=StateDictOptions(full_state_dict=True))
    entries = saved["optimizer"]["state"]  # the numbers of parameters have become texts
    numbered = {int(number): entry for number, entry in entries.items()}
    optimizer.load_state_dict(saved["optimizer"] | {"state": numbered})
