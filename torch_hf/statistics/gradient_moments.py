"""Statistics of per-case gradients from one backward: Martens' diagonal, the gradient's variance.

For a linear layer that is used once, the sum over cases of squared gradients is exact:
``sum_i (delta_i x_i^T)^2 = (delta^2)^T (x^2)`` with x its inputs and delta the gradients at its
outputs. For all other weights (shared, recurrent, convolutional, normalisation) the sign of
each case's gradient is flipped at random: ``E (sum_i s_i g_i)^2 = sum_i g_i^2``, unbiased, its
noise drawn towards the tensor's mean. Positions of a sequence count as cases. Penalties on the
parameters themselves are no case's and are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import grad

from torch_hf.capture.autograd_graph import leaf_uses
from torch_hf.capture.capture import Layer
from torch_hf.loss.loss_hessians import LossTerm, random_signs

#: Martens 2010, section 4.7.
EXPONENT = 0.75
#: A squared Gaussian has the mean's weight 1 : 2 in the best linear blend with its mean.
SHRINKAGE = 2.0 / 3.0


def trace_and_slopes(
    loss_terms: Sequence[LossTerm], params: Sequence[Tensor]
) -> tuple[float, float]:
    """What turns sums of squared gradients into curvature: ``tr H`` over ``sum |dL/dz|^2``.

    Squared gradients scale with the square of the loss, lambda with the loss; times this
    ratio, both taken in output space, they scale alike. Over batches the two are added up first.
    """
    loss_terms = over_cases(loss_terms, params)
    trace = sum(float(h.trace()) for h in loss_terms)
    slopes = sum(float(s.double().square().sum()) for h in loss_terms for s in h.gradient())
    return trace, slopes


def squared_gradients(
    loss_terms: Sequence[LossTerm], params: Sequence[Tensor], layers: Sequence[Layer]
) -> list[Tensor]:
    """Per parameter, the sum over cases of the squared gradients, in the objective's units."""
    outputs, cotangents = _weighted_slopes(loss_terms, params, _random_signs)
    if not outputs:
        return [torch.zeros_like(p) for p in params]
    used_once = _used_once(outputs, params, layers)
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


def _used_once(
    outputs: Sequence[Tensor], params: Sequence[Tensor], layers: Sequence[Layer]
) -> list[Layer]:
    """Layers whose weight and bias are parameters themselves and serve nowhere else."""
    own = {id(p) for p in params}
    seen = Counter(id(p) for layer in layers for p in (layer.weight, layer.bias))
    uses = leaf_uses(outputs)

    def once(p: Tensor) -> bool:
        return seen[id(p)] == 1 and uses[id(p)] <= 1  # 0 where it is frozen

    return [
        layer
        for layer in layers
        if layer.geometry is None
        and id(layer.weight) in own
        and once(layer.weight)
        and (layer.bias is None or once(layer.bias))
    ]


def _of_layer(layer: Layer, delta: Tensor) -> dict[int, Tensor]:
    own = layer.weight.dtype  # under autocast the two may have others, and unequal ones
    squares = delta.reshape(-1, delta.shape[-1]).to(own).square()
    inputs = layer.input.detach().reshape(-1, layer.input.shape[-1]).to(own).square()
    sums = {id(layer.weight): squares.T @ inputs}
    if layer.bias is not None:
        sums[id(layer.bias)] = squares.sum(0)
    return sums


def _of_signed_sum(p: Tensor, signed_sum: Tensor | None) -> Tensor:
    if signed_sum is None:
        return torch.zeros_like(p)
    square = signed_sum.square()
    return square.lerp(square.mean(), SHRINKAGE)


def _weighted_slopes(
    loss_terms: Sequence[LossTerm],
    params: Sequence[Tensor],
    weights: Callable[[int, Tensor], Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """The loss_terms' outputs and gradients there, each case under its weight, the same in all."""
    drawn: dict[int, Tensor] = {}
    outputs, slopes = [], []
    for loss_term in over_cases(loss_terms, params):
        for z, slope in zip(loss_term.outputs, loss_term.gradient(), strict=True):
            cases = slope.shape[0] if slope.ndim else 1
            if cases not in drawn:
                drawn[cases] = weights(cases, slope)
            shape = [*slope.shape[:1], *[1] * (slope.ndim - 1)]
            outputs.append(z)
            slopes.append(slope * drawn[cases].to(slope.dtype).view(shape))
    return outputs, slopes


def over_cases(loss_terms: Sequence[LossTerm], params: Sequence[Tensor]) -> list[LossTerm]:
    """The terms that are no penalties on the parameters themselves."""
    own = {id(p) for p in params}
    return [h for h in loss_terms if not all(id(z) in own for z in h.outputs)]


def _random_signs(cases: int, like: Tensor) -> Tensor:
    return random_signs((cases,), like)


def _balanced_signs(cases: int, like: Tensor) -> Tensor:
    """Random signs whose sum is 0, and n that of their squares: what all share cancels."""
    signs = torch.ones(cases, dtype=like.dtype, device=like.device)
    signs[: cases // 2] = -1.0
    signs -= signs.mean()
    if cases > 1:
        signs *= math.sqrt(cases) / signs.norm()
    return signs[torch.randperm(cases, device=like.device)]


def variance_over_cases(loss_terms: Sequence[LossTerm], params: Sequence[Tensor]) -> float:
    """An unbiased estimate of ``sum_j Var_i g_ij / n``, g_i a case's gradient, from one backward.

    With signs that sum to 0, ``E |sum_i s_i g_i / n|^2`` is the variance over cases (with
    ``n - 1``) over n; the mean gradient, and with it whatever all cases share, drops out.
    """
    outputs, cotangents = _weighted_slopes(loss_terms, params, _balanced_signs)
    if not outputs:
        return 0.0
    found = grad(outputs, list(params), cotangents, retain_graph=True, allow_unused=True)
    return sum(float(g.double().square().sum()) for g in found if g is not None)
