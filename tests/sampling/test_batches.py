"""Pieces of a batch hold its cases, in order, in its structure, without a copy."""

import collections
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from torch_hf.sampling.batches import head, split_batch

Pair = collections.namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass
class Registered:
    x: torch.Tensor
    name: str


@dataclasses.dataclass
class Unregistered:
    x: torch.Tensor


pytree.register_dataclass(Registered)

STRUCTURES = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, 2 * x),
    "list": lambda x: [x, [x.unsqueeze(1)]],
    "dict": lambda x: {"x": x, "y": {"deep": (x, None)}},
    "ordered dict": lambda x: collections.OrderedDict(b=x, a=-x),
    "named tuple": lambda x: Pair(x, x > 1),
    "dataclass": lambda x: Registered(x, "kept"),
    "repeated": lambda x: (x, torch.tensor(3.0), ["a", "b"], 4, None),
}
KEPT = (str, int, type(None))


def leaves(batch):
    return pytree.tree_leaves(batch)


@pytest.mark.parametrize("build", STRUCTURES.values(), ids=STRUCTURES.keys())
@given(cases=st.integers(1, 9), size=st.integers(1, 11))
def test_pieces_put_together_are_the_batch(build, cases, size):
    batch = build(torch.arange(cases))
    pieces = split_batch(batch, size)
    assert len(pieces) == -(-cases // size)
    for piece in pieces:
        assert pytree.tree_structure(piece) == pytree.tree_structure(batch)
    for whole, *parts in zip(leaves(batch), *map(leaves, pieces), strict=True):
        if isinstance(whole, torch.Tensor) and whole.dim():
            assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
            assert torch.equal(torch.cat(parts), whole)
            assert all(part._base is not None or part is whole for part in parts)
            assert parts[0].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        else:
            assert all(part is whole for part in parts)
    for first, piece in zip(leaves(head(batch, size)), leaves(pieces[0]), strict=True):
        same = torch.equal(first, piece) if isinstance(first, torch.Tensor) else first is piece
        assert same


def test_gradients_flow_through_the_pieces():
    x = torch.ones(5, 2, requires_grad=True)
    sum((i + 1) * piece.sum() for i, piece in enumerate(split_batch(x, 2))).backward()
    assert x.grad[:, 0].tolist() == [1, 1, 2, 2, 3]


def test_head_of_a_smaller_batch_is_all_of_it():
    assert head([torch.arange(3)], 8)[0].tolist() == [0, 1, 2]


ROWS = torch.zeros(4, 3)
WRONG = {
    "no tensor": ({"a": 1}, 2, ValueError, "got a dict with no tensor with a leading"),
    "scalars": ((torch.tensor(1.0),), 2, ValueError, "got a tuple with no tensor with a leading"),
    "no cases": (torch.zeros(0, 3), 2, ValueError, "got a Tensor with no cases"),
    "lengths": (
        {"x": ROWS, "y": [torch.zeros(5)]},
        2,
        ValueError,
        "got shape (4, 3) for batch['x'] and (5,) for batch['y'][0]. Move what is not per",
    ),
    "zero": (ROWS, 0, ValueError, "size must be at least 1 case, got 0"),
    "negative": (ROWS, -1, ValueError, "size must be at least 1 case, got -1"),
    "fraction": (
        ROWS,
        2.0,
        TypeError,
        "size must be an int, the largest number of cases in a piece, got 2",
    ),
    "truth": (ROWS, True, TypeError, "size must be an int"),
    "unregistered": (
        (ROWS, Unregistered(ROWS)),
        2,
        TypeError,
        "got a Unregistered that holds tensors",
    ),
    "user dict": (
        collections.UserDict(x=ROWS),
        2,
        TypeError,
        "got a UserDict that holds tensors",
    ),
}


@pytest.mark.parametrize("cut", [split_batch, head])
@pytest.mark.parametrize("batch, size, error, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_named(cut, batch, size, error, message):
    with pytest.raises(error) as caught:
        cut(batch, size)
    assert message in str(caught.value)


def test_a_class_without_named_children_is_still_cut_and_named():
    class Box:
        def __init__(self, *inside):
            self.inside = inside

    pytree.register_pytree_node(Box, lambda box: (list(box.inside), None), lambda x, _: Box(*x))
    assert head(Box(ROWS, ROWS), 1).inside[1].shape == (1, 3)
    with pytest.raises(ValueError, match=r"\(5,\) for leaf 1 of the batch"):
        head(Box(ROWS, torch.zeros(5)), 1)
