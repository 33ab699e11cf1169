"""Levenberg-Marquardt steps from an exact solver: several lambda at one Jacobian, by true losses.

The least lambda tried whose reduction ratio is at least 1/10 is taken: full steps at a low ratio
get further than short ones that the model predicts well. Each trial step is corrected before it is
judged. Along a curved valley the residual at the step's end differs from the one that the linear
model predicted. A further solve with the same factor removes the difference (a chord correction;
Transtrum & Sethna 2012's geodesic acceleration is half of the first one).

The damping is ``lambda D^2``, with D from the norms of the Jacobian's columns. Near their median it
is the square root of the norm, so parameters of similar scale are damped alike. Far from it, it is
the norm itself (Marquardt's scaling), so the units of single parameters do not matter.

``docs/records/exact-lambda.md`` has the experiments that chose rule and constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.solver.exact import ExactSolver
from torch_hf.solver.lanczos import LanczosSolver

#: Between neighbouring lambdas; far up, where nothing has worked, it is the second.
FACTOR, FAR_FACTOR = 3.0, 10.0
#: A step is taken from this ratio of actual to predicted change on.
LEAST_RATIO = 0.1
#: Below this ratio a step is corrected, so many times at the most.
CORRECT_BELOW, MAX_CORRECTIONS = 0.9, 6
#: A correction longer than this part of the step is none.
SHORT = 0.2
#: Lambdas tried in one step: downwards, and upwards (by ``FACTOR`` the first six times, by
#: ``FAR_FACTOR`` six more).
TRIES_DOWN, TRIES_UP, TRIES_NEAR, TRIES_FAR = 6, 20, 6, 12
#: After steps of another kind: between neighbouring lambdas, and how many.
FRESH_FACTOR, TRIES_FRESH = 100.0, 9
#: Curvature has vanished, as of saturated classes, where a gradient step asks for so many times it.
VANISHED = 1e6
#: A smaller lambda is tried where it could lower the loss by this part.
WORTH = 0.1
#: From this ratio on the next step begins with a smaller lambda, untried.
EASY_RATIO = 0.5
#: Units of rounding of the loss below which a predicted change says nothing.
LOSS_ULPS = 16.0
#: Least lambda, in units of the trace.
FLOOR = 1e-18
#: Column norms within this factor of the median are scaled by half a power, others by a whole one.
NEAR_MEDIAN = 10.0
#: What is left of a column's squared norm of earlier steps, after each.
NORM_MEMORY = 0.6
#: Said where no lambda lowers the loss.
STUCK = "no lambda gives a step that lowers the loss"
CONVERGED = "converged: the predicted decrease is below the rounding of the loss"

#: Loss at ``theta + d``, and the residual there where the rows of R have one.
Evaluate = Callable[[Tensor], tuple[float, Tensor | None]]


class DampingState(NamedTuple):
    """What one step's search hands to the next; numbers alone.

    Attributes:
        damping: Lambda to begin with; 0 before there was one.
        hit_wall: Whether the last search ended at a lambda that failed.
        stuck_at: The loss from which no lambda led down; inf elsewhere.
    """

    damping: float = 0.0
    hit_wall: float = 0.0
    stuck_at: float = math.inf


class Found(NamedTuple):
    """Where a search ended.

    Attributes:
        direction: The step, of shape (P,); None where the parameters are to stay.
        loss: At its end.
        ratio: Actual over predicted change; nan where nothing was judged.
        damping: The lambda of the step.
        trials: How many lambdas were tried.
        state: For the next search.
        reason: Why the parameters stay.
        converged: Whether rounding hides what is left to gain.
        again: Whether this is where the search before ended, too: nothing new is known.
    """

    direction: Tensor | None
    loss: float
    ratio: float
    damping: float
    trials: int
    state: DampingState
    reason: str = ""
    converged: bool = False
    again: bool = False


class _Trial(NamedTuple):
    damping: float
    step: Tensor
    loss: float
    ratio: float  # -inf where the loss is not finite, or nothing is predicted
    predicted: float  # the fall of the model; at most 0 where rounding hides it


def column_scale(squares: Tensor) -> Tensor:
    """D, of mean square 1, from the squared norms of R's columns, of shape (P,).

    A column of zeros, which has no scale, counts as one at the median of the others: a slope
    outside of R's rows may still move its parameter.

    Example:
        >>> import torch
        >>> scale = column_scale(torch.tensor([1.0, 16.0, 16.0, 16.0, 1e8]))
        >>> [round(float(x / scale[1]), 2) for x in scale]
        [0.5, 1.0, 1.0, 1.0, 790.57]
    """
    squares = squares.double()
    largest = squares.max()
    if not largest > 0 or not math.isfinite(float(largest)):
        return torch.ones_like(squares)
    known = squares > 0
    logs = (squares / largest).clamp(min=1e-150).log()
    logs = torch.where(known, logs - logs[known].median(), 0.0)
    width = 2.0 * math.log(NEAR_MEDIAN)
    near = logs.clamp(-width, width)
    scale = (0.25 * near + 0.5 * (logs - near)).exp()
    return scale / scale.square().mean().sqrt()


def remembered_norms(squares: Tensor, before: Tensor | None) -> Tensor:
    """The running maximum of squared column norms, which forgets, but not for a column of zeros."""
    squares = squares.double()
    if before is None or before.shape != squares.shape:
        return squares
    before = before.to(squares)
    return torch.where(squares > 0, torch.maximum(NORM_MEMORY * before, squares), before)


class DampingSearch:
    """One step's search over lambda.

    Args:
        solver: Of the quadratic at the present parameters.
        evaluate: The loss at a step's end.
        loss: At the present parameters.
        eps: The rounding unit of the model's type.
        state: What the last step's search left.
        first: The first lambda of all; None for the mean diagonal of the scaled matrix.
        noise: By how much the loss scatters beside its own rounding.
        fresh: Whether the last steps were of another kind: lambda may have to fall far.
    """

    def __init__(
        self,
        solver: ExactSolver | LanczosSolver,
        evaluate: Evaluate,
        loss: float,
        eps: float,
        state: DampingState,
        first: float | None = None,
        noise: float = 0.0,
        fresh: bool = False,
    ) -> None:
        self.solver = solver
        self.fresh = fresh
        self.evaluate = evaluate
        self.loss = loss
        self.rounding = LOSS_ULPS * eps * abs(loss) + noise
        self.state = state
        mean = solver.trace / solver.order or self._without_curvature()
        self.trace = mean * solver.order  # no curvature is above it
        self.floor = FLOOR * self.trace
        start = mean if first is None else first
        self.first = max(state.damping or start, self.floor)
        self.trials = 0

    def run(self) -> Found:
        """Tries lambdas until the least that is good is known."""
        trial = self._try(self.first)
        if abs(trial.predicted) <= self.rounding:
            return self._flat(trial)
        if trial.ratio >= LEAST_RATIO:
            return self._far_down(trial) if self.fresh else self._down(trial)
        if self.loss == self.state.stuck_at:  # the same point again
            return self._stay(trial, self.state, STUCK)._replace(again=True)
        return self._up(trial)

    def _without_curvature(self) -> float:
        """Lambda where R is 0: that of a step which predicts a fall by half of the loss."""
        slope = self.solver.gradient().square() / self.solver.squares
        return float(slope.sum()) / abs(self.loss or 1.0) or 1.0

    # --- the three ways ---

    def _flat(self, trial: _Trial) -> Found:
        """Rounding hides the change: lambda says nothing, unless it is what makes it small."""
        hidden = trial.damping > self.trace
        damping = self.trace if hidden else trial.damping
        state = DampingState(damping, 0.0)
        if trial.loss < self.loss:
            return self._take(trial, state)
        return self._stay(trial, state, CONVERGED, converged=not hidden)

    def _down(self, best: _Trial) -> Found:
        if self.state.hit_wall and best.ratio < EASY_RATIO:
            return self._take(best, DampingState(best.damping))
        if not self._worth(best):
            easy = best.ratio > EASY_RATIO
            after = max(best.damping / FACTOR, self.floor) if easy else best.damping
            return self._take(best, DampingState(after))
        wall = 0.0
        for _ in range(TRIES_DOWN - 1):
            if best.damping <= self.floor:
                break
            trial = self._try(max(best.damping / FACTOR, self.floor))
            if trial.ratio < LEAST_RATIO:
                wall = 1.0
                break
            best = trial
        return self._take(best, DampingState(best.damping, wall))

    def _far_down(self, best: _Trial) -> Found:
        """Downwards in large steps, whatever each is worth; the last one in a smaller one."""
        factor, wall = FRESH_FACTOR, 0.0
        for _ in range(TRIES_FRESH):
            if best.damping <= self.floor:
                break
            trial = self._try(max(best.damping / factor, self.floor))
            if trial.ratio >= LEAST_RATIO:
                best = trial
                if factor < FRESH_FACTOR:
                    break
            elif factor < FRESH_FACTOR:
                wall = 1.0
                break
            else:
                factor = FAR_FACTOR
        return self._take(best, DampingState(best.damping, wall))

    def _up(self, trial: _Trial) -> Found:
        for k in range(1, TRIES_UP):
            trial = self._try(trial.damping * self._factor(k, trial.damping))
            if trial.ratio >= LEAST_RATIO:
                return self._take(trial, DampingState(trial.damping))
            if abs(trial.predicted) <= self.rounding:
                break
        # rounding, or a model that is false at any length: lambda is not at fault
        return self._stay(trial, DampingState(self.first, 0.0, self.loss), STUCK)

    def _factor(self, k: int, damping: float) -> float:
        """Upwards in small steps, then in larger ones, at last so that nothing is above it."""
        if k <= TRIES_NEAR:
            return FACTOR
        if k <= TRIES_FAR:
            return FAR_FACTOR
        most = self._without_curvature()
        if not most > VANISHED * self.trace:
            most = self.trace
        return max(math.sqrt(most / damping), FAR_FACTOR)

    def _take(self, trial: _Trial, state: DampingState) -> Found:
        if not trial.loss < self.loss:
            return self._stay(trial, state, STUCK)
        return Found(trial.step, trial.loss, trial.ratio, trial.damping, self.trials, state)

    def _stay(
        self, trial: _Trial, state: DampingState, reason: str, converged: bool = False
    ) -> Found:
        ratio = math.nan if converged else trial.ratio
        return Found(None, self.loss, ratio, trial.damping, self.trials, state, reason, converged)

    # --- one lambda ---

    def _try(self, damping: float) -> _Trial:
        """The step of one lambda, corrected towards the residual that the model predicted."""
        self.trials += 1
        solver = self.solver
        step = solver.minimum(damping)
        change = solver.quadratic(step)
        if not change < 0:
            return _Trial(damping, step, math.inf, -math.inf, -change)
        predicted, model = -change, self.loss + change
        new, residual = self.evaluate(step)
        if residual is not None:
            step, new = self._corrected(damping, step, predicted, model, new, residual)
        if not math.isfinite(new):
            return _Trial(damping, step, math.inf, -math.inf, predicted)
        return _Trial(damping, step, new, (self.loss - new) / predicted, predicted)

    def _corrected(
        self,
        damping: float,
        step: Tensor,
        predicted: float,
        model: float,
        new: float,
        residual: Tensor,
    ) -> tuple[Tensor, float]:
        solver = self.solver
        promised = solver.residual + solver.times(step)
        length, contraction = solver.length(step), None
        for left in range(MAX_CORRECTIONS, 0, -1):
            if not math.isfinite(new) or predicted <= self.rounding:
                break
            if self.loss - new >= CORRECT_BELOW * predicted:
                break
            more = solver.correction(damping, residual.double() - promised)
            part = solver.length(more) / length
            if not part <= SHORT:
                break
            excess = new - model
            if contraction is None:
                contraction = min((2.0 * part) ** 2, 1.0)  # of the excess, per correction
            if excess * contraction**left > (1.0 - LEAST_RATIO) * predicted:
                break  # those that are left will not get there
            trial_loss, trial_residual = self.evaluate(step + more)
            if not trial_loss < new or trial_residual is None:
                break
            contraction = max((trial_loss - model) / excess, 1e-6)
            step, new, residual = step + more, trial_loss, trial_residual
        return step, new

    def _worth(self, trial: _Trial) -> bool:
        """Whether a smaller lambda could lower the loss much: one more solve, no evaluation.

        A second round of the same solve, from where the first ends on the model, tells what the
        damping holds back (iterated Tikhonov regularisation).
        """
        solver = self.solver
        before = solver.quadratic(trial.step)
        further = trial.step + solver.further(trial.damping, trial.step)
        after = solver.quadratic(further)
        return before - after >= WORTH * abs(trial.loss)
