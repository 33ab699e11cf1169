"""Whether a tensor would fit, asked before it is made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


def available(device: torch.device) -> int | None:
    """Bytes that could still be allocated on a device, None where the system does not say.

    On CUDA what torch's allocator holds free counts as free; on the CPU the least of what the
    machine and the container's limits leave.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    rooms = [room for room in (_machine(), _container()) if room is not None]
    return min(rooms, default=None)


def _machine() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _container(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int | None:
    """What the control groups of this process leave, of version 2 or 1."""
    try:
        lines = Path(own).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    rooms = []
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        top = Path(root) / "memory" if controllers else Path(root)
        if not controllers:
            files = ("memory.max", "memory.current", "inactive_file")
        group = top / inside.strip("/")
        rooms += [_left(g, *files) for g in (group, *group.parents) if g.is_relative_to(top)]
    return min((room for room in rooms if room is not None), default=None)


def _left(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        most = (group / limit).read_text(encoding="ascii").strip()
        used = int((group / usage).read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    if not most.isdigit():  # "max"
        return None
    caches = [int(x.split()[1]) for x in stat if x.split()[0] == reclaimable]
    return max(0, int(most) - used + sum(caches))


def check_fits(
    what: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device, instead: str
) -> None:
    """Raises MemoryError, with the size and the way round it, where a tensor would not fit."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    room = available(device)
    if room is not None and size > room:
        dims = " x ".join(f"{length:,}" for length in shape)
        raise MemoryError(
            f"{what} of {dims} entries would take {size / 1e9:.3g} GB in {dtype}, but {device} has "
            f"{room / 1e9:.3g} GB left. {instead}"
        )


def check_all_fit(parts: Mapping[str, float], device: torch.device, instead: str) -> None:
    """Raises MemoryError where the bytes of all parts together would not fit."""
    room, size = available(device), sum(parts.values())
    if room is not None and size > room:
        listed = ", ".join(f"{name} {x / 1e9:.3g}" for name, x in parts.items() if x)
        raise MemoryError(
            f"The layer would take {size / 1e9:.3g} GB ({listed}), but {device} has "
            f"{room / 1e9:.3g} GB left. {instead}"
        )
