"""Dense self-scaled quasi-Newton methods in the race (Al-Baali 1998; Urbán, Stefanou & Pons 2024).

They keep the inverse Hessian, P^2 numbers, and scale it in every step. The best published results
of physics-informed networks of some thousand parameters are theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.lbfgs import _strong_wolfe

from .flat import FlatProblem

#: Conditions of Wolfe, as in SciPy's BFGS and Urbán et al.
ARMIJO, CURVATURE = 1e-4, 0.9
SEARCH_STEPS = 25
#: Iterations on the same points where each step draws others.
ON_NEW_POINTS = 20
UPDATES = ("ssbroyden", "ssbfgs", "bfgs")


class SelfScaledBroyden:
    """Broyden's family with self-scaling and a strong Wolfe line search.

    Args:
        problem: What it minimises.
        lr: The first length that the line search tries.
        update: ``"ssbroyden"``, ``"ssbfgs"`` or plain ``"bfgs"``.
    """

    def __init__(self, problem: FlatProblem, lr: float = 1.0, update: str = "ssbroyden") -> None:
        if update not in UPDATES:
            raise ValueError(f"update must be one of {', '.join(UPDATES)}, got {update!r}.")
        self.problem, self.lr, self.update = problem, lr, update
        self.inverse: Tensor | None = None
        self.here = problem.position()
        self.loss, self.slope = math.inf, torch.zeros_like(self.here)

    def step(self) -> None:
        """One iteration; on points drawn for this step, twenty."""
        if self.problem.changes or math.isinf(self.loss):
            self.loss, self.slope = self.problem.gradient(self.here)
        for _ in range(ON_NEW_POINTS if self.problem.changes else 1):
            self._iterate()
        self.problem.move_to(self.here)

    def _iterate(self) -> None:
        move = -self.slope if self.inverse is None else -(self.inverse @ self.slope)
        descent = float(self.slope @ move)
        if not descent < 0:
            self.inverse, move = None, -self.slope
            descent = float(self.slope @ move)
        if descent == 0:
            return
        first = self.lr
        if self.inverse is None:
            first = min(1.0, 1 / float(self.slope.abs().sum())) * self.lr
        loss, slope, length = self._search(move, descent, first)
        if not loss < self.loss:
            self.inverse = None  # begin anew; where it had just begun there is nothing to gain
            return
        step, change = length * move, slope - self.slope
        along = float(step @ change)
        if along > 0:
            if self.inverse is None:
                scale = along / float(change @ change)
                self.inverse = torch.eye(len(step), dtype=step.dtype, device=step.device) * scale
            # B s = -length g, as the step is -length H g
            bend = -length * float(self.slope @ step)
            update_inverse(self.inverse, step, change, bend, self.update)
        self.here, self.loss, self.slope = self.here + step, loss, slope

    def _search(self, move: Tensor, descent: float, first: float) -> tuple[float, Tensor, float]:
        loss, slope, length, _ = _strong_wolfe(
            lambda x, t, d: self.problem.gradient(x + t * d),
            *(self.here, first, move, self.loss, self.slope, descent),
            c1=ARMIJO,
            c2=CURVATURE,
            tolerance_change=0.0,
            max_ls=SEARCH_STEPS,
        )
        return float(loss), slope, float(length)


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
