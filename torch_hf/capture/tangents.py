"""Whether a backward through the backward asks only for tangents, for which own rules are shorter.

PyTorch's double backward of a convolution or a normalisation computes the second-order terms
in its operands even where only the tangent of the output is asked for. A Gauss-Newton product
asks for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_only = False  # of the process, since CUDA's backward runs in a thread of its own


@contextmanager
def tangents_only() -> Iterator[None]:
    """While a backward through the backward asks only for the cotangents' derivative."""
    global _only
    before, _only = _only, True
    try:
        yield
    finally:
        _only = before


def all_derivatives() -> None:
    """As outside of :func:`tangents_only`, where an interrupt may have skipped its end."""
    global _only
    _only = False


def are_tangents_all() -> bool:
    """Whether this is inside of :func:`tangents_only`."""
    return _only


def second_order(backward: Any, operands: Any, tangents: Any) -> Any:
    """Autograd's own double backward of an operation.

    Args:
        backward: The operands, cotangents first, to the gradients.
        operands: Its tensors; None for those it lacks.
        tangents: A cotangent of each gradient, or None.
    """
    with torch.enable_grad():
        # Views, since what a cotangent was made of may lead to other operands once more: that part
        # of the derivative is not this operation's.
        inputs = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in operands
        ]
        pulled = backward(*inputs)
        pairs = [(p, t) for p, t in zip(pulled, tangents, strict=True) if t is not None]
    if not pairs:
        return tuple(None for _ in inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    given = [t for t in inputs if t is not None]
    create = torch.is_grad_enabled()
    found = iter(
        torch.autograd.grad(outputs, given, cotangents, create_graph=create, allow_unused=True)
    )
    return tuple(None if t is None else next(found) for t in inputs)
