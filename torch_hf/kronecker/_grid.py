"""Points that lie in the grid of two tables: steps that do not grow with their number.

Two tables have a and b rows, and point i is ``x_i = s_i u_r ⊗ v_c`` with a row r of the first and a
row c of the second. Then the coefficients of a neuron are a matrix Y ``(a, b)``, and its products
with all points of the grid are ``K_L Y K_R``. Only ``K_L Y`` is kept. A gradient g of point (r, c)
adds ``K_L[:, r] g`` to its column c. The product with point (r, c) is its row r times
``K_R[:, c]``: a + b multiply-adds a sample and neuron, instead of n. This is the vec trick of
Kronecker kernel methods (Airola & Pahikkala, arXiv 1601.01507), taken one sample at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torch_hf.kronecker import _terms
from torch_hf.kronecker._geometry import Slot
from torch_hf.kronecker._sparse_gradient import Entries, add_rows, dense_rows
from torch_hf.kronecker._terms import Factor, Term
from torch_hf.kronecker.factors import KroneckerFactors

#: The grid is taken where n is at least so many times a + b: its products are smaller and many.
WORTH_FROM = 4
#: It may take so many times the numbers of n m, or so many bytes if that is more.
LARGER_BY, BYTES = 4, 2**30
#: Numbers in a temporary.
TEMPORARY = 2**24
#: Numbers of a column below which rows lie together in memory, and reads gain more than updates
#: lose: at a = 68, b = 442, m = 64, batch 128, both took 0.8 ms together, else 1.5; at a = 300,
#: b = 400, m = 256 they would take 8.2 instead of 4.9.
SHORT_COLUMN = 2**13
#: Numbers of an update up to which one call for all columns is faster than one for each.
SMALL_UPDATE = 2**20


class Side:
    """The distinct rows that points have of one or several of their factors.

    Attributes:
        term: These factors, of ``len(self)`` rows each.
        codes: ``(n,)``, which row each point takes.
    """

    def __init__(self, term: Term, codes: Tensor) -> None:
        self.term, self.codes = term, codes

    @classmethod
    def of(cls, factors: Sequence[Factor]) -> Side:
        """Of factors that all have an index."""
        index = torch.stack([f.places(None) for f in factors], 1)  # type: ignore[misc]
        if len(factors) == 1:
            distinct, codes = torch.unique(index[:, 0], return_inverse=True)
            distinct = distinct[:, None]
        else:
            distinct, codes = torch.unique(index, dim=0, return_inverse=True)
        pairs = zip(factors, distinct.T, strict=True)
        return cls(tuple(Factor(f.table, column) for f, column in pairs), codes)

    def __len__(self) -> int:
        return len(self.term[0])

    @property
    def features(self) -> int:
        """The width of a row."""
        width = 1
        for factor in self.term:
            width *= factor.table.shape[1]
        return width

    def rows(self) -> Tensor:
        """``(a, p)``."""
        return _terms.columns(self.term, 0, self.features)

    def cross(self, rows: Side) -> Tensor:
        """Inner products ``(len(rows), a)`` of other rows with these."""
        return _terms.inner(rows.term, None, self.term, None)

    def to(self, device: torch.device, dtype: torch.dtype) -> Side:
        """The same rows elsewhere or in another precision."""
        return Side(tuple(f.to(device, dtype) for f in self.term), self.codes.to(device))


class Grid:
    """How a layer's points lie in a grid, and products with them.

    Attributes:
        left, right: The two tables.
        split: How many factors the left one holds.
        scale: ``(n,)`` or None, as in the data.
    """

    def __init__(self, left: Side, right: Side, split: int, scale: Tensor | None) -> None:
        self.left, self.right, self.split, self.scale = left, right, split, scale
        self.left_gram, self.right_gram = left.cross(left), right.cross(right)

    def to(self, factors: KroneckerFactors) -> Grid:
        """The grid of the same points elsewhere or in another precision."""
        left, right = (s.to(factors.device, factors.dtype) for s in (self.left, self.right))
        return Grid(left, right, self.split, factors._scale)

    def shape(self, neurons: int) -> tuple[int, int, int]:
        """Of the products that are kept: ``(b, a, m)``."""
        return len(self.right), len(self.left), neurons

    def zeros(self, like: Tensor, neurons: int) -> Tensor:
        """Products of no coefficients, laid out as steps want them."""
        b, a, m = self.shape(neurons)
        if a * m <= SHORT_COLUMN:
            return like.new_zeros(a, b, m).transpose(0, 1)
        return like.new_zeros(b, a, m)

    # --- steps ---

    def read(self, slots: Sequence[Slot], shares: Sequence[float], samples: Tensor) -> Tensor:
        """Products ``(m, B)`` with points, of a sum of slots."""
        right = self.right_gram[self.right.codes[samples]]
        if self.scale is not None:
            right = right * self.scale[samples, None]
        products = [slot.products for slot in slots]
        return _at_points(products, shares, self.left.codes[samples], right).T

    def carry_out(
        self,
        slots: Sequence[Slot],
        samples: Tensor,
        gradient: Tensor | Entries,
        worth: Sequence[Sequence[float]],
    ) -> None:
        """Adds gradient rows of points to slots, each row with its worth in each slot."""
        rows = dense_rows(gradient, len(samples), slots[0].coefficients.shape[1])
        left = self.left_gram[self.left.codes[samples]]
        if self.scale is not None:
            left = left * self.scale[samples, None]
        codes = self.right.codes[samples]
        for number, slot in enumerate(slots):
            factors = [row[number] for row in worth]
            if any(factors):
                weighted = left * left.new_tensor(factors)[:, None]
                _add_columns(slot.products, codes, weighted, rows)
                add_rows(slot.coefficients, rows, samples, factors)

    def gram(self, rows: Tensor, columns: Tensor) -> Tensor:
        """A block of the points' Gram matrix."""
        left, right = self.left.codes, self.right.codes
        found = self.left_gram[left[rows][:, None], left[columns]]
        found = found * self.right_gram[right[rows][:, None], right[columns]]
        if self.scale is not None:
            found = found * self.scale[rows, None] * self.scale[columns]
        return found

    # --- from the coefficients ---

    def coefficients(self, points: Tensor) -> Tensor:
        """Coefficients ``(n, m)`` of points as those of places of the grid, ``(b, a, m)``."""
        weighted = points if self.scale is None else points * self.scale[:, None]
        found = points.new_zeros(len(self.right) * len(self.left), points.shape[1])
        found.index_add_(0, self.right.codes * len(self.left) + self.left.codes, weighted)
        return found.view(self.shape(points.shape[1]))

    def products(self, points: Tensor) -> Tensor:
        """What is kept of coefficients ``(n, m)``, computed anew."""
        return self.left_gram @ self.coefficients(points)

    def predict(self, coefficients: Tensor, points: KroneckerFactors) -> Tensor:
        """Products ``(k, m)`` of ``Σ_i c_i x_i`` with new points."""
        found = coefficients.new_zeros(len(points), coefficients.shape[1])
        for left, right in self.sides(points):
            to_left, to_right = self.left.cross(left), self.right.cross(right)[right.codes]
            size = max(len(self.left), len(left)) * len(self.right)
            for part in parts(coefficients.shape[1], size):
                products = to_left @ self.coefficients(coefficients[:, part])
                found[:, part] += _at_points([products], [1.0], left.codes, to_right)
        return found if points._scale is None else found.mul_(points._scale[:, None])

    def combine(self, coefficients: Tensor) -> Tensor:
        """``Σ_i c_i x_i``, ``(m, d)``."""
        left, right = self.left.rows(), self.right.rows()
        found = coefficients.new_empty(coefficients.shape[1], left.shape[1], right.shape[1])
        for part in parts(len(found), left.shape[1] * max(right.shape)):
            products = left.T @ self.coefficients(coefficients[:, part])  # (b, p, m)
            found[part] = torch.tensordot(products, right, dims=([0], [0])).transpose(0, 1)
        return found.flatten(1)

    def sides(self, points: KroneckerFactors) -> Iterator[tuple[Side, Side]]:
        """Of each term of other points, the rows for the left table and for the right one."""
        for term in points._terms:
            factors = _padded([indexed(f) for f in term], len(self.left.term + self.right.term))
            yield Side.of(factors[: self.split]), Side.of(factors[self.split :])


class GridOfLayer:
    """A grid as the geometry of a layer, with the products of its initial weights."""

    def __init__(self, grid: Grid, initial: Tensor) -> None:
        self.grid, self.initial = grid, initial  # (n, m)
        self.read, self.between, self.carry_out = grid.read, grid.gram, grid.carry_out

    def start(self, samples: Tensor) -> Tensor | None:
        """``(m, B)``."""
        return self.initial[samples].T


def find(factors: KroneckerFactors, neurons: int, any_size: bool = False) -> Grid | None:
    """The grid that points lie in, None where their rows repeat too little for it to pay.

    Args:
        factors: The points.
        neurons: That will be kept.
        any_size: Whether a grid that is larger or dearer than the points is welcome too.
    """
    if len(factors._terms) != 1:
        return None
    known = {f: indexed(f) for f in dict.fromkeys(factors._terms[0])}
    given = [known[f] for f in factors._terms[0]]
    most = 2 * len(factors) if any_size else len(factors) // WORTH_FROM
    best: tuple[int, Side, Side, int] | None = None
    for split in range(1, len(given) + 1):
        padded = _padded(given, max(split + 1, len(given)))
        left, right = Side.of(padded[:split]), Side.of(padded[split:])
        size = len(left) + len(right)
        if size <= most and (best is None or size < best[0]):
            best = (size, left, right, split)
    if best is None:
        return None
    _, left, right, split = best
    size, itemsize = len(left) * len(right), factors.dtype.itemsize
    if not any_size and size * neurons * itemsize > max(
        BYTES, LARGER_BY * len(factors) * neurons * itemsize
    ):
        return None
    return Grid(left, right, split, factors._scale)


def indexed(factor: Factor) -> Factor:
    """The same factor as its distinct rows and an index, if it repeats many; else one a point."""
    if factor.index is not None:
        return factor
    table = factor.table
    number = torch.arange(len(table), device=table.device)
    some = torch.linspace(0, table.shape[1] - 1, min(16, table.shape[1]), device=table.device)
    codes = torch.unique(table[:, some.long()], dim=0, return_inverse=True)[1]
    if int(codes.max()) + 1 > len(table) // WORTH_FROM:
        return Factor(table, number)
    first = _first_of(codes)
    if not torch.equal(table[first[codes]], table):  # alike in some columns only
        codes = torch.unique(table, dim=0, return_inverse=True)[1]
        first = _first_of(codes)
    return Factor(table[first], codes)


def parts(length: int, size: int) -> Iterator[slice]:
    """Slices of ``length``, each of as many items of ``size`` numbers as a temporary has."""
    step = max(1, TEMPORARY // size)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _first_of(codes: Tensor) -> Tensor:
    number = torch.arange(len(codes), device=codes.device)
    first = number.new_full((int(codes.max()) + 1,), len(codes))
    return first.scatter_reduce(0, codes, number, "amin")


def _padded(factors: Sequence[Factor], length: int) -> list[Factor]:
    """Factors, and behind them one of a single 1 if there are fewer than ``length``."""
    if len(factors) >= length:
        return list(factors)
    table, index = factors[0].table, factors[0].places(None)
    assert index is not None
    return [*factors, Factor(table.new_ones(1, 1), torch.zeros_like(index))]


def _at_points(
    products: Sequence[Tensor], shares: Sequence[float], left: Tensor, right: Tensor
) -> Tensor:
    """``Σ_k share_k Σ_c right[i, c] products_k[c, left[i]]``, ``(B, m)``."""
    neurons = products[0].shape[2]
    found = right.new_zeros(len(left), neurons)
    used = [(p, share) for p, share in zip(products, shares, strict=True) if share != 0.0]
    if right.is_cuda:
        for part in parts(len(left), right.shape[1] * neurons):
            for held, share in used:
                rows = held[:, left[part]].transpose(0, 1)
                found[part] += share * torch.bmm(right[part, None], rows)[:, 0]
        return found
    order, runs = _runs(left)
    right = right[order]
    ordered = torch.empty_like(found)
    for row, start, stop in runs:
        for number, (held, share) in enumerate(used):
            out = ordered[start:stop]
            torch.addmm(
                out, right[start:stop], held[:, row], beta=float(number > 0), alpha=share, out=out
            )
    return found.index_copy_(0, order, ordered) if used else found


def _add_columns(products: Tensor, codes: Tensor, left: Tensor, rows: Tensor) -> None:
    """``products[codes[i]] += left[i] ⊗ rows[i]``."""
    if rows.is_cuda or left.numel() * rows.shape[1] <= SMALL_UPDATE:
        for part in parts(len(codes), left.shape[1] * rows.shape[1]):
            if products.is_contiguous():
                products.index_add_(0, codes[part], left[part, :, None] * rows[part, None])
            else:
                update = left[part].T[:, :, None] * rows[part]
                products.transpose(0, 1).index_add_(1, codes[part], update)
        return
    order, runs = _runs(codes)
    left, rows = left[order].T, rows[order]
    for column, start, stop in runs:
        products[column].addmm_(left[:, start:stop], rows[start:stop])


def _runs(codes: Tensor) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """An order in which equal codes lie together, and of each run its code, start and stop."""
    ordered, order = codes.sort(stable=True)
    found, stops = torch.unique_consecutive(ordered, return_counts=True)
    ends = stops.cumsum(0).tolist()
    return order, list(zip(found.tolist(), [0, *ends[:-1]], ends, strict=True))
