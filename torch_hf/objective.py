"""A user's closure as an objective: loss, gradient, graph, and safe values at trial points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_hf.capture import Capture, Record
from torch_hf.cases import Cases, count_cases
from torch_hf.frozen import FrozenWorld
from torch_hf.per_case import signed_square, variance_norm
from torch_hf.reduce import Reducer
from torch_hf.split import Split, split_by_calls, split_by_outputs
from torch_hf.vector import ParameterVector

_NO_BATCH = object()


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
        self.batches = _listed(batches, "batches")
        self.own_curvature_batches = curvature_batches is not None
        self.curvature_batches = (
            _listed(curvature_batches, "curvature_batches")
            if curvature_batches is not None
            else self.batches
        )
        if self.own_curvature_batches and batches is None:
            raise ValueError(
                "curvature_batches was given without batches. Pass both, and a closure that "
                "takes one batch: step(closure, batches=[batch], curvature_batches=[part])."
            )
        self.decay = decay
        self.sign = -1.0 if maximize else 1.0
        self.layers = layers
        self.fast_convolutions = fast_convolutions
        self.reducer = reducer
        self.needs_graph = False
        self.weights: list[float] = []
        self.kept: Graph | None = None  # the graph of a single batch, for the curvature
        self.evaluations = 0

    # --- the first run: loss and gradient ---

    def value(self) -> Value:
        """Runs the closure on all batches for the loss and its gradient.

        Raises:
            TypeError, ValueError, RuntimeError: The closure returned something unusable; the
                message says what was expected.
        """
        with self.world.first_run():
            runs = [self._differentiate(i) for i in range(len(self.batches))]
        counts = [run[2] for run in runs]
        self.weights, total = self._weigh(counts, "batches")
        losses = [run[0] for run in runs]
        gradients = [run[1] for run in runs]
        loss = sum(w * x for w, x in zip(self.weights, losses, strict=True))
        (loss,) = self.reducer.numbers([loss])
        _check_finite(loss)
        plain = self._combined(gradients)
        flat = self.reducer.vector(self.vector.flatten(plain))
        if self.reducer.group is not None:
            plain = list(self.vector.unflatten(flat.clone()))
        self._add_decay(flat)
        returned = runs[0][3]
        if len(runs) > 1:
            returned = torch.tensor(self.sign * loss, dtype=self.vector.dtype)
        norm = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
        full = loss + self._decay_loss()
        return Value(full, flat, self._signed(plain), norm, total, returned)

    def _differentiate(self, i: int) -> tuple[float, list[Tensor | None], Cases, Any]:
        graph = self._run(self.batches[i])
        self.needs_graph |= graph.record.differentiates_inside
        keep = len(self.batches) == 1 and not self.own_curvature_batches
        found = torch.autograd.grad(
            graph.loss, self.vector.params, retain_graph=keep, allow_unused=True
        )
        if all(g is None for g in found):
            raise RuntimeError(
                "The closure's loss does not depend on any parameter of this optimizer. Give the "
                "optimizer the parameters of the model that the closure calls."
            )
        self.kept = graph if keep else None
        self.world.mark()
        return float(graph.loss.detach()), list(found), graph.cases, graph.returned

    def _combined(self, gradients: list[list[Tensor | None]]) -> list[Tensor | None]:
        total: list[Tensor | None] = []
        for parts in zip(*gradients, strict=True):
            terms = [w * g for w, g in zip(self.weights, parts, strict=True) if g is not None]
            total.append(torch.stack(terms).sum(0) if len(terms) > 1 else next(iter(terms), None))
        return total

    def _weigh(self, counts: list[Cases], name: str) -> tuple[list[float], float]:
        """Each batch's weight, so that the sum is the mean by cases, and the number of cases."""
        adds = all(c.adds for c in counts)
        known = [c.number for c in counts if c.number is not None]
        alone = len(counts) == 1 and self.reducer.group is None
        if alone:
            return [1.0], known[0] if known else 1.0
        if len(known) < len(counts) and not adds:
            raise ValueError(
                f"The losses of several {name} are to be averaged by number of cases, but the "
                "terms of the loss have no number of cases in common. Let the closure return it: "
                "`return loss, outputs, cases`."
            )
        (total,) = self.reducer.numbers([sum(known)])
        if adds:
            return [1.0] * len(counts), total
        if total <= 0:
            raise ValueError(f"The {name} hold no case at all. Leave out empty batches.")
        return [n / total for n in known], total

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

    def _signed(self, gradient: list[Tensor | None]) -> list[Tensor | None]:
        return [None if g is None else g * self.sign for g in gradient]

    # --- trial points ---

    def loss(self) -> float:
        """The objective at whatever values the parameters hold now, without a graph if it can."""
        self.evaluations += 1
        if not self.needs_graph:
            try:
                return self._loss(grad=False)
            except RuntimeError:  # the closure differentiates in a way that was not seen
                self.needs_graph = True
        return self._loss(grad=True)

    def _loss(self, grad: bool) -> float:
        losses = []
        with self.world.rerun(), torch.set_grad_enabled(grad):
            for batch in self.batches:
                capture = Capture(self.vector.params, calls=False)
                losses.append(self._objective(self._call(capture, batch)).detach())
        weighted = sum(w * float(x) for w, x in zip(self.weights, losses, strict=True))
        (total,) = self.reducer.numbers([weighted])
        return total + self._decay_loss()

    def gradient_variance(self, here: Value) -> float:
        """The L1 norm of the gradient's variance over cases (Byrd et al. 2012)."""
        total = 0.0
        shared = self.kept is not None and not self.own_curvature_batches
        for i, (batch, weight) in enumerate(zip(self.batches, self.weights, strict=True)):
            with self.world.rerun(i):
                graph = self.kept if shared else self._run(batch)
            assert graph is not None
            heads = self.split(graph).heads
            total += weight**2 * signed_square(heads, self.vector.params)
        (total,) = self.reducer.numbers([total])
        return variance_norm(total, here.cases, here.gradient_norm)

    # --- graphs for the curvature ---

    def curvature_weights(self, counts: list[Cases]) -> tuple[list[float], float]:
        return self._weigh(counts, "curvature_batches")

    @contextmanager
    def curvature_graph(self, i: int) -> Iterator[Graph]:
        """The graph of curvature batch ``i``: the kept one, or that of a new run."""
        if self.kept is not None:
            yield self.kept
            return
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
        return capture.run(self.closure, *args)

    @torch.enable_grad()
    def _run(self, batch: Any) -> Graph:
        capture = Capture(
            self.vector.params, layers=self.layers, fast_convolutions=self.fast_convolutions
        )
        record = self._call(capture, batch)
        loss = self._objective(record)
        returned, outputs, cases = parse(record)
        if not loss.requires_grad:
            raise RuntimeError(
                "The closure's loss is a constant: it is not connected to any parameter. Compute "
                "it from the model's output without detach(), item() or torch.no_grad()."
            )
        counted = count_cases(record, loss, outputs, self.vector.params)
        if cases is not None:
            counted = Cases(cases, adds=False)
        return Graph(loss, outputs, record, returned, counted)

    def _objective(self, record: Record) -> Tensor:
        returned, _, _ = parse(record)
        terms = record.held or [returned]
        for term in terms:
            if not isinstance(term, Tensor) or term.numel() != 1:
                got = tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__
                raise ValueError(
                    f"The closure's loss must be a tensor with one element, got {got}. "
                    "Reduce it, for instance with loss.mean()."
                )
        total = terms[0].reshape(())
        for term in terms[1:]:
            total = total + term.reshape(())
        return total if self.sign == 1.0 else -total


def parse(record: Record) -> tuple[Any, tuple[Tensor, ...], float | None]:
    """What a closure returned, as (loss, outputs, cases)."""
    returned = record.returned
    if returned is None:
        raise TypeError(
            "The closure returned None, but the loss was expected. End it with `return loss`."
        )
    if not isinstance(returned, (tuple, list)):
        return returned, (), None
    if len(returned) not in (2, 3):
        raise TypeError(
            f"The closure returned a {type(returned).__name__} of {len(returned)}, but a loss, "
            "(loss, outputs) or (loss, outputs, cases) was expected."
        )
    outputs = returned[1]
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not isinstance(outputs, (tuple, list)) or not all(isinstance(z, Tensor) for z in outputs):
        raise TypeError(
            "The closure returned (loss, outputs) where outputs is neither a tensor nor a tuple "
            "of tensors. Return the tensors that the loss was computed from."
        )
    if torch.is_grad_enabled() and not any(z.requires_grad for z in outputs):
        raise RuntimeError(
            "The outputs that the closure returned are not connected to the loss (none requires "
            "a gradient). Return the very tensors that the loss was computed from, not detached."
        )
    cases = None
    if len(returned) == 3:
        cases = float(returned[2])
        if not (math.isfinite(cases) and cases > 0):
            raise ValueError(f"The closure's number of cases must be positive, got {returned[2]!r}.")
    return returned[0], tuple(outputs), cases


def parse_loss(returned: Any) -> Any:
    """The loss alone of what a closure returned."""
    loss = returned[0] if isinstance(returned, (tuple, list)) else returned
    return loss.detach() if isinstance(loss, Tensor) else loss


def _listed(batches: Iterable[Any] | None, name: str) -> list[Any]:
    if batches is None:
        return [_NO_BATCH]
    if isinstance(batches, (Tensor, dict, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} must be a list (or another iterable) of batches, got a "
            f"{type(batches).__name__}. Wrap a single batch: {name}=[batch], or cut it: "
            f"{name}=split_batch(batch, size)."
        )
    listed = list(batches)
    if not listed:
        raise ValueError(f"{name} is empty: at least one batch is needed.")
    return listed


def _check_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise RuntimeError(
            f"The closure's loss is {loss} at the present parameters, so no step can be judged. "
            "Check the batch for NaN or Inf, and the loss for log(0) or a division by zero "
            "(F.cross_entropy and F.binary_cross_entropy_with_logits are safe forms)."
        )
