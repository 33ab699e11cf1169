"""Products through functions whose backward autograd may not see through.

The backward of a user's ``autograd.Function``, or of a custom op, may compute on detached data, in
NumPy or in a kernel. First derivatives are then right, and what is differentiated again lacks a
part, without an error. Where the graph holds such a function, one product is compared:

- ``J v`` by double backward with ``J^T u`` by a first one: ``<J v, u> = <v, J^T u>``. It holds to
  rounding, and fails where a path from u to ``J^T u`` was lost.
- H v with a central difference of gradients. Symmetry would not tell: of ``f(x) = sum k(x)`` with
  k elementwise, what is lost is a diagonal.

``J v`` by central differences of the outputs is compared with ``J^T u`` in turn: it fails where a
backward is no derivative of its forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_hf.statistics.case_signs import Places, case_signs

Product = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]
#: How far products may differ that are alike but for rounding; a backward and a difference.
ROUNDING_POWER, COARSE = 0.5, 0.1
#: A difference and a product: it falls with rounding's power of this.
DIFFERENCE_POWER = 0.2
#: What a parameter's part of a product counts at least, beside the whole.
FLOOR = 0.1


class LostPartError(RuntimeError):
    """Products would be wrong, and nothing can stand in for them."""


def cut(names: Sequence[str]) -> str:
    """What to say where autograd lost a part of a product."""
    return (
        f"Autograd cannot differentiate twice: the backward of {_and(names)} uses data that "
        "autograd does not track (detached, in NumPy or in a kernel). Products would lack a part "
        'of the curvature. Use engine="auto" or "finite_differences". Or write that backward with '
        "torch functions of ctx.saved_tensors and the incoming gradient, or mark it with "
        "torch.autograd.function.once_differentiable."
    )


def no_derivative(names: Sequence[str]) -> str:
    """What to say where a backward is no derivative."""
    return (
        f"The backward of {_and(names)} must be the derivative of its forward where products are "
        "taken by finite differences, but the two disagree. Write that backward with torch "
        "functions, so that autograd can differentiate it, or use a first-order optimizer."
    )


def cut_loss(names: Sequence[str]) -> str:
    """What to say where autograd lost a part of the loss's own Hessian."""
    return (
        f"The loss's second derivative in the outputs goes through {_and(names)}, whose backward "
        "uses data that autograd does not track. The curvature would be wrong. Write the loss "
        'with torch functions (F.cross_entropy, ...), or use curvature="hessian", which takes its '
        "products by finite differences here."
    )


def belong_together(
    push: Product,
    pull: Product,
    outputs: Sequence[Tensor],
    params: Sequence[Tensor],
    tolerance: float | None = None,
) -> bool:
    """Whether J v and J^T u are products with one matrix.

    v is ``J^T u``, each parameter's part of it at length one, so that a parameter whose gradients
    are small counts, too.
    """
    u = [case_signs(z, Places(), k) for k, z in enumerate(outputs)]
    v, expected = units(pull(u), params)
    if not expected or not math.isfinite(expected):
        return True
    pushed = zip(push(v), u, strict=True)
    seen = sum(float((t.double() * c).sum()) for t, c in pushed if t is not None)
    if tolerance is None:
        tolerance = 4.0 * _rounding([*outputs, *params]) ** ROUNDING_POWER
    return abs(seen - expected) <= tolerance * expected


def units(slopes: Sequence[Tensor | None], params: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """Each parameter's part at length one, and the product with the whole: the sum of lengths."""
    whole = [torch.zeros_like(p) if w is None else w for w, p in zip(slopes, params, strict=True)]
    lengths = [float(torch.linalg.vector_norm(w)) for w in whole]
    parts = [w / length if length else w for w, length in zip(whole, lengths, strict=True)]
    return parts, sum(lengths)


def agree(found: Sequence[Tensor | None], truth: Sequence[Tensor | None]) -> bool:
    """Whether a product is that by differences, in each tensor."""
    kept = [t for t in truth if t is not None]
    whole = math.sqrt(sum(float(t.double().square().sum()) for t in kept))
    if not kept or not math.isfinite(whole):
        return True
    tolerance = _rounding(kept) ** DIFFERENCE_POWER
    for a, b in zip(found, truth, strict=True):
        if b is None:
            continue
        error = float(torch.linalg.vector_norm(b if a is None else a - b))
        size = float(torch.linalg.vector_norm(b))
        if not error <= tolerance * max(size, FLOOR * whole):
            return False
    return True


def probe(params: Sequence[Tensor]) -> list[Tensor]:
    """Signs, each parameter's at its own scale."""
    return [
        case_signs(p, Places(), k) * p.detach().abs().mean().clamp(min=1e-3)
        for k, p in enumerate(params)
    ]


def _rounding(tensors: Sequence[Tensor]) -> float:
    return max(float(torch.finfo(t.dtype).eps) for t in tensors)


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)
