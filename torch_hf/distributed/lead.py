"""Algorithms that the first rank runs for all: their branches are taken once.

An exact solve or a quasi-Newton iteration branches on numbers at every turn. If each rank ran it,
a last bit that differs on other hardware would send the ranks different ways, and the next
collective would never end. So the first rank alone runs the algorithm and holds its matrices. The
functions of a vector that it calls are computed by all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_hf.distributed.reducer import Reducer

T = TypeVar("T")
#: What the first rank tells the others, beside the number of a function.
DONE, FAILED = -1, -2
#: Types of vectors, by their place.
DTYPES = (torch.float32, torch.float64)

#: Of a vector, a result that is used on the first rank.
Function = Callable[[Tensor], Any]


def lead(
    reducer: Reducer, functions: Sequence[Function], algorithm: Callable[..., T], size: int
) -> T | None:
    """What ``algorithm(*functions)`` returns on the first rank, and None on the others.

    Args:
        reducer: Of the ranks; alone, the algorithm is called as it is.
        functions: Each takes one vector and may use collectives; what it raises, all ranks raise.
        algorithm: Called on the first rank.
        size: Of the longest vector that it passes on.

    Raises:
        PeerError: The algorithm failed on the first rank, which raises its own error.

    Example:
        >>> lead(Reducer(None, torch.device("cpu")), [torch.sum], lambda f: f(torch.ones(3)), 3)
        tensor(3.)
    """
    if reducer.group is None:
        return algorithm(*functions)
    if reducer.rank:
        _follow(reducer, functions, size)
        return None
    leader = _Leader(reducer, functions)
    try:
        found = algorithm(*leader.functions())
    except BaseException as error:
        if not leader.in_call:  # the others wait for a word
            reducer.failure = error
            leader.say(FAILED)
            reducer.numbers([])
        raise
    leader.say(DONE)
    return found


class _Leader:
    """The first rank's side.

    Attributes:
        in_call: Whether a function is being computed by all ranks, or has raised on all.
    """

    def __init__(self, reducer: Reducer, functions: Sequence[Function]) -> None:
        self.reducer, self.own = reducer, functions
        self.in_call = False

    def functions(self) -> list[Function]:
        return [partial(self._call, i) for i in range(len(self.own))]

    def say(self, command: int, numel: int = 0, dtype: int = 0) -> None:
        device = self.reducer.device
        self.reducer.agreed(torch.tensor([command, numel, dtype], device=device))

    def _call(self, i: int, v: Tensor) -> Any:
        self.in_call = True
        self.say(i, v.numel(), DTYPES.index(v.dtype))
        self.reducer.agreed(v.detach())
        found = self.own[i](v)
        self.in_call = False
        return found


def _follow(reducer: Reducer, functions: Sequence[Function], size: int) -> None:
    """Computes what the first rank asks for, until it has done."""
    header = torch.zeros(3, dtype=torch.long, device=reducer.device)
    room = {}
    while True:
        command, numel, kind = reducer.agreed(header).tolist()
        if command == DONE:
            return
        if command == FAILED:
            reducer.numbers([])  # raises, with the first rank's reason
        if kind not in room:
            room[kind] = torch.zeros(size, dtype=DTYPES[kind], device=reducer.device)
        v = room[kind][:numel] if numel <= size else room[kind].new_zeros(numel)
        functions[command](reducer.agreed(v))
