"""A step decided: what will be done, and the report it makes."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.objective.objective import Objective
from torch_hf.objective.results import Evaluation
from torch_hf.optimizer.exact_step import ExactStep
from torch_hf.optimizer.timer import StepTimer
from torch_hf.report import Requests, StepReport, Stop
from torch_hf.solver.cg import CGResult
from torch_hf.solver.choose_solver import CG
from torch_hf.solver.line_search import SearchResult
from torch_hf.solver.trust_region import (
    EASY_ITERATIONS,
    THRESHOLDS_ON_NEW_DATA,
    THRESHOLDS_ON_SAME_DATA,
    halfway,
    next_damping,
)


class StepDecision(NamedTuple):
    """What a step came to.

    Attributes:
        move: Where the parameters go.
        damping: The lambda used; None where the step ended before there was one.
        solution: What CG found, if it ran.
        curvature: The operator, if it was made.
        variance: The gradient's variance, if it was asked for.
        nothing_to_do: Whether there was nothing to do: the gradient is zero, or ``lr``; or nothing
            to be learnt, from a batch that is not finite.
        same_data: Whether the loss began where the last step left it.
        curvature_seen: Along the first vector that was multiplied.
        exact: What an exact step hands to the next.
    """

    move: SearchResult
    damping: float | None
    solution: CGResult | None = None
    curvature: ObjectiveOperator | None = None
    variance: float | None = None
    nothing_to_do: bool = False
    same_data: bool = True
    curvature_seen: float = math.nan
    exact: ExactStep | None = None

    @classmethod
    def of_exact(
        cls,
        exact: ExactStep,
        damping: float | None,
        curvature: ObjectiveOperator,
        variance: float | None,
        same_data: bool,
    ) -> StepDecision:
        """An exact step's; the lambda of conjugate gradients stays."""
        found = exact.found
        move = SearchResult(
            found.direction,
            1.0 if found.direction is not None else 0.0,
            found.loss,
            found.ratio,
            reason=found.reason,
            converged=found.converged,
        )
        return cls(
            move,
            damping,
            None,
            curvature,
            variance,
            nothing_to_do=found.again,
            same_data=same_data,
            exact=exact,
        )

    @property
    def accepted(self) -> bool:
        """Whether the parameters move."""
        return self.move.direction is not None

    def next_damping(self) -> float | None:
        """Lambda for the next step."""
        if self.damping is None or self.nothing_to_do or self.exact is not None:
            return self.damping
        if self.move.converged:  # unless lambda is what hides it, and not rounding
            return halfway(self.damping, self.curvature_seen)
        return next_damping(
            self.damping,
            self.move.ratio,
            self.accepted,
            self.move.floor,
            thresholds=THRESHOLDS_ON_SAME_DATA if self.same_data else THRESHOLDS_ON_NEW_DATA,
            easy=self.same_data and self._soon_solved(),
            curvature=self.curvature_seen,
            doubt=self.move.doubt,
        )

    def _soon_solved(self) -> bool:
        """Whether a few iterations of CG passed one of its tests."""
        solved = self.solution
        if solved is None or solved.iterations > EASY_ITERATIONS:
            return False
        return solved.stop in (Stop.RESIDUAL, Stop.PROGRESS)

    def report(
        self,
        step: int,
        objective: Objective,
        here: Evaluation,
        timer: StepTimer,
        requests: Requests,
    ) -> StepReport:
        """The record of the step."""
        solution, curvature = self.solution, self.curvature
        return StepReport(
            step=step,
            loss=here.loss,
            new_loss=self.move.loss,
            accepted=self.accepted,
            reduction_ratio=self.move.ratio,
            damping=self._damping_used(),
            gradient_norm=here.gradient_norm,
            step_length=self.move.length,
            cg_iterations=solution.iterations if solution else 0,
            cg_stop=solution.stop if solution else _without_cg(here),
            products=curvature.products if curvature else 0,
            evaluations=objective.evaluations,
            batch_cases=round(here.cases),
            curvature_cases=round(curvature.cases) if curvature else 0,
            engine=curvature.engine if curvature else "",
            reason=self.move.reason,
            gradient_variance=self.variance,
            seconds=timer.seconds(),
            requests=requests,
            converged=self.move.converged,
            solver=self.exact.solver if self.exact is not None else CG if solution else "",
        )

    def _damping_used(self) -> float:
        if self.exact is not None:
            return self.exact.found.damping
        return math.nan if self.damping is None else self.damping


def _without_cg(here: Evaluation) -> Stop:
    if not (math.isfinite(here.gradient_norm) and math.isfinite(here.loss)):
        return Stop.NON_FINITE
    return Stop.NOT_RUN if here.gradient_norm else Stop.ZERO_GRADIENT
