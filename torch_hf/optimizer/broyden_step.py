"""A step of quasi-Newton iterations: the dense inverse Hessian, and what it is kept with."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
#: By how much the last look comes nearer, at least and at most.
NEARER, FURTHER = 4.0, 1e3
#: Said where iterations lower the loss no further.
NO_DECREASE = "the quasi-Newton iterations found no decrease"


class Secant(NamedTuple):
    """What quasi-Newton iterations have learnt of the Hessian.

    Attributes:
        inverse: H, of shape (P, P); None for none.
        pairs: Those of limited memory, (2 m, P); None for none.
        anchor: The gradient where the last pair ends, and the way from there, of shape (2, P).
    """

    inverse: Tensor | None
    pairs: Tensor | None
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


class _Inverses(NamedTuple):
    """H of both kinds; None where nothing is known, or a kind is not asked for."""

    dense: InverseHessian | None
    limited: LimitedInverse | None

    @classmethod
    def of(cls, secant: Secant | None, gradient: Tensor, kinds: Sequence[str]) -> _Inverses:
        """Those kept, with the way since the last pair, from the gradient at that way's end."""
        if secant is None:
            return cls(None, None)
        dense = limited = None
        if BROYDEN in kinds and secant.inverse is not None:
            dense = InverseHessian(secant.inverse.to(gradient))
        if LBFGS in kinds and secant.pairs is not None:
            limited = LimitedInverse(len(gradient), secant.pairs.to(gradient))
        slope, way = secant.anchor.to(gradient)
        for inverse in (dense, limited):
            if inverse is not None:
                inverse.add(way, gradient - slope)
        return cls(dense, limited)

    def after(self, found: Descent, solver: str, kinds: Sequence[str]) -> Secant | None:
        """What is kept, the pairs of a descent by one kind in the other's H, too."""
        dense, limited, pairs = self.dense, self.limited, found.pairs
        anchor = torch.stack([found.gradient, torch.zeros_like(found.gradient)])
        if solver == BROYDEN:
            kept = None
            if LBFGS in kinds:
                limited = limited or LimitedInverse(len(found.gradient))
                for step, change in pairs:
                    limited.add(step, change)
                kept = limited.kept()
            learnt = found.inverse is not None or kept is not None
            return Secant(found.inverse, kept, anchor) if learnt else None
        if BROYDEN in kinds and pairs:
            dense = dense or InverseHessian.of_pair(*pairs[0])
        if BROYDEN in kinds and dense is not None:
            for step, change in pairs:
                dense.add(step, change)
        inverse = None if dense is None else dense.kept()
        learnt = found.inverse is not None or inverse is not None
        return Secant(inverse, found.inverse, anchor) if learnt else None


class BroydenStep(NamedTuple):
    """What a step of quasi-Newton iterations came to.

    Attributes:
        move: Where the parameters go.
        secant: For the next step.
        gradients: Taken at trial points.
        solver: What the report calls it.
        both: Whether dense and L-BFGS iterations are in question.
    """

    move: SearchResult
    secant: Secant | None
    gradients: int
    solver: str = BROYDEN
    both: bool = False

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
    needed = 3.0 * vector.numel**2 * _type_of_inverse(vector, (wanted,)).itemsize
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


def _type_of_inverse(vector: ParameterVector, kinds: Sequence[str]) -> torch.dtype:
    """Of H and its vectors: the dense one is in float64.

    In float32 it has no digits for curvature 1e-7 of the largest, and the search breaks down there.
    """
    return torch.float64 if BROYDEN in kinds else vector.dtype


def broyden_step(
    objective: Objective,
    here: Evaluation,
    secant: Secant | None,
    timer: StepTimer,
    solver: str,
    iterations: int = ITERATIONS,
    both: bool = False,
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
        both: Whether the other kind learns from them, too.
    """
    kinds = (BROYDEN, LBFGS) if both else (solver,)
    kind: type[Inverse] = LimitedInverse if solver == LBFGS else InverseHessian
    vector, reducer = objective.vector, objective.reducer
    wide = _type_of_inverse(vector, kinds)
    first = objective.evaluations
    least = LOSS_ULPS * torch.finfo(vector.dtype).eps * abs(here.loss)
    with vector.trial() as trial, timer.part("gradient"):

        def evaluate(displacement: Tensor) -> tuple[float, Tensor]:
            trial.place(displacement, 1.0)
            return objective.trial_gradient(here)

        def algorithm(evaluate: Evaluate) -> tuple[Descent, Secant | None, bool, bool]:
            def widely(displacement: Tensor) -> tuple[float, Tensor]:
                loss, gradient = evaluate(displacement.to(vector.dtype))
                return loss, gradient.to(wide)

            slope, eps = here.gradient.to(wide), torch.finfo(vector.dtype).eps
            inverses = _Inverses.of(secant, slope, kinds)
            known = inverses.limited if solver == LBFGS else inverses.dense
            found = descend(widely, here.loss, slope, known, iterations, kind, eps)
            found = found._replace(displacement=found.displacement.to(vector.dtype))
            moves = here.loss - found.loss > least and trial.moves(found.displacement, 1.0)
            if moves:
                return found, inverses.after(found, solver, kinds), True, False
            norms = [torch.linalg.vector_norm(p, dtype=torch.float64) for p in vector.params]
            size = float(torch.linalg.vector_norm(torch.stack(norms)))
            hidden = rounding_hides(evaluate, here.loss, here.gradient, least, size)
            return found, None, False, hidden

        led = lead(reducer, [evaluate], algorithm, vector.numel)
    found, after, moves, hidden = led or (None, None, False, False)
    loss, *told = reducer.told([found.loss if found else 0.0, float(moves), float(hidden)])
    moves, hidden = (bool(flag) for flag in told)
    taken = objective.evaluations - first
    if not moves:
        reason = CONVERGED if hidden else NO_DECREASE
        stay = SearchResult(None, 0.0, here.loss, reason=reason, converged=hidden)
        return BroydenStep(stay, secant, taken, solver, both)
    displacement = reducer.agreed(found.displacement if found else vector.zeros())
    return BroydenStep(SearchResult(displacement, 1.0, loss), after, taken, solver, both)


def rounding_hides(
    evaluate: Evaluate, loss: float, gradient: Tensor, least: float, size: float = 0.0
) -> bool:
    """Whether rounding is why no search finds a decrease: a last look along the gradient.

    At a length where the slope promises what could well be told from rounding, the loss lies on a
    parabola, whose lowest point is as good as the gradient alone gets. Where it is not worth
    telling, rounding hides it. Where the gradient is not that of the loss, it would be.

    Args:
        evaluate: The objective.
        loss: Where the search began.
        gradient: There, of shape (P,).
        least: The least change of the loss that says something.
        size: The parameters' norm. Where the gradient is so small that a promise of ``least`` is
            far away, lengths down to a small part of it are looked at.
    """
    square = float(gradient @ gradient)
    if not square > 0:
        return True  # it underflows
    root = math.sqrt(torch.finfo(gradient.dtype).eps)
    most, promise = root * abs(loss), TOLD * least
    shortest = min(least, root * size * math.sqrt(square)) if size else least
    while True:
        rise = evaluate(-promise / square * gradient)[0] - loss
        if rise <= most:
            return rise > -promise and promise**2 <= 4.0 * (rise + promise) * least
        if promise < shortest:  # no rounding moves a loss so far
            return False
        far = rise / most if most > 0 and math.isfinite(rise) else FURTHER
        promise /= min(max(math.sqrt(far), NEARER), FURTHER)
