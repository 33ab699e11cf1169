"""Exact Gauss-Newton in the race: Levenberg-Marquardt, energy natural gradient, SPRING.

One step is one Jacobian. Steps come from :class:`torch_hf.solver.exact.ExactSolver`, a Cholesky
factor in the smaller of residuals and parameters with refinement (the form of Woodbury where the
residuals are fewer), so that none of them is short of digits or of speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_hf.solver.exact import ExactSolver

from .flat import FlatProblem, Linearization

#: Trials of one step before it is given up.
TRIALS = 16
#: The least and the largest damping, relative to the largest squared norm of a column: beyond them
#: there is only rounding.
FLOOR, CEILING = 1e-18, 1e18
#: Of the difference along the step that gives the acceleration, and how long that may be
#: (Transtrum & Sethna 2012).
PROBE, BEND = 0.1, 0.75
#: Lengths of the line search are 1, 1/2, ... down to 2^-LENGTHS.
LENGTHS = 30


class LevenbergMarquardt:
    """Levenberg-Marquardt with a dense Jacobian.

    Args:
        problem: What it minimises.
        damping: The first lambda, relative to the largest squared norm of a column of J.
        rule: ``"nielsen"`` is the smooth rule by the gain ratio (Nielsen 1999; algorithm 3.16 of
            Madsen, Nielsen & Tingleff 2004), ``"tenfold"`` Marquardt's, up and down by 10, and
            ``"delayed"`` up by 3 and down by 10 ("delayed gratification" of Transtrum & Sethna).
        geodesic: Add half the geodesic acceleration (Transtrum & Sethna 2012).
        scaled: Damp each parameter by the largest norm that its column of J has had (Moré 1978).
    """

    def __init__(
        self,
        problem: FlatProblem,
        damping: float = 1e-3,
        rule: str = "nielsen",
        geodesic: bool = False,
        scaled: bool = False,
    ) -> None:
        if rule not in ("nielsen", "tenfold", "delayed"):
            raise ValueError(f"rule must be nielsen, tenfold or delayed, got {rule!r}.")
        self.problem, self.rule, self.geodesic, self.scaled = problem, rule, geodesic, scaled
        self.first = damping
        self.damping: float | None = None
        self.raise_by = 2.0
        self.norms: Tensor | None = None
        self.trials = 0

    def step(self) -> None:
        """One Jacobian, and trials until one lowers the loss."""
        problem = self.problem
        here = problem.position()
        at = problem.linearize(here)
        solver, unit = self._solver(at.jacobian, at.residual)
        if self.damping is None:
            self.damping = self.first * unit
        for _ in range(TRIALS):
            self.damping = min(max(self.damping, FLOOR * unit), CEILING * unit)
            self.trials += 1
            move = self._move(solver, at, here)
            if move is not None:
                loss = problem.loss(here + move)
                if loss < at.loss:
                    self._lower((at.loss - loss) / self._predicted(solver, at, move))
                    return
            self._raise()
        self.raise_by = 2.0
        problem.move_to(here)

    def _solver(self, jacobian: Tensor, residual: Tensor) -> tuple[ExactSolver, float]:
        """The solver, and the largest squared norm of a column, in the metric of the damping."""
        norms = torch.linalg.vector_norm(jacobian, dim=0)
        if not self.scaled:
            return ExactSolver(jacobian, residual), float(norms.max()) ** 2
        self.norms = norms if self.norms is None else torch.maximum(self.norms, norms)
        # a column that was always zero has no scale of its own
        scale = torch.where(self.norms > 0, self.norms, self.norms.max())
        return ExactSolver(jacobian, residual, scale=scale), 1.0

    def _move(self, solver: ExactSolver, at: Linearization, here: Tensor) -> Tensor | None:
        assert self.damping is not None
        move = solver.step(self.damping)
        if not self.geodesic:
            return move
        ahead = self.problem.residual(here + PROBE * move)
        along = solver.times(move).to(at.residual.dtype)
        bend = (2 / PROBE) * ((ahead - at.residual) / PROBE - along)
        if not bool(bend.isfinite().all()):
            return None
        change = solver.solve(self.damping, bend)
        scale = solver.squares.sqrt().to(move.dtype)
        length, width = (torch.linalg.vector_norm(scale * v) for v in (move, change))
        return move + 0.5 * change if 2 * width <= BEND * length else None

    def _predicted(self, solver: ExactSolver, at: Linearization, move: Tensor) -> float:
        after = at.residual.double() + solver.times(move)
        return max(at.loss - 0.5 * float(after @ after), 1e-300)

    def _lower(self, ratio: float) -> None:
        assert self.damping is not None
        if self.rule == "nielsen":
            self.damping *= max(1 / 3, 1 - (2 * min(ratio, 1.0) - 1) ** 3)
        else:
            self.damping /= 10
        self.raise_by = 2.0

    def _raise(self) -> None:
        assert self.damping is not None
        if self.rule == "nielsen":
            self.damping *= self.raise_by
            self.raise_by *= 2
        else:
            self.damping *= 10 if self.rule == "tenfold" else 3


class NaturalGradient:
    """Energy natural gradient descent (Müller & Zeinhofer 2023), and SPRING with momentum.

    ``d = argmin |J d + r|^2 + lambda |d - momentum d_last|^2``, then the best of the lengths
    ``2^-k`` by loss. In Woodbury's form by Guzmán-Cordero et al. (2025), as is SPRING (Goldshlager,
    Abrahamsen & Lin 2024) for least squares.

    Args:
        problem: What it minimises.
        damping: Lambda, which stays.
        momentum: Of the last step; 0 is the natural gradient.
    """

    def __init__(self, problem: FlatProblem, damping: float = 1e-12, momentum: float = 0.0) -> None:
        self.problem, self.damping, self.momentum = problem, damping, momentum
        self.last: Tensor | None = None

    def step(self) -> None:
        """One Jacobian, one solve, one search along its solution."""
        problem = self.problem
        here = problem.position()
        at = problem.linearize(here)
        kept = self.momentum * self.last if self.last is not None else torch.zeros_like(here)
        solver = ExactSolver(at.jacobian, at.residual)
        ahead = at.residual + at.jacobian @ kept
        move = kept + solver.solve(self.damping, ahead)
        length = self._search(here, move, at.loss)
        problem.move_to(here + length * move)
        # a momentum along which the loss rises is not worth keeping
        self.last = move if self.momentum and length > 0 else None

    def _search(self, here: Tensor, move: Tensor, loss: float) -> float:
        best, length = loss, 0.0
        for k in range(LENGTHS + 1):
            trial = self.problem.loss(here + 2.0**-k * move)
            if trial < best:
                best, length = trial, 2.0**-k
            elif length > 0:
                break
        return length
