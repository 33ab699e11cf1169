"""A step decided: what will be done, and the report it makes."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.objective.objective import Objective
from torch_hf.objective.results import Evaluation
from torch_hf.optimizer.broyden_step import NO_DECREASE as NO_QUASI_NEWTON_DECREASE
from torch_hf.optimizer.broyden_step import BroydenStep, Secant
from torch_hf.optimizer.exact_step import ExactStep
from torch_hf.optimizer.light_step import LightStep, after_full, after_light
from torch_hf.optimizer.progress import Progress
from torch_hf.optimizer.timer import StepTimer
from torch_hf.report import Requests, StepReport, Stop
from torch_hf.solver.cg import CGResult
from torch_hf.solver.cg_budget import is_close
from torch_hf.solver.choose_solver import CG, KRONECKER
from torch_hf.solver.levenberg_marquardt import STUCK
from torch_hf.solver.line_search import NO_DECREASE, NO_DESCENT, SearchResult
from torch_hf.solver.phases import LEAST_PRICE, Phases
from torch_hf.solver.trust_region import (
    EASY_ITERATIONS,
    THRESHOLDS_ON_NEW_DATA,
    THRESHOLDS_ON_SAME_DATA,
    halfway,
    next_damping,
)

#: What parts of a full step cost, in gradients (measured on small convolutional networks).
GRADIENT_WITH_GRAPH, PRODUCT, EVALUATION = 1.5, 1.2, 0.4
#: Evidence, of next to no weight, that what is tried next holds.
BENEFIT = 1e-9
#: Units of rounding of the loss at the start, of what is nothing beside it.
REST_ULPS = 64.0
#: Said where a search fails at a loss that is nothing beside where it began.
NOTHING_LEFT = "converged: the loss is below the rounding of its value at the start"
#: What a step says that found nothing to gain.
FAILURES = (STUCK, NO_DECREASE, NO_DESCENT, NO_QUASI_NEWTON_DECREASE)


#: Of an optimizer that has taken no step.
BEGINNING = Progress()


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
        light: What a light step hands to the next.
        broyden: What a step of quasi-Newton iterations hands to the next.
        price: What an exact solve costs here, in gradients; 0 where none is in question.
        begun: The phases that begin with this step, beside conjugate gradients.
        failed: Quasi-Newton iterations that gained nothing, before the step that is taken.
        holds: Whether points of an equation changed and gains were found again on others.
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
    light: LightStep | None = None
    broyden: BroydenStep | None = None
    price: float = 0.0
    begun: Phases | None = None
    failed: BroydenStep | None = None
    holds: bool = False

    @classmethod
    def of_exact(
        cls,
        exact: ExactStep,
        damping: float | None,
        curvature: ObjectiveOperator,
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
            nothing_to_do=found.again,
            same_data=same_data,
            exact=exact,
        )

    @classmethod
    def of_broyden(
        cls, broyden: BroydenStep, damping: float | None, same_data: bool
    ) -> StepDecision:
        """That of quasi-Newton iterations, which have no lambda."""
        move = broyden.move
        return cls(move, damping, same_data=same_data, broyden=broyden)

    @property
    def accepted(self) -> bool:
        """Whether the parameters move."""
        return self.move.direction is not None

    @property
    def is_by_cg(self) -> bool:
        """Whether lambda is that of conjugate gradients."""
        return self.exact is None and self.light is None and self.broyden is None

    @property
    def solver(self) -> str:
        """What solved the quadratic; empty where nothing did."""
        if self.exact is not None:
            return self.exact.solver
        if self.light is not None:
            return KRONECKER
        if self.broyden is not None:
            return self.broyden.solver
        return CG if self.solution else ""

    def cost(self, objective: Objective, here: Evaluation) -> float:
        """What the step cost, in gradients of its batch: roughly, but the same in every run."""
        if self.broyden is not None:
            return self.broyden.cost
        products = 0.0
        if self.curvature is not None:
            products = self.curvature.products * self.curvature.cases / here.cases
        if self.exact is not None:
            products = max(products, self.price / PRODUCT)
        return GRADIENT_WITH_GRAPH + PRODUCT * products + EVALUATION * objective.evaluations

    def settled(self, progress: Progress, here: Evaluation, eps: float) -> StepDecision:
        """The decision, as a converged one where no search finds what rounding has hidden.

        Cross-entropy near 0 cancels: its gradient is wrong long before the loss is too coarse. That
        of squares vanishes with the residual.

        Args:
            progress: That the step began with.
            here: Where it began.
            eps: The rounding unit of the loss.
        """
        move = self.move
        if move.reason not in FAILURES:
            return self
        highest = progress.with_highest(here.loss, self.same_data).highest
        squares = self.curvature is not None and self.curvature.squares
        if not abs(here.loss) <= REST_ULPS * (eps**2 if squares else eps) * highest:
            return self
        move = move._replace(reason=NOTHING_LEFT, ratio=math.nan, converged=True)
        return self._replace(move=move, nothing_to_do=False)

    def next_progress(self, progress: Progress, objective: Objective, here: Evaluation) -> Progress:
        """The numbers for the next step.

        Args:
            progress: Those that this step began with.
            objective: Of the step, which knows what it cost.
            here: Where it began.
        """
        before, move = progress, self.move
        progress = before.seeing(here.loss, self.same_data)
        progress = progress.with_highest(here.loss, self.same_data)
        changed = before.steps and not self.same_data and not self.nothing_to_do
        close = is_close(before._asdict(), here.loss, here.cases, objective.vector.dtype)
        progress = progress._replace(
            steps=before.steps + 1,
            changes=progress.changes + 1.0 if changed else 0.0,
            close=before.close + 1.0 if close else 0.0,
        )
        if self.light is not None:
            return after_light(progress, self.light, here)
        if not self.nothing_to_do:
            cost = self.cost(objective, here)
            squares = self.curvature is not None and self.curvature.squares
            exact = self.exact is not None
            progress = after_full(progress, here, cost, exact=exact, squares=squares)
            progress = self._with_phases(progress, here, cost)
        if self.exact is not None:
            state, batched = self.exact.found.state, self.exact.batched
            progress = progress._replace(
                exact_damping=state.damping,
                exact_wall=state.hit_wall,
                exact_stuck_at=state.stuck_at,
                batched_rows=progress.batched_rows if batched is None else float(batched),
            )
        if move.converged:
            progress = progress._replace(
                rejections=0,
                last_loss=here.loss,
                last_cases=here.cases,
                noise=max(move.noise, progress.noise),
                converged_at=here.gradient_norm,
            )
        elif not self.nothing_to_do:
            if self.accepted:
                progress = progress._replace(rejected_here=0.0)
            else:
                damping = self.next_damping(before)
                progress = progress.with_rejection(here.loss, here.gradient_norm, damping)
            progress = progress._replace(
                rejections=0 if self.accepted else progress.rejections + 1,
                last_loss=move.loss,
                last_start=here.loss,
                last_cases=here.cases,
                last_ratio=move.ratio,
                noise=max(move.noise, progress.noise if self.same_data else 0.0),
                converged_at=-1.0,
            )
        elif not math.isfinite(here.loss):  # such a batch says nothing, but many in a row do
            progress = progress._replace(rejections=progress.rejections + 1)
        if self.solution is not None:
            progress = progress.with_curvature(self.curvature_seen)
        return progress

    def next_secant(self, secant: Secant | None) -> Secant | None:
        """What is known of the Hessian after the step; on other data nothing."""
        if self.broyden is not None:
            return self.broyden.secant
        if secant is None or self.nothing_to_do:
            return secant
        if not self.same_data:
            return secant.elsewhere() if self.holds else None
        return secant.moved(self.move.direction, self.move.length)

    def _with_phases(self, progress: Progress, here: Evaluation, cost: float) -> Progress:
        """With the choice of the next step's kind; on other data it is made anew."""
        if not (self.same_data or self.holds) and progress.steps > 1:
            if progress.phase_quasi and progress.phase_price and self.exact is not None:
                # their gains were of a sample: exact steps go on, with evidence of their own
                progress = progress._replace(claimed=BENEFIT, found_again=BENEFIT)
                return progress.with_phases(progress.phases.handed_over(here.loss))
            return progress.with_phases(Phases())
        if self.broyden is not None and self.broyden.both:
            kinds = progress.kinds.after(here.loss, self.move.loss, self.broyden.gradients)
            progress = progress.with_kinds(kinds)
        by_cg = self.exact is None and self.broyden is None
        phases = progress.phases.begun(self.price, here.loss) if self.price else progress.phases
        phases = phases if self.begun is None else self.begun
        if self.failed is not None:
            phases = phases.handed_over(here.loss)
            cost += self.failed.cost
        if by_cg and phases.by_cg:
            phases = phases._replace(price=max(cost, LEAST_PRICE))
        elif by_cg and not phases.trial:
            return progress.with_phases(phases)  # no evidence, unless it stands in on trial
        return progress.with_phases(phases.after(here.loss, self.move.loss, cost))

    def next_damping(self, progress: Progress = BEGINNING) -> float | None:
        """Lambda for the next step.

        Args:
            progress: The numbers that this step began with.
        """
        if self.damping is None or self.nothing_to_do or not self.is_by_cg:
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
            promise=self.move.promise,
            rejections=progress.rejected_here if self.same_data else 0,
            stale=bool(progress.phase_trial and progress.phase_by_cg),
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
            solver=self.solver,
        )

    def _damping_used(self) -> float:
        if self.exact is not None:
            return self.exact.found.damping
        return math.nan if self.damping is None or self.broyden else self.damping


def _without_cg(here: Evaluation) -> Stop:
    if not (math.isfinite(here.gradient_norm) and math.isfinite(here.loss)):
        return Stop.NON_FINITE
    return Stop.NOT_RUN if here.gradient_norm else Stop.ZERO_GRADIENT
