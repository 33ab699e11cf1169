"""What a layer's weights were before training, known by their correlations with data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_hf.kronecker.factors import KroneckerFactors

#: Coordinates of the initial weights made at a time.
BLOCK = 2048
#: Neurons drawn at a time.
NEURONS = 4096


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(points: KroneckerFactors, neurons: int, std: float, seed: int) -> Tensor:
    """Correlations ``(neurons, n)`` of weights N(0, std²), made block by block from the seed."""
    generator = _generator(seed)
    found = torch.zeros(neurons, len(points), dtype=points.dtype, device=points.device)
    for start in range(0, points.features, BLOCK):
        stop = min(start + BLOCK, points.features)
        weights = torch.randn(neurons, stop - start, dtype=points.dtype, generator=generator)
        found.addmm_(weights.to(points.device), points.dense(start, stop).T, alpha=std)
    return found


def seeded_weights(points: KroneckerFactors, neurons: int, std: float, seed: int) -> Tensor:
    """The weights ``(neurons, d)`` that :func:`seeded` goes through."""
    generator = _generator(seed)
    blocks = [
        torch.randn(
            neurons, min(BLOCK, points.features - s), dtype=points.dtype, generator=generator
        )
        for s in range(0, points.features, BLOCK)
    ]
    return torch.cat(blocks, dim=1).to(points.device).mul_(std)


def joint(gram: Tensor, neurons: int, std: float, seed: int, dtype: torch.dtype) -> Tensor:
    """Correlations ``(neurons, n)``, each row drawn from N(0, std² gram).

    That is the distribution they have for weights N(0, std² I), of whatever dimension.
    """
    generator = _generator(seed)
    found = torch.empty(neurons, len(gram), dtype=dtype, device=gram.device)
    if std == 0.0:
        return found.zero_()
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


def conditional(
    known: Sequence[tuple[KroneckerFactors, Tensor]],
    points: KroneckerFactors,
    std: float,
    seed: int,
) -> Tensor:
    """Correlations ``(neurons, k)`` with new points, drawn given those with the known ones.

    Gaussian: mean K_*n K⁺ Z₀ and covariance std² (K_** - K_*n K⁺ K_n*).
    """
    exact = [p.to(dtype=torch.float64) for p, _ in known]
    new = points.to(dtype=torch.float64)
    gram = torch.cat([torch.cat([q.cross(p) for q in exact], dim=1) for p in exact])
    between = torch.cat([p.cross(new) for p in exact], dim=1)  # (k, n)
    initial = torch.cat([values for _, values in known], dim=1)
    weights = solve(gram, between.T)
    mean = initial.double() @ weights
    rest = new.gram() - between @ weights
    noise = joint((rest + rest.T) / 2, len(initial), std, seed, torch.float64)
    return (mean + noise).to(initial.dtype)


def solve(gram: Tensor, right: Tensor) -> Tensor:
    """``gram⁺ right`` in float64; by eigenvalues where the Gram matrix is singular."""
    lower, info = _cholesky(gram)
    if not int(info) and _regular(lower):
        return torch.cholesky_solve(right, lower)
    values, vectors = _eigh(gram)
    keep = values > len(gram) * torch.finfo(gram.dtype).eps * values[-1]
    vectors = vectors[:, keep]
    return vectors @ ((vectors.T @ right) / values[keep, None])


def _root(gram: Tensor) -> Tensor:
    lower, info = _cholesky(gram)
    if not int(info):
        return lower
    values, vectors = _eigh(gram)
    return vectors * values.clamp_min(0.0).sqrt()


def _regular(lower: Tensor) -> bool:
    pivots = lower.diagonal()
    return bool(pivots.min() > 1e-6 * pivots.max())  # squares: twelve digits


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    lower, info = torch.linalg.cholesky_ex(gram)
    return lower, info


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values, vectors


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
            found = joint(gram, self.neurons, self.std, int(self.seed), dtype)
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
        found = conditional(known, points, self.std, int(self.seed) + len(known))
        self.later.append((points, found))
        return found

    def dense(self) -> Tensor:
        """The weights ``(m, d)``; of a joint draw those of least norm."""
        if self.kind == "given":
            return cast(Tensor, self.weight)
        if self.kind == "seeded":
            return seeded_weights(self.factors, self.neurons, self.std, int(self.seed))
        exact = self.factors.to(dtype=torch.float64)
        return exact.combine(solve(exact.gram(), self.kept().T.double()))

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
            return given(points, self.weight)
        return seeded(points, self.neurons, self.std, int(self.seed))

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
