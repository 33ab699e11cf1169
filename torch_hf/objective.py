"""A user's closure as an objective: loss, gradient, graph, and safe values at trial points."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_hf import _checks
from torch_hf.capture import Capture, Record
from torch_hf.cases import Cases, count_cases, weigh
from torch_hf.frozen import FrozenWorld
from torch_hf.per_case import variance_over_cases
from torch_hf.reduce import Reducer
from torch_hf.split import Split, split_by_calls, split_by_outputs
from torch_hf.vector import ParameterVector

_NO_BATCH = object()
#: How autograd says that it was asked for a derivative where no graph was built.
_NEEDS_GRAPH = re.compile(r"requires?[_ ]grad|used in the graph")


class Graph(NamedTuple):
    """One batch's run of the closure, its graph alive."""

    loss: Tensor  # scalar, the sign such that it is minimised
    outputs: tuple[Tensor, ...]  # those the closure returned, if any
    record: Record
    returned: Any
    cases: Cases


class Value(NamedTuple):
    """The objective and its gradient at the present parameters."""

    loss: float
    gradient: Tensor  # (P,), weight decay included
    plain_gradient: list[Tensor | None]  # as .grad shows it: the closure's own
    gradient_norm: float
    cases: float
    returned: Any


class Objective:
    """The sum of what ``backward()`` was called on, or of the loss returned, plus weight decay.

    Args:
        closure: In any of the three forms; it takes a batch where ``batches`` are given.
        vector: The parameters.
        world: Random states and buffers, kept the same over all runs.
        batches: Batches that the loss is averaged over by number of cases, or None.
        curvature_batches: Those of the products; None for the same.
        decay: Weight decay of each parameter.
        maximize: Whether the closure's objective is to grow.
        layers: Whether graphs keep the inputs and outputs of linear layers.
        fast_convolutions: Whether convolutions take the rule for Gauss-Newton products.
        reducer: Sums over processes.
    """

    def __init__(
        self,
        closure: Callable[..., Any],
        vector: ParameterVector,
        world: FrozenWorld,
        *,
        batches: Iterable[Any] | None = None,
        curvature_batches: Iterable[Any] | None = None,
        decay: Sequence[float],
        maximize: bool = False,
        layers: bool = False,
        fast_convolutions: bool = True,
        reducer: Reducer,
    ) -> None:
        self.closure = closure
        self.vector = vector
        self.world = world
        self.own_curvature_batches = curvature_batches is not None
        if self.own_curvature_batches and batches is None:
            raise ValueError(
                "curvature_batches was given without batches. Pass both, and a closure that "
                "takes one batch: step(closure, batches=[batch], curvature_batches=[part])."
            )
        _checks.takes_batch(closure, batches is not None)
        self.batches = [_NO_BATCH] if batches is None else _checks.listed("batches", batches)
        self.curvature_batches = self.batches
        if curvature_batches is not None:
            self.curvature_batches = _checks.listed("curvature_batches", curvature_batches)
        self.decay = decay
        self.sign = -1.0 if maximize else 1.0
        self.layers = layers
        self.fast_convolutions = fast_convolutions
        self.reducer = reducer
        self.needs_graph = False
        self.accumulates = False  # whether backward() found gradients that were not cleared
        self.weights: list[float] = []
        self.cases = 0.0
        self.kept: Graph | None = None  # the graph of a single batch, for the curvature
        self.evaluations = 0

    # --- the first run: loss and gradient ---

    def value(self) -> Value:
        """Runs the closure on all batches for the loss and its gradient.

        Raises:
            TypeError, ValueError, RuntimeError: The closure returned something unusable; the
                message says what was expected.
        """
        gradient: list[Tensor | None] = [None] * len(self.vector.params)
        losses, counts, returned = [], [], None
        with self.world.first_run():
            for i, batch in enumerate(self.batches):
                graph = self._run(batch)
                self.needs_graph |= graph.record.differentiates_inside
                losses.append(float(graph.loss.detach()))
                counts.append(graph.cases)
                self._add_gradient(gradient, graph, self._share(graph.cases, counts[0].adds))
                if i == 0:
                    returned = parse_loss(graph.returned)
                self.world.mark()
        self.weights, self.cases = self._weigh(counts, "batches")
        shares = [self._share(c, c.adds) for c in counts]
        scale = next((w / s for w, s in zip(self.weights, shares, strict=True) if s), 1.0)
        loss = sum(w * x for w, x in zip(self.weights, losses, strict=True) if w)
        (loss,) = self.reducer.numbers([loss])
        plain = [None if g is None else g.mul_(scale) for g in gradient] if scale != 1 else gradient
        flat = self.reducer.vector(self.vector.flatten(plain))
        plain = self._plain(plain, flat)
        self._add_decay(flat)
        if len(losses) > 1:
            dtype, device = self.vector.dtype, self.vector.device
            returned = torch.tensor(self.sign * loss, dtype=dtype, device=device)
        norm = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
        full = loss + self._decay_loss()
        return Value(full, flat, plain, norm, self.cases, returned)

    def _add_gradient(self, total: list[Tensor | None], graph: Graph, share: float) -> None:
        """One batch's gradient onto the sum so far, so that no two batches' are held."""
        keep = len(self.batches) == 1 and not self.own_curvature_batches
        params = self.vector.params
        found = torch.autograd.grad(graph.loss, params, retain_graph=keep, allow_unused=True)
        _checks.gradients(found)
        self.kept = graph if keep else None
        for i, g in enumerate(found):
            if g is not None:
                part = g if share == 1 else g * share if share else torch.zeros_like(g)
                before = total[i]
                total[i] = part if before is None else before.add_(part)

    def _share(self, cases: Cases, adds: bool) -> float:
        """What a batch counts before the sum over batches is divided."""
        alone = len(self.batches) == 1 and self.reducer.group is None
        if alone or adds or not cases.denominators:
            return 1.0
        return cases.denominators[0]

    def _weigh(self, counts: list[Cases], name: str) -> tuple[list[float], float]:
        if len(counts) == 1 and self.reducer.group is None:
            return [1.0], counts[0].number or 1.0
        return weigh(counts, name, self.reducer.numbers)

    # --- weight decay ---

    def _decay_loss(self) -> float:
        pairs = [(d, p) for d, p in zip(self.decay, self.vector.params, strict=True) if d]
        if not pairs:
            return 0.0
        with torch.no_grad():
            squares = [d * p.double().square().sum() for d, p in pairs]
        return 0.5 * float(torch.stack(squares).sum())

    def _add_decay(self, flat: Tensor) -> None:
        for d, p, g in zip(self.decay, self.vector.params, self.vector.views(flat), strict=True):
            if d:
                g.add_(p.detach(), alpha=d)

    def _plain(self, found: list[Tensor | None], flat: Tensor) -> list[Tensor | None]:
        """The closure's own gradient as ``.grad`` shows it; where that is ``flat``, its views."""
        if self.reducer.group is not None:  # ranks may differ in what their loss reaches
            return list(self.vector.unflatten(flat * self.sign))
        if self.sign == -1.0 or any(self.decay) or self.vector.mixed:
            return [None if g is None else g * self.sign for g in found]
        views = self.vector.views(flat)
        return [None if g is None else v for g, v in zip(found, views, strict=True)]

    # --- trial points ---

    def loss(self) -> float:
        """The objective at whatever values the parameters hold now, without a graph if it can."""
        self.evaluations += 1
        if not self.needs_graph:
            try:
                return self._loss(grad=False)
            except RuntimeError as error:
                if not _NEEDS_GRAPH.search(str(error)):
                    raise
                self.needs_graph = True  # the closure differentiates in a way that was not seen
        return self._loss(grad=True)

    def _loss(self, grad: bool) -> float:
        losses = []
        with self.world.rerun(), torch.set_grad_enabled(grad):
            for batch in self.batches:
                capture = Capture(self.vector.params, calls=False)
                losses.append(self._objective(self._call(capture, batch)).detach())
        weighted = sum(w * float(x) for w, x in zip(self.weights, losses, strict=True) if w)
        (total,) = self.reducer.numbers([weighted])
        return total + self._decay_loss()

    def gradient_variance(self, here: Value) -> float:
        """The L1 norm of the gradient's variance over cases, ``sum_j Var_i g_ij``.

        Source: Byrd, Chin, Nocedal & Wu 2012, "Sample size selection in optimization methods
        for machine learning", section 3.
        """
        total = 0.0
        shared = self.kept is not None and not self.own_curvature_batches
        for i, (batch, weight) in enumerate(zip(self.batches, self.weights, strict=True)):
            if not weight:
                continue
            with self.world.rerun(i):
                graph = self.kept if shared else self._run(batch)
            assert graph is not None
            heads = self.split(graph).heads
            total += weight**2 * variance_over_cases(heads, self.vector.params)
        (total,) = self.reducer.numbers([total])
        return total * here.cases

    # --- graphs ---

    @contextmanager
    def graph(self) -> Iterator[Graph]:
        """The graph of the first batch alone, as a first run."""
        with self.world.first_run():
            graph = self._run(self.batches[0])
        yield graph

    def curvature_weights(self, counts: list[Cases]) -> tuple[list[float], float]:
        """Each curvature batch's weight, and the number of cases in all.

        Where losses add, the sum over a sample stands for the sum over all cases.
        """
        weights, cases = self._weigh(counts, "curvature_batches")
        if self.own_curvature_batches and counts[0].adds:
            weights = [w * self.cases / cases for w in weights]
        return weights, cases

    @contextmanager
    def curvature_graph(self, i: int) -> Iterator[Graph]:
        """The graph of curvature batch ``i``: the kept one, or that of a new run."""
        if self.kept is not None:
            yield self.kept
            return
        with self.world.rerun(i):
            graph = self._run(self.curvature_batches[i])
        yield graph

    def outputs_at(self, i: int, values: Sequence[Tensor]) -> list[Tensor | None]:
        """The outputs of curvature batch ``i``, with other values in the parameters."""
        with self._graph_at(i, values) as graph:
            return [z.detach() for head in self.split(graph).heads for z in head.outputs]

    def gradient_at(self, i: int, values: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradient on curvature batch ``i``, with other values in the parameters."""
        with self._graph_at(i, values) as graph:
            found = torch.autograd.grad(graph.loss, self.vector.params, allow_unused=True)
            return [None if g is None else g.detach() for g in found]

    @contextmanager
    def _graph_at(self, i: int, values: Sequence[Tensor]) -> Iterator[Graph]:
        with self.vector.lent(values):
            with self.world.rerun(i):
                graph = self._run(self.curvature_batches[i])
            yield graph

    def split(self, graph: Graph) -> Split:
        """The Gauss-Newton split of a graph."""
        if graph.outputs:
            return split_by_outputs(graph.record, graph.loss, graph.outputs, self.vector.params)
        return split_by_calls(graph.record, graph.loss, self.vector.params)

    # --- running the closure ---

    def _call(self, capture: Capture, batch: Any) -> Record:
        args = () if batch is _NO_BATCH else (batch,)
        gradients = [p.grad for p in self.vector.params]
        for p in self.vector.params:
            p.grad = None  # so that the closure's zero_grad() does not reach the present ones
        try:
            with self.world.surroundings():
                return capture.run(self.closure, *args)
        except (AttributeError, RuntimeError) as error:
            if capture.record.held and _checks.misses_gradients(error):
                raise RuntimeError(_checks.HELD_BACK) from error
            raise
        finally:
            for p, g in zip(self.vector.params, gradients, strict=True):
                p.grad = g

    @torch.enable_grad()
    def _run(self, batch: Any) -> Graph:
        capture = Capture(
            self.vector.params, layers=self.layers, fast_convolutions=self.fast_convolutions
        )
        record = self._call(capture, batch)
        self.accumulates |= bool(record.held) and not record.clears
        loss = self._objective(record)
        returned, outputs, cases = _checks.returned(record.returned)
        if not loss.requires_grad:
            raise RuntimeError(
                "The closure's loss is a constant: it is not connected to any parameter. Compute "
                "it from the model's output without detach(), item() or torch.no_grad()."
            )
        counted = count_cases(record, loss, outputs, self.vector.params)
        if cases is not None:
            counted = Cases(cases, adds=False, denominators=(cases,))
        return Graph(loss, outputs, record, returned, counted)

    def _objective(self, record: Record) -> Tensor:
        loss, _, _ = _checks.returned(record.returned)
        terms = [_checks.scalar(term) for term in record.held or [loss]]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total if self.sign == 1.0 else -total


def parse_loss(returned: Any) -> Any:
    """The loss alone of what a closure returned."""
    loss = returned[0] if isinstance(returned, (tuple, list)) else returned
    return loss.detach() if isinstance(loss, Tensor) else loss
