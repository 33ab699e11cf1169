"""Pre-activations that hand their gradient to the layer's parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_hf.kronecker._sparse_gradient import quiet


class RowGradient(torch.autograd.Function):
    """Passes values ``(B, m)`` on; backward gives the parameter ``(n, m)`` its rows of gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, values: Tensor, samples: Tensor) -> Tensor:
        """The values ``(B, m)`` as they are, of data points ``samples`` ``(B,)``."""
        ctx.save_for_backward(samples)
        ctx.parameter = parameter
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient ``(B, m)`` as B rows of a sparse ``(n, m)``."""
        (samples,), shape = ctx.saved_tensors, ctx.parameter.shape
        if _held_form(ctx.parameter) == ENTRIES:
            place = torch.cartesian_prod(samples, torch.arange(shape[1], device=samples.device)).T
            return _sparse(place, gradient.reshape(-1), shape), None, None
        return _sparse(samples[None], gradient, shape), None, None


class EntryGradient(torch.autograd.Function):
    """Passes values ``(k,)`` on; backward gives the parameter ``(n, m)`` entries of gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        parameter: Tensor,
        values: Tensor,
        samples: Tensor,
        neurons: Tensor,
        beside_rows: Callable[[], bool],
    ) -> Tensor:
        """The values ``(k,)`` as they are, each of a data point and a neuron, ``(k,)`` both."""
        ctx.save_for_backward(samples, neurons)
        ctx.parameter, ctx.beside_rows = parameter, beside_rows
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient ``(k,)`` as entries of a sparse ``(n, m)``, or as rows beside others."""
        (samples, neurons), shape = ctx.saved_tensors, ctx.parameter.shape
        held = _held_form(ctx.parameter)
        if held == ROWS or (held is None and ctx.beside_rows()):
            points, row = samples.unique(return_inverse=True)
            rows = gradient.new_zeros(len(points), shape[1])
            rows.index_put_((row, neurons), gradient, accumulate=True)
            return _sparse(points[None], rows, shape), None, None, None, None
        return _sparse(torch.stack([samples, neurons]), gradient, shape), None, None, None, None


#: Numbers of sparse dimensions of a gradient; torch adds only those of one form.
ROWS, ENTRIES = 1, 2


def _held_form(parameter: Tensor) -> int | None:
    held = parameter.grad
    return held.sparse_dim() if held is not None and held.is_sparse else None


def _sparse(place: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    with quiet():
        return torch.sparse_coo_tensor(place, values, shape, check_invariants=False)
