"""Which loss term a watched call makes: a convex function of the network's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import GradientEdge

from torch_hf.capture.capture import Call, Record
from torch_hf.capture.op_names import LOSSES
from torch_hf.loss.loss_hessians import (
    AutogradTerm,
    DiagonalTerm,
    ElementwiseTerm,
    LossTerm,
    NormTerm,
    Piece,
    SoftmaxTerm,
    entropy_weights,
)


def make_loss_term(call: Call, weight: Tensor, record: Record) -> LossTerm | None:
    """The loss term of a call seen; None where it has no convex curvature in its argument.

    Args:
        call: A term of the loss.
        weight: The derivative of the loss in the call's result.
        record: What else was seen: log-probabilities and norms are followed to their makers.
    """
    piece = (call.edge, weight, call.inputs)
    match call.name:
        case "cross_entropy":
            logits = call.inputs[0]
            dim = 1 if logits.ndim > 1 else 0
            return SoftmaxTerm(piece, entropy_weights(logits, call.settings, weight), dim)
        case "nll_loss" | "kl_div" | "log_softmax" | "log":
            return _log_probability_term(call, weight, record)
        case "binary_cross_entropy":
            return _bernoulli_term(call, weight, record)
        case "gaussian_nll_loss":
            return AutogradTerm(*piece)
        case "norm":
            convex = bool((weight >= 0).all())
            if not convex:
                return None
            return NormTerm(piece, *_norm_weight(call, weight))
        case "pow" | "square" | "mul" | "dot":
            return _square_term(call, weight, record)
        case "softmax" | "sigmoid" | "l1_loss" | "modulus":
            return None
    if len(call.inputs) == 2:
        return _difference_term(piece)
    return ElementwiseTerm(*piece)


def _square_term(call: Call, weight: Tensor, record: Record) -> LossTerm:
    """``sum(c * r**2)``, also where it was written as the square of a norm or of a modulus."""
    if call.settings.get("complex"):
        scale = 2 * weight.real
        scale = scale.unsqueeze(-1) if scale.ndim else scale
        return DiagonalTerm((call.edge, weight, call.inputs), scale)
    norm = record.maker(call.inputs[0], "norm", "modulus")
    if norm is None or call.name == "dot":
        return DiagonalTerm((call.edge, weight, call.inputs), 2 * weight)
    pulled = _pulled(weight, call.inputs[0], norm.edge)
    if norm.name == "modulus":
        return DiagonalTerm((call.edge, weight, norm.inputs), 2 * pulled.unsqueeze(-1))
    return DiagonalTerm((call.edge, weight, norm.inputs), 2 * _norm_weight(norm, pulled)[0])


def _norm_weight(norm: Call, weight: Tensor) -> tuple[Tensor, Any]:
    """A weight on norms in a shape that broadcasts to their argument, and their dimensions."""
    dim = norm.settings["dim"]
    dims = [dim] if isinstance(dim, int) else dim
    if dims is not None and not norm.settings["keepdim"]:
        for d in sorted(d % norm.inputs[0].ndim for d in dims):
            weight = weight.unsqueeze(d)
    if norm.settings.get("complex") and dims is not None:
        return weight.unsqueeze(-1), (*dims, -1)
    return weight, dim


def _log_probability_term(call: Call, weight: Tensor, record: Record) -> LossTerm | None:
    """Walks log-probabilities back to logits: cut at the former, the curvature is zero."""
    link = call
    if call.name in LOSSES:
        found = record.maker(call.inputs[0], "log_softmax", "log")
        if found is None:
            return None
        link = found
    slope = weight if link is call else _pulled(weight, call.edge, link.edge)
    logits, dim = link.inputs[0], link.settings.get("dim")
    if link.name == "log":
        soft = record.maker(logits, "softmax")
        if soft is None:
            convex = bool((slope <= 0).all())
            return ElementwiseTerm(link.edge, slope, link.inputs) if convex else None
        slope = _pulled(slope, logits, soft.edge)
        logits, dim = soft.inputs[0], soft.settings["dim"]
    axis = dim if isinstance(dim, int) else (0 if logits.ndim in (0, 1, 3) else 1)
    return SoftmaxTerm((call.edge, weight, (logits,)), -slope.sum(axis, keepdim=True), axis)


def _bernoulli_term(call: Call, weight: Tensor, record: Record) -> LossTerm:
    """Walks probabilities back to logits z, where the second derivative is ``p (1 - p)``.

    Double backward through p loses it to rounding where p is close to 0 or 1.
    """
    p, settings = call.inputs[0], call.settings
    link = record.maker(p, "sigmoid")
    if link is None:
        return ElementwiseTerm(call.edge, weight, call.inputs)
    entries = weight / p.numel() if settings["reduction"] == "mean" else weight
    if settings["weight"] is not None:
        entries = entries * settings["weight"]
    z = link.inputs[0]
    q = torch.sigmoid(z.detach())
    pulled = _pulled(entries.expand_as(p), p, link.edge)
    return DiagonalTerm((call.edge, weight, link.inputs), pulled * q * (1 - q))


def _difference_term(piece: Piece) -> LossTerm:
    """Of two outputs, one of which may depend on the other, that one comes first."""
    result, weight, (a, b) = piece
    if a.shape != b.shape:
        return AutogradTerm(*piece)
    (through,) = grad(b, a, torch.zeros_like(b), retain_graph=True, allow_unused=True)
    return ElementwiseTerm(result, weight, (a, b) if through is None else (b, a))


def _pulled(weight: Tensor, result: Any, back_to: GradientEdge) -> Tensor:
    return grad([result], [back_to], [weight], retain_graph=True)[0]
