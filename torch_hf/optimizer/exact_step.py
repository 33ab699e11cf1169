"""A step whose quadratic is solved exactly: R, its factor, and the search over lambda."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.curvature.joint_root import (
    joint_root,
    root_size,
    took_one_backward,
    why_no_root,
)
from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.loss.hessian_roots import sums_of_squares
from torch_hf.objective.objective import Objective
from torch_hf.objective.results import Evaluation
from torch_hf.optimizer.timer import StepTimer
from torch_hf.solver.choose_solver import CG, EXACT, exact_bytes, exact_is_cheaper
from torch_hf.solver.exact import ExactSolver
from torch_hf.solver.levenberg_marquardt import (
    DampingSearch,
    DampingState,
    Found,
    column_scale,
    remembered_norms,
)

#: By how much of its length the gradient may differ from the one that R gives, beside rounding.
AGREEMENT = 1e-3


class ExactStep(NamedTuple):
    """What an exact step came to, and what it hands to the next.

    Attributes:
        found: Where the search ended.
        norms: Squared norms of R's columns, their running maximum, of shape (P,).
        batched: Whether rows needed a backward pass each.
    """

    found: Found
    norms: Tensor
    batched: bool


def solves_exactly(
    operator: ObjectiveOperator,
    wanted: str,
    *,
    data_stay: bool,
    first_step: bool,
    batched: bool,
    products: int,
) -> bool:
    """Whether this step's quadratic is solved exactly.

    Args:
        operator: Of the quadratic.
        wanted: The option ``solver``.
        data_stay: Whether steps on these data may solve to the end: they stay, or what was gained
            on one sample was found again on the next.
        first_step: Nothing is known of the data; where they are more than the parameters, a step
            cannot fit noise far.
        batched: Whether rows were seen to need a backward pass each.
        products: That CG would take.

    Raises:
        RuntimeError: An exact solve was asked for, and there is none.
    """
    if wanted == CG:
        return False
    why = why_no_root(operator)
    size = None if why else root_size(operator)
    if size is None or not size.rows:
        if wanted == EXACT:
            why = why or "a term of the loss bypasses the outputs, or has no curvature in them"
            raise RuntimeError(
                f'solver="exact" needs the Jacobian, which is not to be had here: {why}. Or take '
                'solver="auto".'
            )
        return False
    item = max(p.element_size() for p in operator.objective.vector.params)
    if wanted == EXACT:
        needed = exact_bytes(size.rows, size.params, item)
        if needed > memory_of(operator.objective.vector.device):
            raise RuntimeError(
                f'solver="exact" needs {needed:.3g} bytes for {size.rows} rows of {size.params} '
                'parameters, more than this machine has. Take solver="auto", or fewer cases.'
            )
        return True
    if not (data_stay or (first_step and size.rows >= size.params)):
        return False
    passes = size.rows if batched else size.passes
    return exact_is_cheaper(size.rows, size.params, passes, size.cases, item, products)


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
) -> ExactStep | None:
    """The search of one step; None where the loss's Hessian has no root after all.

    Args:
        objective: Whose trial losses decide.
        here: At the present parameters.
        operator: Of the quadratic there; it is released.
        state: What the last search left.
        norms: What the last step remembered of the columns' norms.
        first: The first lambda of all, if a user gave one.
        timer: Takes the seconds.
    """
    vector = objective.vector
    with timer.part("products"):
        root = joint_root(operator)
        if root is None:
            return None
        decay = operator.decay if root.diagonal is None else operator.decay + root.diagonal
        seen = remembered_norms(_squares(root.rows), norms).to(vector.dtype)
        solver = ExactSolver(
            root.rows,
            root.residual,
            _rest(root.rest, objective),
            decay=decay,
            scale=column_scale(seen),
        )
        if not _agrees(solver, here.gradient):
            return None
        squares = operator.split is None or sums_of_squares(operator.split.loss_terms)
        operator.release()
    with vector.trial() as trial, timer.part("evaluations"):

        def evaluate(d: Tensor) -> tuple[float, Tensor | None]:
            trial.place(d.to(vector.dtype), 1.0)
            if squares:
                return objective.trial_residual(here)
            return objective.trial_loss(here), None

        eps = torch.finfo(vector.dtype).eps
        found = DampingSearch(solver, evaluate, here.loss, eps, state, first).run()
        if found.direction is not None:
            direction = found.direction.to(vector.dtype)
            found = found._replace(direction=direction)
            if not trial.moves(direction, 1.0):
                found = found._replace(direction=None, loss=here.loss, converged=True)
    return ExactStep(found, seen, not took_one_backward(root))


def _agrees(solver: ExactSolver, gradient: Tensor) -> bool:
    """Whether R's own gradient is that of the loss: a backward pass of a user's may not be."""
    eps = torch.finfo(gradient.dtype).eps
    rounding = 100.0 * eps * math.sqrt(solver.norm) * float(solver.residual.norm())
    difference = float((solver.gradient() - gradient.double()).norm())
    return difference <= AGREEMENT * float(gradient.double().norm()) + rounding


def _squares(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64)
    return norms.square()


def _rest(rest: Tensor | None, objective: Objective) -> Tensor | None:
    """The gradient outside of R's rows: of terms without a residual, and of weight decay."""
    if not any(objective.decay):
        return rest
    flat = objective.vector.zeros()
    objective.penalty.add_gradient(flat)
    flat = objective.free(flat)
    return flat if rest is None else rest + flat
