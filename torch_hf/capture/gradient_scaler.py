"""Whether a product of two tensors is a ``GradScaler``'s, which scales a closure's loss."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Frames between a scaler's method and the call that is looked at: a list of losses has a few.
DEPTH = 10


def scales_a_loss(args: Sequence[Any]) -> bool:
    """Whether the multiplication that is going on was written in a method of a ``GradScaler``.

    A disabled scaler multiplies nothing.

    Args:
        args: The multiplication's.
    """
    if len(args) != 2 or not all(isinstance(t, Tensor) for t in args) or args[1].numel() != 1:
        return False
    frame = sys._getframe(1)
    for _ in range(DEPTH):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if isinstance(frame.f_locals.get("self"), torch.amp.GradScaler):
            return True
    return False
