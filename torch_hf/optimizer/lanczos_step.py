"""A step whose quadratic is solved by bidiagonalisation of R, from products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_hf import _messages
from torch_hf.curvature.joint_root import leaves_out_gradient, root_size, why_no_root
from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.curvature.root_products import RootProducts
from torch_hf.loss.hessian_roots import NoRootError, sums_of_squares
from torch_hf.objective.objective import Objective
from torch_hf.objective.results import Evaluation
from torch_hf.optimizer.exact_step import (
    ROUNDINGS,
    ExactStep,
    exact_step,
    gradients_agree,
    memory_of,
    rest_of_gradient,
    rounding_of_gradient,
)
from torch_hf.optimizer.timer import StepTimer
from torch_hf.solver.choose_solver import (
    LANCZOS,
    MOST_BYTES,
    MOST_PAIRS,
    lanczos_bytes,
)
from torch_hf.solver.golub_kahan import GolubKahan
from torch_hf.solver.lanczos import LanczosSolver
from torch_hf.solver.levenberg_marquardt import DampingSearch, DampingState
from torch_hf.vector import ParameterVector


def pairs_of_step(operator: ObjectiveOperator, wanted: str, *, data_stay: bool) -> int:
    """How many pairs this step's bidiagonalisation may take; 0 where it is not the way to solve.

    Without being asked for it is taken on data that stay, for sums of squares in one batch (of
    several, each pair runs the closure twice), where all of its vectors fit, if the closure takes
    derivatives itself: there Kronecker factors, with which conjugate gradients are the faster on
    other networks (``docs/design.md``), do not hold.

    Args:
        operator: Of the quadratic.
        wanted: The option ``solver``.
        data_stay: Whether the data are those of the step before.

    Raises:
        RuntimeError: Bidiagonalisation was asked for, and cannot be.
    """
    if wanted not in ("auto", LANCZOS) or (wanted == "auto" and not data_stay):
        return 0
    why = why_no_root(operator)
    size = None if why else root_size(operator)
    if size is None or not size.rows:
        if wanted == LANCZOS:
            why = why or "a term of the loss bypasses the outputs, or has no curvature in them"
            raise RuntimeError(
                f'solver="lanczos" needs products of the Jacobian, which are not available here: '
                f'{why}. Or take solver="auto".'
            )
        return 0
    item = operator.objective.vector.zeros().element_size()
    if wanted == LANCZOS:
        needed = lanczos_bytes(size.rows, size.params, item)
        if needed > memory_of(operator.objective.vector.device):
            raise RuntimeError(
                f'solver="lanczos" needs {needed:.3g} bytes for {MOST_PAIRS} vectors of '
                f'{size.params} parameters, more than this machine has. Take solver="cg".'
            )
        return MOST_PAIRS
    squares = operator.split is not None and sums_of_squares(operator.split.loss_terms)
    if not squares or not operator.objective.runs.needs_graph:
        return 0
    return MOST_PAIRS if lanczos_bytes(size.rows, size.params, item) <= MOST_BYTES else 0


def lanczos_step(
    objective: Objective,
    here: Evaluation,
    operator: ObjectiveOperator,
    state: DampingState,
    first: float | None,
    pairs: int,
    timer: StepTimer,
    forced: bool = False,
) -> ExactStep | None:
    """The search of one step; None where conjugate gradients have to do.

    That is where the loss's Hessian has no root after all, where R's gradient is not the loss's,
    and where an operation has no second derivative, for which they have finite differences.

    The graph is kept during the search, as a smaller lambda may ask for further products.

    Args:
        objective: Whose trial losses decide.
        here: At the present parameters.
        operator: Of the quadratic there; it is released.
        state: What the last search left.
        first: The first lambda of all, if a user gave one.
        pairs: Of the bidiagonalisation, at the most.
        timer: Takes the seconds.
        forced: Whether there is no other solver to turn to.
    """
    vector = objective.vector
    with timer.part("products"):
        try:
            root = RootProducts(operator)
        except NoRootError:
            return None
        if not root.rows and not forced:
            return None
        decay = operator.decay if root.diagonal is None else operator.decay + root.diagonal
        rest = rest_of_gradient(root.rest, objective)
        gradient = root.transposed(root.residual) if root.rows else vector.zeros()
        gradient = gradient if rest is None else gradient + rest
    if not root.rows:  # all curvature has vanished: nothing is there to be multiplied
        step = exact_step(objective, here, operator, state, None, first, timer, forced)
        return None if step is None else step._replace(norms=None, solver=LANCZOS)
    times, transposed = (
        timer.timed("products", root.times),
        timer.timed("products", root.transposed),
    )

    def solver_of(residual: Tensor | None, rest: Tensor | None) -> LanczosSolver:
        size = vector.numel
        run = GolubKahan(times, transposed, size, residual, rest, decay=decay, max_pairs=pairs)
        return LanczosSolver(run, times, transposed, root.residual, min(root.rows, size))

    try:
        solver = solver_of(root.residual, rest)
    except RuntimeError as error:  # an operation that the first product is the first to meet
        if forced or not _messages.not_twice(error):
            raise
        return None
    rounding = rounding_of_gradient(solver.trace, root.residual, vector.dtype)
    agrees = gradients_agree(gradient, here.gradient, rounding)
    if not agrees:
        if not forced and not leaves_out_gradient(operator):
            return None
        solver = solver_of(None, here.gradient)
    sums = agrees and (operator.split is None or sums_of_squares(operator.split.loss_terms))
    noise = _noise(times, vector) if sums else 0.0
    saved = vector.keep()

    def evaluate(y: Tensor) -> tuple[float, Tensor | None]:
        with timer.part("evaluations"), vector.lent(_moved(vector, saved, solver.direction(y))):
            if sums:
                return objective.trial_residual(here)
            return objective.trial_loss(here), None

    eps = torch.finfo(vector.dtype).eps
    found = DampingSearch(solver, evaluate, here.loss, eps, state, first, noise).run()
    operator.release()
    if found.direction is not None:
        direction = solver.direction(found.direction)
        found = found._replace(direction=direction)
        moved = _moved(vector, saved, direction)
        if all(torch.equal(p, old) for p, old in zip(moved, saved, strict=True)):
            found = found._replace(direction=None, loss=here.loss, converged=True)
    return ExactStep(found, None, None, LANCZOS)


def _moved(vector: ParameterVector, saved: list[Tensor], direction: Tensor) -> list[Tensor]:
    """The parameters at a step's end, the bits that a move there makes."""
    pieces = vector.views(direction)
    return [
        torch.add(old.to(d.dtype), d).to(old.dtype) for old, d in zip(saved, pieces, strict=True)
    ]


def _noise(times: Callable[[Tensor], Tensor], vector: ParameterVector) -> float:
    """The scatter of a sum of squares near 0, whose residual the parameters' rounding moves.

    One product with the parameters under random signs estimates the columns' norms times them.
    """
    values = torch.cat([p.detach().reshape(-1).to(vector.dtype) for p in vector.params])
    generator = torch.Generator(values.device).manual_seed(0)
    signs = torch.rand(len(values), generator=generator, device=values.device).sub_(0.5).sign_()
    eps = torch.finfo(vector.dtype).eps
    moved = torch.linalg.vector_norm(times(values * signs), dtype=torch.float64)
    return ROUNDINGS * eps**2 * float(moved.square())
