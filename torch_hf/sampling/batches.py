"""Cutting a batch of any nested structure along its cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.utils import _pytree as pytree

Batch = TypeVar("Batch")


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """Cut ``batch`` into pieces of at most ``size`` cases, in order.

    Every tensor is cut along dimension 0, without a copy; 0-dimensional tensors
    and everything that is no tensor are repeated in each piece. Tuples, lists,
    dicts, named tuples and classes registered with ``torch.utils._pytree`` (for
    a dataclass: ``register_dataclass``) are structure and come back as they
    were. A list is therefore never cut, not even a list of strings with one
    entry per case: turn such an entry into a tensor, or leave it out.

    Args:
        batch: What a data loader yields: a tensor, or tensors in such
            structures, all with the same leading dimension ``N >= 1``.
        size: Most cases in a piece, at least 1.

    Returns:
        ``ceil(N / size)`` batches; only the last may hold fewer than ``size``.

    Raises:
        TypeError: If ``size`` is no int, or tensors hide in an object whose
            structure is not known.
        ValueError: If ``size < 1``, if no tensor has a leading dimension, if two
            of them differ, or if there are no cases.

    Example:
        >>> import torch
        >>> pieces = split_batch({"x": torch.arange(5), "task": "sum"}, 2)
        >>> pieces[-1], len(pieces)
        ({'x': tensor([4]), 'task': 'sum'}, 3)
    """
    leaves, spec, cases = _open(batch, size)
    return [_cut(leaves, spec, start, start + size) for start in range(0, cases, size)]


def head(batch: Batch, size: int) -> Batch:
    """Return the first ``size`` cases of ``batch``, or all where it holds fewer.

    Args:
        batch: As in :func:`split_batch`.
        size: Cases to keep, at least 1.

    Returns:
        A batch of the same structure; its tensors are views.

    Raises:
        TypeError: As in :func:`split_batch`.
        ValueError: As in :func:`split_batch`.

    Example:
        >>> import torch
        >>> head((torch.zeros(8, 3), torch.arange(8)), 2)[1]
        tensor([0, 1])
    """
    leaves, spec, _ = _open(batch, size)
    return cast(Batch, _cut(leaves, spec, 0, size))


def _open(batch: Batch, size: int) -> tuple[list[Any], pytree.TreeSpec, int]:
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(
            f"size must be an int, the largest number of cases in a piece, got {size!r}."
        )
    if size < 1:
        raise ValueError(f"size must be at least 1 case, got {size}.")
    leaves, spec = pytree.tree_flatten(batch)
    cases, first = None, 0
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            _refuse_hidden_tensors(batch, index, leaf)
        elif leaf.dim() and cases is None:
            cases, first = len(leaf), index
        elif leaf.dim() and len(leaf) != cases:
            raise ValueError(
                "All tensors of a batch must have the same leading dimension (the cases), got "
                f"shape {tuple(leaves[first].shape)} for {_where(batch, first)} and "
                f"{tuple(leaf.shape)} for {_where(batch, index)}. Move what is not per case out of "
                "the batch, or give it a leading dimension of cases."
            )
    if not cases:
        what = "no cases" if cases == 0 else "no tensor with a leading dimension of cases"
        raise ValueError(
            "The batch must hold a tensor with a leading dimension of cases, got a "
            f"{type(batch).__name__} with {what}. Pass a tensor, or tuples, lists and dicts of "
            "tensors."
        )
    return leaves, spec, cases


def _cut(leaves: list[Any], spec: pytree.TreeSpec, start: int, stop: int) -> Any:
    pieces = [x[start:stop] if isinstance(x, Tensor) and x.dim() else x for x in leaves]
    return pytree.tree_unflatten(pieces, spec)


def _refuse_hidden_tensors(batch: Any, index: int, leaf: Any) -> None:
    children = leaf if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {})
    if any(isinstance(child, Tensor) for child in dict(children).values()):
        raise TypeError(
            f"{_where(batch, index)} must be a tensor or a container that torch.utils._pytree "
            f"knows, got a {type(leaf).__name__} that holds tensors, which would not be cut. Make "
            "it a dict, or register the class (register_dataclass for a dataclass)."
        )


def _where(batch: Any, index: int) -> str:
    try:
        path = pytree.tree_flatten_with_path(batch)[0][index][0]
    except ValueError:  # a registered class that does not name its children
        return f"leaf {index} of the batch"
    return "batch" + pytree.keystr(path)
