"""A step of quasi-Newton iterations: the dense inverse Hessian, and what it is kept with."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.distributed import Reducer, lead
from torch_hf.objective.objective import Objective
from torch_hf.objective.results import Evaluation
from torch_hf.optimizer.exact_step import memory_of
from torch_hf.optimizer.timer import StepTimer
from torch_hf.solver.broyden import Descent, Evaluate, Inverse, InverseHessian, descend
from torch_hf.solver.choose_solver import BROYDEN, LBFGS, MOST_DENSE
from torch_hf.solver.levenberg_marquardt import LOSS_ULPS
from torch_hf.solver.limited_memory import LimitedInverse, limited_fits
from torch_hf.solver.line_search import CONVERGED, SearchResult
from torch_hf.vector import ParameterVector

#: Iterations of one step: as many as ``torch.optim.LBFGS`` makes.
ITERATIONS = 20
#: Of the first step of all, whose data may be a sample.
FIRST_ITERATIONS = 5
#: What a gradient at a trial point costs with its update, in gradients.
PRICE_OF_TRIAL = 1.3
#: Units of what rounding hides, in the last look at whether it does.
TOLD = 64.0
#: Said where iterations lower the loss no further.
NO_DECREASE = "the quasi-Newton iterations found no decrease"


class Secant(NamedTuple):
    """What quasi-Newton iterations have learnt of the Hessian.

    Attributes:
        inverse: H, of shape (P, P), or its pairs (2 m, P).
        anchor: The gradient where H was last updated, and the way from there, of shape (2, P).
    """

    inverse: Tensor
    anchor: Tensor

    def moved(self, direction: Tensor | None, length: float) -> Secant:
        """After a step of another kind; None for a step that stayed."""
        if direction is None:
            return self
        slope, way = self.anchor
        return self._replace(anchor=torch.stack([slope, way + length * direction]))

    def elsewhere(self) -> Secant:
        """On other data of the same kind: H is kept, the gradient at its last update is not."""
        return self._replace(anchor=torch.zeros_like(self.anchor))

    def begun(self, gradient: Tensor) -> Inverse:
        """H with the way since its last update in it, from the gradient at that way's end."""
        slope, way = self.anchor
        change = gradient - slope
        if len(self.inverse) != len(way):
            limited = LimitedInverse(len(way), self.inverse)
            limited.add(way, change)
            return limited
        known = InverseHessian(self.inverse)
        if 0 < float(way @ change) < math.inf:
            known.update(way, change, known.times(change), math.nan, update="bfgs")
        return known


class BroydenStep(NamedTuple):
    """What a step of quasi-Newton iterations came to.

    Attributes:
        move: Where the parameters go.
        secant: For the next step.
        gradients: Taken at trial points.
        solver: What the report calls it.
    """

    move: SearchResult
    secant: Secant | None
    gradients: int
    solver: str = BROYDEN

    @property
    def cost(self) -> float:
        """In gradients, that at the beginning included."""
        return 1.0 + PRICE_OF_TRIAL * self.gradients


def check_broyden(wanted: str, vector: ParameterVector, whole: bool, reducer: Reducer) -> None:
    """Complains where quasi-Newton iterations were asked for and cannot be.

    Raises:
        RuntimeError: They would not fit, or vectors are cut over ranks.
    """
    if not whole:
        raise RuntimeError(
            f'solver="{wanted}" needs parameters and vectors whole on every rank, got some cut by '
            'fully_shard or shard_state. Use solver="auto".'
        )
    needed = 3.0 * vector.numel**2 * vector.zeros().element_size()
    if wanted == BROYDEN and needed > reducer.told([memory_of(vector.device)])[0]:
        raise RuntimeError(
            f'solver="broyden" needs {needed:.3g} bytes for the inverse Hessian of {vector.numel} '
            'parameters, more than this machine has. Use solver="lbfgs", or solver="auto".'
        )


def quasi_newton_of(vector: ParameterVector) -> str:
    """Which quasi-Newton iterations may be taken without being asked for; empty for none."""
    if vector.numel <= MOST_DENSE:
        return BROYDEN
    return LBFGS if limited_fits(vector.numel, vector.zeros().element_size()) else ""


def broyden_step(
    objective: Objective,
    here: Evaluation,
    secant: Secant | None,
    timer: StepTimer,
    solver: str,
    iterations: int = ITERATIONS,
) -> BroydenStep:
    """Iterations from the present parameters; the move has no direction where none gained.

    Over ranks the first one holds H and searches; the others add their part of each gradient.

    Args:
        objective: Whose loss and gradient count.
        here: At the present parameters.
        secant: What the last such step left.
        timer: Takes the seconds.
        solver: ``"broyden"`` or ``"lbfgs"``.
        iterations: At the most.
    """
    kind: type[Inverse] = LimitedInverse if solver == LBFGS else InverseHessian
    vector, reducer = objective.vector, objective.reducer
    first = objective.evaluations
    least = LOSS_ULPS * torch.finfo(vector.dtype).eps * abs(here.loss)
    with vector.trial() as trial, timer.part("gradient"):

        def evaluate(displacement: Tensor) -> tuple[float, Tensor]:
            trial.place(displacement, 1.0)
            return objective.trial_gradient(here)

        def algorithm(evaluate: Evaluate) -> tuple[Descent, bool, bool]:
            inverse = None if secant is None else secant.begun(here.gradient)
            if not isinstance(inverse, kind):
                inverse = None  # of the other kind, from before an option changed
            found = descend(evaluate, here.loss, here.gradient, inverse, iterations, kind)
            moves = here.loss - found.loss > least and trial.moves(found.displacement, 1.0)
            hidden = not moves and rounding_hides(evaluate, here.loss, here.gradient, least)
            return found, moves, hidden

        led = lead(reducer, [evaluate], algorithm, vector.numel)
    found, moves, hidden = led or (None, False, False)
    loss, *told = reducer.told([found.loss if found else 0.0, float(moves), float(hidden)])
    moves, hidden = (bool(flag) for flag in told)
    taken = objective.evaluations - first
    if not moves:
        reason = CONVERGED if hidden else NO_DECREASE
        stay = SearchResult(None, 0.0, here.loss, reason=reason, converged=hidden)
        return BroydenStep(stay, secant, taken, solver)
    displacement = reducer.agreed(found.displacement if found else vector.zeros())
    move = SearchResult(displacement, 1.0, loss)
    after = None
    if found is not None and found.inverse is not None:
        anchor = torch.stack([found.gradient, torch.zeros_like(found.gradient)])
        after = Secant(found.inverse, anchor)
    return BroydenStep(move, after, taken, solver)


def rounding_hides(evaluate: Evaluate, loss: float, gradient: Tensor, least: float) -> bool:
    """Whether rounding is why no search finds a decrease: a last look along the gradient.

    At a length where the slope promises what could well be told from rounding, the loss lies on a
    parabola, whose lowest point is as good as the gradient alone gets. Where it is not worth
    telling, rounding hides it. Where the gradient is not that of the loss, it would be.

    Args:
        evaluate: The objective.
        loss: Where the search began.
        gradient: There, of shape (P,).
        least: The least change of the loss that says something.
    """
    square = float(gradient @ gradient)
    if not square > 0:
        return True  # it underflows
    most = math.sqrt(torch.finfo(gradient.dtype).eps) * abs(loss)
    promise = TOLD * least
    while True:
        rise = evaluate(-promise / square * gradient)[0] - loss
        if rise <= most:
            return rise > -promise and promise**2 <= 4.0 * (rise + promise) * least
        if promise < least:  # no rounding moves a loss so far
            return False
        promise /= 4.0
