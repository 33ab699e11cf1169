"""What a layer is made of, checked before anything is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_hf import _checks
from torch_hf.kronecker import _memory
from torch_hf.kronecker._checks import check_finite
from torch_hf.kronecker.factors import KroneckerFactors

#: Bytes up to which gram="auto" keeps the whole Gram matrix.
GRAM_BYTES = 2**30
#: With init="auto", initial weights are made one by one where d is at most so many times n: beyond
#: that a factorization of the Gram matrix, n**3 / 3, costs less than n m d with m near n.
SEEDED_BELOW = 2


def check_arguments(
    factors: Any, out_features: Any, init: Any, std: Any, gram: Any, keep_initial: Any
) -> None:
    """Those of :class:`~torch_hf.kronecker.KroneckerLinear`.

    Raises:
        TypeError, ValueError: One is wrong; the message says which.
    """
    if not isinstance(factors, KroneckerFactors):
        raise TypeError(
            f"factors must be KroneckerFactors, got {type(factors).__name__}. Make them of the "
            "factors' matrices: KroneckerLinear(KroneckerFactors(A, B), out_features)."
        )
    _checks.count("out_features", out_features, low=1, hint="It is the number of neurons.")
    _checks.number("std", std, low=0.0, hint="std=1.0 is usual with points of length 1.")
    _checks.one_of("gram", gram, ("auto", "full", "rows"))
    _checks.flag("keep_initial", keep_initial)
    if not isinstance(init, Tensor):
        _checks.one_of("init", init, ("auto", "joint", "seeded"))
        return
    shape = (out_features, factors.features)
    if tuple(init.shape) != shape or not init.is_floating_point():
        raise ValueError(
            f"Initial weights must be floating-point of shape (out_features, d) = {shape}, got "
            f"{init.dtype} of {tuple(init.shape)}."
        )
    check_finite("init", init)


def kind(init: str | Tensor, factors: KroneckerFactors) -> str:
    """``"joint"``, ``"seeded"`` or ``"given"``."""
    if isinstance(init, Tensor):
        return "given"
    if init == "auto":
        return "seeded" if factors.features <= SEEDED_BELOW * len(factors) else "joint"
    return init


def keeps_gram(factors: KroneckerFactors, gram: str) -> bool:
    """Whether the whole Gram matrix is kept."""
    if gram == "auto":
        return len(factors) ** 2 * factors.dtype.itemsize <= GRAM_BYTES
    return gram == "full"


def check_memory(
    factors: KroneckerFactors, neurons: int, init: str, full: bool, keep_initial: bool
) -> None:
    """Raises MemoryError for what would not fit, with the option that avoids it."""
    n, dtype, device = len(factors), factors.dtype, factors.device
    if full:
        instead = 'Use gram="rows", which computes the rows that a step needs.'
        _memory.check_fits("The Gram matrix", (n, n), dtype, device, instead)
    if init == "joint":
        instead = 'Use init="seeded", which factorizes no Gram matrix.'
        _memory.check_fits(
            "The draw's Gram matrix (twice)", (2, n, n), torch.float64, device, instead
        )
    parts, instead = 2, "Use fewer neurons or points, or a narrower dtype."
    if keep_initial:
        parts, instead = 3, "Use keep_initial=False (a third less), fewer neurons or fewer points."
    what = "Coefficients and correlations"
    _memory.check_fits(what, (parts, n, neurons), dtype, device, instead)
