"""Checks of what a user hands in: matrices and indices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rows = Tensor | Sequence[int]


def check_matrices(factors: Sequence[Tensor], same_length: bool = True) -> None:
    """Matrices of finite numbers, of one dtype, on one device, and of as many rows."""
    if not factors:
        raise ValueError(
            "KroneckerFactors must have at least one factor, got none. Pass a matrix with a row "
            "for each point."
        )
    first = factors[0]
    for number, factor in enumerate(factors, start=1):
        if not isinstance(factor, Tensor) or not factor.is_floating_point():
            got = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
            raise TypeError(
                f"Factor {number} must be a floating-point tensor, got {got}. Convert it, for "
                "instance with .float()."
            )
        if factor.layout != torch.strided:
            raise TypeError(
                f"Factor {number} must be a dense tensor, got layout {factor.layout}. Pass "
                "factor.to_dense()."
            )
        if factor.requires_grad:
            raise ValueError(
                f"Factor {number} must be data, got a tensor that requires a gradient, which would "
                "not reach it. Pass factor.detach()."
            )
        if factor.dim() != 2 or 0 in factor.shape:
            raise ValueError(
                f"Factor {number} must be a matrix (points, features) that is not empty, got shape "
                f"{tuple(factor.shape)}."
            )
        if factor.dtype != first.dtype:
            raise TypeError(
                f"All factors must have one dtype, got {first.dtype} for factor 1 and "
                f"{factor.dtype} for factor {number}. Convert one, for instance with "
                f".to({first.dtype})."
            )
        if factor.device != first.device:
            raise ValueError(
                f"All factors must be on one device, got {first.device} for factor 1 and "
                f"{factor.device} for factor {number}. Move one with .to({str(first.device)!r})."
            )
        if same_length and len(factor) != len(first):
            raise ValueError(
                f"All factors must have a row for each point, got {len(first)} rows in factor 1 "
                f"and {len(factor)} in factor {number}. For a list of pairs from two feature "
                "matrices use KroneckerFactors.from_pairs."
            )
        check_finite(f"Factor {number}", factor)


def check_finite(name: str, matrix: Tensor) -> None:
    """No NaN, no infinity; says where the first is."""
    wrong = ~torch.isfinite(matrix)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{name} must be finite, got {int(wrong.sum())} values that are not finite, the first "
            f"{matrix[place]} at {place}. Remove such points, or fill in the values."
        )


def as_indices(rows: Rows, length: int, device: torch.device, what: str = "indices") -> Tensor:
    """Numbers of points as a tensor ``(k,)``, each at least 0 and below ``length``."""
    found = torch.as_tensor(rows)  # checked where it lies: no wait for a device where it is a list
    if found.numel() == 0:
        found = found.long()
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(
            f"{what} must be integers, got {found.dtype}. For a mask, pass mask.nonzero()[:, 0]."
        )
    if found.dim() != 1:
        raise ValueError(f"{what} must be a list or a vector, got shape {tuple(found.shape)}.")
    found = found.long()
    if len(found):
        low, high = torch.stack(found.aminmax()).tolist()
        if low < 0 or high >= length:
            raise ValueError(
                f"{what} must be from 0 to {length - 1}, got {low if low < 0 else high}."
            )
    return found.to(device)
