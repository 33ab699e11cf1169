"""Batch, layer and group normalisation whose tangent is the gradient's own formula.

A normalisation's Jacobian in its input is symmetric up to the weight: the tangent of ``w * x^ + b``
along t is ``w * B(t) + t_w * x^ + t_b``, where B is the backward pass without weight (Ioffe &
Szegedy 2015, Ba et al. 2016, Wu & He 2018 for the passes themselves). PyTorch's double backward
takes 25 to 100 operations for it, most of them for second-order terms that a Gauss-Newton product
does not ask for; this takes 5 to 8. Everywhere else the rule is autograd's own.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_hf.capture.tangents import are_tangents_all, second_order

aten = torch.ops.aten
_BATCH, _LAYER, _GROUP = F.batch_norm, F.layer_norm, F.group_norm
_SIGNATURES = {f: signature(f) for f in (_BATCH, _LAYER, _GROUP)}

#: Gradients of input, weight and bias.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Setting(NamedTuple):
    """What a normalisation is, besides its tensors.

    Attributes:
        function: ``F.batch_norm``, ``F.layer_norm`` or ``F.group_norm``.
        eps: Added to variances.
        size: The normalised shape, or the number of groups.
        training: Whether batch normalisation takes the batch's statistics.
    """

    function: Callable[..., Tensor]
    eps: float
    size: Any = None
    training: bool = True


def rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Tensor] | None:
    """A call of torch's function by the rule above; None where it does not apply."""
    form = _SIGNATURES.get(func) if func in (_BATCH, _LAYER, _GROUP) else None
    if form is None or not torch.is_grad_enabled():
        return None
    if torch._C._are_functorch_transforms_active():
        return None
    try:
        bound = form.bind(*args, **kwargs)
    except TypeError:  # torch's own function says what is wrong
        return None
    bound.apply_defaults()
    given = bound.arguments
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if not _is_usual(x, weight, bias):
        return None
    if func is _BATCH:
        return _batch_norm(x, weight, bias, given)
    size = given["normalized_shape"] if func is _LAYER else given["num_groups"]
    if func is _LAYER and (not size or tuple(x.shape[-len(size) :]) != tuple(size)):
        return None
    if func is _GROUP and (x.ndim < 3 or x.shape[1] % size):
        return None
    setting = Setting(func, given["eps"], list(size) if func is _LAYER else size)
    return lambda: _Normalization.apply(x, weight, bias, None, None, 0.0, setting)


def _is_usual(x: Any, weight: Tensor | None, bias: Tensor | None) -> bool:
    """One dtype, some entries, no autocast, and affine in both or neither."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
        return False
    if torch.is_autocast_enabled(x.device.type) or (weight is None) != (bias is None):
        return False
    same = all(t is None or (t.dtype, t.device) == (x.dtype, x.device) for t in (weight, bias))
    return same and any(t is not None and t.requires_grad for t in (x, weight, bias))


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, given: dict[str, Any]
) -> Callable[[], Tensor] | None:
    mean, variance, training = given["running_mean"], given["running_var"], given["training"]
    if x.ndim < 2 or (not training and (mean is None or variance is None)):
        return None
    if (training and x.numel() == x.shape[1]) or not isinstance(given["momentum"], float):
        return None
    if any(t is not None and (t.dtype, t.device) != (x.dtype, x.device) for t in (mean, variance)):
        return None
    setting = Setting(_BATCH, given["eps"], training=training)
    momentum = given["momentum"]
    return lambda: _Normalization.apply(x, weight, bias, mean, variance, momentum, setting)


def _forward(
    setting: Setting,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the statistics that the backward takes: means, and what divides."""
    found: tuple[Tensor, Tensor, Tensor]
    if setting.function is _BATCH:
        found = aten.native_batch_norm(
            x, weight, bias, *running, setting.training, momentum, setting.eps
        )
        if setting.training:
            return found
        mean, variance = running
        assert mean is not None and variance is not None
        return found[0], mean, variance
    if setting.function is _LAYER:
        found = aten.native_layer_norm(x, setting.size, weight, bias, setting.eps)
        return found
    sizes = (x.shape[0], x.shape[1], x[0, 0].numel())
    found = aten.native_group_norm(x.contiguous(), weight, bias, *sizes, setting.size, setting.eps)
    return found


def _backward(
    setting: Setting,
    go: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor],
    mask: list[bool],
) -> Gradients:
    """Gradients of x, weight and bias, those that the mask asks for."""
    found: Gradients
    if setting.function is _BATCH:
        nothing = (None, None)
        four = (*nothing, *statistics) if setting.training else (*statistics, *nothing)
        found = aten.native_batch_norm_backward(
            go, x, weight, *four, setting.training, setting.eps, mask
        )
    elif setting.function is _LAYER:
        found = aten.native_layer_norm_backward(
            go, x, setting.size, *statistics, weight, bias, mask
        )
    else:
        sizes = (x.shape[0], x.shape[1], x[0, 0].numel())
        found = aten.native_group_norm_backward(
            go.contiguous(), x.contiguous(), *statistics, weight, *sizes, setting.size, mask
        )
    return found


def _differentiable_backward(
    setting: Setting,
    go: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor],
    mask: list[bool],
) -> Gradients:
    """As :func:`_backward`, by operations that autograd differentiates."""
    if setting.function is not _GROUP:
        return _backward(setting, go, x, weight, bias, statistics, mask)
    result = F.group_norm(x, setting.size, weight, bias, setting.eps)
    wanted = [t for t, own in zip((x, weight, bias), mask, strict=True) if own and t is not None]
    found = iter(torch.autograd.grad(result, wanted, go, create_graph=True))
    gradients = [next(found) if own else None for own in mask]
    return gradients[0], gradients[1], gradients[2]


def normalized(setting: Setting, x: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """The input less its mean by its deviation, before weight and bias."""
    mean, scale = statistics
    if not setting.training:
        scale = (scale + setting.eps).rsqrt()
    if setting.function is _BATCH:
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x - mean.view(shape)) * scale.view(shape)
    if setting.function is _LAYER:
        return (x - mean) * scale
    grouped = x.reshape(x.shape[0], setting.size, -1)
    return ((grouped - mean[..., None]) * scale[..., None]).view_as(x)


def by_channel(setting: Setting, x: Tensor, numbers: Tensor) -> Tensor:
    """A weight or bias as it multiplies the input."""
    return numbers if setting.function is _LAYER else numbers.view(1, -1, *[1] * (x.ndim - 2))


class _Normalization(torch.autograd.Function):
    """A normalisation whose backward is a function with the rule above."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        momentum: float,
        setting: Setting,
    ) -> Tensor:
        """The normalisation; running statistics move in place."""
        result, *statistics = _forward(setting, x, weight, bias, (mean, variance), momentum)
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.setting = setting
        return result

    @staticmethod
    def backward(ctx: Any, go: Tensor) -> Any:
        """Gradients of x, weight and bias, with a graph where one is asked for."""
        x, weight, bias, *statistics = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():
            found = _Pullback.apply(go, x, weight, bias, *statistics, mask, ctx.setting)
        else:
            found = _backward(ctx.setting, go, x, weight, bias, tuple(statistics), mask)
        found = tuple(g if own else None for g, own in zip(found, mask, strict=True))
        return (*found, None, None, None, None)


class _Pullback(torch.autograd.Function):
    """The backward of a normalisation, as a function with a backward of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        go: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        mask: list[bool],
        setting: Setting,
    ) -> Any:
        """Gradients of x, weight and bias under the cotangent ``go``."""
        ctx.save_for_backward(go, x, weight, bias, mean, scale)
        ctx.set_materialize_grads(False)
        ctx.mask, ctx.setting = mask, setting
        found = _backward(setting, go, x, weight, bias, (mean, scale), mask)
        return tuple(g if own else None for g, own in zip(found, mask, strict=True))

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        """Their derivative along tangents: in ``go`` alone, or in x and weight too."""
        go, x, weight, bias, *kept = ctx.saved_tensors
        statistics = (kept[0], kept[1])
        if are_tangents_all():
            tangent = _tangent(ctx.setting, x, weight, statistics, tangents)
            found: Any = (tangent, None, None, None)
        else:
            found = second_order(
                lambda go, x, weight, bias: _differentiable_backward(
                    ctx.setting, go, x, weight, bias, statistics, ctx.mask
                ),
                (go, x, weight, bias),
                tangents,
            )
        return (*found, None, None, None, None)


def _tangent(
    setting: Setting,
    x: Tensor,
    weight: Tensor | None,
    statistics: tuple[Tensor, Tensor],
    tangents: Any,
) -> Tensor | None:
    tx, tweight, tbias = tangents
    total = None
    if tx is not None:
        # Batch normalisation's weight commutes with its backward: one pass has both.
        inside = weight if setting.function is _BATCH else None
        total = _backward(setting, tx, x, inside, None, statistics, [True, False, False])[0]
        assert total is not None
        if weight is not None and inside is None:
            total = total.mul_(by_channel(setting, x, weight))
    if tweight is not None:
        hat, factor = normalized(setting, x, statistics), by_channel(setting, x, tweight)
        total = hat.mul_(factor) if total is None else total.addcmul_(hat, factor)
    if tbias is not None:
        shift = by_channel(setting, x, tbias)
        total = shift.expand_as(x) if total is None else total.add_(shift)
    return total
