"""Pre-activations that hand their gradient to the layer's parameter."""

from __future__ import annotations

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
        ctx.shape = parameter.shape
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient ``(B, m)`` as B rows of a sparse ``(n, m)``."""
        (samples,) = ctx.saved_tensors
        place = samples[None]
        return _sparse(place, gradient, ctx.shape), None, None


class EntryGradient(torch.autograd.Function):
    """Passes values ``(k,)`` on; backward gives the parameter ``(n, m)`` entries of gradient."""

    @staticmethod
    def forward(
        ctx: Any, parameter: Tensor, values: Tensor, samples: Tensor, neurons: Tensor
    ) -> Tensor:
        """The values ``(k,)`` as they are, each of a data point and a neuron, ``(k,)`` both."""
        ctx.save_for_backward(samples, neurons)
        ctx.shape = parameter.shape
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient ``(k,)`` as entries of a sparse ``(n, m)``."""
        place = torch.stack(ctx.saved_tensors)
        return _sparse(place, gradient, ctx.shape), None, None, None


def _sparse(place: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    with quiet():
        return torch.sparse_coo_tensor(place, values, shape, check_invariants=False)
