"""What runs of a closure yield: a graph, a value, what one rank found."""

from __future__ import annotations

from collections.abc import Callable
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


class Evaluation(NamedTuple):
    """The objective and its gradient at the present parameters."""

    loss: float
    gradient: Tensor  # what this rank holds of (P,), weight decay included
    plain_gradient: Callable[[], list[Tensor | None]]  # as .grad shows it: the closure's own
    gradient_norm: float
    cases: float
    returned: Any
    where: str = ""  # the ranks whose loss is not finite


class LocalEvaluation(NamedTuple):
    """What the first run came to on this rank: sums over its batches, by their shares."""

    gradient: list[Tensor | None]
    losses: list[float]
    counts: list[Cases]
    shares: list[float]
    returned: Any

    def numbers(self) -> list[float]:
        """Loss, cases, shares, and what must agree on all ranks."""
        loss = sum(s * x for s, x in zip(self.shares, self.losses, strict=True) if s)
        cases = sum(c.number or 0.0 for c in self.counts)
        return [loss, cases, sum(self.shares), agreed_terms(self.counts[0])]
