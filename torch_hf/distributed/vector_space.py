"""Where the flat vectors of a step live: whole on every rank, or cut over the ranks.

Conjugate gradients and the preconditioner work on vectors of one rank and ask their space for dot
products, which are the same on all ranks to the last bit: each rank adds up its own entries and
one small all-reduce adds up the ranks. So all ranks take the same branch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_hf.distributed.reducer import Reducer
from torch_hf.vector import ParameterVector

Pair = tuple[Tensor, Tensor]


class Space:
    """Vectors of one process.

    Attributes:
        share: This rank's part of a number that the ranks share, in a sum over ranks.
        sharded: Whether a rank holds a part of each vector alone.
    """

    share = 1.0
    sharded = False

    def dots(self, *pairs: Pair) -> Tensor:
        """Dot products of pairs of vectors, (k,)."""
        return self.sum(torch.stack([torch.dot(self.cut(a), self.cut(b)) for a, b in pairs]))

    def dot(self, a: Tensor, b: Tensor) -> float:
        """One dot product, on the host."""
        return float(self.dots((a, b)))

    def norm(self, v: Tensor) -> float:
        """The Euclidean norm, in float64."""
        return float(torch.linalg.vector_norm(v, dtype=torch.float64))

    def cut(self, v: Tensor) -> Tensor:
        """The entries (..., p) that this rank adds up, of a vector or rows of them."""
        return v

    def sum(self, partial: Tensor) -> Tensor:
        """A small result over this rank's entries to that over all."""
        return partial

    def own(self, v: Tensor) -> Tensor:
        """What this rank holds of whole vectors (..., P)."""
        return v

    def whole(self, v: Tensor) -> Tensor:
        """The whole vector (P,) of what the ranks hold."""
        return v

    def reduce(self, v: Tensor) -> Tensor:
        """What this rank holds of the sum over ranks of vectors (P,)."""
        return v

    def reduce_with(self, v: Tensor, values: list[float]) -> tuple[Tensor, list[list[float]]]:
        """As :meth:`reduce`, with numbers; a row of them for each rank."""
        return v, [values]


#: The space of one process.
LOCAL = Space()


class Replicated(Space):
    """Vectors whole on every rank; each adds up a part of the entries.

    Args:
        reducer: Of the ranks.
        numel: P.
    """

    def __init__(self, reducer: Reducer, numel: int) -> None:
        self.reducer = reducer
        self.numel = numel
        self.share = 1.0 / reducer.ranks
        self.length = math.ceil(numel / reducer.ranks)
        self.start = min(reducer.rank * self.length, numel)

    def norm(self, v: Tensor) -> float:
        """The Euclidean norm, in float64."""
        square = torch.linalg.vector_norm(self.cut(v), dtype=torch.float64).square()
        return math.sqrt(float(self.sum(square)))

    def cut(self, v: Tensor) -> Tensor:
        """This rank's entries."""
        return v[..., self.start : min(self.start + self.length, self.numel)]

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over ranks."""
        return self.reducer.small(partial)

    def reduce(self, v: Tensor) -> Tensor:
        """The sum over ranks, in one all-reduce."""
        return self.reducer.vector(v)[0]

    def reduce_with(self, v: Tensor, values: list[float]) -> tuple[Tensor, list[list[float]]]:
        """Both in one all-reduce."""
        return self.reducer.vector(v, values)


class Sharded(Replicated):
    """Vectors cut into equal parts, one a rank, the last padded with zeros."""

    sharded = True

    def cut(self, v: Tensor) -> Tensor:
        """All of what this rank holds."""
        return v

    def own(self, v: Tensor) -> Tensor:
        """This rank's part of whole vectors."""
        own = v.new_zeros(*v.shape[:-1], self.length)
        part = super().cut(v)
        own[..., : part.shape[-1]] = part
        return own

    def whole(self, v: Tensor) -> Tensor:
        """One all-gather."""
        return self.reducer.gather(v, self.numel)

    def reduce(self, v: Tensor) -> Tensor:
        """One reduce-scatter."""
        return self.reducer.scatter(v, self.length)

    def reduce_with(self, v: Tensor, values: list[float]) -> tuple[Tensor, list[list[float]]]:
        """Numbers first, so that all know of a failure."""
        table = self.reducer.table(values)
        return self.reduce(v), table


class Own(Replicated):
    """Vectors of parameters that are themselves sharded: each rank holds its own entries.

    Gradients and products arrive added up over ranks, by the module's own reduction.
    """

    sharded = True

    def __init__(self, reducer: Reducer, copies: int = 1) -> None:
        super().__init__(reducer, 0)
        self.share = 1.0 / copies  # ranks that hold the same entries share them (HSDP)

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over ranks, each entry once."""
        total = super().sum(partial)
        return total if self.share == 1.0 else total * self.share

    def cut(self, v: Tensor) -> Tensor:
        """All of what this rank holds."""
        return v

    def reduce(self, v: Tensor) -> Tensor:
        """The sum as it arrived."""
        return v

    def reduce_with(self, v: Tensor, values: list[float]) -> tuple[Tensor, list[list[float]]]:
        """The numbers alone."""
        return v, self.reducer.table(values)


def space_of(reducer: Reducer, vector: ParameterVector, sharded: bool = False) -> Space:
    """The space of a step's vectors."""
    if vector.sums:
        return Own(reducer, getattr(vector, "copies", 1))
    if reducer.group is None:
        return LOCAL
    return (Sharded if sharded else Replicated)(reducer, vector.numel)
