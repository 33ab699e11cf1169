"""What a preconditioner may ask of the curvature: statistics of cases and layers in its batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from torch_hf import _messages
from torch_hf.curvature.joint_root import joint_root, why_no_root
from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.statistics.case_signs import Places, places
from torch_hf.statistics.gradient_moments import EXPONENT, squared_gradients, trace_and_slopes
from torch_hf.statistics.kronecker_factors import LayerFactors, averaged, measure

#: Of so many outputs of the loss terms ranks tell each other the rows; further ones count as the
#: last of them, which matters only where they have other numbers of rows.
TOLD = 8


class LayerStatistics:
    """Martens' diagonal and the layers' Kronecker factors, over batches and ranks.

    Args:
        operator: Whose batches, weights and kept graph these are.

    Attributes:
        vector: The parameters.
        decays: Weight decay of each.
    """

    def __init__(self, operator: ObjectiveOperator) -> None:
        self._operator = operator
        self._objective = operator.objective
        self.vector = operator.objective.vector
        self.decays = operator.objective.decay

    def product(self, v: Tensor) -> Tensor:
        """The operator's product with a vector, counted with those of CG."""
        return self._operator(v)

    def root(self) -> tuple[Tensor, Tensor]:
        """R of shape (M, P) and c of shape (P,), with ``G = R^T R + diag(c)``.

        R holds the Jacobian's rows times the roots of the loss's Hessians, those of this rank's
        cases; ``R^T R`` is to be summed over ranks. c holds weight decay and the curvature of
        squares of the parameters themselves, the same on all ranks.

        Raises:
            RuntimeError: There is none, as of the Hessian, or of a loss that is not convex in the
                outputs.
        """
        operator, reducer = self._operator, self._objective.reducer
        why = why_no_root(operator)
        root = None if why else reducer.attempt(lambda: joint_root(operator))
        if not why and reducer.numbers([float(root is None)])[0]:
            why = "the loss is not convex in its outputs, or couples too many of them"
        if root is None or why:
            raise RuntimeError(f"The curvature has no root R with G = R^T R here: {why}.")
        own = self.vector.zeros() if root.diagonal is None else root.diagonal
        return root.rows, reducer.vector(own.to(self.vector.dtype))[0] + operator.decay

    def diagonal(self, damping: float) -> Tensor:
        """Martens' diagonal ``(mean g^2 + lambda)^0.75`` on the curvature batches.

        The same over any split of the cases into batches and ranks, but for random signs.
        """
        objective = self._objective
        found = objective.reducer.attempt(self._own_diagonal)
        total, trace, slopes = found or (objective.vector.zeros(), 0.0, 0.0)
        total, table = objective.space.reduce_with(total, [trace, slopes])
        trace, slopes = (sum(column) for column in zip(*table, strict=True))
        total = total * (trace / slopes if slopes > 0 else 0.0)
        total = total + self._operator.decay + damping
        return total.clamp_(min=torch.finfo(total.dtype).tiny) ** EXPONENT

    def _own_diagonal(self) -> tuple[Tensor, float, float]:
        """Squared gradients, the trace of H and the squared slopes over this rank's batches."""
        vector = self._objective.vector
        if vector.sums:
            raise RuntimeError(_messages.PER_CASE.format(what="The diagonal preconditioner"))
        total, trace, slopes = vector.zeros(), 0.0, 0.0
        for i, weight in enumerate(self._operator.weights):
            if not weight:
                continue
            graph = self._operator.graph(i)
            loss_terms = self._operator.loss_terms(graph)
            squares = squared_gradients(loss_terms, vector.params, graph.record.layers)
            total.add_(vector.flatten(squares), alpha=weight**2)
            parts = trace_and_slopes(loss_terms, vector.params)
            trace, slopes = trace + weight * parts[0], slopes + weight**2 * parts[1]
        return total, trace, slopes

    def factors(self, salt: int) -> list[LayerFactors]:
        """Kronecker factors of the layers on the curvature batches; none if no layer was seen.

        The same, but for rounding, over any split of the cases into batches and ranks that leaves
        their order; see :func:`torch_hf.statistics.case_signs.places`.

        Args:
            salt: Another one draws other signs; see :mod:`torch_hf.statistics.case_signs`.
        """
        self._operator.check_alive()
        objective = self._objective
        if objective.vector.sums or not objective.runs.layers:
            return []  # of fully sharded layers no rank sees the whole
        at = self._places()
        found = objective.reducer.attempt(lambda: self._own_factors(salt, at))
        blocks, rows = found or ([], self.vector.zeros()[:0])
        return averaged(blocks, rows, objective.reducer, self.vector.zeros())

    def _places(self) -> list[list[Places]]:
        """Where the rows of each batch stand among those of all batches and ranks, by output."""
        reducer = self._objective.reducer
        rows = [own[:TOLD] for own in self._operator.rows]
        totals = [sum(own[k] for own in rows if k < len(own)) for k in range(TOLD)]
        table = reducer.table([float(n) for n in totals])
        shares = [[int(n) for n in column] for column in zip(*table, strict=True)]
        before, found = [0] * TOLD, []
        for own in rows:
            found.append([places(before[k], shares[k], reducer.rank) for k in range(len(own))])
            before = [n + m for n, m in zip_longest(before, own, fillvalue=0)]
        return found

    def _own_factors(
        self, salt: int, at: Sequence[Sequence[Places]]
    ) -> tuple[list[LayerFactors], Tensor]:
        """Sums over this rank's batches, and each block's number of rows."""
        blocks: list[LayerFactors] = []
        rows = self.vector.zeros()[:0]
        for i, weight in enumerate(self._operator.weights):
            if not weight:
                continue
            graph = self._operator.graph(i)
            try:
                loss_terms = self._operator.loss_terms(graph)
            except RuntimeError:
                if self._operator.curvature == "hessian":  # which needs no split
                    return [], rows
                raise
            layers = graph.record.layers
            found, count = measure(loss_terms, self.vector.params, layers, salt, at[i])
            for block in found:
                block.outputs *= weight
            if not blocks:
                blocks, rows = found, count
            else:
                rows = rows + count
                for total, part in zip(blocks, found, strict=True):
                    total.inputs += part.inputs
                    total.outputs += part.outputs
        return blocks, rows
