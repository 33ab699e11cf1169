"""A look at a user's own preconditioner, once: conjugate gradients rely on what it promises."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torch_hf.distributed import LOCAL, Space
from torch_hf.preconditioner.kfac import KroneckerPreconditioner
from torch_hf.preconditioner.lbfgs import LBFGSPreconditioner
from torch_hf.preconditioner.protocol import Preconditioner
from torch_hf.preconditioner.simple import DiagonalPreconditioner, NoPreconditioner

Operator = Callable[[Tensor], Tensor]

BUILT_IN = (
    NoPreconditioner,
    DiagonalPreconditioner,
    KroneckerPreconditioner,
    LBFGSPreconditioner,
)
#: What ``|A apply(r) - r| / |r|`` may be where ``apply`` is said to be exact.
EXACT_WITHIN = 1e-2


def is_exact(preconditioner: Preconditioner) -> bool:
    """Whether it says that ``apply`` solves with ``G + damping I`` itself."""
    return bool(getattr(preconditioner, "exact", False))


def check_definite(
    preconditioner: Preconditioner,
    apply: Operator,
    operator: Operator,
    gradient: Tensor,
    space: Space = LOCAL,
) -> None:
    """Complains of a user's preconditioner that cannot be what it must be.

    ``r^T apply(r)`` is looked at for the gradient and a random vector, and so is whether ``apply``
    is symmetric between the two.

    Args:
        preconditioner: After its ``begin``.
        apply: Its ``apply``, as CG calls it.
        operator: v of shape (P,) to ``(G + damping I) v``; called only for one that says it is
            exact.
        gradient: Of shape (P,), not zero.
        space: Takes the dot products.

    Raises:
        RuntimeError: ``apply`` is not symmetric and positive definite there, or not exact.

    Example:
        >>> g = torch.tensor([3.0, 4.0])
        >>> check_definite(NoPreconditioner(), lambda r: r, lambda v: v, g)
        >>> check_definite(NoPreconditioner(), lambda r: -r, lambda v: v, g)  # of those built in
    """
    if isinstance(preconditioner, BUILT_IN):
        return
    name = type(preconditioner).__name__
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(gradient.shape, generator=generator, dtype=torch.float64).to(gradient)
    one, two = apply(gradient.clone()).clone(), apply(other.clone()).clone()
    pairs = ((gradient, one), (other, two), (gradient, two), (other, one))
    first, second, left, right = space.dots(*pairs).tolist()
    for what, form in (("the gradient", first), ("a random vector", second)):
        if not 0 < form < math.inf:
            raise RuntimeError(
                f"The preconditioner's apply must be positive definite, got r^T apply(r) = "
                f"{form:.3g} for {what} r from {name}. Return an approximation of "
                "(G + damping I)^-1 r; adding a multiple of r makes it definite."
            )
    bound = torch.finfo(gradient.dtype).eps ** 0.25 * math.sqrt(first) * math.sqrt(second)
    if not abs(left - right) <= bound:
        raise RuntimeError(
            f"The preconditioner's apply must be symmetric, got r^T apply(s) = {left:.3g} and "
            f"s^T apply(r) = {right:.3g} for two vectors from {name}. Apply it from both sides, as "
            "L^-T (L^-1 r)."
        )
    if is_exact(preconditioner):
        rest = operator(one).clone().sub_(gradient)
        missed, whole = (
            math.sqrt(x) for x in space.dots((rest, rest), (gradient, gradient)).tolist()
        )
        if not missed <= EXACT_WITHIN * whole:
            raise RuntimeError(
                f"{name}.exact is true, but (G + damping I) apply(r) differs from r by "
                f"{missed / whole:.2g} of its length for the gradient r. Solve with the damping "
                "that begin is given, or set exact to False."
            )
