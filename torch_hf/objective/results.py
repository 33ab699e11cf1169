"""What runs of a closure yield: a graph, what one rank found, the objective at a point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from torch_hf.capture.capture import Record
from torch_hf.loss.case_counts import Cases, agreed_terms


class Graph(NamedTuple):
    """One batch's run of the closure, its graph alive."""

    loss: Tensor  # scalar, the sign such that it is minimised
    outputs: tuple[Tensor, ...]  # those the closure returned, if any
    record: Record
    returned: Any  # the loss as the closure returned it, detached: reported, not minimised
    cases: Cases


class LocalEvaluation(NamedTuple):
    """What the first run came to on this rank: sums over its batches, by their shares."""

    gradient: list[Tensor | None]
    losses: list[float]
    counts: list[Cases]
    shares: list[float]
    returned: Any
    graph: Graph | None = None  # of a single batch whose products are taken on it, too

    def numbers(self) -> list[float]:
        """Loss, cases, shares, whether losses add, and what must agree on all ranks."""
        loss = sum(s * x for s, x in zip(self.shares, self.losses, strict=True) if s)
        cases = sum(c.number or 0.0 for c in self.counts)
        if not self.counts:
            return [0.0] * 5
        adds = float(self.counts[0].adds)
        return [loss, cases, sum(self.shares), adds, agreed_terms(self.counts[0])]


class Evaluation:
    """The objective and its gradient where the parameters are, and how its batches are averaged.

    What is asked of an objective later, a loss at a trial point or the gradient's variance, is
    asked with its evaluation. It owns two things that are handed over once: the graph, to the
    operator that takes products through it, and the gradient, to ``.grad``.

    Args:
        loss: Weight decay included.
        gradient: What this rank holds of (P,), weight decay included.
        closures_gradient: The same without weight decay; None where that is ``gradient``.
        as_grads: Turns the closure's gradient, which it may edit, into each parameter's ``.grad``.
        gradient_norm: Of ``gradient``.
        cases: In all batches of all ranks; 1 where nothing tells.
        shares: What each of this rank's batches counts in the sum over batches.
        divisor: What that sum is divided by.
        returned: What the step returns.
        graph: Of a single batch whose products are taken on it, too.
        where: The ranks whose loss is not finite, as said in a message.
    """

    def __init__(
        self,
        *,
        loss: float,
        gradient: Tensor,
        closures_gradient: Tensor | None,
        as_grads: Callable[[Tensor], list[Tensor | None]],
        gradient_norm: float,
        cases: float,
        shares: Sequence[float],
        divisor: float,
        returned: Any,
        graph: Graph | None,
        where: str = "",
    ) -> None:
        self.loss = loss
        self.gradient_norm = gradient_norm
        self.cases = cases
        self.shares = shares
        self.divisor = divisor
        self.returned = returned
        self.where = where
        self._gradient: Tensor | None = gradient
        self._closures_gradient = closures_gradient
        self._as_grads = as_grads
        self._graph = graph

    @property
    def gradient(self) -> Tensor:
        """What this rank holds of (P,), weight decay included.

        Raises:
            RuntimeError: It was handed over.
        """
        if self._gradient is None:
            raise RuntimeError(
                "This evaluation's gradient was handed over to .grad and cannot be read here. "
                "Read it before hand_over_gradients(), or evaluate the objective again."
            )
        return self._gradient

    @property
    def weights(self) -> list[float]:
        """Each of this rank's batches' part in the mean over all."""
        return [s / self.divisor for s in self.shares]

    @property
    def graph(self) -> Graph | None:
        """The graph of the only batch, until an operator takes it."""
        return self._graph

    def take_graph(self) -> Graph | None:
        """Gives the graph away, so that it lives as long as its new owner wants."""
        graph, self._graph = self._graph, None
        return graph

    def hand_over_gradients(self) -> list[Tensor | None]:
        """The closure's own gradient for ``.grad``; this evaluation forgets its gradients.

        So ``.grad`` alone holds that memory, whatever the options are, and no copy is made for it.
        """
        gradient = self.gradient
        own = gradient if self._closures_gradient is None else self._closures_gradient
        self._gradient = self._closures_gradient = None
        return self._as_grads(own)
