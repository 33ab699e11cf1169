"""Rademacher signs without a generator: each case draws its own from the bits of its data.

So the signs of a case are the same wherever it stands in a batch, in whichever part of a split
batch, and on whichever process.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Multipliers of the hash (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
#: generators", as signed 64-bit numbers) and its increment.
_FIRST, _SECOND, _STEP = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB


def case_signs(z: Tensor, data: Tensor, salt: int) -> Tensor:
    """Signs of the shape of ``z``, from the cases of ``data`` along dimension 0.

    Where the two do not have the same cases, a case is known by its place.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> signs = case_signs(x, x, salt=0)
        >>> bool((case_signs(x[1:], x[1:], salt=0) == signs[1:]).all()), signs.shape
        (True, torch.Size([3, 2]))
    """
    cases = z.shape[0] if z.ndim else 1
    if data.ndim and data.shape[0] == cases:
        keys = _keys(data)
    else:
        keys = torch.arange(cases, device=z.device)
    numbers = torch.arange(z.numel() // max(cases, 1), device=z.device) + salt
    hashed = _mix(keys[:, None] + _STEP * numbers)
    return ((hashed >> 62) & 1).to(z.dtype).mul_(2).sub_(1).view(z.shape)


def _keys(data: Tensor) -> Tensor:
    """A number for each case, from the bits of all of its entries, in any format as in single."""
    rows = data.detach().reshape(len(data), -1)
    bits = rows.to(torch.float32).view(torch.int32).long()
    places = torch.arange(rows.shape[1], device=data.device)
    return _mix(bits ^ _mix(places * _STEP)).sum(1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit numbers that leaves no pattern."""
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)
