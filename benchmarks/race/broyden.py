"""Dense self-scaled quasi-Newton methods in the race (Al-Baali 1998; Urbán, Stefanou & Pons 2024).

They keep the inverse Hessian, P^2 numbers, and scale it in every step. The best published results
of physics-informed networks of some thousand parameters are theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.lbfgs import _strong_wolfe

from torch_hf.solver.broyden import UPDATES, update_inverse

from .flat import FlatProblem

#: Conditions of Wolfe, as in SciPy's BFGS and Urbán et al.
ARMIJO, CURVATURE = 1e-4, 0.9
SEARCH_STEPS = 25
#: Iterations on the same points where each step draws others.
ON_NEW_POINTS = 20


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
