"""Rademacher signs without a generator: a hash of a case's place among all cases.

They depend on no number that was computed, so the last bit of an activation cannot flip one. A case
has the same signs in whichever part of a split batch and on whichever process it stands, as long as
all cases together come in the same order: see :func:`places`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Multipliers of the hash (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
#: generators", as signed 64-bit numbers) and its increment.
_FIRST, _SECOND, _STEP = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB
#: Signs that one number of 64 bits gives.
_BITS = 64


class Places(NamedTuple):
    """Where the rows of one tensor stand among those of all batches and ranks."""

    first: int = 0
    stride: int = 1


def places(before: int, shares: Sequence[int], rank: int) -> Places:
    """The places of a batch's rows.

    Rows that were dealt to the ranks in turn, as torch's ``DistributedSampler`` and
    ``GrowingBatchSampler`` do, are counted in turn; shares of other sizes one after another.

    Args:
        before: How many rows this rank's earlier batches have.
        shares: How many rows each rank has.
        rank: Which of them this is.
    """
    ranks, rows = len(shares), sum(shares)
    if list(shares) == [len(range(r, rows, ranks)) for r in range(ranks)]:
        return Places(before * ranks + rank, ranks)
    return Places(sum(shares[:rank]) + before)


def case_signs(z: Tensor, at: Places, salt: int) -> Tensor:
    """Signs of the shape of ``z``, whose rows are cases.

    Args:
        z: Rows along dimension 0; a tensor without dimensions is one.
        at: The places of its rows.
        salt: Another one draws other signs.

    Example:
        >>> import torch
        >>> z = torch.zeros(3, 2)
        >>> signs = case_signs(z, Places(), salt=0)
        >>> bool((case_signs(z[1:], Places(1), salt=0) == signs[1:]).all()), signs.shape
        (True, torch.Size([3, 2]))
    """
    rows = z.shape[0] if z.ndim else 1
    width = z.numel() // max(rows, 1)
    row = torch.arange(rows, device=z.device)
    keys = _mix(_mix(at.first + at.stride * row) + _wrapped(_STEP * (salt + 1)))
    numbers = torch.arange(-(-width // _BITS), device=z.device)
    hashed = _mix(keys[:, None] + _STEP * (numbers + 1))
    eighths = hashed.view(torch.uint8)[:, :, None]  # the bits of a byte are told apart in a byte
    bits = (eighths >> torch.arange(8, dtype=torch.uint8, device=z.device)) & 1
    signs = bits.flatten(1)[:, :width].to(z.dtype)
    return signs.mul_(2).sub_(1).view(z.shape)


def _wrapped(number: int) -> int:
    """As 64 bits with a sign hold it."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit numbers that leaves no pattern."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    mixed: Tensor = x ^ _shifted(x, 31)
    return mixed


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in, where torch would repeat the sign."""
    shifted: Tensor = (x >> by) & (2 ** (64 - by) - 1)
    return shifted
