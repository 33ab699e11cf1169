"""Numbers by which a saved layer knows the data it belongs to, point by point."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_hf.kronecker._terms import Factor
from torch_hf.kronecker.factors import KroneckerFactors

#: Directions that each factor's rows are projected on.
DIRECTIONS = 4
#: Share of a point's own length by which a projection may differ: bfloat16 keeps 8 bits.
TOLERANCE = 0.02


def fingerprint(factors: KroneckerFactors) -> Tensor:
    """Projections of all rows of all factors, and the points' scale, ``(n, k)`` in float32.

    They see other values, another order, and another normalisation; they take n k numbers.
    """
    known: dict[Factor, Tensor] = {}
    for factor in (f for term in factors._terms for f in term):
        if factor not in known:
            known[factor] = _projected(factor, len(known))
    columns = [known[f] for term in factors._terms for f in term]
    scale = torch.ones(len(factors)) if factors._scale is None else factors._scale.cpu().float()
    return torch.cat([*columns, scale[:, None].expand(-1, DIRECTIONS)], dim=1)


def same(saved: Tensor, own: Tensor) -> bool:
    """Whether two belong to the same data, given in whatever precision."""
    if saved.shape != own.shape:
        return False
    ours, theirs = (x.cpu().float().view(len(x), -1, DIRECTIONS) for x in (own, saved))
    room = TOLERANCE * (ours.norm(dim=2) + theirs.norm(dim=2))
    return bool(((ours - theirs).norm(dim=2) <= room).all())


def _projected(factor: Factor, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    table = factor.table.float()
    directions = torch.randn(table.shape[1], DIRECTIONS, generator=generator)
    found = (table @ directions.to(table.device)).cpu()
    return found if factor.index is None else found[factor.index.cpu()]
