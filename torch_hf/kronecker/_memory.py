"""Whether a tensor would fit, asked before it is made."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch


def available(device: torch.device) -> int | None:
    """Bytes that could still be allocated on a device, None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


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
