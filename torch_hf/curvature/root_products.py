"""R by products alone: ``R v`` and ``R^T u`` over all batches of a step, without writing R down.

The rows are those of :mod:`torch_hf.curvature.joint_root`, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.curvature.joint_root import leaves_out_gradient, squares_of
from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.curvature.products import Jacobian
from torch_hf.loss.hessian_roots import (
    HessianRoot,
    NoRootError,
    hessian_root,
    nonnegative,
    terms_with_rows,
)
from torch_hf.loss.loss_hessians import LossTerm


class _Batch(NamedTuple):
    """R of one batch: the roots of the loss's Hessian, and the Jacobian of their outputs."""

    weight: float  # of the batch in G
    roots: list[HessianRoot]
    terms: list[LossTerm]  # with rows
    own: list[LossTerm]  # squares, and the like, of a parameter itself
    jacobian: Jacobian


class RootProducts:
    """``G = R^T R + diag(diagonal)`` and ``g = R^T residual + rest``, R as a pair of maps.

    A single batch keeps its graph over all products; of several, each product runs the closure on
    every batch again, at the memory of one graph. Rows are kept of all batches.

    Args:
        operator: Of the quadratic, one process's. It counts a product for each ``times``.

    Attributes:
        rows: M.
        residual: r of shape (M,).
        rest: What of the gradient of the loss's terms is not ``R^T r``, (P,); None if nothing.
        diagonal: Curvature of squares of the parameters themselves, (P,); None without such.

    Raises:
        NoRootError: A term is not convex in the outputs, or couples too many of them.
    """

    residual: Tensor
    rest: Tensor | None
    diagonal: Tensor | None

    def __init__(self, operator: ObjectiveOperator) -> None:
        self.operator = operator
        self.objective = operator.objective
        self._single: _Batch | None = None
        self.rest = self.diagonal = None
        residuals = []
        with torch.no_grad():
            for batch in self._batches():
                residuals += [self._residual(batch, i) for i in range(len(batch.roots))]
                self._take_own_terms(batch)
                if len(operator.weights) == 1:
                    self._single = batch
        dtype, device = self.objective.vector.dtype, self.objective.vector.device
        self.residual = torch.cat([torch.zeros(0, dtype=dtype, device=device), *residuals])
        self.rows = len(self.residual)

    def times(self, v: Tensor) -> Tensor:
        """``R v`` of shape (M,) for a vector (P,)."""
        self.operator.check_alive()
        self.operator.products += 1
        vector = self.objective.vector
        parts = [self.residual[:0]]
        for batch in self._batches():
            pushed = iter(batch.jacobian.push(vector.unflatten(self.objective.free(v))))
            for root in batch.roots:
                rows = root.times(tuple(next(pushed) for _ in root.outputs))
                parts.append(rows.to(vector.dtype).mul_(math.sqrt(batch.weight)))
        return torch.cat(parts)

    def transposed(self, u: Tensor) -> Tensor:
        """``R^T u`` of shape (P,) for rows (M,)."""
        self.operator.check_alive()
        total, start = self.objective.vector.zeros(), 0
        for batch in self._batches():
            cotangents: list[Tensor] = []
            for root in batch.roots:
                part = u[start : start + root.rows] * math.sqrt(batch.weight)
                start += root.rows
                cotangents += root.transposed(part)
            total += self._pulled(batch.jacobian, cotangents)
        return self.objective.free(total)

    # --- batches --------------------------------------------------------------------------

    def _batches(self) -> Iterator[_Batch]:
        if self._single is not None:
            yield self._single
            return
        for i, weight in enumerate(self.operator.weights):
            if weight:
                yield self._batch(i, weight)

    def _batch(self, i: int, weight: float) -> _Batch:
        params = self.objective.vector.params
        every = self.operator.loss_terms(self.operator.graph(i))
        terms = terms_with_rows(every, params)
        own = [term for term in every if term not in terms]
        outputs = [z for term in terms for z in term.outputs]
        roots = [hessian_root(term) for term in terms]
        return _Batch(weight, roots, terms, own, Jacobian(outputs, params))

    def _residual(self, batch: _Batch, i: int) -> Tensor:
        """A term's residual; where it has none its gradient goes to ``rest``."""
        root, term = batch.roots[i], batch.terms[i]
        dtype = self.objective.vector.dtype
        if root.residual is not None:
            return root.residual.to(dtype) * math.sqrt(batch.weight)
        slopes = [torch.zeros_like(z) for z in batch.jacobian.outputs]
        before = sum(len(t.outputs) for t in batch.terms[:i])
        slopes[before : before + len(term.outputs)] = list(term.gradient())
        self.rest = _sum(self.rest, self._pulled(batch.jacobian, slopes) * batch.weight)
        return torch.zeros(root.rows, dtype=dtype, device=self.objective.vector.device)

    def _take_own_terms(self, batch: _Batch) -> None:
        params = self.objective.vector.params
        for term in batch.own:
            (z,) = term.outputs
            (weight,) = term.hessian(torch.ones_like(z))
            found = [nonnegative(weight.detach()), term.gradient()[0].detach()]
            diagonal, rest = (self._placed(params, z, t) * batch.weight for t in found)
            self.diagonal, self.rest = _sum(self.diagonal, diagonal), _sum(self.rest, rest)

    def _placed(self, params: list[Tensor], own: Tensor, values: Tensor) -> Tensor:
        pieces = [values.expand_as(p) if p is own else None for p in params]
        return self.objective.free(self.objective.vector.flatten(pieces))

    def _pulled(self, jacobian: Jacobian, cotangents: list[Tensor]) -> Tensor:
        kept = [u.to(z.dtype) for u, z in zip(cotangents, jacobian.outputs, strict=True)]
        return self.objective.free(self.objective.vector.flatten(jacobian.pull(kept)))


class CollectedProducts:
    """R of all ranks as a pair of maps that all ranks compute together.

    Rows stay on their rank but for vectors (M,), which the first rank gets and gives.

    Args:
        operator: Of the quadratic.

    Attributes:
        rows: M, over all ranks.
        squares: Whether the loss may be a sum of squares.
        affine: Whether a loss has terms without curvature, whose gradient R does not give.
        residual: r of shape (M,) on the first rank, (0,) on others.
        gradient: ``R^T residual + rest``, of shape (P,), on all.
        rest: The part of it outside of R's rows, (P,); None if nothing.
        diagonal: Curvature of squares of the parameters themselves, (P,); None without such.

    Raises:
        NoRootError: A term on one of the ranks has no root.
    """

    def __init__(self, operator: ObjectiveOperator) -> None:
        self.reducer = operator.objective.reducer
        self.zeros = operator.objective.vector.zeros
        found = self.reducer.attempt(lambda: (_products(operator), leaves_out_gradient(operator)))
        self._own, affine = found or (None, False)
        own = self._own
        others = operator.split is not None and not squares_of(operator)
        flags = [own is None, affine, others and own is not None and own.rows > 0]
        flags += [
            own is not None and t is not None for t in (own and own.rest, own and own.diagonal)
        ]
        rows = 0 if own is None else own.rows
        table = self.reducer.table([float(rows), *(float(flag) for flag in flags)])
        none, self.affine, others, rest, diagonal = (
            any(row[k] for row in table) for k in range(1, 6)
        )
        if none or own is None:
            raise NoRootError
        self.squares = not others
        self.counts = [int(row[0]) for row in table]
        self.rows = sum(self.counts)
        self._start = sum(self.counts[: self.reducer.rank])
        self.rest = self._summed(own.rest) if rest else None
        self.diagonal = self._summed(own.diagonal) if diagonal else None
        self.residual = self.reducer.collected(own.residual, self.counts)
        gradient = self._summed(own.transposed(own.residual)) if self.rows else self.zeros()
        self.gradient = gradient if self.rest is None else gradient + self.rest

    def times(self, v: Tensor) -> Tensor:
        """``R v`` of shape (M,) on the first rank."""
        own = self._own
        assert own is not None
        found = self.reducer.attempt(lambda: own.times(v))
        self.reducer.numbers([])  # tells of a failure
        assert found is not None
        return self.reducer.collected(found, self.counts)

    def transposed(self, u: Tensor) -> Tensor:
        """``R^T u`` of shape (P,) for all rows (M,)."""
        own, mine = self._own, u[self._start : self._start + self.counts[self.reducer.rank]]
        assert own is not None
        return self._summed(self.reducer.attempt(lambda: own.transposed(mine)))

    def _summed(self, v: Tensor | None) -> Tensor:
        return self.reducer.vector(self.zeros() if v is None else v)[0]


def _products(operator: ObjectiveOperator) -> RootProducts | None:
    try:
        return RootProducts(operator)
    except NoRootError:
        return None


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part
