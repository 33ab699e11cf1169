"""Where training starts: correlations of initial weights with the data, without the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
