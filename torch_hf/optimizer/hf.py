"""``HFOptimizer``: the story of one Hessian-free step, from closure to parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from inspect import signature
from typing import Any, NoReturn
from weakref import ref

import torch
from torch import Tensor

from torch_hf import _checks, _messages
from torch_hf._user_warnings import warn_user
from torch_hf.curvature.cuda_graph import Recorder
from torch_hf.curvature.layer_statistics import LayerStatistics
from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.curvature.precision import warn_of_tf32
from torch_hf.distributed import Space, check_group
from torch_hf.objective import checks
from torch_hf.objective.objective import Objective
from torch_hf.objective.results import Evaluation
from torch_hf.optimizer import unsupported_options
from torch_hf.optimizer.broyden_step import (
    Secant,
)
from torch_hf.optimizer.light_step import LightStep, light_step, takes_light_step, undo
from torch_hf.optimizer.outcome import StepDecision
from torch_hf.optimizer.progress import PATIENCE, Progress
from torch_hf.optimizer.solver_choice import SolverChoice
from torch_hf.optimizer.timer import StepTimer
from torch_hf.optimizer.transaction import Transaction
from torch_hf.preconditioner.choose import factors_of, make_preconditioner, worth_observing
from torch_hf.preconditioner.definite import check_definite, is_exact
from torch_hf.preconditioner.protocol import Preconditioner
from torch_hf.report import Requests, StepReport
from torch_hf.solver.cg import CGResult, conjugate_gradients
from torch_hf.solver.cg_budget import is_same_data, max_iterations
from torch_hf.solver.choose_solver import (
    BROYDEN,
    LBFGS,
    SOLVERS,
)
from torch_hf.solver.line_search import CONVERGED, SearchResult, repeats, scaled, search
from torch_hf.solver.trust_region import (
    curvature_along,
    damping_ceiling,
    damping_without_curvature,
    initial_damping,
    ratio_is_absurd,
    resolution,
    warm_start_factor,
)
from torch_hf.vector import ParameterVector

#: Said where the direction found is lost in the parameters' rounding.
NO_BIT_MOVES = "converged: the step is below the rounding of the parameters"
#: Said where steps were rejected so often that no more are tried.
GAVE_UP = "the steps before were all rejected here, and nothing has changed since"
#: Of CG under a preconditioner that solves exactly: the second mends the first one's rounding.
EXACT_ITERATIONS = 2
#: Below this a factor on the Newton step is one that was meant for a gradient.
SMALL_RATE = 0.1


class HFOptimizer(SolverChoice):
    """Hessian-free optimization with an implicit L-BFGS preconditioner (arXiv 1309.1508).

    Each step minimises the quadratic ``q(d) = g^T d + 1/2 d^T (G + lambda I) d``. Conjugate
    gradients only multiply G, the Gauss-Newton matrix or the Hessian of the closure's loss. The
    step walks back over their iterates while the loss falls, and searches along the best one. On
    unchanged data the quadratic is solved to the end instead, for several lambda, and the true loss
    decides among them: exactly from the Jacobian where that takes fewer operations, else by
    bidiagonalisation for squared residuals of differential equations. On batches that change most
    steps are light: one gradient, preconditioned by Kronecker factors (``solver``).

    Args:
        params: Parameters, named parameters or parameter groups. A group may have its own ``lr``
            and ``weight_decay``.
        lr: Factor on the direction before the line search starts from it. 1 is the Newton step;
            there is seldom a reason to change it.
        curvature: ``"ggn"``, the generalized Gauss-Newton matrix, or ``"hessian"``.
        damping: lambda of the first step; it adapts from there (Martens 2010, section 4.1; exact
            steps keep theirs in the state). None takes the curvature along the first gradient, so
            that the scale of the loss does not matter.
        weight_decay: L2 penalty ``weight_decay/2 |theta|^2``, in loss, gradient and curvature.
        preconditioner: ``"lbfgs"`` (CG's own pairs of the last step), ``"kronecker"`` (factors of
            the layers' blocks, Martens & Grosse 2015), ``"kronecker-lbfgs"`` (pairs of long solves
            on these factors), ``"diagonal"`` (Martens 2010, section 4.7) or ``"none"``. Or an
            object with the methods of :class:`torch_hf.preconditioner.Preconditioner`.
        history_size: M, how many pairs are kept, an even number.
        cg_max_iter: The most CG iterations. None is 250 on the data of the last step (Martens &
            Sutskever 2012), 3 on new data with Kronecker factors and 20 without. The data count as
            the same where the loss starts at its last value on as many cases.
        cg_tol: Relative progress per iteration at which CG stops (Martens 2010, section 4.4, has
            5e-4; longer solves cost more than they gain); 0 leaves only the residual test.
        cg_decay: beta, the factor on the last step's CG solution where the next CG starts (Martens
            2010, section 4.8); 0 starts at zero. None is 0.9, less after a step with a
            reduction ratio below 3/4, and 0 for short solves on new data without
            ``curvature_batches``.
        maximize: Maximise the closure's objective.
        process_group: A ``torch.distributed`` group over which loss, gradient and products are
            averaged by cases; None for one process. Parameters of ``fully_shard`` bring their own.
        solver: ``"cg"``, ``"exact"`` (Levenberg-Marquardt by Cholesky from the Jacobian, several
            lambda a step), ``"lanczos"`` (the same by Golub-Kahan bidiagonalisation, from products
            alone), ``"broyden"`` or ``"lbfgs"`` (quasi-Newton iterations, up to 20 a step), or
            ``"auto"``. With the default preconditioner auto is light on batches that
            change. With ``lr=1`` it is exact on unchanged data where that takes fewer operations,
            else Lanczos for squares in a closure that takes derivatives; in turns with
            quasi-Newton iterations, as the evidence goes. ``report.solver`` says which it was.
        shard_state: Cuts CG's vectors and the L-BFGS pairs over the ranks of ``process_group``.
            Then every rank must call ``state_dict`` (``docs/distributed.md``).

    Raises:
        TypeError, ValueError: An argument is not what is said above; the message says which.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(50, 3, dtype=torch.float64)
        >>> y = x @ torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
        >>> model = torch.nn.Linear(3, 1, bias=False).double()
        >>> optimizer = HFOptimizer(model.parameters())
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(15):
        ...     loss = optimizer.step(closure)
        >>> optimizer.last_report.new_loss < 1e-8
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        curvature: str = "ggn",
        damping: float | None = None,
        weight_decay: float = 0.0,
        preconditioner: str | Preconditioner = "kronecker-lbfgs",
        history_size: int = 4,
        cg_max_iter: int | None = None,
        cg_tol: float = 5e-3,
        cg_decay: float | None = None,
        maximize: bool = False,
        process_group: Any = None,
        shard_state: bool = False,
        solver: str = "auto",
        **unsupported: NoReturn,
    ) -> None:
        unsupported_options.keywords(unsupported, list(signature(HFOptimizer).parameters)[1:-1])
        _checks.one_of("curvature", curvature, ("ggn", "hessian"))
        _checks.one_of("solver", solver, SOLVERS)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "damping": damping,
            "cg_max_iter": cg_max_iter,
            "cg_tol": cg_tol,
            "cg_decay": cg_decay,
            "maximize": maximize,
            "curvature": curvature,
            "solver": solver,
        }
        _checks.options(defaults)
        self.preconditioner = make_preconditioner(preconditioner, history_size)
        defaults["preconditioner"] = type(self.preconditioner).__name__
        defaults["base"] = getattr(self.preconditioner, "base", None)
        defaults["history_size"] = getattr(self.preconditioner, "history_size", 0)
        check_group(process_group)
        _checks.shard_state(shard_state, process_group, self.preconditioner)
        self.curvature = curvature
        self.process_group = process_group
        self.shard_state = shard_state
        self.last_report: StepReport | None = None
        self._requests = Requests()
        self._start: Tensor | None = None
        self._norms: Tensor | None = None
        self._secant: Secant | None = None
        self._progress = Progress()
        self._recorder = Recorder()
        super().__init__(params, defaults)
        self._vector()  # complains now rather than at the first step
        self._look_at_rates()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by ``torch.amp.GradScaler``, which no step can be taken under."""
        raise RuntimeError(_messages.GRADIENT_SCALER)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[..., Any] | None = None,
        batches: Iterable[Any] | None = None,
        curvature_batches: Iterable[Any] | None = None,
    ) -> Any:
        """One step: lowers the closure's loss on this data, or leaves the parameters alone.

        On batches that change most steps are light: the next batches judge them, and the next step
        takes back one that overshot (``docs/step.md``).

        Afterwards ``.grad`` is the closure's own gradient at the old parameters, in memory that
        nothing else holds.

        Args:
            closure: Computes the loss, in one of three forms: an L-BFGS closure as it stands
                (calls ``backward()``, returns the loss); returns a loss with its graph; returns
                ``(loss, outputs)`` or ``(loss, outputs, cases)``. It runs several times a step.
                Where it raises ``torch.linalg.LinAlgError`` at a trial point, as a Cholesky factor
                may, the loss there counts as infinite.
            batches: If given, the closure takes one batch, and loss, gradient and products are
                averaged over these by number of cases, at the memory of one.
            curvature_batches: Batches for the products; ``batches`` if None.

        Returns:
            The loss before the step.

        Raises:
            TypeError, ValueError, RuntimeError: The closure or a batch is unusable. Parameters,
                buffers, random generators and the optimizer's state are as before the call.
            KeyboardInterrupt: All is as before the call, or the step is whole.

        Warns:
            UserWarning: ``lr`` is below 0.1; products are rounded (TF32); there are no factors
                under ``fully_shard``. Each is said once; as an
                error it leaves all as before the call.
            RuntimeWarning: Five steps in a row, ten and so on, were rejected. As an error it
                leaves the step whole, with its report.
        """
        if closure is None:
            return self._initialise()
        self._look_at_rates()
        parts = ("gradient", "products", "preconditioner", "evaluations")
        vector = self._vector()
        timer = StepTimer(parts, vector.device)
        change = Transaction(self, vector)
        alone = self.process_group is None and not vector.sums
        with self._recorder.stream(vector.device, alone), change, change:
            objective = self._objective(closure, batches, curvature_batches, vector, change)
            objective.runs.normalizations = not self._progress.light
            with objective.replay.arithmetic():
                with timer.part("gradient"):
                    here = objective.evaluate(lambda left: checks.accumulated(left, self._left))
                self._look_at_precision(objective)
                outcome = self._decide(objective, here, timer)
            change.reloads = True
            self._commit(vector, objective, here, outcome)
            objective.replay.settle(counts=math.isfinite(here.loss))
            steps, rejections = self._progress.steps, self._progress.rejections
            self.last_report = outcome.report(steps, objective, here, timer, self._requests)
            change.whole = True
        if rejections and rejections % PATIENCE == 0:
            # As an error it finds the step whole, its report included.
            warn_user(_messages.rejected(rejections, outcome.move.reason), RuntimeWarning)
        return here.returned

    def _look_at_rates(self) -> None:
        """Warns, once, of a learning rate that was kept from another optimizer."""
        small = [g["lr"] for g in self.param_groups if 0.0 < g["lr"] < SMALL_RATE]
        if small and not self._knows_rates:
            self._knows_rates = True
            warn_user(_messages.small_rate(min(small)), UserWarning)

    def _look_at_precision(self, objective: Objective) -> None:
        if not self._knows_precision:
            self._knows_precision = True
            vector = objective.vector
            if vector.sums and factors_of(self.preconditioner) is not None:
                warn_user(_messages.NO_FACTORS_WHEN_SHARDED, UserWarning)
            warn_of_tf32(vector.device, vector.dtype, objective.replay.buffers.seen)

    # --- the parts of a step, in the order it takes them ---

    def _decide(self, objective: Objective, here: Evaluation, timer: StepTimer) -> StepDecision:
        """Everything that is computed; nothing that lasts is changed."""
        damping = self.param_groups[0]["damping"]
        if self._progress.still_converged(here.loss, here.gradient_norm):
            move = SearchResult(None, 0.0, here.loss, reason=CONVERGED, converged=True)
            return StepDecision(move, damping)
        reason = self._no_step(here)
        if not reason and self._progress.gave_up(here.loss, here.gradient_norm, damping):
            reason = GAVE_UP
        if reason and not math.isfinite(here.loss):
            undone = undo(objective, here, self._progress, self._start, self._rates())
            if undone is not None:
                return StepDecision(undone.move, damping, same_data=False, light=undone)
        if reason:
            move = SearchResult(None, 0.0, here.loss, reason=reason)
            return StepDecision(move, damping, nothing_to_do=True)
        with timer.part("gradient"):
            asked = self._requests.gradient_variance
            variance = objective.gradient_variance(here) if asked else None
        dtype = objective.vector.dtype
        same_data = is_same_data(self._progress._asdict(), here.loss, here.cases, dtype)
        light = self._light_step(objective, here, same_data, timer)
        if light is not None:
            operator = light.curvature
            return StepDecision(
                light.move, damping, None, operator, variance, same_data=False, light=light
            )
        step = self._full_step(objective, here, same_data, timer)
        holds = not same_data and self._holds(objective, here)
        return step._replace(variance=variance, holds=holds)

    def _full_step(
        self, objective: Objective, here: Evaluation, same_data: bool, timer: StepTimer
    ) -> StepDecision:
        """By quasi-Newton iterations where it is their turn, else exactly, else by CG."""
        damping = self.param_groups[0]["damping"]
        eps = torch.finfo(objective.vector.dtype).eps
        begun = self._phases_beside_cg(objective, here, same_data)
        broyden = self._broyden_step(objective, here, same_data, timer, begun)
        moved = broyden is not None and broyden.move.direction is not None
        if broyden is not None and (moved or self.param_groups[0]["solver"] in (BROYDEN, LBFGS)):
            step = StepDecision.of_broyden(broyden, damping, same_data)
            return step.settled(self._progress, here, eps)._replace(begun=begun)
        with timer.part("gradient"):
            kept = here if broyden is None else None  # trial points have spoiled its graph
            curvature = ObjectiveOperator(objective, self.curvature, here=kept)
        compared = self._compares_solvers(objective)
        price = self._price_of_exact(curvature) if compared else 0.0
        if self._begins_with_iterations(objective, price):
            curvature.release()
            broyden = self._first_iterations(objective, here, timer)
            if broyden.move.direction is not None:
                return StepDecision.of_broyden(broyden, damping, same_data)._replace(price=price)
            curvature = ObjectiveOperator(objective, self.curvature)
        exact = self._exact_step(objective, here, curvature, same_data, timer)
        if exact is not None:
            step = StepDecision.of_exact(exact, damping, curvature, same_data)
        else:
            step = self._cg_step(objective, here, curvature, same_data, timer)
        step = step.settled(self._progress, here, eps)
        return step._replace(price=price, begun=begun, failed=broyden)

    def _cg_step(
        self,
        objective: Objective,
        here: Evaluation,
        curvature: ObjectiveOperator,
        same_data: bool,
        timer: StepTimer,
    ) -> StepDecision:
        """Conjugate gradients, then the walk back over their iterates and the line search."""
        vector, space = objective.vector, objective.space
        damping = self.param_groups[0]["damping"]
        with timer.part("products"):
            damping = self._damping(damping, here, curvature, space)
        seen: list[float] = []

        def damped(v: Tensor) -> Tensor:
            product = curvature(v)
            if not seen:
                seen.append(curvature_along(v, product, space))
            return product.add_(v, alpha=damping)

        solution = self._solve(curvature, here, damped, damping, same_data, timer)
        with timer.part("products"):
            rates = vector.spread(self._rates())
            candidates, length = scaled(solution.iterates, rates, here.gradient, damped, space)
        curvature.release()  # trial values in the parameters would spoil the kept graph
        whole = lru_cache(maxsize=1)(space.whole)  # of a direction tried at several lengths
        with vector.trial() as trial, timer.part("evaluations"):

            def loss_along(direction: Tensor, length: float) -> float:
                trial.place(whole(direction), length)
                return objective.trial_loss(here)

            noise = self._progress.noise if same_data else 0.0
            least = resolution(here.loss, vector.dtype, noise)
            move = search(loss_along, candidates, length, here.loss, damping, space, least)
            tried = not math.isnan(move.ratio)
            odd = move.direction is None or ratio_is_absurd(move.ratio)
            if tried and odd and not repeats(loss_along, solution.last.vector):
                said = "" if move.converged or not move.reason else f"{move.reason}. "
                reason = said + _messages.NOT_DETERMINISTIC
                move = move._replace(reason=reason, converged=False, noise=0.0)
            if move.direction is not None:
                moves = trial.moves(whole(move.direction), move.length)
                if not any(objective.reducer.numbers([float(moves)])):
                    move = SearchResult(None, 0.0, here.loss, reason=NO_BIT_MOVES, converged=True)
        return StepDecision(
            move,
            damping,
            solution,
            curvature,
            same_data=same_data,
            curvature_seen=seen[0] if seen else math.nan,
        )

    def _light_step(
        self, objective: Objective, here: Evaluation, same_data: bool, timer: StepTimer
    ) -> LightStep | None:
        """The step by the factors alone, where data change; else None."""
        options, factors = self.param_groups[0], factors_of(self.preconditioner)
        progress = self._progress.seeing(here.loss, same_data)
        inside = objective.runs.needs_graph
        if not takes_light_step(options, self.curvature, factors, progress, same_data, inside):
            return None
        assert factors is not None
        start, rates = self._start, self._rates()
        return light_step(objective, here, factors, progress, start, rates, timer)

    def _damping(
        self, given: float | None, here: Evaluation, curvature: ObjectiveOperator, space: Space
    ) -> float:
        """Lambda of this step: that given, within what the curvature gives sense to."""
        known = self._progress.curvature_seen
        if given is None or (not known and self._progress.steps):  # of an older version's state
            slope = here.gradient
            product = curvature(slope)
            if given is None:
                return initial_damping(slope, product, space)
            known = curvature_along(slope, product, space)
        dtype = here.gradient.dtype
        free = damping_without_curvature(here.gradient_norm, here.loss)
        least = min(free, damping_ceiling(0.0, dtype))
        return min(given, max(damping_ceiling(known, dtype), least))

    def _no_step(self, here: Evaluation) -> str:
        """Why there is nothing to solve; empty where there is."""
        if not math.isfinite(here.loss):
            if not self._progress.steps:  # nothing has ever worked: that is bad input
                raise RuntimeError(_messages.not_finite(here.loss, here.where))
            return f"the loss before the step is {here.loss}{here.where}"
        if here.gradient_norm == 0.0:
            return "the gradient is zero"
        if not math.isfinite(here.gradient_norm):
            return "the gradient is not finite"
        return "" if any(g["lr"] for g in self.param_groups) else "lr is 0"

    def _solve(
        self,
        curvature: ObjectiveOperator,
        here: Evaluation,
        damped: Callable[[Tensor], Tensor],
        damping: float,
        same_data: bool,
        timer: StepTimer,
    ) -> CGResult:
        """Conjugate gradients on the damped quadratic, from the last solution."""
        options = self.param_groups[0]
        free = curvature.objective.free
        space = curvature.objective.space

        def apply(r: Tensor) -> Tensor:
            return free(self.preconditioner.apply(free(r)))

        with timer.part("preconditioner"):
            self.preconditioner.begin(damping, LayerStatistics(curvature))
            if not self._knows_preconditioner:
                check_definite(self.preconditioner, apply, damped, here.gradient, space)
                self._knows_preconditioner = True
        budget = self._progress.seeing(here.loss, same_data).budget
        most = options["cg_max_iter"] or max_iterations(self.preconditioner, same_data, budget)
        decay = options["cg_decay"]
        if decay is None:
            ratio_misses_noise = not same_data and not curvature.objective.own_curvature_batches
            decay = warm_start_factor(self._progress.ratio, most, ratio_misses_noise)
        if is_exact(self.preconditioner):
            most, decay = min(most, EXACT_ITERATIONS), 0.0
        observe = timer.timed("preconditioner", self.preconditioner.observe)
        curvature.replays(self._recorder, most)
        return conjugate_gradients(
            timer.timed("products", damped),
            here.gradient,
            start=free(self._start) if decay and self._start is not None else None,
            decay=decay,
            preconditioner=timer.timed("preconditioner", apply),
            tol=options["cg_tol"],
            max_iter=most,
            observe=observe if worth_observing(self.preconditioner, most) else None,
            space=space,
            damping=damping if self.curvature == "hessian" else None,
        )

    def _commit(
        self, vector: ParameterVector, objective: Objective, here: Evaluation, outcome: StepDecision
    ) -> None:
        """The only place where parameters and the state for the next step change."""
        space = objective.space
        move, solution = outcome.move, outcome.solution
        gradients = here.hand_over_gradients()
        if move.direction is not None:
            direction = space.whole(move.direction)
            if not space.sharded and not vector.sums:
                direction = objective.reducer.agreed(direction)
            vector.move(direction, move.length)
        if solution is not None:
            self.preconditioner.end()
        if outcome.exact is not None:
            norms = outcome.exact.norms
            self._norms = self._norms if norms is None else norms
        self._secant = outcome.next_secant(self._secant)
        if outcome.light is not None:
            self._start = outcome.light.velocity
            if factors := factors_of(self.preconditioner):
                factors.end()
        elif not outcome.nothing_to_do and not move.converged:
            self._start = solution.last.vector if outcome.accepted and solution else None
        damping = outcome.next_damping(self._progress)
        self._progress = outcome.next_progress(self._progress, objective, here)
        for group in self.param_groups:
            group["damping"] = damping
        self._pack(vector, space)
        for p, g in zip(vector.params, gradients, strict=True):
            p.grad = g
        self._left = [ref(p.grad) for p in vector.params if p.grad is not None]
