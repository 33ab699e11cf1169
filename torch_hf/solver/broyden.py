"""Dense self-scaled quasi-Newton iterations (Al-Baali & Khalfan 2005; Urbán et al. 2024).

They keep the inverse Hessian, P^2 numbers, learn it from changes of the gradient, and scale it in
every update. An iteration costs one gradient, or little more. Unlike Gauss-Newton steps they see
the residual's own curvature, so on strongly nonconvex starts they get ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.solver.wolfe import Point, strong_wolfe

UPDATES = ("ssbroyden", "ssbfgs", "bfgs")
#: A search begins at the full step, or at so many times the length of the last one's end.
LONGER = 4.0

#: The loss, inf where it is no number, and its gradient (P,) at a displacement (P,).
Evaluate = Callable[[Tensor], tuple[float, Tensor]]


class Descent(NamedTuple):
    """Where a number of iterations ended.

    Attributes:
        displacement: From where they began, of shape (P,).
        loss: There.
        gradient: There, of shape (P,).
        inverse: The inverse Hessian's approximation (P, P); None before the first update.
        iterations: How many lowered the loss.
    """

    displacement: Tensor
    loss: float
    gradient: Tensor
    inverse: Tensor | None
    iterations: int


def descend(
    evaluate: Evaluate,
    loss: float,
    gradient: Tensor,
    inverse: Tensor | None,
    iterations: int,
) -> Descent:
    """So many iterations with a strong Wolfe search each; fewer where one finds no decrease.

    Args:
        evaluate: The objective.
        loss: Where they begin.
        gradient: There, of shape (P,).
        inverse: H (P, P), changed in place; None for none, which is a multiple of the identity.
        iterations: At the most.

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
    here, done, last = torch.zeros_like(gradient), 0, 1.0
    while done < iterations:
        direction = -gradient if inverse is None else -(inverse @ gradient)
        slope = float(gradient @ direction)
        if not slope < 0 or not math.isfinite(slope):
            if inverse is None:
                break
            inverse = None  # rounding has spoiled it: begin anew
            continue
        if inverse is not None:
            first = min(1.0, LONGER * last)
        else:
            first = 1.0 / float(gradient.abs().sum())  # a step of length 1, whatever the scale
        start = Point(0.0, loss, gradient, slope)
        base = here

        def along(t: float, base: Tensor = base, direction: Tensor = direction):  # type: ignore[no-untyped-def]
            return evaluate(base + t * direction)

        end = strong_wolfe(along, start, direction, first)
        if not end.loss < loss:
            if inverse is None:
                break
            inverse = None
            continue
        last = end.length if inverse is not None else 1.0
        step, change = end.length * direction, end.gradient - gradient
        # B s = -length g, as the step is -length H g
        inverse = updated(inverse, step, change, -end.length * float(gradient @ step))
        here, loss, gradient, done = base + step, end.loss, end.gradient, done + 1
    return Descent(here, loss, gradient, inverse, done)


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
    least = min(1.0, 1 / b)
    if update == "ssbfgs":
        return least, 1.0
    a = b * h - 1
    if a <= 0:  # s and H y are parallel, to rounding: v is zero
        return least, 1.0
    low = min(1.0, h * (1 - math.sqrt(a / (1 + a))))
    theta = max((low - 1) / a, min(1 / low, (1 - b) / b))
    sigma = 1 + a * theta
    even = sigma ** (-1 / (size - 1)) if sigma > 0 and size > 1 else 1.0
    tau = least * min(even, 1 / theta) if theta > 0 else min(least * even, sigma)
    return tau, (1 - theta) / (1 + a * theta)
