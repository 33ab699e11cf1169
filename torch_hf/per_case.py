"""Statistics of per-case gradients from one backward: Martens' diagonal, the gradient's variance.

For a linear layer that is used once, the sum over cases of squared gradients is exact:
``sum_i (delta_i x_i^T)^2 = (delta^2)^T (x^2)`` with x its inputs and delta the gradients at its
outputs. For all other weights (shared, recurrent, convolutional, normalisation) the sign of
each case's gradient is flipped at random: ``E (sum_i s_i g_i)^2 = sum_i g_i^2``, unbiased, its
noise drawn towards the tensor's mean. Positions of a sequence count as cases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import grad

from torch_hf.capture import Layer
from torch_hf.heads import Head, random_signs

#: Martens 2010, section 4.7.
EXPONENT = 0.75
#: A squared Gaussian has the mean's weight 1 : 2 in the best linear blend with its mean.
SHRINKAGE = 2.0 / 3.0


def curvature_scale(heads: Sequence[Head]) -> Tensor:
    """What turns sums of squared gradients into curvature: ``tr H / sum |dL/dz|^2``.

    Squared gradients scale with the square of the loss, lambda with the loss; times this
    ratio, both taken in output space, they scale alike.
    """
    trace = torch.stack([h.trace().double() for h in heads]).sum()
    slopes = torch.stack(
        [s.double().square().sum() for h in heads for s in h.gradient()]
    ).sum()
    return torch.where(slopes > 0, trace / slopes, 0.0)


def squared_gradients(
    heads: Sequence[Head], params: Sequence[Tensor], layers: Sequence[Layer]
) -> list[Tensor]:
    """Per parameter, the sum over cases of the squared gradients, in the objective's units."""
    used_once = _used_once(params, layers)
    cotangents = [_with_random_signs(s) for h in heads for s in h.gradient()]
    outputs = [z for h in heads for z in h.outputs]
    targets = [layer.output for layer in used_once] + list(params)
    found = grad(outputs, targets, cotangents, retain_graph=True, allow_unused=True)
    deltas, sums = found[: len(used_once)], found[len(used_once) :]
    exact: dict[int, Tensor] = {}
    for layer, delta in zip(used_once, deltas, strict=True):
        if delta is not None:
            exact.update(_of_layer(layer, delta))
    return [
        exact[id(p)] if id(p) in exact else _of_signed_sum(p, s)
        for p, s in zip(params, sums, strict=True)
    ]


def _used_once(params: Sequence[Tensor], layers: Sequence[Layer]) -> list[Layer]:
    """Layers whose weight is one of the parameters itself and serves nowhere else seen."""
    own = {id(p) for p in params}
    uses: dict[int, int] = {}
    for layer in layers:
        for p in (layer.weight, layer.bias):
            uses[id(p)] = uses.get(id(p), 0) + 1
    return [
        layer
        for layer in layers
        if id(layer.weight) in own
        and uses[id(layer.weight)] == 1
        and (layer.bias is None or uses[id(layer.bias)] == 1)
    ]


def _of_layer(layer: Layer, delta: Tensor) -> dict[int, Tensor]:
    squares = delta.reshape(-1, delta.shape[-1]).square()
    inputs = layer.input.detach().reshape(-1, layer.input.shape[-1]).square()
    sums = {id(layer.weight): squares.T @ inputs}
    if layer.bias is not None:
        sums[id(layer.bias)] = squares.sum(0)
    return sums


def _of_signed_sum(p: Tensor, signed_sum: Tensor | None) -> Tensor:
    if signed_sum is None:
        return torch.zeros_like(p)
    square = signed_sum.square()
    return square.lerp(square.mean(), SHRINKAGE)


def _with_random_signs(slope: Tensor) -> Tensor:
    if slope.ndim == 0:
        return slope
    signs = random_signs(slope.shape[:1], slope)
    return slope * signs.view(-1, *[1] * (slope.ndim - 1))


def signed_square(heads: Sequence[Head], params: Sequence[Tensor]) -> float:
    """``|sum_i s_i g_i / n|^2`` with random signs; its expectation is ``mean |g_i|^2 / n``."""
    cotangents = [_with_random_signs(s) for h in heads for s in h.gradient()]
    outputs = [z for h in heads for z in h.outputs]
    found = grad(outputs, list(params), cotangents, retain_graph=True, allow_unused=True)
    return sum(float(g.double().square().sum()) for g in found if g is not None)


def variance_norm(signed: float, cases: float, gradient_norm: float) -> float:
    """The L1 norm of the variance over cases of the gradient, ``sum_j Var_i g_ij``.

    Args:
        signed: From :func:`signed_square`.
        cases: n.
        gradient_norm: The norm of the mean gradient.

    Source: Byrd, Chin, Nocedal & Wu 2012, "Sample size selection in optimization methods for
    machine learning", section 3.
    """
    if cases <= 1:
        return 0.0
    return max(cases * signed - gradient_norm**2, 0.0) * cases / (cases - 1)
