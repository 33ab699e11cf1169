"""What CG is asked for: how far it goes, and from where, on new data and on data that stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from torch_hf.preconditioner.protocol import Preconditioner
from torch_hf.solver.line_search import TRUSTED

#: Most iterations of CG: on the data of the step before; on new data, on a strong base or none.
FULL, STRONG, WEAK = 250, 3, 20
#: What the next solve begins with of CG's last solution, from the ratio that is trusted on.
KEPT = 0.9
#: By how many units of rounding the loss at the same parameters and data may differ.
SAME_ULPS = 10


def data_stay(last: Mapping[str, Any], loss: float, cases: float, dtype: torch.dtype) -> bool:
    """Whether a step sees the data of the one before: as many cases, and the loss it ended with.

    Args:
        last: ``last_loss`` and ``last_cases`` of the step before.
        loss: Where this one begins.
        cases: How many this one sees.
        dtype: Of the parameters.

    Example:
        >>> last = {"last_loss": 2.0, "last_cases": 500.0}
        >>> data_stay(last, 2.0, 500.0, torch.float32), data_stay(last, 2.0, 505.0, torch.float32)
        (True, False)
        >>> data_stay(last, 2.00001, 500.0, torch.float32)  # another batch may come as near
        False
    """
    before = last.get("last_loss")
    if before is None or last.get("last_cases") != cases:
        return False
    allowed = SAME_ULPS * torch.finfo(dtype).eps * max(abs(before), abs(loss))
    return bool(abs(before - loss) <= allowed)


def most_iterations(preconditioner: Preconditioner, same_data: bool) -> int:
    """How far CG may go: all the way on data that stay, before it fits the sample on new ones."""
    if same_data:
        return FULL
    return STRONG if getattr(preconditioner, "strong", False) else WEAK


def start_factor(ratio: float | None, most: int, blind: bool) -> float:
    """The factor on CG's last solution where the next solve begins: 0.9 if it kept its promise.

    Few iterations from much of the last solution are a momentum, and where the loss falls short of
    what the quadratic promised, as on small samples of noisy data, that carries noise along
    (``docs/design.md`` has the figures). Below a ratio of 3/4 the factor goes down with it.

    Args:
        ratio: Actual over predicted change in the last step, if there was one.
        most: How many iterations CG may make.
        blind: Whether products are taken on the gradient's very cases, and these are new: then the
            ratio does not see noise, and few iterations begin at zero.

    Example:
        >>> start_factor(0.8, 3, False), start_factor(0.375, 3, False), start_factor(-3.0, 3, False)
        (0.9, 0.45, 0.0)
        >>> start_factor(1.0, 3, True), start_factor(None, 20, True)
        (0.0, 0.9)
    """
    if blind and most <= STRONG:
        return 0.0
    if ratio is None:
        return KEPT
    kept = 0.0 if math.isnan(ratio) else max(ratio, 0.0)  # undefined: nothing was promised
    return KEPT * min(kept / TRUSTED, 1.0)
