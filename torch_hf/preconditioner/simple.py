"""Plain CG, and Martens' diagonal."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_hf.distributed import LOCAL, Space
from torch_hf.preconditioner.protocol import Curvature


class NoPreconditioner:
    """Plain CG."""

    wants_layers = False
    space: Space = LOCAL  # works on single entries, so on vectors of any space

    def begin(self, damping: float, curvature: Curvature) -> None:
        """Nothing to prepare."""

    def apply(self, r: Tensor) -> Tensor:
        """R itself."""
        return r

    def observe(self, iteration: int, direction: Tensor, product: Tensor) -> None:
        """Nothing is kept."""

    def end(self) -> None:
        """Nothing to adopt."""

    def abandon(self) -> None:
        """Nothing to forget."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take."""


class DiagonalPreconditioner(NoPreconditioner):
    """Division by ``(mean g^2 + lambda)^0.75`` (Martens 2010, section 4.7).

    The mean square is scaled to curvature, so that multiplying the loss by a constant changes
    nothing (see :mod:`torch_hf.statistics.gradient_moments`).
    """

    wants_layers = True

    def __init__(self) -> None:
        self._inverse: Tensor | None = None

    def begin(self, damping: float, curvature: Curvature) -> None:
        """Takes the step's diagonal."""
        self._inverse = curvature.diagonal(damping).reciprocal()

    def apply(self, r: Tensor) -> Tensor:
        """R over the diagonal."""
        assert self._inverse is not None
        return r * self._inverse

    def end(self) -> None:
        """The diagonal is made anew in each step."""
        self._inverse = None

    abandon = end
