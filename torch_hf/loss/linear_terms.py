"""The terms that a loss is the sum of: its graph, walked down through linear operations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torch_hf.capture.op_names import SHAPING, kind

AVERAGING = {"Mean", "Div"}
PRODUCTS = {"Mul", "Dot", "Mv", "Mm", "Bmm"}
LINEAR = (
    SHAPING
    | AVERAGING
    | PRODUCTS
    | {
        "Add",
        "Sub",
        "Rsub",
        "Neg",
        "Sum",
        "Nansum",
        "Cumsum",
        "Trace",
        "Stack",
        "Cat",
        "Where",
        "MaskedFill",
        "MaskedSelect",
        "Gather",
        "IndexSelect",
        "IndexAdd",
        "ScatterAdd",
    }
)


@dataclass
class LinearTerm:
    """A place in the graph that the loss depends on linearly.

    Attributes:
        node: Of the graph.
        place: Which of the node's results.
        weight: The derivative of the loss there, along linear paths alone.
        divisor: What the means and quotients on the way divide by.
        averaged: Whether there are any.
    """

    node: Any
    place: int
    weight: Tensor
    divisor: float = 1.0
    averaged: bool = False


@torch.no_grad()
def linear_terms(loss: Tensor, stops: Any) -> list[LinearTerm]:
    """The first places below linear operations, each once, or the stops on the way.

    Args:
        loss: A scalar.
        stops: Nodes, or pairs of a node and a place.
    """
    start = edge_of(loss)
    found = {start: LinearTerm(*start, torch.ones_like(loss))}
    for node in _users_first(start, stops):
        places = [(node, i) for i in range(len(node._input_metadata))]
        terms = [None if p in stops else found.pop(p, None) for p in places]
        arrived = [t for t in terms if t is not None]
        if not arrived:
            continue
        divisor = max(t.divisor for t in arrived) * _divisor(node)
        averaged = kind(node) in AVERAGING or any(t.averaged for t in arrived)
        # A node called by itself gives its operands' share and goes no further: what the
        # operands owe to other paths, through a loss function, is not counted.
        weights: Any = [None if t is None else t.weight for t in terms]
        if kind(node) != "BackwardHookFunction":  # where modules hang their hooks: the identity
            weights = node(*weights)
            weights = weights if isinstance(weights, tuple) else (weights,)
        for edge, weight in zip(node.next_functions, weights, strict=True):
            if edge[0] is not None and weight is not None:
                _arrive(found, edge, weight, divisor, averaged)
    return list(found.values())


def _arrive(found: Any, edge: Any, weight: Tensor, divisor: float, averaged: bool) -> None:
    node, place = edge
    like = node._input_metadata[place]
    weight = weight.sum_to_size(like.shape).to(device=like.device, dtype=like.dtype)
    term = found.get(edge)
    if term is None:
        found[edge] = LinearTerm(node, place, weight, divisor, averaged)
    else:
        term.weight = term.weight + weight
        term.divisor = max(term.divisor, divisor)
        term.averaged |= averaged


def _users_first(start: tuple[Any, int], stops: Any) -> list[Any]:
    """The linear nodes under a place, each after all that use it."""
    order: list[Any] = []
    seen: set[Any] = set()
    todo: list[tuple[Any, int, bool]] = [(*start, False)]
    while todo:
        node, place, done = todo.pop()
        if done:
            order.append(node)
            continue
        stop = node in stops or (node, place) in stops
        if node not in seen and not stop and _is_linear(node):
            seen.add(node)
            todo.append((node, place, True))
            todo.extend((fn, nr, False) for fn, nr in node.next_functions if fn is not None)
    return order[::-1]


def _is_linear(node: Any) -> bool:
    """Whether a node is linear in all of its differentiable operands together."""
    name = kind(node)
    active = [fn is not None for fn, _ in node.next_functions]
    if name == "Div":
        return not any(active[1:])
    return name in LINEAR and not (name in PRODUCTS and sum(active) > 1)


def _divisor(node: Any) -> float:
    if kind(node) == "Mean":
        fn, nr = node.next_functions[0]
        below, above = fn._input_metadata[nr].shape, node._input_metadata[0].shape
        return float(math.prod(below) / max(math.prod(above), 1))
    other = getattr(node, "_saved_other", None) if kind(node) == "Div" else None
    if other is None or (isinstance(other, Tensor) and other.numel() != 1):
        return 1.0
    divisor = abs(float(other))
    return divisor if 0 < divisor < math.inf else 1.0


def edge_of(z: Tensor) -> tuple[Any, int]:
    """The node that made a tensor, and which of its results it is."""
    edge = get_gradient_edge(z)
    return edge.node, edge.output_nr


def under(nodes: Iterable[Any], stops: Any = ()) -> Iterator[Any]:
    """The nodes of the graph from some of them down, each once, not going past the stops."""
    todo = list(nodes)
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for fn, nr in node.next_functions:
            if fn is not None and fn not in seen and (fn, nr) not in stops:
                seen.add(fn)
                todo.append(fn)
