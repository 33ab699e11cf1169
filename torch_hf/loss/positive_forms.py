"""Whether a quadratic form is positive semidefinite, by the eigenvalues of its matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: A Hessian of at most so many rows is looked at whole.
DENSE = 512


def is_positive(hessian: Callable[..., tuple[Tensor, ...]], outputs: tuple[Tensor, ...]) -> bool:
    """Whether a Hessian in the outputs is positive semidefinite, as a whole or case by case.

    Of a quadratic function the Hessian is the same everywhere, so that this is a proof.
    """
    sizes = [z.numel() for z in outputs]
    if sum(sizes) <= DENSE:
        eye = torch.eye(sum(sizes), dtype=outputs[0].dtype, device=outputs[0].device)
        rows = [_flat(hessian(*_unflat(e, outputs)), 0) for e in eye]
        return _has_positive_eigenvalues(torch.stack(rows))
    cases = {z.shape[0] if z.ndim else 0 for z in outputs}
    if len(cases) != 1 or 0 in cases or sum(sizes) // min(cases) > DENSE:
        return False
    (n,) = cases
    width = sum(sizes) // n
    eye = torch.eye(width, dtype=outputs[0].dtype, device=outputs[0].device)
    blocks = torch.stack([_flat(hessian(*_unflat(e.expand(n, -1), outputs)), 1) for e in eye], 1)
    probe = torch.sin(torch.arange(n * width, dtype=eye.dtype, device=eye.device)).view(n, width)
    product = _flat(hessian(*_unflat(probe, outputs)), 1)
    expected = torch.einsum("nij,ni->nj", blocks, probe)
    close = (product - expected).norm() <= 1e-4 * expected.norm()
    return bool(close) and _has_positive_eigenvalues(blocks)


def _has_positive_eigenvalues(matrix: Tensor) -> bool:
    rounding = 10 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))  # eigenvalues need it
    values = torch.linalg.eigvalsh((wide + wide.mT) / 2)
    return bool((values >= -rounding * values.abs().max()).all())


def _flat(parts: tuple[Tensor, ...], lead: int) -> Tensor:
    return torch.cat([p.reshape(*p.shape[:lead], -1) for p in parts], dim=lead)


def _unflat(v: Tensor, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    lead = v.ndim - 1
    sizes = [z.numel() // (z.shape[0] if lead else 1) for z in outputs]
    return tuple(
        p.reshape(z.shape) for p, z in zip(torch.split(v, sizes, lead), outputs, strict=True)
    )
