"""Whether a closure scales its loss by a ``GradScaler``."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def scales_a_loss(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of ``Tensor.to`` brings a scaler's factor to a loss.

    That is the first thing its ``scale`` does, unless it is disabled. Who owns the factor is asked
    of the garbage collector, and only of numbers that are moved in just that way.

    Args:
        args: The call's.
        kwargs: The call's.
    """
    factor = args[0]
    odd = not kwargs.get("non_blocking") or "device" not in kwargs or factor.ndim
    if odd or factor.dtype != torch.float32 or factor.requires_grad:
        return False
    return any(_is_scaler(owner, factor) for owner in gc.get_referrers(factor))


def _is_scaler(owner: Any, factor: Tensor) -> bool:
    if isinstance(owner, torch.amp.GradScaler):
        return owner._scale is factor
    return isinstance(owner, dict) and owner.get("_scale") is factor and "_growth_factor" in owner
