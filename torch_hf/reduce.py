"""Sums over processes; the only room that imports ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Reducer:
    """Adds numbers and vectors over the ranks of a process group; alone, it does nothing.

    Args:
        group: A ``torch.distributed`` process group, or None for one process.
        device: Where numbers travel (NCCL wants them on the GPU).
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group = group
        self.device = device

    def vector(self, v: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(v, group=self.group)
        return v

    def numbers(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks of a few numbers, in float64, in one collective."""
        if self.group is None:
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(packed, group=self.group)
        return [float(x) for x in packed.tolist()]
