"""A step whose quadratic is solved exactly: R, its factor, and the search over lambda."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.curvature.jacobian import JacobianRoot
from torch_hf.curvature.joint_root import (
    RootSize,
    RootSummary,
    collected_root,
    root_size,
    why_no_root,
)
from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.distributed import Reducer, lead
from torch_hf.objective.objective import Objective
from torch_hf.objective.results import Evaluation
from torch_hf.optimizer.timer import StepTimer
from torch_hf.solver.choose_solver import (
    EXACT,
    MOST_BYTES,
    exact_bytes,
    exact_is_cheaper,
    exact_price,
    lanczos_bytes,
    lanczos_price,
)
from torch_hf.solver.exact import ExactSolver
from torch_hf.solver.levenberg_marquardt import (
    DampingSearch,
    DampingState,
    Found,
    column_scale,
    remembered_norms,
)
from torch_hf.vector import ParameterVector, Trial

#: By how much of its length the gradient may differ from the one that R gives, beside rounding.
AGREEMENT = 1e-3
#: Units of rounding below which a column of R is none, and a residual may be 0.
ROUNDINGS = 16.0


#: The loss at a displacement, and the residual there where it is asked for.
At = Callable[[Tensor], tuple[float, Tensor | None]]


class ExactStep(NamedTuple):
    """What a step by a search over lambda came to, and what it hands to the next.

    Attributes:
        found: Where the search ended.
        norms: Squared norms of R's columns, their running maximum, of shape (P,); None where R was
            not written down.
        batched: Whether rows needed a backward pass each; None where there were none.
        solver: What solved the quadratic.
    """

    found: Found
    norms: Tensor | None
    batched: bool | None
    solver: str = EXACT


def solves_exactly(
    operator: ObjectiveOperator,
    wanted: str,
    *,
    data_stay: bool,
    many_rows_do: bool,
    batched: bool,
    products: int,
) -> bool:
    """Whether this step's quadratic is solved exactly.

    Args:
        operator: Of the quadratic.
        wanted: The option ``solver``.
        data_stay: Whether steps on these data may solve to the end: they stay, or what was gained
            on one sample was found again on the next.
        many_rows_do: Whether more rows than parameters are enough, so that a step cannot fit noise
            far: at the first step, and where most of what steps gained was found again. It holds
            for sums of squares alone.
        batched: Whether rows were seen to need a backward pass each.
        products: That CG would take.

    Raises:
        RuntimeError: An exact solve was asked for, and there is none.
    """
    if wanted not in ("auto", EXACT):
        return False
    why = why_no_root(operator)
    size = None if why else root_size(operator)
    if size is None or not size.rows:
        if wanted == EXACT:
            why = why or "a term of the loss bypasses the outputs, or has no curvature in them"
            raise RuntimeError(
                f'solver="exact" needs the Jacobian, which is not available here: {why}. Or use '
                'solver="auto".'
            )
        return False
    item = max(p.element_size() for p in operator.objective.vector.params)
    if wanted == EXACT:
        needed = exact_bytes(size.rows, size.params, item)
        if needed > least_memory(operator):
            raise RuntimeError(
                f'solver="exact" needs {needed:.3g} bytes for {size.rows} rows of {size.params} '
                'parameters, more than this machine has. Use solver="auto", or fewer cases.'
            )
        return True
    if not data_stay and not (many_rows_do and size.rows >= size.params and size.squares):
        return False
    passes = size.rows if batched else size.passes
    return exact_is_cheaper(size.rows, size.params, passes, size.cases, item, products)


def price_of_exact(operator: ObjectiveOperator) -> float:
    """What an exact or Lanczos solve costs, in gradients; 0 where CG is the way."""
    size = None if why_no_root(operator) else root_size(operator)
    if size is None or not size.rows or not size.cases:
        return 0.0
    item = max(p.element_size() for p in operator.objective.vector.params)
    inside = operator.objective.runs.needs_graph
    if exact_is_cheaper(size.rows, size.params, size.passes, size.cases, item):
        return exact_price(size.rows, size.params, size.passes, size.cases, inside)
    return lanczos_price(inside) if lanczos_pays(size, item, inside) else 0.0


def lanczos_pays(size: RootSize, element_size: int, differentiates: bool) -> bool:
    """Whether bidiagonalisation is taken without being asked for, where data stay."""
    fits = lanczos_bytes(size.rows, size.params, element_size) <= MOST_BYTES
    return size.squares and differentiates and fits


def least_memory(operator: ObjectiveOperator) -> float:
    """Bytes of a device's memory; of several, the first rank's, which solves."""
    here = memory_of(operator.objective.vector.device)
    return operator.objective.reducer.told([here])[0]


def memory_of(device: torch.device) -> float:
    """Bytes of a device's memory; inf where nothing tells."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # not on every system
        return math.inf


def exact_step(
    objective: Objective,
    here: Evaluation,
    operator: ObjectiveOperator,
    state: DampingState,
    norms: Tensor | None,
    first: float | None,
    timer: StepTimer,
    forced: bool = False,
    fresh: bool = False,
) -> ExactStep | None:
    """The search of one step; None where the loss's Hessian has no root after all.

    The loss's own gradient may not be the one that R gives: where a backward pass is a user's own,
    or where cross-entropy is near 0 and its gradient cancels. Then conjugate gradients do better,
    and an exact step that was asked for takes the loss's gradient. So does one whose loss has terms
    without curvature, as ``z.exp() - y * z``.

    Over ranks the first one gets all rows and searches; the others evaluate what it tries.

    Args:
        objective: Whose trial losses decide.
        here: At the present parameters.
        operator: Of the quadratic there; it is released.
        state: What the last search left.
        norms: What the last step remembered of the columns' norms.
        first: The first lambda of all, if a user gave one.
        timer: Takes the seconds.
        forced: Whether there is no other solver to turn to.
        fresh: Whether the steps before were quasi-Newton's.
    """
    vector = objective.vector
    with timer.part("products"):
        collected = collected_root(operator)
        if collected is None or not (collected[1].rows or forced):
            return None
        search = _Search(objective, here, operator, collected, forced)
    with vector.trial() as trial:

        def algorithm(*at: At) -> tuple[Found, Tensor] | None:
            with timer.part("products"):
                ready = search.ready(norms)
            if ready is None:
                return None
            operator.release()
            with timer.part("evaluations"):
                found = search.run(ready, at, DampingSettings(state, first, fresh))
            return _moving(found, trial, here), ready.norms

        found = lead(objective.reducer, search.functions(trial), algorithm, vector.numel)
    told = over_ranks(objective.reducer, found, vector)
    if told is None:
        return None
    operator.release()
    kept = told[1] if bool(told[1].isfinite().all()) else norms  # their squares may overflow
    return ExactStep(told[0], kept, not collected[1].one_backward)


class DampingSettings(NamedTuple):
    """Where a search over lambda begins.

    Attributes:
        state: What the last search left.
        first: The first lambda of all, if a user gave one.
        fresh: Whether the steps before were quasi-Newton's.
    """

    state: DampingState
    first: float | None
    fresh: bool


class _Ready(NamedTuple):
    """R in a form that gives steps.

    Attributes:
        solver: Of the quadratic.
        noise: The scatter of the loss beside its own rounding.
        sums: Whether trial points have a residual.
        norms: Squared norms of R's columns, with those remembered.
    """

    solver: ExactSolver
    noise: float
    sums: bool
    norms: Tensor


class _Search:
    """One step's search over lambda, which the first rank makes.

    Args:
        objective: Whose trial losses decide.
        here: At the present parameters.
        operator: Of the quadratic there.
        collected: R with the rows of all ranks on the first one.
        forced: Whether there is no other solver to turn to.
    """

    def __init__(
        self,
        objective: Objective,
        here: Evaluation,
        operator: ObjectiveOperator,
        collected: tuple[JacobianRoot, RootSummary],
        forced: bool,
    ) -> None:
        self.objective, self.here, self.operator, self.forced = objective, here, operator, forced
        root, self.summary = collected
        if not self.summary.rows:  # all curvature has vanished
            none = root.rows.new_zeros(1, objective.vector.numel)
            root = replace(root, rows=none, residual=none[:, 0])
        self.root = root
        decay = operator.decay
        self.decay = decay if root.diagonal is None else decay + root.diagonal
        self.rest = rest_of_gradient(root.rest, objective)

    def ready(self, norms: Tensor | None) -> _Ready | None:
        """The solver; None where its gradient is not the loss's, and there are other ways."""
        root, vector = self.root, self.objective.vector
        squares = _squares(root.rows)
        seen = remembered_norms(squares, norms).to(vector.dtype)
        scale = column_scale(seen)
        solver = ExactSolver(root.rows, root.residual, self.rest, decay=self.decay, scale=scale)
        rounding = rounding_of_gradient(solver.norm, solver.residual, vector.dtype)
        if gradients_agree(solver.gradient(), self.here.gradient, rounding):
            return _Ready(solver, _noise(squares, vector), self.summary.squares, seen)
        if not (self.forced or self.summary.affine):
            return None
        return _Ready(solver.towards(self.here.gradient), 0.0, False, seen)

    def functions(self, trial: Trial) -> list[At]:
        """The loss at a displacement, alone and with its residual, by all ranks."""

        def loss_at(d: Tensor) -> tuple[float, Tensor | None]:
            self.operator.release()  # trial values in the parameters would spoil its graph
            trial.place(d, 1.0)
            return self.objective.trial_loss(self.here), None

        def residual_at(d: Tensor) -> tuple[float, Tensor | None]:
            self.operator.release()
            trial.place(d, 1.0)
            return self.objective.trial_residual(self.here)

        return [loss_at, residual_at]

    def run(self, ready: _Ready, at: Sequence[At], settings: DampingSettings) -> Found:
        """Tries lambdas."""
        dtype, (loss_at, residual_at) = self.objective.vector.dtype, at
        evaluate = residual_at if ready.sums else loss_at
        return DampingSearch(
            ready.solver,
            lambda d: evaluate(d.to(dtype)),
            self.here.loss,
            torch.finfo(dtype).eps,
            settings.state,
            settings.first,
            ready.noise,
            settings.fresh,
        ).run()


def _moving(found: Found, trial: Trial, here: Evaluation) -> Found:
    """A step of the model's type; none where it moves no bit."""
    if found.direction is None:
        return found
    direction = found.direction.to(here.gradient.dtype)
    if trial.moves(direction, 1.0):
        return found._replace(direction=direction)
    return found._replace(direction=None, loss=here.loss, converged=True)


def over_ranks(
    reducer: Reducer, result: tuple[Found, Tensor] | None, vector: ParameterVector
) -> tuple[Found, Tensor] | None:
    """What the first rank found, on all ranks."""
    if reducer.group is None:
        return result
    found, norms = result or (None, None)
    numbers = None if found is None else found._replace(direction=None)
    moves = found is not None and found.direction is not None
    told, moves = reducer.shared((numbers, moves))
    if told is None:
        return None
    direction = vector.zeros() if found is None or found.direction is None else found.direction
    agreed = reducer.agreed(direction) if moves else None
    kept = reducer.agreed(vector.zeros() if norms is None else norms)
    return told._replace(direction=agreed), kept


def rounding_of_gradient(norm: float, residual: Tensor, dtype: torch.dtype) -> float:
    """The error that rounding may leave in ``R^T r``, from the squared norm of R."""
    return 100.0 * torch.finfo(dtype).eps * math.sqrt(norm) * float(residual.norm())


def gradients_agree(ours: Tensor, gradient: Tensor, rounding: float) -> bool:
    """Whether R's own gradient is that of the loss: a backward pass of a user's may not be."""
    difference = float((ours.double() - gradient.double()).norm())
    return difference <= AGREEMENT * float(gradient.double().norm()) + rounding


def _squares(rows: Tensor) -> Tensor:
    """Squared norms of the columns; 0 for those of rounding alone.

    A bias before batch normalisation or that of attention's keys moves no output. As a scale the
    rounding in its column would let it move by the inverse.
    """
    norms: Tensor = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64)
    least = ROUNDINGS * torch.finfo(rows.dtype).eps * norms.max()
    return torch.where(norms > least, norms, 0.0).square()


def _noise(squares: Tensor, vector: ParameterVector) -> float:
    """The scatter of a sum of squares near 0, whose residual the parameters' rounding moves."""
    values = torch.cat([p.detach().reshape(-1).double() for p in vector.params])
    eps = torch.finfo(vector.dtype).eps
    return ROUNDINGS * eps**2 * float(squares @ values.square())


def rest_of_gradient(rest: Tensor | None, objective: Objective) -> Tensor | None:
    """The gradient outside of R's rows: of terms without a residual, and of weight decay."""
    if not any(objective.decay):
        return rest
    flat = objective.vector.zeros()
    objective.penalty.add_gradient(flat)
    flat = objective.free(flat)
    return flat if rest is None else rest + flat
