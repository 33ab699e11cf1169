"""The Gauss-Newton split: which part of a loss is network, which is a convex loss on it.

The graph is walked from the loss through operations that are linear (sums, means,
products with constants) to the results of known loss functions, the heads. What else
the loss is made of is a remainder and brings its own Hessian: nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import GradientEdge

from torch_hf.capture import Call, Record
from torch_hf.heads import (
    ElementwiseHead,
    GraphHead,
    Head,
    SoftmaxHead,
    SquareHead,
    entropy_weights,
)

SHAPING = {
    "View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute", "Squeeze", "Unsqueeze",
    "Clone", "Alias", "ToCopy", "Expand", "Select", "Slice", "Index", "BackwardHookFunction",
    "Contiguous", "Flatten",
}
AVERAGING = {"Mean", "Div"}
LINEAR = SHAPING | AVERAGING | {
    "Add", "Sub", "Rsub", "Mul", "Neg", "Sum", "Stack", "Cat", "Where", "MaskedFill",
    "MaskedSelect", "Gather", "IndexSelect",
}

EXPLICIT_FORM = """return the network's outputs beside the loss, and the split is yours:

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


@dataclass
class Term:
    node: Any
    place: int
    averaged: bool


def split_by_calls(record: Record, loss: Tensor, params: Sequence[Tensor]) -> Split:
    """The split found from the loss functions that were seen.

    Raises:
        RuntimeError: No known loss function was seen, or none with curvature.
    """
    own = {id(p) for p in params}
    terms = list(linear_terms(loss, record.calls))
    known = [t for t in terms if t.node in record.calls]
    calls = [record.calls[t.node] for t in known]
    weights = _weights(loss, [c.result for c in calls])
    heads = [_head(c, w, record) for c, w in zip(calls, weights, strict=True)]
    flat = [c.name for c, h in zip(calls, heads, strict=True) if h is None]
    curved = [h for h in heads if h is not None]
    if not curved:
        raise RuntimeError(_no_split(flat))
    others = [t for t in terms if t.node not in record.calls]
    for call, head, term in zip(calls, heads, known, strict=True):
        if head is None and call.name != "l1_loss":
            others.append(term)  # no curvature in its argument, but that may be curved itself
    remainders = _remainders(loss, [t for t in others if _reaches(t.node, own, ())])
    return Split(curved, remainders)


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
    stops = {_edge(z) for z in outputs}
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
            "not their log_softmax), or use HFOptimizer(params, curvature=\"hessian\")."
        )
    return Split([head], _remainders(loss, remainders))


# --- the walk -------------------------------------------------------------------------------


def _kind(node: Any) -> str:
    return str(node.name()).split("::")[-1].rstrip("0123456789").removesuffix("Backward")


def linear_terms(loss: Tensor, stops: Any) -> Iterator[Term]:
    """The first nodes below linear operations, each once, or the stops on the way."""
    start = _edge(loss)
    todo = [(start[0], start[1], False)]
    seen: dict[tuple[Any, int], Term] = {}
    while todo:
        node, place, averaged = todo.pop()
        if (node, place) in seen:
            seen[node, place].averaged |= averaged
            continue
        stop = node in stops or (node, place) in stops
        below = None if stop else _operands(node)
        if below is None:
            seen[node, place] = Term(node, place, averaged)
        else:
            averaged = averaged or _kind(node) in AVERAGING
            todo.extend((fn, nr, averaged) for fn, nr in below)
    yield from seen.values()


def _operands(node: Any) -> list[tuple[Any, int]] | None:
    """The differentiable operands of a linear operation; None if it is not linear in them."""
    kind = _kind(node)
    if kind not in LINEAR:
        return None
    entries = list(node.next_functions)
    active = [e for e in entries if e[0] is not None]
    if kind == "Mul" and len(active) > 1:
        return None
    if kind == "Div" and len(entries) > 1 and entries[1][0] is not None:
        return None
    return active


def _edge(z: Tensor) -> tuple[Any, int]:
    edge = torch.autograd.graph.get_gradient_edge(z)
    return edge.node, edge.output_nr


def _below(node: Any, stops: Any) -> Iterator[Any]:
    """The nodes of the graph under a node, not going past the stops."""
    todo, seen = [node], {node}
    while todo:
        node = todo.pop()
        yield node
        for fn, nr in node.next_functions:
            if fn is not None and fn not in seen and (fn, nr) not in stops:
                seen.add(fn)
                todo.append(fn)


def _reaches(node: Any, own: set[int], stops: Any) -> bool:
    return any(id(getattr(n, "variable", None)) in own for n in _below(node, stops))


def _hits(node: Any, stops: Any) -> bool:
    return any((fn, nr) in stops for n in _below(node, stops) for fn, nr in n.next_functions)


def _check_separate(outputs: tuple[Tensor, ...]) -> None:
    for i, z in enumerate(outputs):
        others = {_edge(o) for j, o in enumerate(outputs) if j != i}
        if _hits(_edge(z)[0], others):
            raise RuntimeError(
                f"Output {i} that the closure returned is computed from another of the outputs, "
                "so the loss would be counted twice. Return only the tensors that the loss "
                "function itself takes."
            )


# --- heads ----------------------------------------------------------------------------------


def _weights(loss: Tensor, results: list[Tensor]) -> list[Tensor]:
    return list(grad(loss, results, retain_graph=True)) if results else []


def _remainders(loss: Tensor, terms: list[Term]) -> list[tuple[GradientEdge, Tensor]]:
    edges = [GradientEdge(t.node, t.place) for t in terms]
    return list(zip(edges, grad(loss, edges, retain_graph=True), strict=True)) if edges else []


def _head(call: Call, weight: Tensor, record: Record) -> Head | None:
    """The head of a call seen; None where the loss has no curvature in its argument."""
    piece = (call.result, weight, call.inputs)
    if call.name == "cross_entropy":
        logits = call.inputs[0]
        dim = 1 if logits.ndim > 1 else 0
        return SoftmaxHead(piece, entropy_weights(logits, call.settings, weight), dim)
    if call.name in ("nll_loss", "kl_div"):
        return _log_probability_head(call, weight, record)
    if call.name == "binary_cross_entropy":
        link = _link(call.inputs[0], record, "sigmoid")
        if link is not None:
            piece = (call.result, weight, link.inputs)
    if call.name == "gaussian_nll_loss":
        return _curved(GraphHead(*piece))
    if call.result.ndim == 0 and call.name in ("pow", "__pow__", "square", "mul", "__mul__"):
        link = _link(call.inputs[0], record, "norm", "linalg_vector_norm", "vector_norm")
        if link is not None and link.result.ndim == 0:
            return SquareHead(call.result, weight, link.inputs)
    if call.name in ("binary_cross_entropy_with_logits", "binary_cross_entropy") or (
        call.name.endswith("_loss")
    ):
        return _curved(ElementwiseHead(*piece))
    return SquareHead(*piece)


def _log_probability_head(call: Call, weight: Tensor, record: Record) -> Head | None:
    """Walks log-probabilities back to logits: cut at the former, the curvature is zero."""
    link = _link(call.inputs[0], record, "log_softmax", "log")
    if link is None:
        return None
    logits, dim = link.inputs[0], link.settings.get("dim")
    if link.name == "log":
        soft = _link(link.inputs[0], record, "softmax")
        if soft is None:
            return _curved(GraphHead(call.result, weight, link.inputs))
        logits, dim = soft.inputs[0], soft.settings.get("dim")
    slope = grad(call.result, link.result, weight, retain_graph=True)[0]
    axis = dim if isinstance(dim, int) else (0 if logits.ndim in (0, 1, 3) else 1)
    return SoftmaxHead((call.result, weight, (logits,)), -slope.sum(axis, keepdim=True), axis)


def _curved(head: Any) -> Any:
    return head if head.curved else None


def _link(z: Tensor, record: Record, *names: str) -> Call | None:
    """The call of one of these names that made a tensor, seen through changes of shape."""
    node = z.grad_fn
    while node is not None and node not in record.calls and _kind(node) in SHAPING:
        node = node.next_functions[0][0]
    call = record.calls.get(node) if node is not None else None
    return call if call is not None and call.name in names else None


def _recognised(record: Record, loss: Tensor, outputs: tuple[Tensor, ...]) -> list[Head] | None:
    """Heads with closed forms, where the outputs named are just what the losses took."""
    terms = list(linear_terms(loss, record.calls))
    if not all(t.node in record.calls for t in terms):
        return None
    calls = [record.calls[t.node] for t in terms]
    given = {id(z) for z in outputs}
    if {id(z) for c in calls for z in c.inputs} != given:
        return None
    weights = _weights(loss, [c.result for c in calls])
    heads = [_head(c, w, record) for c, w in zip(calls, weights, strict=True)]
    taken = {id(z) for h in heads if h is not None for z in h.outputs}
    return [h for h in heads if h is not None] if taken == given else None


def _no_split(flat: list[str]) -> str:
    if "nll_loss" in flat or "kl_div" in flat:
        cause = (
            "the loss is linear in the log-probabilities it was given, and the log_softmax that "
            "made them was not seen. Use F.cross_entropy on the logits, or "
        )
    elif flat:
        cause = f"{' and '.join(sorted(set(flat)))} has no curvature (its second derivative is 0). "
        cause += "Take a loss that has (F.huber_loss, F.mse_loss), or "
    else:
        cause = "none of torch's loss functions and no mean or sum of squares was seen in it. Either "
    return f"No Gauss-Newton split of this loss was found: {cause}{EXPLICIT_FORM}"
