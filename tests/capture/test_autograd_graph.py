"""Walks over autograd's graph, and that no other module reads its nodes' fields."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_hf
from torch_hf import HFOptimizer
from torch_hf.capture import autograd_graph
from torch_hf.capture.autograd_graph import (
    connects,
    divisor,
    edge_of,
    leaf,
    leaf_uses,
    operands,
    reaches,
    results,
    touches,
    under,
    users_first,
)

PACKAGE = Path(torch_hf.__file__).parent


# --- one reader -----------------------------------------------------------------------------


def private(name):
    """Names of fields that a release of torch may change."""
    return name in ("next_functions", "variable", "_input_metadata") or name.startswith(
        ("_saved_", "_raw_saved_", "saved_")
    )


def reads(source):
    """The fields of nodes that a piece of code reads, by attribute or by ``getattr``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and private(node.attr):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            words = [a.value for a in node.args if isinstance(a, ast.Constant)]
            found |= {w for w in words if isinstance(w, str) and private(w)}
    return found


def test_the_search_finds_them():
    assert reads("n.next_functions") == {"next_functions"}
    assert reads("getattr(n, '_saved_other', 1)") == {"_saved_other"}
    assert reads(Path(autograd_graph.__file__).read_text(encoding="utf-8")) == {
        "next_functions",
        "_input_metadata",
        "_saved_other",
        "variable",
    }


#: ``ctx.saved_tensors`` and the like in an ``autograd.Function`` of one's own are no node's.
def test_one_module_reads_fields_of_nodes():
    readers = {
        path.relative_to(PACKAGE).as_posix(): found
        for path in PACKAGE.rglob("*.py")
        if (found := reads(path.read_text(encoding="utf-8")) - {"saved_tensors"})
    }
    assert list(readers) == ["capture/autograd_graph.py"]


def test_no_module_looks_at_the_call_stack():
    """But the command line, which tells a user's error from one of its own.

    A sampler looks at what draws from it: a DataLoader's own sampler of batches has no door but
    that. And a warning looks for the user's line.
    """
    frames = ("_getframe", "currentframe", "f_back", "f_locals", "f_globals", "inspect.stack")
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in frames)
    }
    assert found <= {"__main__.py", "_user_warnings.py", "sampling/neglect.py"}


# --- what cannot be read is said ------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda x: x.mean(), 6.0),
        (lambda x: x.mean(1).sum(), 1.0),
        (lambda x: x.mean(1), 3.0),
        (lambda x: x / 4, 4.0),
        (lambda x: x / torch.tensor(-4.0), 4.0),
        (lambda x: x / torch.ones(3), 1.0),
        (lambda x: x / 0, 1.0),
        (lambda x: torch.ops.aten.div.Scalar(x, 5), 5.0),
        (lambda x: torch.div(x, 5, rounding_mode="floor"), 5.0),
        (lambda x: x * 4, 1.0),
    ],
)
def test_divisors(make, expected):
    assert divisor(make(torch.ones(2, 3, requires_grad=True)).grad_fn) == expected


class Renamed:
    """A node of a release of torch that calls its fields otherwise."""

    def __init__(self, node, *missing):
        self.node, self.missing = node, missing

    def __getattr__(self, name):
        if name in self.missing:
            raise AttributeError(name)
        return getattr(self.node, name)


@pytest.mark.parametrize(
    ("make", "field", "read"),
    [
        (lambda x: x / 4, "_saved_other", divisor),
        (lambda x: x.mean(), "_input_metadata", divisor),
        (lambda x: x.mean(), "_input_metadata", results),
        (lambda x: x, "variable", leaf),
    ],
)
def test_a_field_that_is_missing_is_an_error(make, field, read):
    node = edge_of(make(torch.ones(2, 3, requires_grad=True)))[0]
    read(node)
    with pytest.raises(RuntimeError, match=rf"must have the field {field}, got none in torch \d"):
        read(Renamed(node, field))


# --- a name is no proof ---------------------------------------------------------------------


def user_function(name, factor):
    """An ``autograd.Function`` of a user's that multiplies the gradient."""

    def forward(ctx, x):
        ctx.variable = x  # of its own, and no leaf
        return x.clone()

    body = {
        "forward": staticmethod(forward),
        "backward": staticmethod(lambda ctx, g: g * factor),
    }
    return type(name, (torch.autograd.Function,), body).apply


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, 2)


def trained(make_loss):
    model = network()
    x, y = torch.linspace(-1, 1, 15).view(5, 3), torch.arange(10.0).view(5, 2)
    optimizer = HFOptimizer(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.step(lambda: make_loss(model, x, y))
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", ["Mul", "Clone", "Div", "Mean", "Flip", "Anything"])
@pytest.mark.parametrize("place", ["outputs", "loss"])
def test_a_users_function_is_not_taken_for_one_of_torch(name, place):
    """With outputs named, its derivatives are autograd's, whatever it is called."""
    ours, other = user_function(name, 0.5), user_function("Something", 0.5)

    def loss_of(apply):
        def make(model, x, y):
            z = model(x)
            error = apply(z) - y if place == "outputs" else z - y
            loss = error.square().sum()
            return (apply(loss) if place == "loss" else loss), z

        return make

    for a, b in zip(trained(loss_of(ours)), trained(loss_of(other)), strict=True):
        assert torch.equal(a, b)


def test_the_variable_of_a_users_function_is_no_leaf():
    x = torch.ones(2, requires_grad=True)
    y = user_function("Clone", 1.0)(x)
    assert leaf(y.grad_fn) is None
    assert leaf(edge_of(x)[0]) is x


# --- walks against brute force --------------------------------------------------------------


def graph():
    """Leaves a, b, c; a is used three times, b once in each half, c in none of the first."""
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    first = (a * b).exp() + a
    second = (first * b).sum() + (c * a).sum()
    return (a, b, c), first, second


def all_paths(node):
    yield node
    for below, _ in node.next_functions:
        if below is not None:
            yield from all_paths(below)


def test_under_visits_each_once():
    _, _, second = graph()
    found = list(under([second.grad_fn]))
    assert len(found) == len(set(found))
    assert set(found) == set(all_paths(second.grad_fn))


def test_under_stops_at_places_and_closed_nodes():
    (a, b, _), first, second = graph()
    whole = set(under([second.grad_fn]))
    for found in (
        set(under([second.grad_fn], stops={edge_of(first)})),
        set(under([second.grad_fn], closed={first.grad_fn})),
    ):
        assert first.grad_fn not in found
        assert {leaf(n) for n in found} >= {a, b}  # by other paths
        assert found < whole


def test_users_come_first():
    _, _, second = graph()
    order = users_first(edge_of(second), lambda edge: True)
    assert set(order) == set(all_paths(second.grad_fn))
    place = {node: i for i, node in enumerate(order)}
    for node in order:
        assert all(place[node] < place[n] for n, _ in operands(node) if n is not None)


def test_leaves_and_their_uses():
    (a, b, c), first, second = graph()
    uses = leaf_uses([first])
    assert (uses[id(a)], uses[id(b)], uses[id(c)]) == (2, 1, 0)
    uses = leaf_uses([first, second])
    assert (uses[id(a)], uses[id(b)], uses[id(c)]) == (3, 2, 1)
    assert not leaf_uses([torch.ones(2)])


def test_what_reaches_what():
    (_, _, c), first, second = graph()
    assert reaches([second.grad_fn], {id(c)})
    assert not reaches([first.grad_fn], {id(c)})
    assert touches(second.grad_fn, {edge_of(first)})
    assert not touches(first.grad_fn, {edge_of(second)})
    ends = {edge_of(c)}
    assert connects(edge_of(second), ends, lambda node: None)
    assert not connects(edge_of(first), ends, lambda node: None)
    product = (c * 2) * torch.ones(2, requires_grad=True)
    assert not connects(edge_of(product), ends, lambda node: 0 if node is product.grad_fn else None)


def test_a_long_graph_needs_no_recursion():
    x = torch.ones((), requires_grad=True)
    z = x
    for _ in range(5000):
        z = z + 1
    assert len(users_first(edge_of(z), lambda edge: True)) == 5001
    assert reaches([z.grad_fn], {id(x)})
