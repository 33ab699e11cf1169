"""The Gauss-Newton split: which part of a loss is network, which is a convex loss on it.

The graph is walked from the loss through operations that are linear (sums, means,
products with constants) to the results of known loss functions, the heads. What else
the loss is made of is a remainder and brings its own Hessian: nothing is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import GradientEdge

from torch_hf.capture import Call, Record
from torch_hf.cases import Term, edge_of, linear_terms, under
from torch_hf.heads import (
    DiagonalHead,
    ElementwiseHead,
    GraphHead,
    Head,
    NormHead,
    Piece,
    SoftmaxHead,
    entropy_weights,
)
from torch_hf.names import LOSSES, kind

EXPLICIT_FORM = """return the network's outputs beside the loss:

    def closure():
        optimizer.zero_grad()
        outputs = model(x)                  # a tensor or a tuple of tensors
        loss = my_loss(outputs, y)          # convex in the outputs
        return loss, outputs

or take the whole Hessian: HFOptimizer(params, curvature="hessian")."""


@dataclass
class Split:
    """The heads of a loss, and what of it bypasses them.

    Attributes:
        heads: Terms that are convex in network outputs.
        remainders: Edges of further terms and their weights in the loss.
    """

    heads: list[Head]
    remainders: list[tuple[GradientEdge, Tensor]] = field(default_factory=list)


def split_by_calls(record: Record, loss: Tensor, params: Sequence[Tensor]) -> Split:
    """The split found from the loss functions that were seen.

    Raises:
        RuntimeError: No known loss function was seen, or none with curvature.
    """
    own = {id(p) for p in params}
    heads, others, flat = [], [], set()
    for term in linear_terms(loss, record.calls):
        call = record.calls.get(term.node)
        head = make_head(call, term.weight, record) if call is not None else None
        if head is not None:
            heads.append(head)
            continue
        if call is not None and call.name in LOSSES:
            flat.add(call.name)
        if (call is None or call.name != "l1_loss") and _reaches(term.node, own, ()):
            others.append(term)  # no curvature in its argument, but that may be curved itself
    if not heads:
        ends = {_spelled(kind(t.node)) for t in others} - {"accumulate_grad"}
        raise RuntimeError(_no_split(flat, record.refused, ends))
    return Split(heads, _remainders(others))


def split_by_outputs(
    record: Record, loss: Tensor, outputs: Sequence[Tensor], params: Sequence[Tensor]
) -> Split:
    """The split at outputs that the user named.

    Raises:
        RuntimeError: The outputs are not connected to the loss, one hangs on another, the
            loss has no curvature in them, or a term mixes outputs with parameters.
    """
    outputs = tuple(z for z in outputs if z.requires_grad)
    found = _recognised(record, loss, outputs)
    if found is not None:
        return Split(found)
    own = {id(p) for p in params}
    stops = {edge_of(z) for z in outputs}
    remainders, connected = [], False
    for term in linear_terms(loss, stops):
        hits = (term.node, term.place) in stops or _hits(term.node, stops)
        bypass = (term.node, term.place) not in stops and _reaches(term.node, own, stops)
        if hits and bypass:
            raise RuntimeError(
                "A term of the loss depends on parameters both through the outputs that the "
                "closure returned and past them, so it is no function of the outputs alone. "
                "Return as outputs all tensors through which the parameters enter that term."
            )
        connected = connected or hits
        if bypass:
            remainders.append(term)
    if not connected:
        raise RuntimeError(
            "The outputs that the closure returned are not connected to its loss: the loss must "
            "be computed from the very tensors returned, as in "
            "`outputs = model(x); return criterion(outputs, y), outputs` (no detach, no second "
            "call of the model)."
        )
    if len(outputs) > 1:
        _check_separate(outputs)
    head = GraphHead(loss, None, outputs)
    if not head.curved:
        raise RuntimeError(
            "The loss is linear in the outputs that the closure returned, so its Gauss-Newton "
            "curvature is zero. Return the tensors before the last nonlinearity (the logits, "
            'not their log_softmax), or use HFOptimizer(params, curvature="hessian").'
        )
    return Split([head], _remainders(remainders))


def _recognised(record: Record, loss: Tensor, outputs: tuple[Tensor, ...]) -> list[Head] | None:
    """Heads with closed forms, where they are functions of just the outputs named."""
    terms = linear_terms(loss, record.calls)
    if not all(t.node in record.calls for t in terms):
        return None
    heads = [make_head(record.calls[t.node], t.weight, record) for t in terms]
    found = [h for h in heads if h is not None]
    named = {id(z) for z in outputs}
    if len(found) < len(heads) or {id(z) for h in found for z in h.outputs} != named:
        return None
    return found


def _remainders(terms: list[Term]) -> list[tuple[GradientEdge, Tensor]]:
    return [(GradientEdge(t.node, t.place), t.weight) for t in terms]


def _reaches(node: Any, own: set[int], stops: Any) -> bool:
    return any(id(getattr(n, "variable", None)) in own for n in under([node], stops))


def _hits(node: Any, stops: Any) -> bool:
    return any((fn, nr) in stops for n in under([node], stops) for fn, nr in n.next_functions)


def _check_separate(outputs: tuple[Tensor, ...]) -> None:
    for i, z in enumerate(outputs):
        others = {edge_of(o) for j, o in enumerate(outputs) if j != i}
        if edge_of(z) in others or _hits(edge_of(z)[0], others):
            raise RuntimeError(
                f"Output {i} that the closure returned is computed from another of the outputs, "
                "so the loss would be counted twice. Return only the tensors that the loss "
                "function itself takes."
            )


# --- which head a call makes ----------------------------------------------------------------


def make_head(call: Call, weight: Tensor, record: Record) -> Head | None:
    """The head of a call seen; None where it has no convex curvature in its argument.

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
            return SoftmaxHead(piece, entropy_weights(logits, call.settings, weight), dim)
        case "nll_loss" | "kl_div" | "log_softmax" | "log":
            return _log_probability_head(call, weight, record)
        case "binary_cross_entropy":
            return _bernoulli_head(call, weight, record)
        case "gaussian_nll_loss":
            return GraphHead(*piece)
        case "norm":
            convex = bool((weight >= 0).all())
            return NormHead(piece, *_norm_weight(call, weight)) if convex else None
        case "pow" | "square" | "mul" | "dot":
            return _square_head(call, weight, record)
        case "softmax" | "sigmoid" | "l1_loss":
            return None
    if len(call.inputs) == 2:
        return _difference_head(piece)
    return ElementwiseHead(*piece)


def _square_head(call: Call, weight: Tensor, record: Record) -> Head:
    """``sum(c * r**2)``, also where it was written as the square of a norm."""
    norm = record.maker(call.inputs[0], "norm")
    if norm is None or call.name == "dot":
        return DiagonalHead((call.edge, weight, call.inputs), 2 * weight)
    pulled = _pulled(weight, call.inputs[0], norm.edge)
    return DiagonalHead((call.edge, weight, norm.inputs), 2 * _norm_weight(norm, pulled)[0])


def _norm_weight(norm: Call, weight: Tensor) -> tuple[Tensor, Any]:
    """A weight on norms in a shape that broadcasts to their argument, and their dimensions."""
    dim = norm.settings["dim"]
    dims = [dim] if isinstance(dim, int) else dim
    if dims is not None and not norm.settings["keepdim"]:
        for d in sorted(d % norm.inputs[0].ndim for d in dims):
            weight = weight.unsqueeze(d)
    return weight, dim


def _log_probability_head(call: Call, weight: Tensor, record: Record) -> Head | None:
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
            return ElementwiseHead(link.edge, slope, link.inputs) if convex else None
        slope = _pulled(slope, logits, soft.edge)
        logits, dim = soft.inputs[0], soft.settings["dim"]
    axis = dim if isinstance(dim, int) else (0 if logits.ndim in (0, 1, 3) else 1)
    return SoftmaxHead((call.edge, weight, (logits,)), -slope.sum(axis, keepdim=True), axis)


def _bernoulli_head(call: Call, weight: Tensor, record: Record) -> Head:
    """Walks probabilities back to logits z, where the second derivative is ``p (1 - p)``.

    Double backward through p loses it to rounding where p is close to 0 or 1.
    """
    p, settings = call.inputs[0], call.settings
    link = record.maker(p, "sigmoid")
    if link is None:
        return ElementwiseHead(call.edge, weight, call.inputs)
    entries = weight / p.numel() if settings["reduction"] == "mean" else weight
    if settings["weight"] is not None:
        entries = entries * settings["weight"]
    z = link.inputs[0]
    q = torch.sigmoid(z.detach())
    pulled = _pulled(entries.expand_as(p), p, link.edge)
    return DiagonalHead((call.edge, weight, link.inputs), pulled * q * (1 - q))


def _difference_head(piece: Piece) -> Head:
    """Of two outputs, one of which may depend on the other, that one comes first."""
    result, weight, (a, b) = piece
    if a.shape != b.shape:
        return GraphHead(*piece)
    (through,) = grad(b, a, torch.zeros_like(b), retain_graph=True, allow_unused=True)
    return ElementwiseHead(result, weight, (a, b) if through is None else (b, a))


def _pulled(weight: Tensor, result: Any, back_to: GradientEdge) -> Tensor:
    return grad([result], [back_to], [weight], retain_graph=True)[0]


# --- where there is none --------------------------------------------------------------------


def _no_split(flat: set[str], refused: set[str], ends: set[str]) -> str:
    if refused == {"gaussian_nll_loss"}:
        cause = (
            "gaussian_nll_loss is not convex in its variance, which depends on the parameters too. "
            'Take the whole Hessian, HFOptimizer(params, curvature="hessian"), or detach it: '
            "var.detach()."
        )
    elif refused:
        cause = (
            f"in {_and(refused)} the target, weight or variance depends on the parameters too. "
            f"Detach it (target.detach()), or {EXPLICIT_FORM}"
        )
    elif flat & {"nll_loss", "kl_div"}:
        cause = (
            f"{_and(flat)} is linear in the log-probabilities it was given, and the log_softmax "
            "that made them was not seen. Use F.cross_entropy or F.log_softmax on the logits, or "
            f"{EXPLICIT_FORM}"
        )
    elif flat:
        cause = (
            f"{_and(flat)} has no curvature, its second derivative is 0. Take F.huber_loss or "
            'F.mse_loss, or the whole Hessian: HFOptimizer(params, curvature="hessian").'
        )
    else:
        cause = (
            f"it comes from {_and(ends) or 'something else'}, and is no sum of torch's loss "
            "functions that are convex in their input (F.cross_entropy, F.mse_loss, ...) and of "
            f"means or sums of squares. To say where the network ends, {EXPLICIT_FORM}"
        )
    return f"No Gauss-Newton split of this loss was found: {cause}"


def _spelled(name: str) -> str:
    """A name of autograd's, as functions are spelled: ``ctc_loss`` for ``CtcLoss``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _and(names: set[str]) -> str:
    return " and ".join(sorted(names))
