"""The protocol of preconditioners, and what they may ask of the curvature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from torch_hf.statistics.kronecker_factors import LayerFactors
from torch_hf.vector import ParameterVector


class Curvature(Protocol):
    """What a preconditioner may ask of the operator."""

    vector: ParameterVector
    decays: Sequence[float]  # weight decay of each parameter

    def product(self, v: Tensor) -> Tensor:
        """``G v``, weight decay included and damping not, for a vector (P,); one product."""

    def root(self) -> tuple[Tensor, Tensor]:
        """R of shape (M, P) and c of shape (P,) with ``G = R^T R + diag(c)``; RuntimeError: none.

        R is the Jacobian times roots of the loss's Hessians. Over ranks each has the rows of its
        own cases, and the sum of ``R^T R`` counts.
        """

    def diagonal(self, damping: float) -> Tensor:
        """Martens' diagonal, of shape (P,)."""

    def factors(self, salt: int) -> list[LayerFactors]:
        """Kronecker factors of the layers."""


@runtime_checkable
class Preconditioner(Protocol):
    """What :class:`~torch_hf.HFOptimizer` asks of a preconditioner; bring your own.

    Where ``wants_layers`` is true, the step's first run of the closure records the uses of linear
    layers and convolutions. Then ``begin`` may ask the curvature for its ``diagonal`` or
    ``factors``; it may always ask for products. One step calls ``begin``, then ``apply`` and
    ``observe`` in each iteration of CG. At the end it calls ``end`` if the step was decided, or
    ``abandon`` if it failed, which undoes what the others did.

    One whose ``apply`` solves with ``G + damping I`` itself may say so by an attribute ``exact``
    that is true. CG then begins at zero and ends after two iterations. The first solve checks that
    ``apply`` is symmetric and positive definite, and exact if it says so.
    """

    @property
    def wants_layers(self) -> bool:
        """Whether this step's ``begin`` looks at layers."""

    def begin(self, damping: float, curvature: Curvature) -> None:
        """Before CG on ``G + damping I``."""

    def apply(self, r: Tensor) -> Tensor:
        """An approximation of ``A^-1 r``, symmetric and positive definite, (P,) to (P,)."""

    def observe(self, iteration: int, direction: Tensor, product: Tensor) -> None:
        """CG's direction p and A p in this iteration; both are overwritten later."""

    def end(self) -> None:
        """Adopts what was observed."""

    def abandon(self) -> None:
        """Forgets what was observed."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs: vectors (..., P), numbers, lists of numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what ``state_dict`` gave."""
