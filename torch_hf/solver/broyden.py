"""Quasi-Newton iterations, dense self-scaled (Al-Baali & Khalfan 2005; Urbán et al. 2024).

They keep the inverse Hessian, P^2 numbers, learn it from changes of the gradient, and scale it in
every update. An iteration costs little more than a gradient: one product of the matrix and one of
a few vectors. Unlike Gauss-Newton steps they see the residual's own curvature, so on strongly
nonconvex starts they get ahead. Those of limited memory are in
:mod:`torch_hf.solver.limited_memory`.

``docs/records/quasi-newton.md`` has the experiments that chose the line search's first length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.solver.levenberg_marquardt import LOSS_ULPS
from torch_hf.solver.limited_memory import LimitedInverse, Move
from torch_hf.solver.wolfe import Point, strong_wolfe

UPDATES = ("ssbroyden", "ssbfgs", "bfgs")
#: By how much a search's first length may exceed the last one's end, at the most.
LONGER = 4.0

#: The loss, inf where it is no number, and its gradient (P,) at a displacement (P,).
Evaluate = Callable[[Tensor], tuple[float, Tensor]]


class Descent(NamedTuple):
    """Where a number of iterations ended.

    Attributes:
        displacement: From where they began, of shape (P,).
        loss: There.
        gradient: There, of shape (P,).
        inverse: The inverse Hessian's approximation (P, P), or its pairs (2 m, P); None before the
            first update.
        iterations: How many lowered the loss.
        pairs: Step and change of the gradient, (P,) each, of each with positive curvature.
    """

    displacement: Tensor
    loss: float
    gradient: Tensor
    inverse: Tensor | None
    iterations: int
    pairs: list[tuple[Tensor, Tensor]]


def descend(
    evaluate: Evaluate,
    loss: float,
    gradient: Tensor,
    known: Inverse | None,
    iterations: int,
    kind: type[Inverse] | None = None,
    eps: float | None = None,
) -> Descent:
    """So many iterations with a strong Wolfe search each; fewer where one finds no decrease.

    Args:
        evaluate: The objective.
        loss: Where they begin.
        gradient: There, of shape (P,).
        known: H; None for none, which is a multiple of the identity.
        iterations: At the most.
        kind: Of H, where there is none; dense if None.
        eps: The loss's rounding unit; that of the gradient's type if None.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))
        >>> x = torch.ones(3, dtype=torch.float64)
        >>> def evaluate(d):
        ...     return float(0.5 * (x + d) @ A @ (x + d)), A @ (x + d)
        >>> found = descend(evaluate, *evaluate(torch.zeros_like(x)), None, 20)
        >>> found.loss < 1e-12
        True
    """
    kind = kind or InverseHessian
    eps = torch.finfo(gradient.dtype).eps if eps is None else eps
    pairs = []
    here, done, first = torch.zeros_like(gradient), 0, 1.0
    newton = gradient if known is None else known.times(gradient)  # H g
    tiny = torch.finfo(gradient.dtype).tiny
    while done < iterations and not 0 < loss < tiny:  # where a loss has no digits to search by
        slope = -float(gradient @ newton)
        if not slope < 0 or not math.isfinite(slope):
            if known is None:
                break
            known, newton = None, gradient  # rounding has spoiled it: begin anew
            continue
        length = first if known is not None else 1.0 / float(gradient.abs().sum())
        start = Point(0.0, loss, gradient, slope)
        base, direction = here, -newton

        def along(t: float, base: Tensor = base, direction: Tensor = direction):  # type: ignore[no-untyped-def]
            return evaluate(base + t * direction)

        end = strong_wolfe(along, start, direction, length, LOSS_ULPS * eps * abs(loss))
        if not end.length:
            if known is None:
                break
            known, newton = None, gradient
            continue
        first = 1.0 if known is None else known.next_length(end.length, end.slope / slope)
        step, change = end.length * direction, end.gradient - gradient
        curved = 0 < float(step @ change) < math.inf
        if curved:
            pairs.append((step, change))
        if known is None and curved:
            known = kind.of_pair(step, change)
            curved = known is not None
            newton = gradient if known is None else known.times(gradient)
        ahead = end.gradient
        if known is not None:
            # B s = -length g, as the step is -length H g; of the first pair it is s / scale
            bend = end.length * float(gradient @ -step) if curved else None
            ahead = known.after(Move(step, change, end.gradient, bend), newton)
        here, loss, gradient, newton = base + step, end.loss, end.gradient, ahead
        done += 1
    return Descent(here, loss, gradient, None if known is None else known.kept(), done, pairs)


def next_length(length: float, slopes: float) -> float:
    """Where the next search begins, from where the last one ended: at most at the full step.

    The updates scale H up, so that the full step is mostly too long. The slopes at both ends of the
    last step say by the secant where the slope was zero, if the full step is to be taken as many
    times too long as it was there; halfway (in decades) to that the search begins.

    Args:
        length: Where the last search ended.
        slopes: The slope there over that at its beginning.

    Example:
        >>> next_length(0.5, 0.0), next_length(0.5, -3.0), next_length(0.5, 0.9)
        (0.5, 0.25, 1.0)
    """
    secant = length / (1.0 - slopes) if slopes < 1.0 else math.inf
    return min(1.0, math.sqrt(length * min(secant, LONGER * length)))


class _Update(NamedTuple):
    """``H+ = H / tau + sum_i w_i u_i u_i^T``."""

    tau: float
    weights: tuple[float, ...]
    vectors: tuple[Tensor, ...]

    def product(self, before: Tensor, v: Tensor) -> Tensor:
        """``H+ v`` from ``H v``."""
        after = before / self.tau
        for w, u in zip(self.weights, self.vectors, strict=True):
            after = after.add(u, alpha=w * float(u @ v))
        return after


class InverseHessian:
    """H (P, P), and updates of it that are written into it later, many at once.

    Then an iteration reads the P^2 numbers once, and writes them seldom. An update of the family
    adds three symmetric terms of rank one and scales the rest, so what is pending is
    ``H = scale H_0 + V^T diag(c) V``.

    Args:
        base: H_0 (P, P), which is not changed, or (P,) ones for the identity.
        scale: Its factor.
    """

    def __init__(self, base: Tensor, scale: float = 1.0) -> None:
        self.base, self.scale = base, scale
        self._vectors: list[Tensor] = []
        self._weights: list[float] = []
        self._stacked: Tensor | None = None

    @classmethod
    def of_pair(cls, step: Tensor, change: Tensor) -> InverseHessian | None:
        """The multiple of the identity that a pair tells (Nocedal & Wright 2006, eq. 6.20).

        None where it under- or overflows.
        """
        square = float(change @ change)
        scale = float(step @ change) / square if square else 0.0
        normal = torch.finfo(step.dtype).tiny < scale < math.inf
        return cls(torch.ones_like(step), scale) if normal else None

    def after(self, move: Move, before: Tensor) -> Tensor:
        """``H g`` at a move's end, with its pair.

        Args:
            move: The last one.
            before: ``H g`` where it began.
        """
        ahead = self.times(move.gradient)
        if move.bend is None:
            return ahead
        bend = move.bend
        if self.is_scalar:
            bend = float(move.step @ move.step) / self.scale
        new = self.update(move.step, move.change, ahead - before, bend)
        return new.product(ahead, move.gradient)

    def add(self, step: Tensor, change: Tensor) -> None:
        """A pair whose step H did not make: by plain BFGS, if its curvature is positive."""
        if 0 < float(step @ change) < math.inf:
            self.update(step, change, self.times(change), math.nan, update="bfgs")

    def next_length(self, length: float, slopes: float) -> float:
        """Where the next search begins, from where the last one ended."""
        return next_length(length, slopes)

    @property
    def is_scalar(self) -> bool:
        """Whether it is a multiple of the identity."""
        return self.base.ndim == 1 and not self._vectors

    def times(self, v: Tensor) -> Tensor:
        """``H v`` for a vector (P,)."""
        product = self.scale * (v if self.base.ndim == 1 else self.base @ v)
        if self._vectors:
            rows, weights = self._rows(), v.new_tensor(self._weights)
            product = product + rows.T @ (weights * (rows @ v))
        return product

    def update(
        self,
        step: Tensor,
        change: Tensor,
        moved: Tensor,
        bend: float,
        update: str = "ssbroyden",
    ) -> _Update:
        """One pair more, with positive curvature; what it changes of products known already.

        Args:
            step: s (P,).
            change: y (P,).
            moved: ``H y``.
            bend: ``s^T H^-1 s``; plain BFGS needs none.
            update: ``"ssbroyden"``, ``"ssbfgs"`` or plain ``"bfgs"``.
        """
        along, width = float(step @ change), float(change @ moved)
        if not 0 < width < math.inf:  # rounding has spoiled H along y
            return _Update(1.0, (), ())
        tau, phi = scaling(bend / along, width / along, len(step), update)
        lean = step / along - moved / width
        vectors = (moved, lean, step)
        weights = (-1.0 / (width * tau), phi * width / tau, 1.0 / along)
        self.scale /= tau
        self._weights = [w / tau for w in self._weights] + list(weights)
        self._vectors += vectors
        return _Update(tau, weights, vectors)

    def kept(self) -> Tensor:
        """All of it, in memory of its own."""
        base = self.base.diag() if self.base.ndim == 1 else self.base
        if not self._vectors:
            return base * self.scale
        rows = self._rows()
        return torch.addmm(base, rows.T * rows.new_tensor(self._weights), rows, beta=self.scale)

    def _rows(self) -> Tensor:
        """The vectors of the pending updates, one below the other."""
        if self._stacked is None or len(self._stacked) < len(self._vectors):
            self._stacked = torch.stack(self._vectors)
        return self._stacked


Inverse = InverseHessian | LimitedInverse


def updated(
    inverse: Tensor | None, step: Tensor, change: Tensor, bend: float, update: str = "ssbroyden"
) -> Tensor | None:
    """The inverse after one pair, in place; the same where the pair has no positive curvature.

    Without one it begins as the multiple of the identity that the pair tells (Nocedal & Wright
    2006, equation 6.20).

    Args:
        inverse: H (P, P), symmetric; None for none.
        step: s (P,).
        change: y (P,), of the gradient.
        bend: ``s^T H^-1 s``.
        update: ``"ssbroyden"``, ``"ssbfgs"`` or plain ``"bfgs"``, which needs no ``bend``.
    """
    along = float(step @ change)
    if not 0 < along < math.inf:
        return inverse
    if inverse is None:
        scale = along / float(change @ change)
        inverse = torch.eye(len(step), dtype=step.dtype, device=step.device).mul_(scale)
        bend = float(step @ step) / scale
    update_inverse(inverse, step, change, bend, update)
    return inverse


def update_inverse(inverse: Tensor, step: Tensor, change: Tensor, bend: float, update: str) -> None:
    """``H+ = (H - H y y^T H / y^T H y + phi v v^T) / tau + s s^T / y^T s``, in place.

    With ``v = sqrt(y^T H y) (s / y^T s - H y / y^T H y)``: equations 14 to 16 of Urbán et al.

    Args:
        inverse: H (P, P), symmetric.
        step: s (P,).
        change: y (P,), of the gradient, with ``y^T s > 0``.
        bend: ``s^T H^-1 s``.
        update: Which tau and phi.
    """
    moved = inverse @ change
    along, width = float(step @ change), float(change @ moved)
    tau, phi = scaling(bend / along, width / along, len(step), update)
    v = step / along - moved / width
    left = torch.stack([-moved / (width * tau), (phi * width / tau) * v, step / along], dim=1)
    right = torch.stack([moved, v, step])
    torch.addmm(inverse, left, right, beta=1 / tau, out=inverse)  # one pass through P^2 numbers


def scaling(b: float, h: float, size: int, update: str) -> tuple[float, float]:
    """The pair (tau, phi), from ``b = s^T B s / y^T s`` and ``h = y^T H y / y^T s``.

    Published by Al-Baali & Khalfan (2005). In the other form of the family, for ``B = H^-1``,
    theta stands for phi, with ``phi = (1 - theta) / (1 + a theta)`` and ``a = b h - 1``.
    """
    if update == "bfgs":
        return 1.0, 1.0
    if not (b > 0 and h > 0 and b * h < math.inf):
        return 1.0, 1.0  # it under- or overflows: the plain update
    least = min(1.0, 1 / b)
    if update == "ssbfgs":
        return least, 1.0
    a = b * h - 1
    if a <= 0:  # s and H y are parallel, to rounding: v is zero
        return least, 1.0
    low = min(1.0, h * (1 - math.sqrt(a / (1 + a))))
    if not low > 0:
        return least, 1.0
    theta = max((low - 1) / a, min(1 / low, (1 - b) / b))
    sigma = 1 + a * theta
    even = sigma ** (-1 / (size - 1)) if sigma > 0 and size > 1 else 1.0
    tau = least * min(even, 1 / theta) if theta > 0 else min(least * even, sigma)
    return tau, (1 - theta) / (1 + a * theta)
