"""Data whose rows are Kronecker products, and their inner products without forming a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_hf import _checks
from torch_hf.kronecker import _memory, _terms
from torch_hf.kronecker._checks import Rows, as_indices, check_matrices
from torch_hf.kronecker._terms import Factor, Term

_FEWER_ROWS = 'Use fewer rows at a time; a KroneckerLinear does so with gram="rows".'

#: Coordinates taken at a time.
_COLUMNS = 2048


class KroneckerFactors:
    """Data points ``x_i = a_i ⊗ b_i ⊗ ...`` of dimension d, kept as their factors.

    The inner product of two Kronecker products is the product of the factors' inner products. So a
    Gram block of r by c points costs ``r * c * (p + q + ...)`` multiply-adds, independent of
    ``d = p * q * ...``. The ordering is that of :func:`torch.kron`.

    Args:
        *factors: Matrices ``(n, p)``, ``(n, q)``, ...; row i of each belongs to point i. Of one
            floating-point dtype, on one device. They are not copied.
        constant: Append a 1 to each row of each factor: ``(a, 1) ⊗ (b, 1)`` holds the products,
            both factors alone (linear terms), and a constant (a bias).
        normalize: Scale each x_i to length 1.

    Raises:
        TypeError: A factor is not a tensor of floating point, or they are of several dtypes.
        ValueError: Shapes or devices do not fit together, a value is not finite, or a point to be
            normalised is zero.

    Example:
        >>> import torch
        >>> a, b = torch.randn(5, 3), torch.randn(5, 4)
        >>> x = KroneckerFactors(a, b)
        >>> len(x), x.features
        (5, 12)
        >>> bool(torch.allclose(x.gram(), (a @ a.T) * (b @ b.T), atol=1e-5))
        True
    """

    def __init__(self, *factors: Tensor, constant: bool = False, normalize: bool = False) -> None:
        check_matrices(factors)
        self._terms = _terms.with_constant((tuple(Factor(f) for f in factors),), constant)
        self._scale = _terms.unit_scale(self._terms, normalize)

    @classmethod
    def power(
        cls, x: Tensor, degree: int = 2, *, constant: bool = False, normalize: bool = False
    ) -> KroneckerFactors:
        """Points ``x̄_i ⊗ ... ⊗ x̄_i``, all products of ``degree`` entries of a row.

        Args:
            x: ``(n, p)``.
            degree: Number of factors.
            constant: ``x̄ = (x, 1)``, for all products of up to ``degree`` entries.
            normalize: As in the class.

        Returns:
            Points of dimension ``p**degree``, or ``(p + 1)**degree`` with the constant.

        Raises:
            TypeError, ValueError: As the class.
        """
        _checks.count("degree", degree, low=1, hint="degree=2 is x ⊗ x.")
        check_matrices([x])
        terms = _terms.with_constant(((Factor(x),) * degree,), constant)
        return _made(terms, _terms.unit_scale(terms, normalize))

    @classmethod
    def from_pairs(
        cls,
        A: Tensor,
        B: Tensor,
        rows: Rows,
        cols: Rows,
        *,
        constant: bool = False,
        normalize: bool = False,
    ) -> KroneckerFactors:
        """Pairs ``x_i = A[rows[i]] ⊗ B[cols[i]]``, such as drug and target, user and item.

        Inner products are taken between rows of A and of B, not between pairs, and then spread.

        Args:
            A: Features ``(drugs, p)``.
            B: Features ``(targets, q)``.
            rows: For each pair, the row of A.
            cols: For each pair, the row of B; as many.
            constant: As in the class.
            normalize: As in the class.

        Raises:
            TypeError, ValueError: As the class; or an index is out of range.

        Example:
            >>> import torch
            >>> drugs, targets = torch.randn(3, 2), torch.randn(4, 5)
            >>> pairs = KroneckerFactors.from_pairs(drugs, targets, [0, 2, 2], [3, 0, 1])
            >>> len(pairs), pairs.features
            (3, 10)
        """
        check_matrices([A, B], same_length=False)
        places = [
            as_indices(rows, len(A), A.device, "rows"),
            as_indices(cols, len(B), B.device, "cols"),
        ]
        if len(places[0]) != len(places[1]):
            raise ValueError(
                "rows and cols must have the same length, one entry per pair, got "
                f"{len(places[0])} and {len(places[1])}."
            )
        pair = (Factor(A, places[0]), Factor(B, places[1]))
        terms = _terms.with_constant((pair,), constant)
        return _made(terms, _terms.unit_scale(terms, normalize))

    @classmethod
    def sum_of(cls, *terms: KroneckerFactors, normalize: bool = False) -> KroneckerFactors:
        """Points that are sums of Kronecker products, as in bilinear pooling: ``Σ_t a_it ⊗ b_it``.

        A Gram block then takes R² products for R terms.

        Args:
            *terms: Data of equally many points, with factors of the same widths, not normalised.
            normalize: Scale each sum to length 1.

        Raises:
            TypeError: A term is no ``KroneckerFactors``.
            ValueError: Terms do not fit together.
        """
        for term in terms:
            if not isinstance(term, KroneckerFactors):
                raise TypeError(
                    f"The terms of sum_of must be KroneckerFactors, got {type(term).__name__}. "
                    "Build them with KroneckerFactors(A, B)."
                )
            if term._scale is not None:
                raise ValueError(
                    "The terms of sum_of must not be normalised, got one that is. Normalise the "
                    "sum instead: sum_of(..., normalize=True)."
                )
            if (len(term), term.widths) != (len(terms[0]), terms[0].widths):
                raise ValueError(
                    "The terms of sum_of must have the same number of points and the same widths, "
                    f"got {len(terms[0])} points of {terms[0].widths} and {len(term)} of "
                    f"{term.widths}."
                )
        if not terms:
            raise ValueError("sum_of must have at least one term, got none. Pass KroneckerFactors.")
        all_terms = tuple(t for term in terms for t in term._terms)
        return _made(all_terms, _terms.unit_scale(all_terms, normalize))

    def __len__(self) -> int:
        return len(self._terms[0][0])

    @property
    def widths(self) -> tuple[int, ...]:
        """The factors' numbers of columns, ones of ``constant`` included."""
        return tuple(f.table.shape[1] for f in self._terms[0])

    @property
    def features(self) -> int:
        """The dimension d of a point."""
        return math.prod(self.widths)

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors and of all products."""
        return self._terms[0][0].table.dtype

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return self._terms[0][0].table.device

    def __repr__(self) -> str:
        terms = f", {len(self._terms)} terms" if len(self._terms) > 1 else ""
        widths = " x ".join(map(str, self.widths))
        return f"KroneckerFactors({len(self)} points of {widths} = {self.features}{terms})"

    def gram(self, rows: Rows | None = None, columns: Rows | None = None) -> Tensor:
        """Inner products ``⟨x_i, x_j⟩``, i in ``rows`` and j in ``columns``; None is all points.

        Of all points these are n² numbers, and a solve with them takes n³. For kernel ridge
        regression on pairs there is no need: by the vec trick (Airola & Pahikkala, arXiv
        1601.01507) a product with the pairs' Gram matrix is ``K_A Y K_B`` and a selection, which
        conjugate gradients take; ``examples/pairs.py`` has it.

        Raises:
            MemoryError: The block would not fit.
            ValueError, TypeError: An index is out of range, or no integer.
        """
        return self._block(rows, self, columns)

    def cross(self, points: KroneckerFactors, columns: Rows | None = None) -> Tensor:
        """Inner products ``(len(points), n)`` of other points with these.

        Args:
            points: Data with factors of the same widths.
            columns: Which of these; None is all.

        Raises:
            ValueError: The widths differ.
        """
        if not isinstance(points, KroneckerFactors) or points.widths != self.widths:
            got = points.widths if isinstance(points, KroneckerFactors) else type(points).__name__
            raise ValueError(f"points must be KroneckerFactors of widths {self.widths}, got {got}.")
        return points._block(None, self, columns)

    def squared_norms(self) -> Tensor:
        """``|x_i|²``, ``(n,)``."""
        total = _terms.squared_norms(self._terms)
        return total if self._scale is None else total * self._scale.square()

    def _block(self, rows: Rows | None, other: KroneckerFactors, columns: Rows | None) -> Tensor:
        left, right = self._checked(rows), other._checked(columns)
        shape = [len(t) if i is None else len(i) for t, i in ((self, left), (other, right))]
        _memory.check_fits("A Gram block", shape, self.dtype, self.device, _FEWER_ROWS)
        pairs = [(t, u) for t in self._terms for u in other._terms]
        total = _terms.inner(pairs[0][0], left, pairs[0][1], right)
        for term, counterpart in pairs[1:]:
            total = total + _terms.inner(term, left, counterpart, right)
        if self._scale is not None:
            total = total * (self._scale if left is None else self._scale[left])[:, None]
        if other._scale is not None:
            total = total * (other._scale if right is None else other._scale[right])
        return total

    def _checked(self, rows: Rows | None) -> Tensor | None:
        return None if rows is None else as_indices(rows, len(self), self.device)

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Coordinates ``start`` to ``stop`` of all points, ``(n, stop - start)``.

        Raises:
            MemoryError: They would not fit; take fewer coordinates at a time.
        """
        stop = self.features if stop is None else stop
        instead = "Take fewer coordinates at a time: dense(start, stop)."
        shape = (len(self), stop - start)
        _memory.check_fits("The dense data", shape, self.dtype, self.device, instead)
        total = _terms.columns(self._terms[0], start, stop)
        for term in self._terms[1:]:
            total += _terms.columns(term, start, stop)
        return total if self._scale is None else total.mul_(self._scale[:, None])

    def combine(self, coefficients: Tensor) -> Tensor:
        """``Σ_i c_i x_i`` for each column of ``(n, m)`` coefficients: ``(m, d)``."""
        found = coefficients.new_empty(coefficients.shape[1], self.features)
        for start in range(0, self.features, _COLUMNS):
            stop = min(start + _COLUMNS, self.features)
            found[:, start:stop] = coefficients.T @ self.dense(start, stop)
        return found

    def select(self, rows: Rows) -> KroneckerFactors:
        """These points only, in this order.

        Raises:
            ValueError, TypeError: An index is out of range, or no integer.
        """
        chosen = self._checked(rows)
        scale = self._scale if self._scale is None or chosen is None else self._scale[chosen]
        return _made(_terms.mapped(self._terms, lambda f: f.select(chosen)), scale)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KroneckerFactors:
        """The same points elsewhere or in another precision; lengths of 1 are kept as they are."""
        terms = _terms.mapped(self._terms, lambda f: f.to(device, dtype))
        scale = None if self._scale is None else self._scale.to(device, dtype)
        return _made(terms, scale)

    def same_as(self, other: KroneckerFactors) -> bool:
        """Whether these are the same points, given by the same factors in the same order."""
        if self is other:
            return True
        alike = (self._scale is None) == (other._scale is None) and len(self) == len(other)
        return alike and _terms.equal(self._terms, other._terms)

    def duplicates(self) -> Tensor:
        """Which points repeat an earlier one: ``(k, 2)``, each a point and the first equal to it.

        Points count as equal if all their factors are. Repeated points are allowed; they make the
        Gram matrix singular, and the initial draw of a layer slower.

        Example:
            >>> import torch
            >>> a = torch.tensor([[1.0], [2.0], [1.0]])
            >>> KroneckerFactors(a, a).duplicates()
            tensor([[2, 0]])
        """
        return _terms.duplicates(self._terms)


def _made(terms: tuple[Term, ...], scale: Tensor | None) -> KroneckerFactors:
    found = object.__new__(KroneckerFactors)
    found._terms, found._scale = terms, scale
    return found


def check_new_points(data: KroneckerFactors, points: KroneckerFactors) -> None:
    """Points at which a layer of ``data`` can be asked."""
    got = getattr(points, "widths", type(points).__name__)
    if got != data.widths:
        raise ValueError(f"points must be KroneckerFactors of widths {data.widths}, got {got}.")
    if points.dtype != data.dtype:
        raise TypeError(
            f"points must be of the layer's dtype {data.dtype}, got {points.dtype}. Convert them: "
            f"points.to(dtype={data.dtype})."
        )
    if points.device != data.device:
        raise ValueError(
            f"points must be on the layer's device {data.device}, got {points.device}. Move them: "
            f"points.to({str(data.device)!r})."
        )
    if (points._scale is None) != (data._scale is None):
        wanted = data._scale is not None
        have = ("not normalised", "normalised")
        raise ValueError(
            f"points must be {have[wanted]} as the layer's data are, got points that are "
            f"{have[not wanted]}. Make them with normalize={wanted}."
        )
