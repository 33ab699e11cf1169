"""What a layer is made of, checked before anything is made."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_hf import _checks
from torch_hf.kronecker import _memory
from torch_hf.kronecker._checks import check_finite
from torch_hf.kronecker._grid import Grid, find
from torch_hf.kronecker.factors import KroneckerFactors

#: Bytes up to which gram="auto" keeps the whole Gram matrix.
GRAM_BYTES = 2**30
#: With init="auto", initial weights are made one by one where d is at most so many times n: beyond
#: that a factorization of the Gram matrix, n**3 / 3, costs less than n m d with m near n.
SEEDED_BELOW = 2
#: Numbers of float64 that a joint draw takes at its peak, in units of n²: 3.1 measured.
DRAW_NUMBERS = 3.2
#: What to write where memory is short.
WAYS = {
    "full": 'Use gram="rows", which computes the rows that a step needs.',
    "joint": 'Use init="seeded", which factorizes no Gram matrix.',
    "keep_initial": "Use keep_initial=False.",
}
FEWER = "Use fewer neurons or points, or a narrower dtype."


def check_arguments(
    factors: Any, out_features: Any, init: Any, std: Any, gram: Any, keep_initial: Any
) -> None:
    """Those of :class:`~torch_hf.kronecker.KroneckerLinear`.

    Raises:
        TypeError, ValueError: One is wrong; the message says which.
    """
    if not isinstance(factors, KroneckerFactors):
        raise TypeError(
            f"factors must be KroneckerFactors, got {type(factors).__name__}. Build them from the "
            "matrices: KroneckerLinear(KroneckerFactors(A, B), out_features)."
        )
    _checks.count("out_features", out_features, low=1, hint="It is the number of neurons.")
    _checks.number("std", std, low=0.0, hint="std=1.0 is usual with points of length 1.")
    _checks.one_of("gram", gram, ("auto", "full", "rows", "grid"))
    _checks.flag("keep_initial", keep_initial)
    if not isinstance(init, Tensor):
        _checks.one_of("init", init, ("auto", "joint", "seeded"))
        return
    shape = (out_features, factors.features)
    if tuple(init.shape) != shape or not init.is_floating_point():
        raise ValueError(
            f"Initial weights must be floating-point of shape (out_features, d) = {shape}, got "
            f'{init.dtype} of shape {tuple(init.shape)}. Pass init of that shape, or init="auto".'
        )
    check_finite("init", init)


def kind(init: str | Tensor, factors: KroneckerFactors, grid: Grid | None) -> str:
    """``"joint"``, ``"seeded"`` or ``"given"``."""
    if isinstance(init, Tensor):
        return "given"
    if init == "auto" and grid is not None:
        return "joint"
    if init == "auto":
        return "seeded" if factors.features <= SEEDED_BELOW * len(factors) else "joint"
    return init


def grid_of(factors: KroneckerFactors, neurons: int, gram: str) -> Grid | None:
    """The grid that a layer's points lie in, None where they are kept one by one.

    Raises:
        ValueError: A grid is asked for, and there is none.
    """
    if gram not in ("auto", "grid"):
        return None
    found = find(factors, neurons, any_size=gram == "grid")
    if found is None and gram == "grid":
        raise ValueError(
            'gram="grid" needs one term of factors whose rows repeat, got points that fill no '
            'grid of two tables. Make pairs with KroneckerFactors.from_pairs, or use gram="auto".'
        )
    return found


def keeps_gram(factors: KroneckerFactors, gram: str) -> bool:
    """Whether the whole Gram matrix is kept."""
    if gram == "auto":
        return len(factors) ** 2 * factors.dtype.itemsize <= GRAM_BYTES
    return gram == "full"


def check_memory(
    factors: KroneckerFactors, neurons: int, init: str, full: bool, keep_initial: bool
) -> None:
    """Raises MemoryError for what would not fit, with the option that avoids it."""
    options = {"joint": init == "joint", "full": full, "keep_initial": keep_initial}
    parts = _parts(factors, neurons, **options)
    room = _memory.available(factors.device)
    open_to = [name for name in WAYS if options[name]]
    trials = [[name] for name in open_to] + [open_to[:k] for k in range(2, len(open_to) + 1)]
    instead = [*(WAYS[name] for name in open_to), FEWER]
    for left_out in trials:  # the first without which it would fit
        rest = _parts(factors, neurons, **{**options, **dict.fromkeys(left_out, False)})
        if room is not None and sum(rest.values()) <= room:
            instead = [WAYS[name] for name in left_out]
            break
    _memory.check_all_fit(parts, factors.device, " ".join(instead))


def _parts(
    factors: KroneckerFactors, neurons: int, *, joint: bool, full: bool, keep_initial: bool
) -> dict[str, float]:
    """Bytes at the peak, which is the draw's or what is kept after it."""
    n, itemsize = len(factors), factors.dtype.itemsize
    gram = float(full * n * n * itemsize)
    kept = {
        "Gram matrix": gram,
        "coefficients and correlations": 2.0 * n * neurons * itemsize,
        "initial correlations": float(keep_initial * n * neurons * itemsize),
    }
    drawing = {
        "Gram matrix": gram,
        "draw by the Gram matrix": joint * DRAW_NUMBERS * n * n * 8,
        "correlations": float(n * neurons * itemsize),
    }
    return max(kept, drawing, key=lambda parts: sum(parts.values()))


def check_grid_memory(grid: Grid, factors: KroneckerFactors, neurons: int) -> None:
    """The same, for points in a grid."""
    a, b, itemsize = len(grid.left), len(grid.right), factors.dtype.itemsize
    parts = {
        "coefficients and initial correlations": 2.0 * len(factors) * neurons * itemsize,
        "products of the grid": float(a * b * neurons * itemsize),
        "draw": DRAW_NUMBERS * 8 * (a * a + b * b) + 8.0 * 2**24,
    }
    _memory.check_all_fit(parts, factors.device, FEWER)
