"""The inverse Hessian by its last pairs of step and change of gradient: L-BFGS (Nocedal 1980)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.solver.choose_solver import MOST_BYTES


class Move(NamedTuple):
    """From one point of a descent to the next.

    Attributes:
        step: s (P,).
        change: y (P,), of the gradient.
        gradient: At the end, (P,).
        bend: ``s^T H^-1 s``; None where the pair is not to be learnt from.
    """

    step: Tensor
    change: Tensor
    gradient: Tensor
    bend: float | None


#: Pairs at the most and at the least, and the numbers that they may take together.
MOST_PAIRS, LEAST_PAIRS, MOST_NUMBERS = 100, 10, 2**25


def pairs_that_fit(numel: int) -> int:
    """How many pairs are kept for so many parameters.

    Example:
        >>> pairs_that_fit(10_000), pairs_that_fit(1_000_000), pairs_that_fit(10**8)
        (100, 16, 10)
    """
    return min(max(MOST_NUMBERS // (2 * numel), LEAST_PAIRS), MOST_PAIRS)


def limited_fits(numel: int, element_size: int) -> bool:
    """Whether the fewest pairs are no more than a solver takes that was not asked for."""
    return 2 * LEAST_PAIRS * numel * element_size <= MOST_BYTES


class LimitedInverse:
    """H of at most so many pairs, by the two-loop recursion.

    Nocedal & Wright 2006, algorithm 7.4. It begins as the multiple of the identity that the newest
    pair tells.

    Args:
        size: P.
        pairs: Rows (2 m, P), the steps above the changes; None for none.
    """

    def __init__(self, size: int, pairs: Tensor | None = None) -> None:
        self.most = pairs_that_fit(size)
        self.steps: list[Tensor] = []
        self.changes: list[Tensor] = []
        self._weights: list[Tensor] = []
        if pairs is not None:
            for step, change in zip(*pairs.chunk(2), strict=True):
                self._keep(step, change)

    def _keep(self, step: Tensor, change: Tensor) -> None:
        self.steps.append(step)
        self.changes.append(change)
        self._weights.append(1.0 / torch.dot(step, change))
        if len(self.steps) > self.most:
            del self.steps[0], self.changes[0], self._weights[0]

    @classmethod
    def of_pair(cls, step: Tensor, change: Tensor) -> LimitedInverse:
        """One that knows nothing yet."""
        return cls(len(step))

    def add(self, step: Tensor, change: Tensor) -> None:
        """One pair more, where its curvature is positive and neither under- nor overflows.

        H does not depend on a pair's length, so changes are kept at length 1: near a minimum their
        squares would underflow.
        """
        length = float(torch.linalg.vector_norm(change, dtype=torch.float64))
        if not 0 < length < math.inf:
            return
        step, change = (step.double() / length).to(step), (change.double() / length).to(change)
        if torch.finfo(step.dtype).tiny < float(step @ change) < math.inf:
            self._keep(step, change)

    def times(self, v: Tensor) -> Tensor:
        """``H v`` for a vector (P,)."""
        if not self.steps:
            return v
        v, parts = v.clone(), []
        for step, change, weight in self._newest_first():
            part = weight * torch.dot(step, v)
            parts.append(part)
            v -= part * change
        newest = self.changes[-1]
        v *= 1.0 / (self._weights[-1] * torch.dot(newest, newest))
        for (step, change, weight), part in zip(
            reversed(list(self._newest_first())), reversed(parts), strict=True
        ):
            v += (part - weight * torch.dot(change, v)) * step
        return v

    def after(self, move: Move, before: Tensor) -> Tensor:
        """``H g`` at a move's end, with its pair."""
        self.add(move.step, move.change)
        return self.times(move.gradient)

    def next_length(self, length: float, slopes: float) -> float:
        """Where the next search begins: at the full step, which mostly is the right one."""
        return 1.0

    def _newest_first(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        kept = zip(self.steps, self.changes, self._weights, strict=True)
        return list(kept)[::-1]

    def kept(self) -> Tensor | None:
        """All pairs, rows (2 m, P); None where there are none."""
        return torch.stack([*self.steps, *self.changes]) if self.steps else None
