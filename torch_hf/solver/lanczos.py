"""Levenberg-Marquardt steps by bidiagonalisation: what a search over lambda asks of a solver.

A step is held as its coordinates in the basis, k numbers, so that the search over lambda works on
small vectors. The space grows where a smaller lambda asks for it. All that lies in the space is
free: steps for other lambda, the quadratic's value, a second round of a damped solve. A correction
towards another residual takes one product ``R^T u``, and what it promised one ``R v``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_hf.solver.golub_kahan import CHECK_EVERY, GolubKahan, Product

#: What the step may leave of the damped model beyond its minimum, as a part of what must be left.
TOLERANCE = 0.1


class LanczosSolver:
    """Steps for any lambda from one growing bidiagonalisation.

    Args:
        run: Of the quadratic.
        times: ``R v``, of shape (M,).
        transposed: ``R^T u``, of shape (P,).
        residual: r of shape (M,).
        order: The rank that R may have, the smaller of M and P.

    Attributes:
        trace: Of ``R^T R`` with weight decay, as far as the first pairs see it: a lower bound.

    Example:
        >>> import torch
        >>> R, r = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([2.0, 3.0])
        >>> solver = LanczosSolver(GolubKahan(R.mv, R.T.mv, 2, r), R.mv, R.T.mv, r, 2)
        >>> y = solver.minimum(1.0)
        >>> solver.direction(y)
        tensor([-0.8000, -1.5000])
        >>> round(solver.quadratic(y), 4)
        -5.295
    """

    def __init__(
        self, run: GolubKahan, times: Product, transposed: Product, residual: Tensor, order: int
    ) -> None:
        self.run = run
        self.residual = residual.double()
        self.order = order
        self.squares = torch.ones((), dtype=torch.float64)
        self._times, self._transposed = times, transposed
        self._dtype = residual.dtype
        run.extend(CHECK_EVERY)
        self.trace = sum(a**2 for a in run.alphas) + sum(b**2 for b in run.betas)

    def minimum(self, damping: float) -> Tensor:
        """The step for a lambda, in the basis: solved as far as it earns its pairs."""
        self.run.until(damping, TOLERANCE)
        return self.run.coordinates(damping)

    def direction(self, y: Tensor) -> Tensor:
        """The step that has these coordinates, of shape (P,)."""
        return self.run.combined(y)

    def correction(self, damping: float, residual: Tensor) -> Tensor:
        """The step for another gradient ``R^T residual``, in the same space."""
        slope = self._transposed(residual.to(self._dtype))
        return self.run.solved(damping, -self.run.along(slope))

    def further(self, damping: float, y: Tensor) -> Tensor:
        """What a second round of the same damped solve adds at y."""
        return self.run.solved(damping, -self.run.slope(y))

    def quadratic(self, y: Tensor) -> float:
        """``g^T d + 1/2 d^T (R^T R + decay) d``: the change predicted."""
        return self.run.quadratic_at(y)

    def times(self, y: Tensor) -> Tensor:
        """``R d`` in float64."""
        return self._times(self.direction(y)).double()

    def length(self, y: Tensor) -> float:
        """``|d|``."""
        return float(torch.linalg.vector_norm(y))

    def gradient(self) -> Tensor:
        """The gradient of the quadratic at 0, as far as the space holds it."""
        return self.run.slope(torch.zeros(self.run.pairs, dtype=torch.float64))
