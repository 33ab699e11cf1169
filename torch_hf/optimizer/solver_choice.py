"""Which solver a full step takes: what it may be by the options, and which one has its turn."""

from __future__ import annotations

from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.objective.objective import Objective
from torch_hf.objective.results import Evaluation
from torch_hf.optimizer.base import FlatStateOptimizer
from torch_hf.optimizer.broyden_step import (
    FIRST_ITERATIONS,
    ITERATIONS,
    BroydenStep,
    broyden_step,
    check_broyden,
    quasi_newton_of,
)
from torch_hf.optimizer.exact_step import ExactStep, exact_step, price_of_exact, solves_exactly
from torch_hf.optimizer.lanczos_step import lanczos_step, pairs_of_step
from torch_hf.optimizer.progress import HELD_OF_EQUATIONS
from torch_hf.optimizer.timer import StepTimer
from torch_hf.solver.cg_budget import max_iterations
from torch_hf.solver.choose_solver import (
    AUTO,
    BROYDEN,
    EXACT,
    LANCZOS,
    LBFGS,
    PRODUCTS_OF_SOLVE,
)
from torch_hf.solver.levenberg_marquardt import DampingState
from torch_hf.solver.phases import LEAST_PRICE, Phases


class SolverChoice(FlatStateOptimizer):
    """Exact, Lanczos and quasi-Newton steps, each where it is wanted and has its turn."""

    def _rates(self) -> list[float]:
        """``lr`` of each parameter."""
        return [float(g["lr"]) for g, _ in self._owned()]

    def _wants(self, solver: str) -> bool:
        return bool(self.param_groups[0]["solver"] == solver)

    def _is_plain(self) -> bool:
        """Whether no option asks for conjugate gradients or for other lengths of steps."""
        return all(g["lr"] == 1.0 for g in self.param_groups) and self._chosen_solver_is_free()

    def _phases_beside_cg(
        self, objective: Objective, here: Evaluation, same_data: bool
    ) -> Phases | None:
        """Those that begin where data are seen to stay and conjugate gradients solved before."""
        progress = self._progress
        if progress.phase_price or not same_data or progress.exact or not progress.full_cost:
            return None
        if self.curvature == "hessian" or not self._compares_solvers(objective):
            return None
        return Phases().beside_cg(progress.full_cost, here.loss)

    def _broyden_step(
        self,
        objective: Objective,
        here: Evaluation,
        same_data: bool,
        timer: StepTimer,
        begun: Phases | None,
    ) -> BroydenStep | None:
        """Quasi-Newton iterations, where it is their turn; else None."""
        whole = not (objective.vector.sums or objective.space.sharded)
        kind = self.param_groups[0]["solver"]
        if kind in (BROYDEN, LBFGS):
            self._check_rates(kind)
            check_broyden(kind, objective.vector, whole, objective.reducer)
        elif (
            not (self._wants(AUTO) and (begun or self._progress.phases).quasi)
            or not (same_data or self._holds(objective, here))
            or not (self._is_plain() and whole)
            or objective.own_curvature_batches
        ):
            return None
        secant = self._secant
        if not same_data and secant is not None:
            secant = secant.elsewhere() if self._holds(objective, here) else None
        if kind != AUTO:
            return broyden_step(objective, here, secant, timer, kind)
        kind = quasi_newton_of(objective.vector)
        if kind != BROYDEN or not objective.runs.needs_graph:
            return broyden_step(objective, here, secant, timer, kind)
        kinds = self._progress.kinds
        kind, number = LBFGS if kinds.limited else BROYDEN, kinds.iterations(ITERATIONS)
        return broyden_step(objective, here, secant, timer, kind, number, both=True)

    def _begins_with_iterations(self, objective: Objective, price: float) -> bool:
        """Whether the run's first step is made of them, where an exact one costs so much.

        For residuals of an equation alone: other data may be gone at the next step.
        """
        return price >= LEAST_PRICE and objective.runs.needs_graph and not self._progress.steps

    def _first_iterations(
        self, objective: Objective, here: Evaluation, timer: StepTimer
    ) -> BroydenStep:
        kind = quasi_newton_of(objective.vector)
        both = kind == BROYDEN
        return broyden_step(objective, here, None, timer, kind, FIRST_ITERATIONS, both)

    def _holds(self, objective: Objective, here: Evaluation) -> bool:
        """Whether points of an equation change, and what steps gained was found again on others."""
        progress = self._progress.seeing(here.loss, False)
        return objective.runs.needs_graph and progress.holds_by(HELD_OF_EQUATIONS)

    def _compares_solvers(self, objective: Objective) -> bool:
        """Whether quasi-Newton iterations would be an alternative."""
        vector = objective.vector
        return (
            self._wants(AUTO)
            and self._is_plain()
            and bool(quasi_newton_of(vector))
            and not (vector.sums or objective.space.sharded)
            and not objective.own_curvature_batches
        )

    def _price_of_exact(self, curvature: ObjectiveOperator) -> float:
        """In gradients; 0 where conjugate gradients solve."""
        return self._progress.phase_price or price_of_exact(curvature)

    def _check_rates(self, wanted: str) -> None:
        if any(g["lr"] != 1.0 for g in self.param_groups):
            raise RuntimeError(
                f'lr must be 1 with solver="{wanted}", which takes the step\'s length from the '
                f'loss, got {[g["lr"] for g in self.param_groups]}. Remove lr, or use solver="cg".'
            )

    def _exact_step(
        self,
        objective: Objective,
        here: Evaluation,
        curvature: ObjectiveOperator,
        same_data: bool,
        timer: StepTimer,
    ) -> ExactStep | None:
        """The step by the Jacobian itself, where that is the cheaper way; else None."""
        options, progress = self.param_groups[0], self._progress.seeing(here.loss, same_data)
        wanted = options["solver"]
        forced = wanted in (EXACT, LANCZOS)
        if forced:
            self._check_rates(wanted)
        if wanted == AUTO and not self._is_plain():
            return None
        most = max_iterations(self.preconditioner, same_data, progress.budget)
        in_phases = bool(progress.phase_price) and (
            self._holds(objective, here) or bool(progress.phase_quasi)
        )
        data_stay = same_data or progress.budget > 1.0 or in_phases
        exactly = solves_exactly(
            curvature,
            wanted,
            data_stay=data_stay,
            many_rows_do=not progress.steps or progress.holds,
            batched=bool(progress.batched_rows),
            products=PRODUCTS_OF_SOLVE if same_data or progress.holds or in_phases else most,
        )
        pairs = 0 if exactly else pairs_of_step(curvature, wanted, data_stay=same_data)
        if not exactly and not pairs:
            return None
        state = DampingState(progress.exact_damping, progress.exact_wall, progress.exact_stuck_at)
        fresh = exactly and same_data and bool(progress.phase_fresh)
        if fresh:
            state = DampingState()
        first = options["damping"] if not progress.steps else None
        found = (
            exact_step(objective, here, curvature, state, self._norms, first, timer, forced, fresh)
            if exactly
            else lanczos_step(objective, here, curvature, state, first, pairs, timer, forced)
        )
        if found is None and forced:
            raise RuntimeError(
                f'solver="{wanted}" needs a square root of the loss\'s Hessian and found none. A '
                "term of the loss is not convex in its outputs, couples too many of them, or is "
                "computed in half precision. In half precision, compute the loss from "
                'outputs.float(); otherwise use solver="auto".'
            )
        return found

    def _chosen_solver_is_free(self) -> bool:
        """Whether no option says that conjugate gradients are wanted."""
        options = self.param_groups[0]
        default = getattr(self.preconditioner, "base", None) == "kronecker"
        return default and options["cg_max_iter"] is None and options["cg_decay"] is None
