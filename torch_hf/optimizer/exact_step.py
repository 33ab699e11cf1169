"""A step whose quadratic is solved exactly: R, its factor, and the search over lambda."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.curvature.joint_root import (
    joint_root,
    leaves_out_gradient,
    root_size,
    took_one_backward,
    why_no_root,
)
from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.loss.hessian_roots import sums_of_squares
from torch_hf.objective.objective import Objective
from torch_hf.objective.results import Evaluation
from torch_hf.optimizer.timer import StepTimer
from torch_hf.solver.choose_solver import EXACT, exact_bytes, exact_is_cheaper, exact_price
from torch_hf.solver.exact import ExactSolver
from torch_hf.solver.levenberg_marquardt import (
    DampingSearch,
    DampingState,
    Found,
    column_scale,
    remembered_norms,
)
from torch_hf.vector import ParameterVector

#: By how much of its length the gradient may differ from the one that R gives, beside rounding.
AGREEMENT = 1e-3
#: Units of rounding below which a column of R is none, and a residual may be 0.
ROUNDINGS = 16.0


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
        if needed > memory_of(operator.objective.vector.device):
            raise RuntimeError(
                f'solver="exact" needs {needed:.3g} bytes for {size.rows} rows of {size.params} '
                'parameters, more than this machine has. Use solver="auto", or fewer cases.'
            )
        return True
    if not data_stay and not (many_rows_do and size.rows >= size.params and _squares_of(operator)):
        return False
    passes = size.rows if batched else size.passes
    return exact_is_cheaper(size.rows, size.params, passes, size.cases, item, products)


def price_of_exact(operator: ObjectiveOperator) -> float:
    """What an exact solve costs, in gradients; 0 where there is none or products are cheaper."""
    size = None if why_no_root(operator) else root_size(operator)
    if size is None or not size.rows or not size.cases:
        return 0.0
    item = max(p.element_size() for p in operator.objective.vector.params)
    if not exact_is_cheaper(size.rows, size.params, size.passes, size.cases, item):
        return 0.0
    inside = operator.objective.runs.needs_graph
    return exact_price(size.rows, size.params, size.passes, size.cases, inside)


def _squares_of(operator: ObjectiveOperator) -> bool:
    """Whether the loss is a sum of squares; of classes a step learns a sample's noise sooner."""
    return operator.split is not None and sums_of_squares(operator.split.loss_terms)


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
        root = joint_root(operator)
        if root is None or not (len(root.rows) or forced):
            return None
        if not len(root.rows):  # all curvature has vanished
            none = root.rows.new_zeros(1, vector.numel)
            root = replace(root, rows=none, residual=none[:, 0])
        decay = operator.decay if root.diagonal is None else operator.decay + root.diagonal
        squares = _squares(root.rows)
        seen = remembered_norms(squares, norms).to(vector.dtype)
        solver = ExactSolver(
            root.rows,
            root.residual,
            rest_of_gradient(root.rest, objective),
            decay=decay,
            scale=column_scale(seen),
        )
        rounding = rounding_of_gradient(solver.norm, solver.residual, vector.dtype)
        agrees = gradients_agree(solver.gradient(), here.gradient, rounding)
        if not agrees and not forced and not leaves_out_gradient(operator):
            return None
        if not agrees:
            solver = solver.towards(here.gradient)
        noise = _noise(squares, vector) if agrees else 0.0
        sums = agrees and (operator.split is None or sums_of_squares(operator.split.loss_terms))
        operator.release()
    with vector.trial() as trial, timer.part("evaluations"):

        def evaluate(d: Tensor) -> tuple[float, Tensor | None]:
            trial.place(d.to(vector.dtype), 1.0)
            if sums:
                return objective.trial_residual(here)
            return objective.trial_loss(here), None

        eps = torch.finfo(vector.dtype).eps
        search = DampingSearch(solver, evaluate, here.loss, eps, state, first, noise, fresh)
        found = search.run()
        if found.direction is not None:
            direction = found.direction.to(vector.dtype)
            found = found._replace(direction=direction)
            if not trial.moves(direction, 1.0):
                found = found._replace(direction=None, loss=here.loss, converged=True)
    kept = seen if bool(seen.isfinite().all()) else norms  # their squares may overflow
    return ExactStep(found, kept, not took_one_backward(root))


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
