"""What a layer's weights were before training, known by what they do to data."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_hf.kronecker import _initial
from torch_hf.kronecker.factors import KroneckerFactors


class Start(nn.Module):
    """Initial weights N(0, std²) as a joint draw of correlations, as a seed, or as given.

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
        self.later: list[tuple[KroneckerFactors, Tensor]] = []  # points drawn later

    def draw(self, keep: bool) -> Tensor:
        """Correlations ``(m, n)`` with the data."""
        if self.kind == "joint":
            gram = self.factors.to(dtype=torch.float64).gram()
            dtype = self.factors.dtype
            found = _initial.joint(gram, self.neurons, self.std, int(self.seed), dtype)
        else:
            found = self._through_weights(self.factors)
        self.values = found.clone() if keep else None
        return found

    def at(self, points: KroneckerFactors) -> Tensor:
        """Correlations ``(m, k)`` with new points; those drawn are remembered."""
        if self.kind != "joint":
            return self._through_weights(points)
        for earlier, values in self.later:
            if earlier.same_as(points):
                return values
        known = [(self.factors, self.kept()), *self.later]
        found = _initial.conditional(known, points, self.std, int(self.seed) + len(known))
        self.later.append((points, found))
        return found

    def dense(self) -> Tensor:
        """The weights ``(m, d)``; of a joint draw those of least norm."""
        if self.kind == "given":
            return cast(Tensor, self.weight)
        if self.kind == "seeded":
            return _initial.seeded_weights(self.factors, self.neurons, self.std, int(self.seed))
        exact = self.factors.to(dtype=torch.float64)
        return exact.combine(_initial.solve(exact.gram(), self.kept().T.double()))

    def kept(self) -> Tensor:
        """The initial correlations with the data."""
        if self.values is None:
            raise RuntimeError(
                "This needs the initial correlations, but the layer was made with "
                "keep_initial=False. Make it with keep_initial=True, n m numbers more."
            )
        return self.values

    def _through_weights(self, points: KroneckerFactors) -> Tensor:
        if self.weight is not None:
            return _initial.given(points, self.weight)
        return _initial.seeded(points, self.neurons, self.std, int(self.seed))

    def _apply(self, fn: Any, recurse: bool = True) -> Start:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = self.scale.double()
        self.later = [(p, fn(values)) for p, values in self.later]
        return self

    def moved(self, factors: KroneckerFactors) -> None:
        """The data lie elsewhere now."""
        self.factors = factors
        self.later = [(p.to(factors.device, factors.dtype), v) for p, v in self.later]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.later.clear()  # drawn from another start
