"""Factors of Kronecker products, and products of their inner products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_hf import _checks


@dataclass(frozen=True, eq=False)
class Factor:
    """A matrix whose row i is ``table[index[i]]``, or ``table[i]`` without an index."""

    table: Tensor
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.table if self.index is None else self.index)

    def places(self, rows: Tensor | None) -> Tensor | None:
        """Rows of the table that rows of the matrix stand for; None for all, in order."""
        if self.index is None:
            return rows
        return self.index if rows is None else self.index[rows]

    def rows(self) -> Tensor:
        """The matrix itself, ``(n, p)``."""
        return self.table if self.index is None else self.table[self.index]

    def select(self, rows: Tensor | None) -> Factor:
        """Some rows as a factor of their own; the table is shared where there is an index."""
        if self.index is not None:
            return Factor(self.table, self.places(rows))
        return self if rows is None else Factor(self.table[rows])

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Factor:
        """The same matrix elsewhere or in another precision."""
        index = None if self.index is None else self.index.to(device)
        return Factor(self.table.to(device, dtype), index)

    def inner(self, rows: Tensor | None, other: Factor, columns: Tensor | None) -> Tensor:
        """Inner products of rows; where a table is the shorter, its own, spread."""
        left, left_spread = self._shorter(rows)
        right, right_spread = other._shorter(columns)
        product = left @ right.T
        product = product if left_spread is None else product[left_spread]
        return product if right_spread is None else product[:, right_spread]

    def _shorter(self, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        places = self.places(rows)
        if places is None:
            return self.table, None
        if len(places) <= len(self.table):
            return self.table[places], None
        return self.table, places


#: One Kronecker product a point: its factors, in order.
Term = tuple[Factor, ...]


def inner(left: Term, rows: Tensor | None, right: Term, columns: Tensor | None) -> Tensor:
    """The product over factors of their inner products; a factor that recurs is taken once."""
    known: dict[tuple[Factor, Factor], Tensor] = {}
    product: Tensor | None = None
    for pair in zip(left, right, strict=True):
        if pair not in known:
            known[pair] = pair[0].inner(rows, pair[1], columns)
        product = known[pair] if product is None else product * known[pair]
    assert product is not None  # a term has at least one factor
    return product


def squared_norms(terms: tuple[Term, ...]) -> Tensor:
    """``|Σ_t x_it|²`` of each point."""
    total: Tensor | None = None
    for left in terms:
        for right in terms:
            product: Tensor | None = None
            for f, g in zip(left, right, strict=True):
                if f is g:
                    part = f.table.square().sum(dim=1)
                    part = part if f.index is None else part[f.index]
                else:
                    part = (f.rows() * g.rows()).sum(dim=1)
                product = part if product is None else product * part
            assert product is not None
            total = product if total is None else total + product
    assert total is not None
    return total


def columns(term: Term, start: int, stop: int) -> Tensor:
    """Coordinates ``start`` to ``stop`` of the Kronecker products, ordered as torch.kron does."""
    place = torch.arange(start, stop, device=term[0].table.device)
    product: Tensor | None = None
    for factor in reversed(term):
        width = factor.table.shape[1]
        part = factor.table[:, place % width]
        part = part if factor.index is None else part[factor.index]
        product = part if product is None else product.mul_(part)
        place = place // width
    assert product is not None
    return product


def mapped(terms: tuple[Term, ...], change: Callable[[Factor], Factor]) -> tuple[Term, ...]:
    """Each factor changed once, so that one that recurs still does."""
    changed = {f: change(f) for f in dict.fromkeys(f for term in terms for f in term)}
    return tuple(tuple(changed[f] for f in term) for term in terms)


def with_constant(terms: tuple[Term, ...], constant: bool) -> tuple[Term, ...]:
    """Each factor with a column of ones at its end, if that is wanted."""
    _checks.flag("constant", constant)
    if not constant:
        return terms
    return mapped(
        terms,
        lambda f: Factor(torch.cat([f.table, f.table.new_ones(len(f.table), 1)], dim=1), f.index),
    )


def unit_scale(terms: tuple[Term, ...], normalize: bool) -> Tensor | None:
    """What makes each point of length 1, if that is wanted."""
    _checks.flag("normalize", normalize)
    if not normalize:
        return None
    squares = squared_norms(terms)
    zero = ~((squares > 0) & torch.isfinite(squares))
    if zero.any():
        raise ValueError(
            "Points must have a positive, finite length with normalize=True, got "
            f"{int(zero.sum())} that have not, the first of them point {int(zero.nonzero()[0])}. "
            "Leave them out, scale the factors, or use constant=True."
        )
    return squares.rsqrt()


def equal(left: tuple[Term, ...], right: tuple[Term, ...]) -> bool:
    """Whether all factors are equal, in order."""
    if [len(term) for term in left] != [len(term) for term in right]:
        return False
    ours, theirs = ([f.rows() for term in terms for f in term] for terms in (left, right))
    return all(map(torch.equal, ours, theirs))


def duplicates(terms: tuple[Term, ...]) -> Tensor:
    """Points that repeat an earlier one, and the first that each repeats: ``(k, 2)``."""
    group = _groups(terms)
    points = len(group)
    number = torch.arange(points, device=group.device)
    first = number.new_full((points,), points).scatter_reduce(0, group, number, "amin")
    again = first[group] != number
    return torch.stack([number[again], first[group][again]], 1)


def _groups(terms: tuple[Term, ...]) -> Tensor:
    """For each point a number, the same where all factors are equal."""
    codes = []
    for factor in dict.fromkeys(f for term in terms for f in term):
        code = torch.unique(factor.table, dim=0, return_inverse=True)[1]
        codes.append(code if factor.index is None else code[factor.index])
    found: Tensor = torch.unique(torch.stack(codes, 1), dim=0, return_inverse=True)[1]
    return found
