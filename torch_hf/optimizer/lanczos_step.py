"""A step whose quadratic is solved by bidiagonalisation of R, from products alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_hf import _messages
from torch_hf.curvature.joint_root import root_size, why_no_root
from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.curvature.root_products import CollectedProducts
from torch_hf.distributed import lead
from torch_hf.loss.hessian_roots import NoRootError
from torch_hf.objective.objective import Objective
from torch_hf.objective.results import Evaluation
from torch_hf.optimizer.exact_step import (
    ROUNDINGS,
    At,
    ExactStep,
    exact_step,
    gradients_agree,
    lanczos_pays,
    least_memory,
    over_ranks,
    rest_of_gradient,
    rounding_of_gradient,
)
from torch_hf.optimizer.timer import StepTimer
from torch_hf.solver.choose_solver import (
    LANCZOS,
    MOST_PAIRS,
    lanczos_bytes,
)
from torch_hf.solver.golub_kahan import GolubKahan
from torch_hf.solver.lanczos import LanczosSolver
from torch_hf.solver.levenberg_marquardt import DampingSearch, DampingState, Found
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
        if needed > least_memory(operator):
            raise RuntimeError(
                f'solver="lanczos" needs {needed:.3g} bytes for {MOST_PAIRS} vectors of '
                f'{size.params} parameters, more than this machine has. Take solver="cg".'
            )
        return MOST_PAIRS
    pays = lanczos_pays(size, item, operator.objective.runs.needs_graph)
    return MOST_PAIRS if pays else 0


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
            products = CollectedProducts(operator)
        except NoRootError:
            return None
        if not products.rows and not forced:
            return None
    if not products.rows:  # all curvature has vanished: nothing is there to be multiplied
        step = exact_step(objective, here, operator, state, None, first, timer, forced)
        return None if step is None else step._replace(norms=None, solver=LANCZOS)
    search = _Search(objective, here, operator, products, pairs, forced)

    def algorithm(*at: Callable[[Tensor], Any]) -> tuple[Found, Tensor] | None:
        ready = search.ready(at)
        return None if ready is None else (search.run(ready, state, first), vector.zeros())

    try:
        functions = search.functions(timer)
        led = lead(objective.reducer, functions, algorithm, max(vector.numel, products.rows))
    except RuntimeError as error:  # an operation that the first product is the first to meet
        if forced or not _messages.not_twice(error):
            raise
        return None
    told = over_ranks(objective.reducer, led, vector)
    if told is None:
        return None
    operator.release()
    return ExactStep(told[0], None, None, LANCZOS)


class _Ready(NamedTuple):
    """A bidiagonalisation begun.

    Attributes:
        solver: Of the quadratic.
        noise: The scatter of the loss beside its own rounding.
        evaluate: The loss at a displacement, with its residual if there is one.
    """

    solver: LanczosSolver
    noise: float
    evaluate: At


class _Search:
    """One step's search over lambda, which the first rank makes.

    Args:
        objective: Whose trial losses decide.
        here: At the present parameters.
        operator: Of the quadratic there.
        products: Of R, by all ranks.
        pairs: Of the bidiagonalisation, at the most.
        forced: Whether there is no other solver to turn to.
    """

    def __init__(
        self,
        objective: Objective,
        here: Evaluation,
        operator: ObjectiveOperator,
        products: CollectedProducts,
        pairs: int,
        forced: bool,
    ) -> None:
        self.objective, self.here, self.products = objective, here, products
        self.pairs, self.forced = pairs, forced
        decay = operator.decay
        self.decay = decay if products.diagonal is None else decay + products.diagonal
        self.rest = rest_of_gradient(products.rest, objective)
        outside = self.rest if self.rest is not None else 0.0
        inside = products.gradient if products.rest is None else products.gradient - products.rest
        self.gradient = inside + outside
        self.saved = objective.vector.keep()

    def functions(self, timer: StepTimer) -> list[Callable[[Tensor], Any]]:
        """Products and losses by all ranks."""
        objective, here, vector = self.objective, self.here, self.objective.vector

        def loss_at(d: Tensor) -> tuple[float, Tensor | None]:
            with vector.lent(_moved(vector, self.saved, d)):
                return objective.trial_loss(here), None

        def residual_at(d: Tensor) -> tuple[float, Tensor | None]:
            with vector.lent(_moved(vector, self.saved, d)):
                return objective.trial_residual(here)

        products = (self.products.times, self.products.transposed)
        return [
            *(timer.timed("products", function) for function in products),
            *(timer.timed("evaluations", function) for function in (loss_at, residual_at)),
        ]

    def ready(self, at: Sequence[Callable[[Tensor], Any]]) -> _Ready | None:
        """The bidiagonalisation; None where R's gradient is not the loss's: CG does better."""
        times, transposed, loss_at, residual_at = at
        vector, products, slope = self.objective.vector, self.products, self.here.gradient

        def solver_of(residual: Tensor | None, rest: Tensor | None) -> LanczosSolver:
            size = vector.numel
            run = GolubKahan(
                times, transposed, size, residual, rest, decay=self.decay, max_pairs=self.pairs
            )
            least = min(products.rows, size)
            return LanczosSolver(run, times, transposed, products.residual, least)

        solver = solver_of(products.residual, self.rest)
        rounding = rounding_of_gradient(solver.trace, products.residual, vector.dtype)
        agrees = gradients_agree(self.gradient, slope, rounding)
        if not agrees:
            if not self.forced and not products.affine:
                return None
            solver = solver_of(None, slope)
        if agrees and products.squares:
            return _Ready(solver, _noise(times, vector), residual_at)
        return _Ready(solver, 0.0, loss_at)

    def run(self, ready: _Ready, state: DampingState, first: float | None) -> Found:
        """Tries lambdas."""
        vector, solver, loss = self.objective.vector, ready.solver, self.here.loss

        def evaluate(y: Tensor) -> tuple[float, Tensor | None]:
            return ready.evaluate(solver.direction(y))

        eps = torch.finfo(vector.dtype).eps
        found = DampingSearch(solver, evaluate, loss, eps, state, first, ready.noise).run()
        if found.direction is None:
            return found
        direction = solver.direction(found.direction)
        moved = _moved(vector, self.saved, direction)
        if all(torch.equal(p, old) for p, old in zip(moved, self.saved, strict=True)):
            return found._replace(direction=None, loss=loss, converged=True)
        return found._replace(direction=direction)


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
