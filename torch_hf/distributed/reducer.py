"""Collectives of a step: sums over ranks, which also tell all ranks of a failure on one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
#: How Gloo, which has no class of errors, and NCCL say that a rank is lost.
_COMMUNICATION = re.compile(
    "gloo/|NCCL|Timed out waiting|Connection (closed|reset) by peer|pair closure|Broken pipe"
)


class PeerError(RuntimeError):
    """Another rank failed; the message names it."""


class Reducer:
    """Adds numbers and vectors over the ranks of a process group; alone, it does nothing.

    What a rank computes between two collectives it attempts: an error is kept until the next
    sum, which carries a flag, and there all ranks raise.

    Args:
        group: A ``torch.distributed`` process group, or None for one process.
        device: Where numbers travel (NCCL wants them on the GPU).
        inside: Whether the module itself communicates as it runs, so that an error cannot wait.
    """

    def __init__(self, group: Any, device: torch.device, inside: bool = False) -> None:
        self.group = group
        self.device = device
        self.inside = inside
        self.rank, self.ranks = 0, 1
        if group is not None:
            self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.failure: BaseException | None = None

    def attempt(self, part: Callable[[], T]) -> T | None:
        """What ``part`` returns; None where it, or one before it, raised."""
        if self.group is None:
            return part()
        if self.failure is not None:
            return None
        try:
            return part()
        except Exception as error:
            if _is_of_communication(error):
                raise PeerError(self._lost("the closure's module", error)) from error
            if self.inside:
                raise
            self.failure = error  # raised by all ranks at the next sum
            return None

    def named(self, ranks: Sequence[int]) -> str:
        """Ranks as a message names them: `` (rank 1, 3)``; empty for one process."""
        if self.group is None or not ranks:
            return ""
        return f" (rank {', '.join(map(str, ranks))})"

    # --- sums ---

    def numbers(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks of a few numbers, in float64, in one collective.

        Raises:
            PeerError: Another rank's attempt failed. This rank raises its own error.
        """
        if self.group is None:
            return list(values)
        packed = self._packed([*values, self._flag()])
        self._run(dist.all_reduce, packed)
        *sums, failures = packed.tolist()
        self._raise_together(failures)
        return [float(x) for x in sums]

    def table(self, values: Sequence[float]) -> list[list[float]]:
        """Each rank's numbers, in one collective; raises as :meth:`numbers` does."""
        if self.group is None:
            return [list(values)]
        rows = self._packed([0.0] * (self.ranks * (len(values) + 1))).view(self.ranks, -1)
        rows[self.rank] = self._packed([*values, self._flag()])
        self._run(dist.all_reduce, rows)
        return self._read(rows)

    def vector(self, v: Tensor, values: Sequence[float] = ()) -> tuple[Tensor, list[list[float]]]:
        """The sum of vectors and each rank's numbers, in one collective.

        A number travels as two of the vector's type, in a row of its rank's own, so that none
        loses digits in a sum of float32.

        Returns:
            The sum of shape (P,), and a row of numbers for each rank.
        """
        if self.group is None:
            return v, [list(values)]
        x = self._packed([*values, self._flag()])
        high = x.to(v.dtype)
        low = torch.nan_to_num(x - high, nan=0.0, posinf=0.0, neginf=0.0).to(v.dtype)
        rows = v.new_zeros(self.ranks, 2, len(x))
        rows[self.rank, 0], rows[self.rank, 1] = high, low
        packed = torch.cat([v, rows.view(-1)])
        self._run(dist.all_reduce, packed)
        found = packed[v.numel() :].view_as(rows).double().sum(1)
        return packed[: v.numel()], self._read(found)

    def small(self, values: Tensor) -> Tensor:
        """Sums over ranks of a small tensor, which stays on its device; no word of failures."""
        if self.group is None:
            return values
        packed = values.double()
        self._run(dist.all_reduce, packed)
        return packed.to(values.dtype)

    def agreed(self, v: Tensor) -> Tensor:
        """The first rank's vector (P,), on all ranks to the bit.

        Replicas stay the same where ranks round differently: other GPUs, other libraries.
        """
        if self.group is None:
            return v
        v = v.contiguous()
        first = dist.get_global_rank(self.group, 0)
        self._run(lambda x, group: dist.broadcast(x, first, group=group), v)
        return v

    def shared(self, value: T) -> T:
        """The first rank's value, made of numbers and text, on all ranks."""
        if self.group is None:
            return value
        values, first = [value], dist.get_global_rank(self.group, 0)
        with self._for_objects():
            self._run(lambda group: dist.broadcast_object_list(values, first, group))
        return values[0]

    def told(self, values: Sequence[float]) -> list[float]:
        """The first rank's numbers, on all ranks."""
        if self.group is None:
            return list(values)
        numbers: list[float] = self.agreed(self._packed(values)).tolist()
        return numbers

    def collected(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows (m, ...) of all ranks, one below the other, on the first; (0, ...) elsewhere.

        Args:
            rows: Of this rank.
            counts: How many each rank has.
        """
        if self.group is None:
            return rows
        first = dist.get_global_rank(self.group, 0)
        if self.rank:
            if len(rows):
                own = rows.contiguous()
                self._run(lambda x, group: dist.send(x, first, group=group), own)
            return rows[:0]
        whole = rows.new_empty(sum(counts), *rows.shape[1:])
        whole[: len(rows)] = rows
        start = len(rows)
        for rank in range(1, self.ranks):
            part = whole[start : start + counts[rank]]
            source = dist.get_global_rank(self.group, rank)
            if len(part):
                self._run(lambda x, group, at=source: dist.recv(x, at, group=group), part)
            start += counts[rank]
        return whole

    # --- vectors cut over ranks ---

    def scatter(self, v: Tensor, part: int) -> Tensor:
        """This rank's ``part`` entries of the sum over ranks of vectors (P,), padded with 0."""
        rows = v.new_zeros(self.ranks, part + 1)
        rows[:, part] = self._flag()
        full, rest = divmod(v.numel(), part)
        rows[:full, :part] = v[: full * part].view(full, part)
        if rest:
            rows[full, :rest] = v[full * part :]
        own = v.new_empty(part + 1)
        self._run(_named("reduce_scatter_single", "reduce_scatter_tensor"), own, rows.view(-1))
        self._raise_together(float(own[part]))
        return own[:part]

    def gather(self, own: Tensor, numel: int) -> Tensor:
        """The vector (P,) that the ranks hold the parts of."""
        whole = own.new_empty(self.ranks * own.numel())
        self._run(_named("all_gather_single", "all_gather_into_tensor"), whole, own.contiguous())
        return whole[:numel]

    # --- failures ---

    def _packed(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def _flag(self) -> float:
        return float(self.failure is not None)

    def _read(self, rows: Tensor) -> list[list[float]]:
        table = rows.tolist()
        self._raise_together(sum(row.pop() for row in table))
        return table

    def _raise_together(self, failures: float) -> None:
        if not failures:
            return
        own, self.failure = self.failure, None
        reports: list[Any] = [None] * self.ranks
        report = None if own is None else f"{type(own).__name__}: {own}"
        with self._for_objects():
            dist.all_gather_object(reports, report, group=self.group)
        if own is not None:
            if hasattr(own, "add_note"):  # from Python 3.11 on
                own.add_note(f"Raised on rank {self.rank}; all ranks leave the step with it.")
            raise own
        told = "; ".join(f"rank {r} raised {text}" for r, text in enumerate(reports) if text)
        raise PeerError(
            f"The step failed on another rank: {told}. No rank has taken the step, and parameters "
            "and state are unchanged on all of them. Fix the error on that rank, or catch it on "
            "every rank and go on with the next batch."
        )

    def _for_objects(self) -> AbstractContextManager[Any]:
        """NCCL sends objects by the current device."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.device(self.device) if on_gpu else nullcontext()

    def _run(self, collective: Callable[..., Any], *tensors: Tensor) -> None:
        try:
            collective(*tensors, group=self.group)
        except RuntimeError as error:
            if self.failure is not None:
                raise self.failure from error
            raise PeerError(self._lost("the step", error)) from error

    def _lost(self, what: str, error: Exception) -> str:
        return (
            f"A collective of {what} failed on rank {self.rank} of {self.ranks} "
            f"({str(error).splitlines()[0]}). Another rank has ended, hangs, or raised an error "
            "inside a module that communicates (DistributedDataParallel with buffers, "
            "fully_shard). The log of that rank gives the cause. The step was not taken. Start "
            "the job again from its last checkpoint."
        )


def _named(name: str, before: str) -> Callable[..., Any]:
    """A collective, by its name or that before torch 2.14, with which later versions warn."""
    found: Callable[..., Any] = getattr(dist, name, None) or getattr(dist, before)
    return found


def _is_of_communication(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_COMMUNICATION.search(str(error)))


def check_group(group: Any) -> None:
    """A process group that this process is in, or None."""
    if group is None:
        return
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be None or a torch.distributed process group that includes this "
            f"rank, got {group!r}. Call torch.distributed.init_process_group() first. Pass "
            "torch.distributed.group.WORLD, or a group of new_group() on its own ranks only."
        )


def unreduced(modules: Iterable[Any]) -> str:
    """What to say where a module of several processes is trained as by one; else empty."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return ""
    if not any(isinstance(m, DistributedDataParallel) for m in modules):
        return ""
    return (
        "The closure calls a DistributedDataParallel module, but the optimizer was made without "
        "process_group, so each rank would take its own step. Pass "
        "process_group=torch.distributed.group.WORLD: HFOptimizer sums over ranks itself."
    )
