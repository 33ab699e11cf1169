"""Checkpoints of a state that is cut over ranks, to which each rank writes its own part."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_hf.distributed import Sharded
from torch_hf.distributed.sharded_files import Content, read, write
from torch_hf.optimizer.base import FlatStateOptimizer
from torch_hf.optimizer.state_dict import Unpacked
from torch_hf.vector import ParameterVector

_PREFIX = "preconditioner."


def save_sharded(optimizer: FlatStateOptimizer, path: str | os.PathLike[str]) -> None:
    """Writes the state of an optimizer made with ``shard_state=True``, each rank its own part.

    Every rank calls it. No vector is gathered: a rank writes the 1/N that it holds, through
    ``torch.distributed.checkpoint``. The model's parameters are whole on each rank and are not
    part of it.

    Args:
        optimizer: An :class:`~torch_hf.HFOptimizer`.
        path: A folder that all ranks see; it is made if need be.

    Raises:
        RuntimeError: The state is not cut over ranks.

    Example:
        >>> import torch, torch_hf
        >>> optimizer = torch_hf.HFOptimizer([torch.nn.Parameter(torch.ones(2))])
        >>> torch_hf.save_sharded(optimizer, "checkpoint")
        Traceback (most recent call last):
        ...
        RuntimeError: save_sharded needs an optimizer made with shard_state=True on several ranks...
    """
    vector, space = _sharded(optimizer, "save_sharded")
    entries = {k: v for k, v in optimizer._kept(vector, space).items() if v is not None}
    own = {_PREFIX + k: v for k, v in optimizer.preconditioner.state_dict().items()}
    cut, whole, rest = {}, {}, {}
    for key, value in {**entries, **own}.items():
        if not isinstance(value, Tensor):
            rest[key] = value
        elif value.ndim and value.shape[-1] == space.length:
            cut[key] = value
        else:
            whole[key] = value
    told = {
        "entries": rest,
        "sizes": list(vector.sizes),
        "counts": [len(g["params"]) for g in optimizer.param_groups],
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "progress": dict(optimizer._progress._asdict()),
    }
    write(Path(path), Content(cut, whole, told), space)


def load_sharded(optimizer: FlatStateOptimizer, path: str | os.PathLike[str]) -> None:
    """Takes a state that :func:`save_sharded` wrote, each rank what it will hold.

    Every rank calls it; there may be more or fewer of them than when it was written.

    Args:
        optimizer: Made with ``shard_state=True``, from the same parameters, with the same options.
        path: The folder.

    Raises:
        RuntimeError: The state is not cut over ranks.
        ValueError: It was written for other parameters or options; the optimizer is as it was.
    """
    vector, space = _sharded(optimizer, "load_sharded")
    content = read(Path(path), space, vector.zeros())
    told = content.rest
    if list(told["sizes"]) != list(vector.sizes):
        raise ValueError(
            f"The state in {os.fspath(path)} must hold parameters of {list(vector.sizes)} numbers, "
            f"got {told['sizes']}. Load it into an optimizer of the parameters that it was saved "
            "with."
        )
    entries = {**content.cut, **content.whole, **told["entries"]}
    own = {k.removeprefix(_PREFIX): v for k, v in entries.items() if k.startswith(_PREFIX)}
    if check := getattr(optimizer.preconditioner, "check_state", None):
        check(own, _PREFIX, vector.sizes, space.length)
    optimizer.load_state_dict(_without_vectors(told))
    start = entries.get("cg_iterate")
    optimizer._take(Unpacked(start, None, None, own, optimizer._progress), vector)


def _sharded(optimizer: FlatStateOptimizer, name: str) -> tuple[ParameterVector, Sharded]:
    vector = optimizer._vector()
    _, space = optimizer._space(vector)
    if not isinstance(space, Sharded):
        raise RuntimeError(
            f"{name} needs an optimizer made with shard_state=True on several ranks, whose state "
            "is cut over them. Save optimizer.state_dict() otherwise."
        )
    return vector, space


def _without_vectors(told: Mapping[str, Any]) -> dict[str, Any]:
    """Options and numbers as a state that every version loads."""
    first, groups = 0, []
    for count, options in zip(told["counts"], told["groups"], strict=True):
        groups.append({**options, "params": list(range(first, first + count))})
        first += count
    return {"state": {0: dict(told["progress"])}, "param_groups": groups}
