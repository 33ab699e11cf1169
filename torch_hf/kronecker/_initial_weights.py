"""What a layer's weights were before training, known by their correlations with data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_hf.kronecker._grid import Grid, Side, parts
from torch_hf.kronecker.factors import KroneckerFactors

#: Coordinates of the initial weights made at a time.
BLOCK = 2048
#: Neurons drawn at a time.
NEURONS = 4096
#: Temporaries of a grid's size that a draw has at once.
GRID_PASSES = 4


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(points: KroneckerFactors, neurons: int, std: float, seed: int) -> Tensor:
    """Correlations ``(neurons, n)`` of weights N(0, std²), made block by block from the seed."""
    generator = _generator(seed)
    found = torch.zeros(neurons, len(points), dtype=points.dtype, device=points.device)
    for start in range(0, points.features, BLOCK):
        stop = min(start + BLOCK, points.features)
        weights = torch.randn(neurons, stop - start, dtype=torch.float64, generator=generator)
        block = weights.to(points.device, points.dtype)
        found.addmm_(block, points.dense(start, stop).T, alpha=std)
    return found


def seeded_weights(points: KroneckerFactors, neurons: int, std: float, seed: int) -> Tensor:
    """The weights ``(neurons, d)`` that :func:`seeded` goes through."""
    generator = _generator(seed)
    blocks = [
        torch.randn(
            neurons, min(BLOCK, points.features - s), dtype=torch.float64, generator=generator
        ).to(points.dtype)
        for s in range(0, points.features, BLOCK)
    ]
    return torch.cat(blocks, dim=1).to(points.device).mul_(std)


def joint(gram: Tensor, neurons: int, std: float, seed: int, dtype: torch.dtype) -> Tensor:
    """Correlations ``(neurons, n)``, each row drawn from N(0, std² gram).

    That is the distribution they have for weights N(0, std² I), of whatever dimension.
    """
    generator = _generator(seed)
    found = torch.empty(neurons, len(gram), dtype=dtype, device=gram.device)
    root = _root(gram).mul_(std)
    for first in range(0, neurons, NEURONS):
        rows = found[first : first + NEURONS]
        noise = torch.randn(len(rows), len(gram), dtype=torch.float64, generator=generator)
        rows.copy_(noise.to(gram.device) @ root.T)
    return found


def given(points: KroneckerFactors, weight: Tensor) -> Tensor:
    """Correlations ``(neurons, n)`` of weights ``(neurons, d)``."""
    found = weight.new_zeros(len(weight), len(points))
    for start in range(0, points.features, BLOCK):
        stop = min(start + BLOCK, points.features)
        found.addmm_(weight[:, start:stop], points.dense(start, stop).T)
    return found


def deviation(covariance: Tensor, neurons: int) -> Tensor:
    """Noise ``(k, neurons)`` of that covariance, from torch's generator at its present state."""
    root = _root((covariance + covariance.T) / 2)
    noise = torch.randn(root.shape[1], neurons, dtype=torch.float64)
    return root @ noise.to(root.device)


def solve(gram: Tensor, right: Tensor, eps: float) -> Tensor:
    """``gram⁺ right`` in float64, of a right side that is exact to ``eps``.

    By eigenvalues where the Gram matrix is singular: those below ``eps`` of the largest would turn
    the right side's rounding into weights larger than the draw's own.
    """
    lower, info = _cholesky(gram)
    if not int(info) and _regular(lower, eps):
        return torch.cholesky_solve(right, lower)
    values, vectors = _eigh(gram)
    keep = values > max(eps, len(gram) * torch.finfo(gram.dtype).eps) * values[-1]
    vectors = vectors[:, keep]
    return vectors @ ((vectors.T @ right) / values[keep, None])


def _root(gram: Tensor) -> Tensor:
    lower, info = _cholesky(gram)
    if not int(info):
        return lower
    values, vectors = _eigh(gram)
    return vectors * values.clamp_min(0.0).sqrt()


def _regular(lower: Tensor, eps: float) -> bool:
    pivots = lower.diagonal()
    return bool(pivots.min() > max(1e-6, eps**0.5) * pivots.max())  # squares: twelve digits


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    lower, info = torch.linalg.cholesky_ex(gram)
    return lower, info


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values, vectors


class Start(nn.Module):
    """Initial weights N(0, std²) as a joint draw of correlations, as a seed, or as given.

    Of a joint draw, the weights are those of least norm with these correlations,
    ``Σ_i v_i x_i``, K V = Z₀: at new points their products are the conditional mean.

    Attributes:
        values: Initial correlations ``(m, n)`` with the data, None if they are not kept.
        scale: How much of the initial weights is left in the present ones.
    """

    weight: Tensor | None
    values: Tensor | None
    seed: Tensor
    scale: Tensor

    def __init__(
        self, factors: KroneckerFactors, neurons: int, kind: str, std: float, weight: Tensor | None
    ) -> None:
        super().__init__()
        self.factors, self.neurons, self.kind, self.std = factors, neurons, kind, std
        self.register_buffer("weight", weight)
        self.register_buffer("seed", torch.randint(2**62, ()))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("values", None)
        self.eps = 0.0  # to which the values are known
        self._dual: Tensor | None = None

    def draw(self, keep: bool) -> Tensor:
        """Correlations ``(m, n)`` with the data."""
        if self.kind == "joint" and self.std == 0.0:
            factors = self.factors
            shape = (self.neurons, len(factors))
            found = torch.zeros(shape, dtype=factors.dtype, device=factors.device)
        elif self.kind == "joint":
            gram = self.factors.to(dtype=torch.float64).gram()
            dtype = self.factors.dtype
            found = joint(gram, self.neurons, self.std, int(self.seed), dtype)
        else:
            found = self._through_weights(self.factors)
        self.values = found.clone() if keep else None
        self.moved(self.factors)
        return found

    def at(self, points: KroneckerFactors, fresh: bool) -> Tensor:
        """Correlations ``(k, m)`` with new points, the mean or a draw given those with the data."""
        if self.kind != "joint":
            return self._through_weights(points).T
        exact, new = (p.to(dtype=torch.float64) for p in (self.factors, points))
        between = exact.cross(new)
        found = between @ self.dual()
        if fresh:
            known = solve(exact.gram(), between.T, 0.0)
            found += self.std * deviation(new.gram() - between @ known, self.neurons)
        return found.to(points.dtype)

    def dense(self) -> Tensor:
        """The weights ``(m, d)``; of a joint draw those of least norm."""
        if self.kind == "given":
            return cast(Tensor, self.weight)
        if self.kind == "seeded":
            return seeded_weights(self.factors, self.neurons, self.std, int(self.seed))
        exact = self.factors.to(dtype=torch.float64)
        return exact.combine(self.dual())

    def kept(self) -> Tensor:
        """The initial correlations with the data."""
        if self.values is None:
            raise RuntimeError(
                "The layer must keep its initial correlations for this, got keep_initial=False. "
                "Make it with keep_initial=True, which keeps n m more numbers."
            )
        return self.values

    def dual(self) -> Tensor:
        """V ``(n, m)``: one factorization of the Gram matrix, then remembered."""
        if self._dual is None and self.std == 0.0:
            self._dual = torch.zeros_like(self.kept().T, dtype=torch.float64)
        if self._dual is None:
            gram = self.factors.to(dtype=torch.float64).gram()
            self._dual = solve(gram, self.kept().T.double(), self.eps)
        return self._dual

    def _through_weights(self, points: KroneckerFactors) -> Tensor:
        if self.weight is not None:
            return given(points, self.weight)
        return seeded(points, self.neurons, self.std, int(self.seed))

    def _apply(self, fn: Any, recurse: bool = True) -> Start:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = scale.to(self.scale.device)
        return self

    def moved(self, factors: KroneckerFactors) -> None:
        """The data lie elsewhere now, or in another precision."""
        self.factors, self._dual = factors, None
        if factors.dtype != torch.float64:
            self.eps = max(self.eps, torch.finfo(factors.dtype).eps)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._dual = None  # of another start


class Basis:
    """Coordinates of one side of a grid in which its initial weights are standard normal.

    The features themselves where there are no more than rows, else an orthonormal basis of the
    rows' span: ``Aᵀ K^(-1/2)``, in which the rows are ``K^(1/2)``.
    """

    def __init__(self, side: Side, features: bool) -> None:
        self.side = side
        self.roots = None if features or side.features <= len(side) else _roots(side)

    @property
    def size(self) -> int:
        """Coordinates."""
        return self.side.features if self.roots is None else len(self.side)

    def rows(self) -> Tensor:
        """Of the side's rows, ``(a, size)``."""
        return self.side.rows() if self.roots is None else self.roots[0].to(self._dtype)

    def of(self, side: Side) -> Tensor:
        """Of other rows, ``(k, size)``."""
        if self.roots is None:
            return side.rows()
        exact = self.side.to(side.codes.device, torch.float64)
        found = exact.cross(side.to(side.codes.device, torch.float64)) @ self.roots[1]
        return found.to(self._dtype)

    def weights(self) -> Tensor | None:
        """Of the features, ``(p, size)``; None if they are the coordinates."""
        if self.roots is None:
            return None
        exact = self.side.to(self.side.codes.device, torch.float64)
        return (exact.rows().T @ self.roots[1]).to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return self.side.term[0].table.dtype


def _roots(side: Side) -> tuple[Tensor, Tensor]:
    """``K^(1/2)`` and ``K^(-1/2)``, symmetric, so that they do not hang on eigenvectors' signs."""
    exact = side.to(side.codes.device, torch.float64)
    values, vectors = _eigh(exact.cross(exact))
    keep = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    values, vectors = values[keep], vectors[:, keep]
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


class GridStart(nn.Module):
    """Initial weights N(0, std²) of points in a grid, in coordinates of its two sides, or given.

    ``"joint"`` draws them in the span of the grid's rows; off the span they are zero, as those of
    least norm are. ``"seeded"`` draws all of them.

    Attributes:
        values: Initial correlations ``(n, m)`` with the data.
        scale: How much of the initial weights is left in the present ones.
    """

    weight: Tensor | None
    values: Tensor
    seed: Tensor
    scale: Tensor

    def __init__(
        self,
        factors: KroneckerFactors,
        grid: Grid,
        neurons: int,
        kind: str,
        std: float,
        weight: Tensor | None,
    ) -> None:
        super().__init__()
        self.factors, self.grid, self.neurons, self.kind = factors, grid, neurons, kind
        self.std = 1.0 if kind == "given" else std
        self.register_buffer("weight", weight)
        self.register_buffer("seed", torch.randint(2**62, ()))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self._bases: tuple[Basis, Basis] | None = None
        self.register_buffer("values", self._draw())

    def at(self, points: KroneckerFactors, fresh: bool) -> Tensor:
        """Correlations ``(k, m)`` with new points, the mean or a draw given those of the grid."""
        found = torch.zeros(len(points), self.neurons, dtype=points.dtype, device=points.device)
        placed = [
            (sides, [b.of(s) for b, s in zip(self.bases(), sides, strict=True)])
            for sides in self.grid.sides(points)
        ]
        for part, core in self._cores():
            for (left, right), (to_left, to_right) in placed:
                found[:, part] += _select(core, to_left, to_right, left.codes, right.codes)
        if points._scale is not None:
            found.mul_(points._scale[:, None])
        found.mul_(self.std)
        unknown = fresh and any(basis.roots is not None for basis in self.bases())
        return found + self._deviation(points, placed) if unknown else found

    def dense(self) -> Tensor:
        """The weights ``(m, d)``; of a joint draw those of least norm."""
        if self.weight is not None:
            return self.weight
        left, right = (basis.weights() for basis in self.bases())
        found = self.values.new_empty(self.neurons, self.factors.features)
        for part, core in self._cores():
            core = core if left is None else left @ core
            core = core if right is None else core @ right.T
            found[part] = core.flatten(1)
        return found.mul_(self.std)

    def bases(self) -> tuple[Basis, Basis]:
        """Of the left side and of the right."""
        if self._bases is None:
            features = self.kind != "joint"
            self._bases = Basis(self.grid.left, features), Basis(self.grid.right, features)
        return self._bases

    def _draw(self) -> Tensor:
        left, right = self.grid.left.codes, self.grid.right.codes
        rows = [basis.rows() for basis in self.bases()]
        factors = self.factors
        found = torch.empty(len(factors), self.neurons, dtype=factors.dtype, device=factors.device)
        for part, core in self._cores():
            found[:, part] = _select(core, rows[0], rows[1], left, right)
        return found.mul_(
            self.std if factors._scale is None else self.std * factors._scale[:, None]
        )

    def _cores(self) -> Iterator[tuple[slice, Tensor]]:
        """The weights in the bases' coordinates, ``(neurons, a, b)`` for some neurons at a time."""
        sizes = [basis.size for basis in self.bases()]
        generator = _generator(int(self.seed))
        for part in parts(self.neurons, max(sizes[0], 1) * max(sizes[1], 1) * GRID_PASSES):
            if self.weight is not None:
                yield part, self.weight[part].view(-1, *sizes)
                continue
            shape = (part.stop - part.start, *sizes)
            noise = torch.randn(shape, dtype=torch.float64, generator=generator)
            yield part, noise.to(self.factors.device, self.factors.dtype)

    def _deviation(
        self, points: KroneckerFactors, placed: list[tuple[tuple[Side, Side], list[Tensor]]]
    ) -> Tensor:
        """A draw of what the grid does not tell of the weights' products with new points."""
        known = torch.zeros(len(points), len(points), dtype=torch.float64, device=points.device)
        spread = [
            [to[side.codes].double() for to, side in zip(rows, sides, strict=True)]
            for sides, rows in placed
        ]
        for left, right in spread:
            for other_left, other_right in spread:
                known += (left @ other_left.T) * (right @ other_right.T)
        if points._scale is not None:
            scale = points._scale.double()
            known *= scale[:, None] * scale
        rest = points.to(dtype=torch.float64).gram() - known
        return (self.std * deviation(rest, self.neurons)).to(points.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> GridStart:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = scale.to(self.scale.device)
        return self

    def moved(self, factors: KroneckerFactors, grid: Grid) -> None:
        """The data lie elsewhere now, or in another precision."""
        self.factors, self.grid, self._bases = factors, grid, None


def _select(core: Tensor, left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``left[rows[i]]ᵀ core right[columns[i]]`` for each neuron: ``(k, neurons)``."""
    products = left @ core
    if len(left) * len(right) <= 8 * max(len(rows), 512):
        return (products @ right.T)[:, rows, columns].T
    found = core.new_empty(len(rows), len(core))
    for part in parts(len(rows), len(core) * right.shape[1]):
        found[part] = torch.einsum("mkq,kq->km", products[:, rows[part]], right[columns[part]])
    return found
