"""How many iterations CG may make: on the data of the last step, and on new data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from torch_hf.preconditioner.protocol import Preconditioner

#: Most iterations of CG: on the data of the last step; on new data with Kronecker factors; on new
#: data without them.
MAX_ITER_SAME_DATA, MAX_ITER_WITH_FACTORS, MAX_ITER_WITHOUT_FACTORS = 250, 3, 20
#: By how many units of rounding the loss at the same parameters and data may differ: where data
#: were seen to change, and where they were not. Kernels with atomic sums scatter by more than ten.
SAME_LOSS_ULPS, STILL_SAME_ULPS = 10, 1000
#: After so many steps in a row that came as close as the second, it is no chance.
CLOSE_STEPS = 2


def is_same_data(last: Mapping[str, Any], loss: float, cases: float, dtype: torch.dtype) -> bool:
    """Whether a step sees the data of the one before: as many cases, and the loss it ended with.

    Args:
        last: ``last_loss`` and ``last_cases`` of the step before, ``changes``, the number of steps
            in a row that saw other data, and ``close``, that of steps whose loss was nearly that.
        loss: Where this one begins.
        cases: How many this one sees.
        dtype: Of the parameters.

    Example:
        >>> last = {"last_loss": 2.0, "last_cases": 500.0}
        >>> [is_same_data(last, 2.0, cases, torch.float32) for cases in (500.0, 505.0)]
        [True, False]
        >>> is_same_data(last | {"changes": 0.0}, 2.0001, 500.0, torch.float32)  # sums in any order
        True
        >>> is_same_data(last | {"changes": 3.0}, 2.0001, 500.0, torch.float32)  # another batch
        False
        >>> is_same_data(last | {"changes": 3.0, "close": 2.0}, 2.0001, 500.0, torch.float32)
        True
    """
    known = not last.get("changes", 0.0) or last.get("close", 0.0) >= CLOSE_STEPS
    return _is_close(last, loss, cases, dtype, STILL_SAME_ULPS if known else SAME_LOSS_ULPS)


def is_close(last: Mapping[str, Any], loss: float, cases: float, dtype: torch.dtype) -> bool:
    """Whether the loss is near that of the last step's end: alone no proof of the same data."""
    return _is_close(last, loss, cases, dtype, STILL_SAME_ULPS)


def _is_close(
    last: Mapping[str, Any], loss: float, cases: float, dtype: torch.dtype, ulps: float
) -> bool:
    before = last.get("last_loss")
    if before is None or not math.isfinite(before) or last.get("last_cases") != cases:
        return False
    allowed = ulps * torch.finfo(dtype).eps * max(abs(before), abs(loss))
    return bool(abs(before - loss) <= allowed)


def max_iterations(preconditioner: Preconditioner, same_data: bool, budget: float = 1.0) -> int:
    """How far CG may go: all the way on data that stay, before it fits the sample on new ones.

    Args:
        preconditioner: With layers' factors fewer iterations do.
        same_data: Whether the data are those of the step before.
        budget: The factor on the number on new data that earlier steps have earned.
    """
    if same_data:
        return MAX_ITER_SAME_DATA
    knows_layers = getattr(preconditioner, "has_layer_factors", False)
    few = MAX_ITER_WITH_FACTORS if knows_layers else MAX_ITER_WITHOUT_FACTORS
    return min(int(few * budget), MAX_ITER_SAME_DATA)
