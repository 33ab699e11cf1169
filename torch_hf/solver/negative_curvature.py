"""Steps where the Hessian is indefinite: Newton's with the size of each curvature (saddle-free).

CG's directions and their products span a subspace; some more products round it off. There the
Hessian H is a small matrix with eigenvalues theta_j, and the step is
``-sum_j q_j (q_j^T g) / (|theta_j| + lambda)``: downhill, finite for every lambda, and as long
along negative curvature as along positive of the same size (Dauphin et al. 2014, "Identifying and
attacking the saddle point problem in high-dimensional non-convex optimization"). How much further
it pays to go along negative curvature only the loss can tell: that part of the step is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.distributed import LOCAL, Space

Operator = Callable[[Tensor], Tensor]

#: Directions kept at any P; where P is small more are, as long as they hold fewer numbers.
LEAST_DIRECTIONS, MOST_NUMBERS = 20, 2**20
#: Negative curvature below this part of lambda makes no difference.
NEGLIGIBLE = 1e-2
#: A vector that others explain to within the square root of rounding adds no direction.
DEPENDENT_POWER = 0.5


def directions_kept(numel: int, max_iter: int) -> int:
    """How many directions memory is spent on, of vectors of so many numbers.

    Example:
        >>> directions_kept(3, 250), directions_kept(10_000, 250), directions_kept(10**8, 250)
        (3, 104, 20)
    """
    return min(numel, max_iter, max(LEAST_DIRECTIONS, MOST_NUMBERS // numel))


class Escape(NamedTuple):
    """The part of a step along negative curvature, of shape (P,), and g^T times it."""

    slope: float
    vector: Tensor


class SaddleFreeStep(NamedTuple):
    """q(d), with H as it is and lambda; g^T d; the step d; and its part to go further along."""

    value: float
    slope: float
    vector: Tensor
    escape: Escape | None


class Spectrum(NamedTuple):
    """Eigenvalues of H in a subspace, (k,); eigenvectors in its coordinates; g along these."""

    theta: Tensor
    vectors: Tensor
    slopes: Tensor


class Subspace:
    """An orthonormal basis of vectors whose products are known, and H within it.

    Args:
        damping: Lambda in the products: ``A = H + lambda I``.
        most: The most directions.
        space: Where the vectors live.
    """

    def __init__(self, damping: float, most: int, space: Space = LOCAL) -> None:
        self.damping = damping
        self.most = most
        self.space = space
        self.size = 0
        self._seen = 0  # rows that hold vectors as they came
        self._vectors: Tensor | None = None  # (most, P), an orthonormal basis once settled
        self._products: Tensor | None = None  # (most, P)
        self._projected = torch.zeros(most, most, dtype=torch.float64)  # V A V^T

    def is_negative(self, curvature: float, square: float) -> bool:
        """Whether ``p^T H p`` is below 0 by more than rounding, from ``p^T A p`` and ``p^T p``."""
        return curvature - self.damping * square < -NEGLIGIBLE * self.damping * square

    def remember(self, v: Tensor, product: Tensor) -> None:
        """Copies a vector and its product, while there is room."""
        if self._vectors is None or self._products is None:
            self._vectors = v.new_empty(self.most, v.numel())
            self._products = torch.empty_like(self._vectors)
        if self._seen < self.most:
            self._vectors[self._seen] = v
            self._products[self._seen] = product
            self._seen += 1

    def settle(self, d: Tensor, product: Tensor) -> None:
        """Makes what was remembered a basis, with CG's iterate, which may lie outside."""
        assert self._vectors is not None and self._products is not None
        for row in range(self._seen):
            self.add(self._vectors[row].clone(), self._products[row].clone())
        self.add(d.clone(), product.clone())

    def add(self, v: Tensor, product: Tensor) -> bool:
        """Takes in a vector, which it uses up; whether that brought a new direction."""
        assert self._vectors is not None and self._products is not None
        length = self.space.norm(v)
        if self.size == self.most or not 0.0 < length < math.inf:
            return False
        v.div_(length)
        product.div_(length)
        for _ in range(2):  # twice is enough (Kahan; Parlett 1980, section 6.9)
            along = self.along(v)
            v.sub_(along @ self._vectors[: self.size])
            product.sub_(along @ self._products[: self.size])
        left = self.space.norm(v)
        if not left > torch.finfo(v.dtype).eps ** DEPENDENT_POWER:
            return False
        self._vectors[self.size] = v.div_(left)
        self._products[self.size] = product.div_(left)
        self.size += 1
        row = self.along(product).double().cpu()
        self._projected[self.size - 1, : self.size] = row
        self._projected[: self.size, self.size - 1] = row
        return True

    def along(self, v: Tensor) -> Tensor:
        """The coordinates of a vector, (size,)."""
        assert self._vectors is not None
        rows = self.space.cut(self._vectors[: self.size])
        return self.space.sum(rows @ self.space.cut(v))

    def extend(self, operator: Operator, solve_with: Operator) -> bool:
        """One product more: along the newest, as Lanczos does; whether there is a new direction."""
        assert self._vectors is not None and self._products is not None
        newest = self._products[self.size - 1].clone()
        length = self.space.norm(newest)
        v = self._outside(newest)
        if not self.space.norm(v) > torch.finfo(v.dtype).eps ** DEPENDENT_POWER * length:
            return False
        v = self._outside(solve_with(v).clone())
        length = self.space.norm(v)
        if not 0.0 < length < math.inf:
            return False
        product = operator(v.div_(length))
        return math.isfinite(self.space.norm(product)) and self.add(v, product)

    def _outside(self, v: Tensor) -> Tensor:
        assert self._vectors is not None
        for _ in range(2):
            v.sub_(self.along(v) @ self._vectors[: self.size])
        return v

    def spectrum(self, gradient: Tensor) -> Spectrum:
        """H in the subspace, and the gradient there."""
        projected = self._projected[: self.size, : self.size]
        values, vectors = torch.linalg.eigh(projected)
        slopes = vectors.T @ self.along(gradient).double().cpu()
        return Spectrum(values - self.damping, vectors, slopes)

    def model(self, gradient: Tensor) -> float:
        """The least value of the quadratic with the size of each curvature."""
        theta, _, b = self.spectrum(gradient)
        return -0.5 * float((b.square() / (theta.abs() + self.damping)).sum())

    def step(self, gradient: Tensor) -> SaddleFreeStep:
        """The saddle-free step in the subspace."""
        theta, vectors, b = self.spectrum(gradient)
        x = -b / (theta.abs() + self.damping)
        slope = float(b @ x)
        value = slope + 0.5 * float((theta + self.damping) @ x.square())
        down = torch.where(theta < 0, x, 0.0)
        escape = Escape(float(b @ down), self._combine(vectors @ down)) if down.any() else None
        return SaddleFreeStep(value, slope, self._combine(vectors @ x), escape)

    def _combine(self, coordinates: Tensor) -> Tensor:
        assert self._vectors is not None
        return coordinates.to(self._vectors) @ self._vectors[: self.size]
