"""Whether all ranks hold the same parameters, to the last bit."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_hf.distributed.fully_sharded import is_fully_sharded

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Entries at a time, so that a check needs little memory.
_CHUNK = 1 << 20
_PRIME = 65521


def check_replicas(optimizer: Any) -> None:
    """Complains of a rank whose parameters or damping differ from rank 0's in any bit.

    Every rank of the optimizer's ``process_group`` must call it. It costs a pass over the
    parameters and one all-reduce of two integers a rank. Parameters that ``fully_shard`` has cut
    are no replicas: of them the options alone are compared.

    Args:
        optimizer: An :class:`~torch_hf.HFOptimizer`; without a process group nothing is done.

    Raises:
        RuntimeError: A rank differs; the message names it, and the first parameter that does.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    group = optimizer.process_group
    if is_fully_sharded(params[0]):
        group = params[0].device_mesh.get_group()
        params = []
    if group is None:
        return
    device = optimizer.param_groups[0]["params"][0].device
    names = [f"parameter {i} of shape {tuple(p.shape)}" for i, p in enumerate(params)]
    sums = [checksum(p.detach()) for p in params]
    numbers = {"damping": optimizer.param_groups[0]["damping"], "steps": 0, "rejections": 0}
    for entries in optimizer.state.values():
        numbers.update({k: entries[k] for k in numbers if k in entries})
    for name, value in numbers.items():
        names.append(f"{name} ({value})")
        number = -1.0 if value is None else float(value)
        sums.append(checksum(torch.tensor([number], dtype=torch.float64, device=device)))
    own = torch.stack(sums)
    whole = torch.stack([_weighted(column) for column in own.T])
    if _alike(whole, group):
        return
    rows = _table(own.view(-1), group).view(-1, len(names), 2)
    ranks = [r for r, row in enumerate(rows) if not torch.equal(row, rows[0])]
    first = [names[int((rows[r] != rows[0]).any(1).nonzero()[0])] for r in ranks]
    told = "; ".join(f"rank {r} differs in {name}" for r, name in zip(ranks, first, strict=True))
    raise RuntimeError(
        f"The ranks' replicas must be the same, got differences from rank 0: {told} (the first of "
        "each rank). Start all ranks from the same values, change parameters on all or none, and "
        "load the same checkpoint. To go on, broadcast rank 0's parameters and state_dict()."
    )


def checksum(p: Tensor) -> Tensor:
    """Two int64 numbers that change with any bit of a tensor, and with the order of entries."""
    bits = p.contiguous().view(-1).view(_INTEGERS[p.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=p.device)
    for i, chunk in enumerate(torch.split(bits, _CHUNK)):
        total[0] += chunk.sum(dtype=torch.int64)
        total[1] += (i + 1) * _weighted(chunk.long())
    return total


def _weighted(x: Tensor) -> Tensor:
    return (x * (torch.arange(len(x), device=x.device) % _PRIME + 1)).sum()


def _table(own: Tensor, group: Any) -> Tensor:
    """Each rank's numbers, a row each, in one all-reduce."""
    rows = own.new_zeros(dist.get_world_size(group), len(own))
    rows[dist.get_rank(group)] = own
    dist.all_reduce(rows, group=group)
    return rows


def _alike(own: Tensor, group: Any) -> bool:
    rows = _table(own, group)
    return bool((rows == rows[0]).all())
