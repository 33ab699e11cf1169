"""Walks over autograd's graph; the only module that reads fields of its nodes.

torch documents ``next_functions`` and ``metadata`` alone. What else is read here may be renamed by
any release, so a field that is missing is an error and never a default.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import get_gradient_edge

from torch_hf.capture.op_names import kind

#: A node, and which of its results.
Edge = tuple[Any, int]

# --- one node -------------------------------------------------------------------------------


def edge_of(z: Tensor) -> Edge:
    """The node that made a tensor, and which of its results it is."""
    edge = get_gradient_edge(z)
    return edge.node, edge.output_nr


def operands(node: Any) -> Sequence[Edge]:
    """Where a node's operands come from, in order; the node is None where one is a constant."""
    found: Sequence[Edge] = node.next_functions
    return found


def results(node: Any) -> Sequence[Any]:
    """Shape, dtype and device of each of a node's results."""
    found: Sequence[Any] = _field(node, "_input_metadata")
    return found


def leaf(node: Any) -> Tensor | None:
    """The leaf whose gradient a node accumulates; None of any other node."""
    if kind(node) != "AccumulateGrad" or is_foreign(node):
        return None
    found: Tensor = _field(node, "variable")
    return found


def constant(node: Any, name: str) -> Any:
    """An operand or a number that a node keeps, by name; None where it keeps no such thing.

    What a rule does not find there, it does not apply to.
    """
    try:
        return getattr(node, f"_saved_{name}", None)
    except RuntimeError:  # it was changed in place since
        return None


def conjugates(first: Edge, second: Edge) -> bool:
    """Whether one of two places holds the complex conjugate of the other."""
    return _conjugate(first) == second or _conjugate(second) == first


def _conjugate(edge: Edge) -> Edge | None:
    return operands(edge[0])[0] if kind(edge[0]) in ("Conj", "ConjPhysical") else None


def made_before(node: Any, moment: int) -> bool:
    """Whether a node that is no leaf was made before one with this sequence number."""
    number = getattr(node, "_sequence_nr", None)
    return number is not None and kind(node) != "AccumulateGrad" and number() < moment


def moment() -> int:
    """The sequence number of a node that is made now, by this thread."""
    with torch.enable_grad():
        node: Any = torch.zeros((), requires_grad=True).clone().grad_fn
    return int(node._sequence_nr())


def is_foreign(node: Any) -> bool:
    """Whether a node is of a user's ``autograd.Function``, whose name tells nothing."""
    return isinstance(node, FunctionCtx) and kind(node) != "BackwardHookFunction"


def is_unknown(node: Any) -> bool:
    """Whether a node's backward is a user's: of ``autograd.Function``, in C++, of a custom op."""
    if "CppNode" in node.name():
        return True
    if not is_foreign(node):
        return False
    module: str = getattr(_field(node, "_forward_cls"), "__module__", "")
    package = module.split(".")[0]
    return package not in ("torch", "torch_hf") or module == "torch._library.autograd"


def divisor(node: Any) -> float:
    """What a mean, or a quotient by one number that is neither 0 nor infinite, divides by; or 1.

    Raises:
        RuntimeError: The node does not tell.
    """
    if kind(node) == "Mean":
        below, place = operands(node)[0]
        summed = math.prod(results(below)[place].shape)
        return float(summed / max(math.prod(results(node)[0].shape), 1))
    if kind(node) != "Div":
        return 1.0
    by = _field(node, "_saved_other")
    if isinstance(by, Tensor) and by.numel() != 1:
        return 1.0
    size = abs(float(by))
    return size if 0 < size < math.inf else 1.0


def saved(node: Any, name: str) -> Any:
    """What a node keeps of its operands or settings under a name; it may be None.

    Raises:
        UnreadableFieldError: The node keeps nothing of that name.
    """
    return _field(node, f"_saved_{name}", optional=True)


class UnreadableFieldError(RuntimeError):
    """A node lacks a field: this torch builds its graph in another way."""


_MISSING = object()


def _field(node: Any, name: str, optional: bool = False) -> Any:
    found = getattr(node, name, _MISSING)
    if found is _MISSING or (found is None and not optional):
        raise UnreadableFieldError(
            f"The node {node.name()} of autograd's graph must have the field {name}, got none in "
            f"torch {torch.__version__}. Use an older torch or a newer torch_hf."
        )
    return found


# --- walks ----------------------------------------------------------------------------------


def under(
    nodes: Iterable[Any], stops: Container[Edge] = (), closed: Container[Any] = ()
) -> Iterator[Any]:
    """The nodes of the graph from some of them down, each once.

    Args:
        nodes: To begin with.
        stops: Places not to go past.
        closed: Nodes not to enter.
    """
    todo = list(nodes)
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for below, place in operands(node):
            if below is None or below in seen or below in closed or (below, place) in stops:
                continue
            seen.add(below)
            todo.append(below)


def users_first(start: Edge, enters: Callable[[Edge], bool]) -> list[Any]:
    """The nodes under a place that are entered, each after all that use it."""
    order: list[Any] = []
    seen: set[Any] = set()
    todo: list[tuple[Edge, bool]] = [(start, False)]
    while todo:
        edge, done = todo.pop()
        node = edge[0]
        if done:
            order.append(node)
        elif node not in seen and enters(edge):
            seen.add(node)
            todo.append((edge, True))
            todo.extend((below, False) for below in operands(node) if below[0] is not None)
    return order[::-1]


def connects(start: Edge, ends: Container[Edge], skips: Callable[[Any], int | None]) -> bool:
    """Whether a path leads from a place down to one of the ends.

    Args:
        start: A place.
        ends: Places.
        skips: Which operand of a node paths do not go through; None for through all.
    """
    todo, seen = [start], {start}
    while todo:
        edge = todo.pop()
        if edge in ends:
            return True
        skipped = skips(edge[0])
        for i, below in enumerate(operands(edge[0])):
            if below[0] is not None and i != skipped and below not in seen:
                seen.add(below)
                todo.append(below)
    return False


def touches(node: Any, places: Container[Edge]) -> bool:
    """Whether some node from this one down takes one of the places for an operand."""
    return any(edge in places for n in under([node], places) for edge in operands(n))


def reaches(nodes: Iterable[Any], leaves: Collection[int], stops: Container[Edge] = ()) -> bool:
    """Whether one of the leaves, given by ``id``, lies under the nodes, not past the stops."""
    return any(id(leaf(n)) in leaves for n in under(nodes, stops))


def unknown_functions(
    tensors: Iterable[Tensor], stops: Container[Edge] = (), more: Iterable[Any] = ()
) -> list[str]:
    """The names of users' functions in the graph of some tensors, not past the stops.

    Args:
        tensors: Whose graph it is.
        stops: Places not to go past.
        more: Further nodes to begin with.
    """
    nodes = ({z.grad_fn for z in tensors} - {None}) | set(more)
    found = {kind(n) for n in under(nodes, stops) if is_unknown(n)}
    return sorted(name.removeprefix("GeneratedBackwardFor_") for name in found)


def may_communicate(tensors: Iterable[Tensor]) -> bool:
    """Whether the backward of some tensors may use other ranks: a collective's does, by its kind.

    It is a Python function, as ``SyncBatchNorm``'s, a C++ one, or a custom operator.
    """
    nodes = {z.grad_fn for z in tensors} - {None}
    return any(_may_communicate(node) for node in under(nodes))


def _may_communicate(node: Any) -> bool:
    if "CppNode" in node.name() or "c10d" in node.name():
        return True
    if not is_foreign(node) or kind(node) == "_DDPSink":
        return False
    module: str = getattr(_field(node, "_forward_cls"), "__module__", "")
    return not module.startswith("torch_hf.")


def leaf_uses(outputs: Iterable[Tensor]) -> Counter[int]:
    """How often each leaf, by its ``id``, is an operand in the graph under the outputs."""
    nodes = {z.grad_fn for z in outputs} - {None}
    return Counter(
        id(found)
        for node in under(nodes)
        for below, _ in operands(node)
        if below is not None and (found := leaf(below)) is not None
    )
