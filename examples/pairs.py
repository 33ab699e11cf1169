"""Pairs of drugs and targets: the Davis data, splits, a kernel ridge regression and a measure."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from torch import Tensor


def load(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities of drugs and of targets, diagonal 1, and pKd ``(drugs, targets)``."""
    data = numpy.load(path)
    kernels = [torch.tensor(data[name]).double() for name in ("drugs", "targets")]
    drugs, targets = (k / (k.diagonal()[:, None] * k.diagonal()).sqrt() for k in kernels)
    affinity = 9 - torch.tensor(data["kd_nanomolar"]).double().log10()
    return (drugs + drugs.T) / 2, (targets + targets.T) / 2, affinity


def split(kind: str, shape: torch.Size) -> Tensor:
    """Which pairs are held out, as a mask of the grid."""
    held = torch.zeros(shape, dtype=torch.bool)
    if kind == "cold drugs":
        held[torch.randperm(shape[0])[: round(shape[0] / 6)]] = True
    else:
        held.view(-1)[torch.randperm(held.numel())[: held.numel() // 6]] = True
    return held


def ridge(drugs: Tensor, targets: Tensor, y: Tensor, held: Tensor, penalty: float) -> Tensor:
    """Kronecker kernel ridge regression, predictions for the whole grid, by the vec trick.

    In closed form where the known pairs are all pairs of some drugs, else by conjugate gradients.
    """
    known = ~held
    rows = known.any(1)
    if bool(known[rows].all()):
        (s, u), (t, v) = torch.linalg.eigh(drugs[rows][:, rows]), torch.linalg.eigh(targets)
        dual = u @ ((u.T @ y[rows] @ v) / (s[:, None] * t + penalty)) @ v.T
        return drugs[:, rows] @ dual @ targets
    dual, residual = torch.zeros_like(y), y * known
    direction = residual.clone()
    for _ in range(400):
        product = (drugs @ direction @ targets) * known + penalty * direction
        square = residual.square().sum()
        step = square / (direction * product).sum()
        dual, residual = dual + step * direction, residual - step * product
        if residual.norm() < 1e-5 * (y * known).norm():
            break
        direction = residual + residual.square().sum() / square * direction
    return drugs @ dual @ targets


def features(similarity: Tensor) -> Tensor:
    """Rows whose inner products are the similarities."""
    values, vectors = torch.linalg.eigh(similarity)
    return (vectors * values.clamp_min(0).sqrt()).float()


def concordance(predicted: Tensor, truth: Tensor) -> float:
    """Of two pairs with different affinities, how often the stronger is predicted stronger."""
    right = total = 0.0
    for value, guess in zip(truth, predicted, strict=True):
        above = predicted[truth > value]
        right += float((above > guess).sum() + 0.5 * (above == guess).sum())
        total += len(above)
    return right / total
