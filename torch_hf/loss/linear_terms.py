"""The terms that a loss is the sum of: its graph, walked down through linear operations."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_hf.capture.autograd_graph import (
    Edge,
    divisor,
    edge_of,
    is_foreign,
    operands,
    results,
    users_first,
)
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
        "IndexPut",
        "ScatterAdd",
        "Diagonal",
        "ViewAsReal",
        "ViewAsComplex",
        "Conj",
        "ConjPhysical",
        "ResolveConj",
        "Real",
        "Imag",
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
def linear_terms(loss: Tensor, stops: Container[Any]) -> list[LinearTerm]:
    """The first places below linear operations, each once, or the stops on the way.

    Args:
        loss: A scalar.
        stops: Nodes, or pairs of a node and a place.
    """
    start = edge_of(loss)
    found = {start: LinearTerm(*start, torch.ones_like(loss))}

    def enters(edge: Edge) -> bool:
        return edge[0] not in stops and edge not in stops and is_linear(edge[0])

    for node in users_first(start, enters):
        places = [(node, i) for i in range(len(results(node)))]
        terms = [None if p in stops else found.pop(p, None) for p in places]
        arrived = [t for t in terms if t is not None]
        if not arrived:
            continue
        divided = max(t.divisor for t in arrived) * divisor(node)
        averaged = kind(node) in AVERAGING or any(t.averaged for t in arrived)
        # A node called by itself gives its operands' share and goes no further: what the
        # operands owe to other paths, through a loss function, is not counted.
        weights: Any = [None if t is None else t.weight for t in terms]
        if kind(node) != "BackwardHookFunction":  # where modules hang their hooks: the identity
            weights = node(*weights)
            weights = weights if isinstance(weights, tuple) else (weights,)
        for edge, weight in zip(operands(node), weights, strict=True):
            if edge[0] is not None and weight is not None:
                _arrive(found, edge, weight, divided, averaged)
    return list(found.values())


def summands(loss: Tensor) -> list[Any]:
    """The nodes down to the first that are not linear, these too."""
    found, seen = [], {loss.grad_fn}
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        found.append(node)
        below = {b for b, _ in operands(node) if b is not None} if is_linear(node) else set()
        todo += below - seen
        seen |= below
    return found


def _arrive(found: Any, edge: Edge, weight: Tensor, divided: float, averaged: bool) -> None:
    node, place = edge
    like = results(node)[place]
    weight = weight.sum_to_size(like.shape).to(device=like.device, dtype=like.dtype)
    term = found.get(edge)
    if term is None:
        found[edge] = LinearTerm(node, place, weight, divided, averaged)
    else:
        term.weight = term.weight + weight
        term.divisor = max(term.divisor, divided)
        term.averaged |= averaged


def is_linear(node: Any) -> bool:
    """Whether a node is linear in all of its differentiable operands together."""
    name = kind(node)
    if is_foreign(node):
        return False
    active = [below is not None for below, _ in operands(node)]
    if name == "Div":
        return not any(active[1:])
    return name in LINEAR and not (name in PRODUCTS and sum(active) > 1)
