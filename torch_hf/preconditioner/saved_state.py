"""Checks of a saved state's entries: each complaint names the entry, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

_HINT = "The state is damaged: load another checkpoint, or start with a new optimizer."
#: What rounding may leave between the two triangles of a symmetric matrix, in units of its largest.
_ASYMMETRY = 1e-2
#: No count is larger.
_MOST = 2**53


def refused(key: str, expected: str, value: Any) -> ValueError:
    """What to say of an entry that cannot be."""
    if isinstance(value, Tensor):
        got = f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    else:
        got = f"{type(value).__name__} {value!r:.80}"
    return ValueError(f"The state's entry {key!r} must be {expected}, got {got}. {_HINT}")


def number(
    key: str, value: Any, low: float = -math.inf, *, whole: bool = False, finite: bool = True
) -> float:
    """A number of at least ``low``, as Python's."""
    kind = "whole number" if whole else "finite number" if finite else "number"
    expected = f"a {kind}" + (f" of at least {low:g}" if low > -math.inf else "")
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refused(key, expected, value)
    if (finite and not math.isfinite(value)) or value < low:
        raise refused(key, expected, value)
    if whole and (value != int(value) or value > _MOST):
        raise refused(key, expected, value)
    return value


def is_dense(value: Any) -> TypeGuard[Tensor]:
    """A tensor that any operation takes."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def floats(key: str, value: Any, expected: str, *, finite: bool = True) -> Tensor:
    """A tensor of floating point."""
    if not is_dense(value) or not value.is_floating_point():
        raise refused(key, expected, value)
    if finite and not bool(value.isfinite().all()):
        raise refused(key, f"{expected}, all of it finite", value)
    return value


def whole_numbers(key: str, value: Any, expected: str) -> list[Any]:
    """A tensor of integers, as lists."""
    if not is_dense(value) or value.dtype not in (torch.int64, torch.int32):
        raise refused(key, expected, value)
    found: list[Any] = value.tolist()
    return found


def check_pairs(state: Mapping[str, Any], prefix: str, history_size: int, numel: int) -> None:
    """The entries of L-BFGS pairs, or none of them."""
    names = ("s", "y", "order", "damping")
    if not any(name in state for name in names):
        return
    _all_there(state, prefix, names)
    expected = f"the pairs, of shape (K, {numel}) with K from 1 to {history_size}"
    rows = {name: floats(prefix + name, state[name], expected, finite=False) for name in "sy"}
    for name, value in rows.items():
        fits = value.ndim == 2 and value.shape[1] == numel and 1 <= len(value) <= history_size
        if not fits or value.shape != rows["s"].shape:
            raise refused(prefix + name, expected, value)
    count = len(rows["s"])
    expected = f"the numbers from 0 to {count - 1}, each once"
    order = whole_numbers(prefix + "order", state["order"], expected)
    if state["order"].ndim != 1 or sorted(order) != list(range(count)):
        raise refused(prefix + "order", expected, state["order"])
    number(prefix + "damping", state["damping"], 0.0)


def check_factors(state: Mapping[str, Any], prefix: str, sizes: Sequence[int]) -> None:
    """The entries of Kronecker factors, or none of them.

    Args:
        state: The preconditioner's entries.
        prefix: What these are called in front, in the state of the optimizer.
        sizes: How many numbers each parameter has.
    """
    names = ("layout", "measured", "age", "iterations", "inverted_at")
    if not any(name in state or name.startswith("factor") for name in (*names, *state)):
        return
    _all_there(state, prefix, names)
    number(prefix + "measured", state["measured"], 1, whole=True)
    for name in ("age", "iterations"):
        number(prefix + name, state[name], 0, whole=True)
    number(prefix + "inverted_at", state["inverted_at"], 0.0)
    key, expected = prefix + "layout", "(weight, bias) of each layer, each parameter at most once"
    layout = whole_numbers(key, state["layout"], expected)
    if state["layout"].ndim != 2 or state["layout"].shape[1] != 2:
        raise refused(key, expected, state["layout"])
    known = [i for row in layout for i in row if i != -1]
    inside = all(0 <= i < len(sizes) for i in known) and all(row[0] >= 0 for row in layout)
    if not inside or len(set(known)) != len(known):
        raise refused(key, f"{expected}, from 0 to {len(sizes) - 1} (-1: no bias)", state["layout"])
    _all_there(state, prefix, [f"factor{i}" for i in range(2 * len(layout))])
    for k, (weight, bias) in enumerate(layout):
        inputs = _factor(prefix + f"factor{2 * k}", state[f"factor{2 * k}"])
        outputs = _factor(prefix + f"factor{2 * k + 1}", state[f"factor{2 * k + 1}"])
        columns = inputs - (bias >= 0)
        if outputs * columns != sizes[weight] or (bias >= 0 and sizes[bias] != outputs):
            expected = f"a layer's that has parameters {weight} and {bias}"
            raise refused(prefix + f"factor{2 * k}", expected, state[f"factor{2 * k}"])


def _factor(key: str, value: Any) -> int:
    """The size of a factor."""
    expected = "a symmetric matrix, or a diagonal, with last dimensions of 1"
    factor = floats(key, value, expected)
    sides = {2: 1, 3: 2, 5: 1, 6: 2}.get(factor.ndim, 0)  # with one of these, as 0.1 had, or four
    if not sides or factor.shape[sides:].numel() != 1 or factor.shape[0] != factor.shape[sides - 1]:
        raise refused(key, expected, value)
    matrix = factor.reshape(factor.shape[:sides])
    diagonal = matrix.diagonal() if matrix.ndim == 2 else matrix
    apart = (matrix - matrix.mT).abs().max() if matrix.ndim == 2 and matrix.numel() else 0.0
    if matrix.numel() and (bool(diagonal.min() < 0) or apart > _ASYMMETRY * matrix.abs().max()):
        raise refused(key, expected + ", of no negative diagonal", value)
    return len(matrix)


def _all_there(state: Mapping[str, Any], prefix: str, names: Sequence[str]) -> None:
    for name in names:
        if name not in state:
            raise ValueError(
                f"The state must have the entry {prefix + name!r} beside those that belong to "
                f"it, got none. {_HINT}"
            )
