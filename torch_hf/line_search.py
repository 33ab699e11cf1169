"""From CG's iterates to a step: walk back while the loss improves, then Armijo's rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from torch_hf.cg import Iterate

#: Martens 2010's code: sufficient decrease c, shrinking factor, most tries.
SUFFICIENT_DECREASE, SHRINK, MAX_TRIES = 1e-2, 0.8, 60

#: The loss at ``theta + length * direction``.
LossAlong = Callable[[Tensor, float], float]


class Backtracked(NamedTuple):
    """The iterate chosen and the loss at its end."""

    iterate: Iterate
    loss: float


class Step(NamedTuple):
    """How far to go along a direction, and the loss there; length 0 is no step."""

    length: float
    loss: float


def backtrack(loss_along: LossAlong, iterates: Sequence[Iterate], length: float) -> Backtracked:
    """Walks back over CG's iterates while the loss falls (Martens 2010, section 4.6).

    Args:
        loss_along: The loss at theta + length * direction.
        iterates: In the order of the solve; those after which q is not below 0 are passed over.
        length: The factor on each iterate, ``lr``.
    """
    last, *earlier = reversed(iterates)
    best = Backtracked(last, loss_along(last.vector, length))
    for iterate in earlier:
        if iterate.value >= 0:
            continue
        loss = loss_along(iterate.vector, length)
        if not (loss < best.loss or not math.isfinite(best.loss)):
            break
        best = Backtracked(iterate, loss)
    return best


def armijo(
    loss_along: LossAlong,
    direction: Tensor,
    *,
    start_loss: float,
    slope: float,
    length: float,
    first_loss: float,
) -> Step:
    """The first length of ``length * 0.8^j`` with enough decrease (Armijo 1966).

    Args:
        loss_along: The loss at theta + length * direction.
        direction: Of shape (P,).
        start_loss: The loss at theta.
        slope: The gradient times the direction, below 0.
        length: The first length to try.
        first_loss: The loss there, known already.

    Returns:
        The step; of length 0 and with ``start_loss`` where no try was good enough.
    """
    loss = first_loss
    for tries in range(MAX_TRIES):
        if tries:
            length *= SHRINK
            loss = loss_along(direction, length)
        if loss <= start_loss + SUFFICIENT_DECREASE * length * slope:
            return Step(length, loss)
    return Step(0.0, start_loss)
