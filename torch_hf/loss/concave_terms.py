"""Known loss functions with a negative weight: concave, unless another term outweighs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_hf.capture.autograd_graph import edge_of, operands
from torch_hf.capture.op_names import kind
from torch_hf.loss.linear_terms import LinearTerm
from torch_hf.loss.loss_hessians import DiagonalTerm, ElementwiseTerm, LossTerm, SoftmaxTerm


def without_concave(
    found: Sequence[tuple[LossTerm, LinearTerm]],
) -> tuple[list[LossTerm], list[LinearTerm]]:
    """The loss terms that are convex together, and those left that are concave.

    Args:
        found: Loss terms and where they come from.
    """
    if not found:
        return [], []
    scales = [_scale(loss_term, term) for loss_term, term in found]
    lowest = torch.stack([s.detach().amin().double() if s.numel() else _zero(s) for s in scales])
    negative = (lowest < 0).tolist()  # one transfer from the device for all
    if not any(negative):
        return [loss_term for loss_term, _ in found], []
    totals: dict[Any, Tensor] = {}
    sizes: dict[Any, Tensor] = {}
    keys = [_key(loss_term) for loss_term, _ in found]
    for key, scale in zip(keys, scales, strict=True):
        if key is not None:
            totals[key] = totals[key] + scale if key in totals else scale
            sizes[key] = sizes[key] + scale.abs() if key in sizes else scale.abs()
    outweighed = {
        key
        for key, total in totals.items()
        if bool((total >= -8 * torch.finfo(total.dtype).eps * sizes[key]).all())
    }
    kept: list[LossTerm] = []
    concave = []
    for (loss_term, term), key, below in zip(found, keys, negative, strict=True):
        if below and key not in outweighed:
            concave.append(term)
        else:
            kept.append(loss_term)
    return kept, concave


def _zero(s: Tensor) -> Tensor:
    return s.new_zeros((), dtype=torch.float64)


def _scale(loss_term: LossTerm, term: LinearTerm) -> Tensor:
    """What a term's Hessian is positive with."""
    if isinstance(loss_term, (DiagonalTerm, SoftmaxTerm)):
        return loss_term.weight
    if isinstance(loss_term, ElementwiseTerm) and len(loss_term.outputs) == 1:
        return loss_term.diagonal
    return term.weight


def _key(loss_term: LossTerm) -> Any:
    """Equal for terms whose Hessians are of one shape at one place."""
    z = loss_term.outputs[0]
    if isinstance(loss_term, SoftmaxTerm):
        return "softmax", loss_term.dim % max(z.ndim, 1), edge_of(z)
    diagonal = isinstance(loss_term, (DiagonalTerm, ElementwiseTerm))
    if diagonal and len(loss_term.outputs) == 1:
        return "diagonal", tuple(z.shape), _shifted(z)
    return None


def _shifted(z: Tensor) -> Any:
    """Where z comes from but for constants that are added to it."""
    node, place = edge_of(z)
    while kind(node) in ("Add", "Sub", "Rsub", "Neg"):
        below = [edge for edge in operands(node) if edge[0] is not None]
        if len(below) != 1:
            break
        node, place = below[0]
    return node, place
