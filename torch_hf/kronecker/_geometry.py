"""How products with points are kept and read: of each point by itself, or of a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from torch_hf.kronecker._sparse_gradient import Entries, add_product, add_rows, compressed

#: Gram rows: ``gram(i, None)`` is ``(len(i), n)``, ``gram(i, j)`` a block of it.
Gram = Callable[[Tensor, Tensor | None], Tensor]


class Slot(NamedTuple):
    """Weights, or their velocity.

    Attributes:
        coefficients: ``(n, m)``.
        products: What the geometry keeps: ``(m, n)`` of points, ``(b, a, m)`` of a grid.
    """

    coefficients: Tensor
    products: Tensor


class Geometry(Protocol):
    """What a span needs of the data."""

    def read(self, slots: Sequence[Slot], shares: Sequence[float], samples: Tensor) -> Tensor:
        """``(m, B)``, new, the products of points with a weighted sum of slots."""

    def start(self, samples: Tensor) -> Tensor | None:
        """``(m, B)``, the products with the initial weights, None if the slots hold them."""

    def between(self, rows: Tensor, columns: Tensor) -> Tensor:
        """A block of the Gram matrix."""

    def carry_out(
        self,
        slots: Sequence[Slot],
        samples: Tensor,
        gradient: Tensor | Entries,
        worth: Sequence[Sequence[float]],
    ) -> None:
        """Adds gradient rows to the slots, each row with its worth in each slot."""


class Points:
    """The products with each point by itself, the initial weights' included."""

    def __init__(self, gram: Gram) -> None:
        self.gram = gram

    def read(self, slots: Sequence[Slot], shares: Sequence[float], samples: Tensor) -> Tensor:
        """Gathers columns."""
        found: Tensor | None = None
        for share, slot in zip(shares, slots, strict=True):
            if share != 0.0:
                part = slot.products.gather(1, samples.expand(len(slot.products), -1))
                part = part if share == 1.0 else part.mul_(share)
                found = part if found is None else found.add_(part)
        if found is None:
            found = slots[0].products.new_zeros(len(slots[0].products), len(samples))
        return found

    def start(self, samples: Tensor) -> Tensor | None:
        """In the slots."""
        return None

    def between(self, rows: Tensor, columns: Tensor) -> Tensor:
        """A block of the Gram matrix."""
        return self.gram(rows, columns)

    def carry_out(
        self,
        slots: Sequence[Slot],
        samples: Tensor,
        gradient: Tensor | Entries,
        worth: Sequence[Sequence[float]],
    ) -> None:
        """Adds the product with the samples' Gram rows to all points."""
        gradient = compressed(gradient)
        rows = self.gram(samples, None)
        for number, slot in enumerate(slots):
            factors = [row[number] for row in worth]
            if any(factors):
                add_product(slot.products, gradient, rows, factors)
                add_rows(slot.coefficients, gradient, samples, factors)
