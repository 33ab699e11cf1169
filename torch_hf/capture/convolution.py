"""A convolution whose tangent is two convolutions.

PyTorch's double backward of a convolution computes the second-order terms in input and
weight even where only the tangent of the output is asked for. A Gauss-Newton product
asks for nothing else, and with this rule a product of a small CNN costs 1.2 gradients
instead of 2.2 (``make bench-products``). Everywhere else the rule is autograd's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_hf.capture.tangents import are_tangents_all, second_order

_RULES = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


def has_rule(name: str, args: Sequence[Any], kwargs: Any) -> bool:
    """Whether a call of a torch function is one this rule can stand in for."""
    dims = _RULES.get(name)
    if dims is None or len(args) < 2 or not torch.is_grad_enabled():
        return False
    x, weight = args[:2]
    padding = args[4] if len(args) > 4 else kwargs.get("padding", 0)
    return (
        isinstance(x, Tensor)
        and x.ndim == dims + 2
        and not isinstance(padding, str)
        and x.dtype == weight.dtype
        and not x.is_complex()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._are_functorch_transforms_active()
    )


def geometry(
    args: Sequence[Any], kwargs: Any
) -> tuple[list[int], list[int], list[int], int] | None:
    """Stride, padding, dilation, one number each a dimension, and groups of a convolution's call.

    None where the padding is a word.
    """
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    dims = given["weight"].ndim - 2
    if isinstance(given.get("padding", 0), str):
        return None
    stride, padding, dilation = (
        _each(given.get(name, usual), dims)
        for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    return stride, padding, dilation, given.get("groups", 1)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """As ``torch.conv1d``, ``conv2d`` or ``conv3d``, with the rule above."""
    dims = x.ndim - 2
    geometry = [_each(v, dims) for v in (stride, padding, dilation)]
    result: Tensor = _Convolution.apply(x, weight, bias, *geometry, groups)
    return result


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    zeros = [0] * len(stride)
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, zeros, groups)


def _backward(go: Tensor, x: Tensor, weight: Tensor, mask: Any, *geometry: Any) -> Any:
    stride, padding, dilation, groups = geometry
    zeros, biases = [0] * len(stride), [weight.shape[0]]
    return torch.ops.aten.convolution_backward(
        go, x, weight, biases, stride, padding, dilation, False, zeros, groups, list(mask)
    )


class _Convolution(torch.autograd.Function):
    """A convolution whose backward is a function with the rule above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        """The convolution."""
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return _forward(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, go: Tensor) -> Any:
        """Gradients of x, weight and bias, with a graph where one is asked for."""
        x, weight = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            found = _Pullback.apply(go, x, weight, mask, *ctx.geometry)
        else:
            found = _backward(go, x, weight, mask, *ctx.geometry)
        return (*found, None, None, None, None)


class _Pullback(torch.autograd.Function):
    """The backward of a convolution, as a function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, go: Tensor, x: Tensor, weight: Tensor, mask: Any, *geometry: Any) -> Any:
        """Gradients of x, weight and bias under the cotangent ``go``."""
        ctx.save_for_backward(go, x, weight)
        ctx.set_materialize_grads(False)
        ctx.mask, ctx.geometry = mask, geometry
        return tuple(_backward(go, x, weight, mask, *geometry))

    @staticmethod
    def backward(ctx: Any, tx: Tensor | None, tweight: Tensor | None, tbias: Tensor | None) -> Any:
        """Their derivative along tangents: in ``go`` alone, or in x and weight too."""
        if are_tangents_all():
            _, x, weight = ctx.saved_tensors
            found = (_tangent(x, weight, (tx, tweight, tbias), ctx.geometry), None, None)
        else:
            tangents = (tx, tweight, tbias)
            found = second_order(
                lambda *inputs: _backward(*inputs, ctx.mask, *ctx.geometry),
                ctx.saved_tensors,
                tangents,
            )
        return (*found, None, None, None, None, None)


def _tangent(x: Tensor, weight: Tensor, tangents: Any, geometry: Any) -> Tensor | None:
    tx, tweight, tbias = tangents
    total = None
    if tx is not None:
        total, tbias = _forward(tx, weight, tbias, *geometry), None
    if tweight is not None:
        part = _forward(x, tweight, tbias, *geometry)
        total, tbias = part if total is None else total.add_(part), None
    if tbias is not None:
        zero = torch.zeros_like(weight)
        total = _forward(x, zero, tbias, *geometry)
    return total
