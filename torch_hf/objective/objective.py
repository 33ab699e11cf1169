"""A user's closure as an objective: loss, gradient, graph, and safe values at trial points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_hf import _messages
from torch_hf.capture.gradient_hooks import free_entries, hooked, modules_watched
from torch_hf.distributed import Reducer, Space, space_of, unreduced
from torch_hf.loss.case_counts import Cases, shares_of
from torch_hf.loss.ggn_split import Split, split_by_calls, split_by_outputs
from torch_hf.loss.hessian_roots import squared_residual
from torch_hf.objective import checks
from torch_hf.objective.closure_runs import NO_BATCH, ClosureRuns
from torch_hf.objective.replay import Replay
from torch_hf.objective.results import Evaluation, Graph, LocalEvaluation
from torch_hf.objective.weight_decay import WeightDecay
from torch_hf.statistics.gradient_moments import variance_over_cases
from torch_hf.vector import ParameterVector

T = TypeVar("T")


class Objective:
    """The sum of what ``backward()`` was called on, or of the loss returned, plus weight decay.

    Args:
        closure: In any of the three forms; it takes a batch where ``batches`` are given.
        vector: The parameters.
        replay: Random states and buffers, kept the same over all runs.
        batches: Batches that the loss is averaged over by number of cases, or None.
        curvature_batches: Those of the products; None for the same.
        decay: Weight decay of each parameter.
        maximize: Whether the closure's objective is to grow.
        layers: Whether graphs keep the inputs and outputs of linear layers.
        tangent_rules: Whether convolutions and normalisations take the rules for Gauss-Newton
            products.
        reducer: Sums over processes.
        space: Where vectors live; None for whole on each rank.
    """

    def __init__(
        self,
        closure: Callable[..., Any],
        vector: ParameterVector,
        replay: Replay,
        *,
        batches: Iterable[Any] | None = None,
        curvature_batches: Iterable[Any] | None = None,
        decay: Sequence[float],
        maximize: bool = False,
        layers: bool = False,
        tangent_rules: bool = True,
        reducer: Reducer,
        space: Space | None = None,
    ) -> None:
        self.vector = vector
        self.replay = replay
        self.own_curvature_batches = curvature_batches is not None
        if self.own_curvature_batches and batches is None:
            raise ValueError(
                "curvature_batches must come with batches, got batches=None. Pass both, and a "
                "closure that takes one batch: step(closure, batches=[batch], "
                "curvature_batches=[part])."
            )
        checks.takes_batch(closure, batches is not None)
        self.reducer = reducer
        self.space = space or space_of(reducer, vector)
        self.batches = [NO_BATCH] if batches is None else self._listed("batches", batches)
        self.curvature_batches = self.batches
        if curvature_batches is not None:
            self.curvature_batches = self._listed("curvature_batches", curvature_batches)
        self.decay = decay
        self.penalty = WeightDecay(decay, vector, self.space, reducer)
        self.sign = -1.0 if maximize else 1.0
        self.runs = ClosureRuns(
            closure,
            vector,
            replay,
            sign=self.sign,
            layers=layers,
            tangent_rules=tangent_rules,
        )
        self.evaluations = 0  # at trial points
        self.fixed: Tensor | None = None  # entries of (P,) that hooks on gradients hold

    def _listed(self, name: str, batches: Iterable[Any]) -> list[Any]:
        """The batches; one rank of several may have none."""
        alone = self.reducer.group is None
        return self.reducer.attempt(lambda: checks.listed(name, batches, empty=not alone)) or []

    # --- the first run: loss and gradient ---

    def evaluate(self, check: Callable[[Sequence[Tensor]], None] = lambda _: None) -> Evaluation:
        """Runs the closure on all batches for the loss and its gradient.

        The graph of a single batch is kept where products are taken on it, too.

        Args:
            check: Called with gradients that the closure leaves as it finds them, if any.

        Raises:
            TypeError, ValueError, RuntimeError: The closure returned something unusable; the
                message says what was expected. What one rank raises, all raise.
        """
        found = self.reducer.attempt(lambda: self._first_run(check))
        if found is None:  # another rank may still be well: it learns of this in the sum
            found = LocalEvaluation(
                [None] * len(self.vector.params), [], [Cases(None, True)], [], None
            )
        flat = self.vector.flatten(found.gradient)
        reached = [g is not None or self.reducer.group is not None for g in found.gradient]
        numbers = [*found.numbers(), float(self.runs.needs_graph)]
        flat, table = self.space.reduce_with(flat, numbers)
        loss, cases, divisor, adds = (sum(column) for column in list(zip(*table, strict=True))[:4])
        self.runs.needs_graph = any(row[5] for row in table)  # also where a rank has no cases
        if adds or self._alone():
            divisor = 1.0
        elif divisor <= 0:
            raise ValueError(
                "The batches must hold at least one case, got none. Leave out empty batches."
            )
        checks.same_terms([row[4] for row in table if row[2]])
        if divisor != 1.0:
            loss, flat = loss / divisor, flat.div_(divisor)
        returned = found.returned
        if len(found.losses) != 1:
            dtype, device = self.vector.dtype, self.vector.device
            returned = torch.tensor(self.sign * loss, dtype=dtype, device=device)
        closures_gradient = flat.clone() if any(self.decay) else None
        self.penalty.add_gradient(flat)
        flat = self.free(flat)
        where = self.reducer.named([i for i, row in enumerate(table) if not math.isfinite(row[0])])
        return Evaluation(
            loss=loss + self.penalty.loss(),
            gradient=flat,
            closures_gradient=closures_gradient,
            as_grads=self._as_grads(reached),
            gradient_norm=self.space.norm(flat),
            cases=cases or 1.0,
            shares=found.shares,
            divisor=divisor,
            returned=returned,
            graph=found.graph,
            where=where,
        )

    def _first_run(self, check: Callable[[Sequence[Tensor]], None]) -> LocalEvaluation:
        gradient: list[Tensor | None] = [None] * len(self.vector.params)
        losses, counts, returned, kept = [], [], None, None
        keep = len(self.batches) == 1 and not self.own_curvature_batches
        with self.replay.first_run():
            for i, batch in enumerate(self.batches):
                graph = self.runs.graph(batch)
                self.runs.needs_graph |= graph.record.differentiates_inside
                losses.append(float(graph.loss.detach()))
                counts.append(graph.cases)
                share = self._share(graph.cases, counts[0].adds)
                self._add_gradient(gradient, graph.loss, share, keep)
                kept = graph if keep else None
                if i == 0:
                    returned = graph.returned
                self.replay.mark()
        if not self.vector.sums:  # there autograd knows nothing of these parameters
            self._look_at_hooks()
        message = "" if self.reducer.group else unreduced(self.replay.buffers.seen)
        if message:
            raise RuntimeError(message)
        if self.runs.uncleared:
            check(self.runs.uncleared)
        shares = [1.0] if self._alone() else shares_of(counts, "batches") if counts else []
        return LocalEvaluation(gradient, losses, counts, shares, returned, kept)

    def _look_at_hooks(self) -> None:
        """Masks are taken up; hooks that change gradients otherwise are errors."""
        if modules := hooked(self.replay.buffers.seen):  # a gradient more, to see what they do
            with self.replay.rerun(), modules_watched(modules):
                loss = self.runs.graph(self.batches[0]).loss
                self.vector.pull([loss], [torch.ones_like(loss)], False)
        free = free_entries(self.vector.params)
        if free is not None:
            self.fixed = self.space.own(self.vector.flatten(free)) == 0

    def free(self, v: Tensor) -> Tensor:
        """A vector of the objective's space without the entries that hooks on gradients hold."""
        return v if self.fixed is None else v.masked_fill(self.fixed, 0.0)

    def _alone(self) -> bool:
        """Whether there is but one batch of one process, which needs no weight."""
        return len(self.batches) == 1 and self.reducer.group is None

    def _add_gradient(
        self, total: list[Tensor | None], loss: Tensor, share: float, keep: bool
    ) -> None:
        """One batch's gradient onto the sum so far, so that no two batches' are held."""
        # A backward that crosses ranks brings slopes of other ranks' losses, weighted by theirs.
        found = self.vector.pull([loss], [torch.full_like(loss, share)], keep)
        checks.gradients(found)
        for i, g in enumerate(found):
            if g is not None:
                part = g if share or bool(g.isfinite().all()) else torch.zeros_like(g)
                before = total[i]
                total[i] = part if before is None else before.add_(part)

    def _share(self, cases: Cases, adds: bool) -> float:
        """What a batch counts before the sum over batches is divided."""
        if self._alone() or adds or not cases.denominators:
            return 1.0
        return cases.denominators[0]

    def _as_grads(self, reached: Sequence[bool]) -> Callable[[Tensor], list[Tensor | None]]:
        """How the closure's gradient, what this rank holds of (P,), becomes ``.grad``."""
        vector, space, sign = self.vector, self.space, self.sign

        def grads(own: Tensor) -> list[Tensor | None]:
            whole = space.whole(own if sign == 1.0 else own.mul_(sign))
            found = vector.gradients(whole)
            return [g if r else None for g, r in zip(found, reached, strict=True)]

        return grads

    # --- trial points ---

    def trial_loss(self, here: Evaluation) -> float:
        """The objective at whatever values the parameters hold now, without a graph if it can.

        It is inf where the closure raises ``torch.linalg.LinAlgError``: a matrix that cannot be
        factorized is outside of where the loss is defined.

        Args:
            here: Whose batches are averaged alike.
        """
        self.evaluations += 1
        weighted = self._attempt_at_trial(partial(self._own_loss, here.shares))
        penalty = self.penalty.own_loss() * self.space.share
        total, penalty = self.reducer.numbers([math.inf if weighted is None else weighted, penalty])
        return total / here.divisor + penalty

    def _attempt_at_trial(self, compute: Callable[[], T]) -> T | None:
        """What is computed; None where a matrix cannot be factorized, or a rank has failed."""

        def part() -> T | None:
            try:
                return compute()
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                if self.reducer.inside:  # other ranks wait for this one
                    raise
                return None

        return self.reducer.attempt(part)

    def _own_loss(self, shares: Sequence[float]) -> float:
        losses = self.runs.losses(self.batches)
        return sum(s * float(x) for s, x in zip(shares, losses, strict=True) if s)

    def trial_gradient(self, here: Evaluation) -> tuple[float, Tensor]:
        """As :meth:`trial_loss`, and the gradient (P,) there.

        A loss that is no number is inf.
        """
        self.evaluations += 1
        found = self._attempt_at_trial(partial(self._own_gradient, here.shares))
        weighted, flat = found or (math.inf, self.vector.zeros())
        penalty = self.penalty.own_loss() * self.space.share
        flat, table = self.reducer.vector(flat, [weighted, penalty])
        total, penalty = (sum(column) for column in zip(*table, strict=True))
        loss = total / here.divisor + penalty
        if here.divisor != 1.0:
            flat.div_(here.divisor)
        self.penalty.add_gradient(flat)
        return loss if math.isfinite(loss) else math.inf, self.free(flat)

    def _own_gradient(self, shares: Sequence[float]) -> tuple[float, Tensor]:
        gradient: list[Tensor | None] = [None] * len(self.vector.params)
        losses = []
        for i, (batch, share) in enumerate(zip(self.batches, shares, strict=True)):
            with self.replay.rerun(i):
                own = self.runs.loss(batch)
            losses.append(float(own.detach()))
            self._add_gradient(gradient, own, share, False)
        total = sum(s * x for s, x in zip(shares, losses, strict=True) if s)
        return total, self.vector.flatten(gradient)

    def trial_residual(self, here: Evaluation) -> tuple[float, Tensor | None]:
        """As :meth:`trial_loss`, and the residual where the loss is a sum of squares.

        Returns:
            The loss, and on the first rank the residual in the order of the Jacobian's rows
            (:func:`~torch_hf.curvature.jacobian.jacobian_root`); None for other losses.
        """
        self.evaluations += 1
        found = self._attempt_at_trial(partial(self._own_residual, here))
        weighted, residual = found or (math.inf, None)
        penalty = self.penalty.own_loss() * self.space.share
        counts = -1.0 if residual is None else float(len(residual))
        table = self.reducer.table([weighted, penalty, counts])
        loss = sum(row[0] for row in table) / here.divisor + sum(row[1] for row in table)
        if residual is None or any(row[2] < 0 for row in table):
            return loss, None
        return loss, self.reducer.collected(residual, [int(row[2]) for row in table])

    def _own_residual(self, here: Evaluation) -> tuple[float, Tensor | None]:
        losses, parts = [], []
        for i, (batch, share) in enumerate(zip(self.batches, here.shares, strict=True)):
            with self.replay.rerun(i):
                graph = self.runs.graph(batch)
            losses.append(float(graph.loss.detach()))
            if share:
                terms = self.split(graph).loss_terms
                part = squared_residual(terms, self.vector.params)
                parts.append(None if part is None else part * math.sqrt(share / here.divisor))
        total = sum(s * x for s, x in zip(here.shares, losses, strict=True) if s)
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return total, None
        none = self.vector.zeros()[:0]  # of a rank without cases
        return total, torch.cat(found) if found else none

    def gradient_variance(self, here: Evaluation) -> float:
        """The L1 norm of the gradient's variance over cases, ``sum_j Var_i g_ij``.

        Args:
            here: Of the parameters as they are. It is cheaper before an operator takes its graph.

        Source: Byrd, Chin, Nocedal & Wu 2012, "Sample size selection in optimization methods
        for machine learning", section 3.
        """
        total = self.reducer.attempt(lambda: self._own_variance(here))
        (total,) = self.reducer.numbers([total or 0.0])
        return total * here.cases

    def _own_variance(self, here: Evaluation) -> float:
        if self.vector.sums:
            raise RuntimeError(_messages.PER_CASE.format(what="VarianceGrowth"))
        total = 0.0
        for i, (batch, weight) in enumerate(zip(self.batches, here.weights, strict=True)):
            if not weight:
                continue
            with self.replay.rerun(i):
                graph = here.graph or self.runs.graph(batch)
            loss_terms = self.split(graph).loss_terms
            total += weight**2 * variance_over_cases(loss_terms, self.vector.params)
        return total

    # --- graphs ---

    @contextmanager
    def graph(self) -> Iterator[Graph]:
        """The graph of the first batch alone, as a first run."""
        with self.replay.first_run():
            graph = self.runs.graph(self.batches[0])
        yield graph

    def curvature_weights(
        self, counts: list[Cases] | None, here: Evaluation | None
    ) -> tuple[list[float], float]:
        """Each curvature batch's weight, and the number of cases in all.

        Where losses add, the sum over a sample stands for the sum over all cases.

        Args:
            counts: Of this rank's batches; None where it failed, which all learn of here.
            here: Whose cases a sample stands for; it may lack where there is no sample.
        """
        counts = counts or []
        if len(counts) == 1 and self.reducer.group is None:
            shares = [1.0]
        elif counts:
            shares = self.reducer.attempt(lambda: shares_of(counts, "curvature_batches")) or []
        else:
            shares = []
        own = sum(c.number or 0.0 for c in counts)
        own_adds = float(bool(counts) and counts[0].adds)
        cases, divisor, adds = self.reducer.numbers([own, sum(shares), own_adds])
        if divisor <= 0:
            raise ValueError(
                "The curvature_batches must hold at least one case, got none. Leave out empty "
                "batches."
            )
        if not adds:
            return [x / divisor for x in shares], cases or 1.0
        if self.own_curvature_batches:
            assert here is not None
            return [x * here.cases / cases for x in shares], cases
        return shares, cases or 1.0

    def curvature_graph(self, i: int) -> Graph:
        """The graph of curvature batch ``i``, of a new run."""
        with self.replay.rerun(i):
            return self.runs.graph(self.curvature_batches[i])

    def outputs_at(self, i: int, values: Sequence[Tensor]) -> list[Tensor | None]:
        """The outputs of curvature batch ``i``, with other values in the parameters."""
        with self._graph_at(i, values) as graph:
            return [
                z.detach() for loss_term in self.split(graph).loss_terms for z in loss_term.outputs
            ]

    def slopes_at(self, i: int, values: Sequence[Tensor]) -> list[Tensor | None]:
        """The loss's gradient in these outputs, and the loss, at other parameters."""
        with self._graph_at(i, values) as graph:
            terms = self.split(graph).loss_terms
            slopes = [slope.detach() for loss_term in terms for slope in loss_term.gradient()]
            return [*slopes, graph.loss.detach()]

    def gradient_at(self, i: int, values: Sequence[Tensor], scale: float) -> list[Tensor | None]:
        """The gradient on curvature batch ``i`` times ``scale``, at other parameters."""
        with self._graph_at(i, values) as graph:
            found = self.vector.pull([graph.loss], [torch.full_like(graph.loss, scale)], False)
            return [None if g is None else g.detach() for g in found]

    @contextmanager
    def _graph_at(self, i: int, values: Sequence[Tensor]) -> Iterator[Graph]:
        with self.vector.lent(values):
            yield self.curvature_graph(i)

    def split(self, graph: Graph) -> Split:
        """The Gauss-Newton split of a graph."""
        if graph.outputs:
            return split_by_outputs(graph.record, graph.loss, graph.outputs, self.vector.params)
        return split_by_calls(graph.record, graph.loss, self.vector.params)
