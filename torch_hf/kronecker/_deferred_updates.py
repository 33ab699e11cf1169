"""Weights that are known by what they do to the inputs, and exact steps on them.

Every vector of weights that SGD can reach is ``w = α w₀ + Σ_i c_i x_i``, and so is its velocity.
Of each, a slot keeps the coefficients C ``(n, m)`` and products from which those with the inputs
are read: Z ``(m, n)``, or what a geometry keeps instead. A step of SGD with momentum and weight
decay maps (weights, velocity, g) linearly, with the same few numbers for all entries:

    (w, v) ← M (w, v) + u g

So M is gathered in a 2 by 2 matrix of numbers, ``mixing``, and the slots only take
``mixing⁻¹ u g``, which touches nothing but the neurons with a gradient. These updates are held back
too, and carried out many at a time. Both are exact; ``read`` accounts for what is outstanding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_hf.kronecker._geometry import Geometry, Slot
from torch_hf.kronecker._sparse_gradient import Entries, add_product

Matrix = list[list[float]]
#: Numbers that are worked on at once where several passes follow.
IN_CACHE = 2**16


class Outstanding:
    """Gradient rows held back, all dense or all sparse, with what each is worth in each slot."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []
        self.worth: list[list[float]] = []  # a list a row
        self.dense: Tensor | None = None  # rows beyond len(worth) are free
        self.sparse: list[Entries] = []

    def has_room(self, gradient: Tensor | Entries, rows: int, capacity: int) -> bool:
        """Whether rows may join: none are held, or of the same kind and not too many in all."""
        alike = isinstance(gradient, Entries) == bool(self.sparse)
        return not self.worth or (alike and len(self.worth) + rows <= capacity)

    def add(
        self, samples: Tensor, gradient: Tensor | Entries, worth: list[float], capacity: int
    ) -> None:
        """Holds back the gradient rows of data points ``samples``.

        Args:
            samples: ``(B,)``.
            gradient: ``(B, m)``, or its entries.
            worth: The rows' factor in each slot.
            capacity: Rows to make room for.
        """
        first, rows = len(self.worth), len(samples)
        if not rows:
            return  # no neuron was active
        if isinstance(gradient, Entries):
            self.sparse.append(gradient._replace(row=gradient.row + first))
        elif rows >= capacity:
            self.dense = gradient  # nothing will join it
        else:
            if not first:
                self._make_room(gradient, capacity)
            assert self.dense is not None
            self.dense[first : first + rows] = gradient
        self.samples.append(samples)
        self.worth += [worth] * rows

    def _make_room(self, gradient: Tensor, capacity: int) -> None:
        shape, held = (capacity, gradient.shape[1]), self.dense
        kept = held is not None and held.shape == shape and held.dtype == gradient.dtype
        if not kept or held is None or held.device != gradient.device:
            self.dense = gradient.new_empty(shape)

    def clear(self) -> None:
        """Nothing is outstanding now; the room stays."""
        self.samples, self.worth, self.sparse = [], [], []

    def index(self) -> Tensor:
        """The data point of each row, ``(rows,)``."""
        return self.samples[0] if len(self.samples) == 1 else torch.cat(self.samples)

    def gradient(self) -> Tensor | Entries:
        """All rows, ``(rows, m)``, or their entries."""
        if self.sparse:
            return Entries(*(torch.cat(parts) for parts in zip(*self.sparse, strict=True)))
        assert self.dense is not None
        return self.dense[: len(self.worth)]


class Span:
    """The numbers of a layer's slots, and what is outstanding. The slots are handed in.

    Attributes:
        anchors: Of each slot, how much of w₀ is in it.
        mixing: Weights and velocity are ``mixing`` times the slots.
        capacity: Gradient rows that may be outstanding.
        velocity: The second slot while a step with momentum needs it.
        rescaled: How often the slots have been multiplied by the mixing.
    """

    def __init__(self) -> None:
        self.anchors = [1.0]
        self.mixing: Matrix = [[1.0]]
        self.capacity = 0
        self.outstanding = Outstanding()
        self.velocity: Slot | None = None
        self.rescaled = 0

    def slots(self, weights: Slot) -> list[Slot]:
        """The weights, and the velocity if there is one."""
        return [weights] if self.velocity is None else [weights, self.velocity]

    def attach(self, velocity: Slot, anchor: float) -> None:
        """A velocity joins; the mixing must be settled."""
        self.velocity = velocity
        self.anchors, self.mixing = [self.anchors[0], anchor], [[1.0, 0.0], [0.0, 1.0]]

    def detach(self) -> None:
        """The velocity leaves; the mixing must be settled."""
        self.velocity = None
        self.anchors, self.mixing = self.anchors[:1], [[1.0]]

    def limit(self, capacity: int, weights: Slot, geometry: Geometry) -> None:
        """Sets how many gradient rows may be outstanding."""
        if capacity != self.capacity:
            self.flush(weights, geometry)
            self.capacity = capacity

    def read(self, weights: Slot, samples: Tensor, geometry: Geometry) -> Tensor:
        """Pre-activations ``(len(samples), m)`` as all steps so far have made them."""
        mix = self.mixing[0]
        found = geometry.read(self.slots(weights), mix, samples)
        start = geometry.start(samples)
        if start is not None:
            share = sum(p * x for p, x in zip(mix, self.anchors, strict=True))
            found = found.add_(start, alpha=share)
        if self.outstanding.worth:
            worth = [
                sum(p * w for p, w in zip(mix, row, strict=True)) for row in self.outstanding.worth
            ]
            between = geometry.between(self.outstanding.index(), samples)
            add_product(found, self.outstanding.gradient(), between, worth)
        return found.T

    def advance(
        self,
        weights: Slot,
        transition: Matrix,
        gain: Sequence[float],
        samples: Tensor,
        gradient: Tensor | Entries,
        geometry: Geometry,
    ) -> None:
        """``(w, v) ← transition (w, v) + gain g``, g the gradient of the given samples."""
        mixing = _multiply(transition, self.mixing)
        inverse = _inverse(mixing, _limit(weights.coefficients.dtype))
        if inverse is None:  # the slots would lose digits: bring them up to date, start afresh
            self.flush(weights, geometry)
            self.mixing = mixing
            self.settle(weights, geometry)
            inverse = _identity(len(mixing))
        else:
            self.mixing = mixing
        worth = [sum(a * u for a, u in zip(row, gain, strict=True)) for row in inverse]
        if not self.outstanding.has_room(gradient, len(samples), self.capacity):
            self.flush(weights, geometry)
        self.outstanding.add(samples, gradient, worth, self.capacity)
        if len(self.outstanding.worth) >= self.capacity:
            self.flush(weights, geometry)

    def flush(self, weights: Slot, geometry: Geometry) -> None:
        """Carries out what is outstanding."""
        held = self.outstanding
        if not held.worth:
            return
        geometry.carry_out(self.slots(weights), held.index(), held.gradient(), held.worth)
        held.clear()

    def settle(self, weights: Slot, geometry: Geometry) -> None:
        """Brings the slots up to date: nothing outstanding, the mixing is the identity."""
        self.flush(weights, geometry)
        size = len(self.mixing)
        if self.mixing == _identity(size):
            return
        for tensors in zip(*self.slots(weights), strict=True):
            _mix(tensors, self.mixing)
        self.anchors = [
            sum(p * x for p, x in zip(row, self.anchors, strict=True)) for row in self.mixing
        ]
        self.mixing = _identity(size)
        self.rescaled += 1


def _mix(tensors: Sequence[Tensor], mixing: Matrix) -> None:
    """Multiplies in place, some rows at a time: they stay in the processor's cache meanwhile."""
    if len(tensors) == 1:
        tensors[0].mul_(mixing[0][0])
        return
    (a, b), (c, d) = mixing
    rows = max(1, IN_CACHE * len(tensors[0]) // tensors[0].numel())
    rows = len(tensors[0]) if tensors[0].is_cuda else rows
    for first, second in zip(*(torch.split(x, rows) for x in tensors), strict=True):
        before = first.clone()
        first.mul_(a).add_(second, alpha=b)
        second.mul_(d).add_(before, alpha=c)


def _identity(size: int) -> Matrix:
    return [[float(i == j) for j in range(size)] for i in range(size)]


def _multiply(a: Matrix, b: Matrix) -> Matrix:
    columns = list(zip(*b, strict=True))
    return [[sum(x * y for x, y in zip(row, c, strict=True)) for c in columns] for row in a]


def _limit(dtype: torch.dtype) -> float:
    """The most that entries of the mixing or its inverse may be: each factor 10 costs a digit."""
    return 1e4 if dtype == torch.float64 else 30.0


def _inverse(mixing: Matrix, limit: float) -> Matrix | None:
    """The inverse, None where it or the matrix has large entries."""
    if len(mixing) == 1:
        value = mixing[0][0]
        return [[1.0 / value]] if 1.0 / limit < abs(value) < limit else None
    (a, b), (c, d) = mixing
    determinant = a * d - b * c
    if determinant == 0.0:
        return None
    inverse = [[d / determinant, -b / determinant], [-c / determinant, a / determinant]]
    return inverse if max(abs(x) for r in (*inverse, *mixing) for x in r) < limit else None
