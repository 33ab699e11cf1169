"""Files to which each rank writes the part of flat vectors that it holds; nothing is gathered.

Vectors cut over the ranks are told to ``torch.distributed.checkpoint`` as DTensors, flat, over the
ranks of the group. It writes each rank's part, and reads those that another number of ranks holds.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_hf.distributed.vector_space import Sharded

#: Names of the entries: what is cut, what is not, and what is no tensor, as the bytes of a file.
_CUT, _WHOLE, _REST = "cut", "whole", "rest"


class Content(NamedTuple):
    """What such files hold.

    Attributes:
        cut: Of shape (..., length): what this rank holds of vectors (..., P).
        whole: Tensors that are the same on all ranks.
        rest: Numbers, strings, lists and dicts, the same on all ranks.
    """

    cut: dict[str, Tensor]
    whole: dict[str, Tensor]
    rest: Any


def write(path: Path, content: Content, space: Sharded) -> None:
    """Writes each rank's part; all ranks call it."""
    from torch.distributed.checkpoint.state_dict_saver import save

    cut = {key: _as_dtensor(value, space) for key, value in content.cut.items()}
    file = io.BytesIO()
    torch.save(content.rest, file)
    rest = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    state = {_CUT: cut, _WHOLE: content.whole, _REST: rest}
    save(state, checkpoint_id=path, process_group=space.reducer.group)


def read(path: Path, space: Sharded, like: Tensor) -> Content:
    """Reads what this rank will hold; all ranks call it.

    Args:
        path: The folder.
        space: Of this run, whose ranks may be more or fewer than those that wrote.
        like: A tensor on the device of the vectors.

    Raises:
        ValueError: The vectors are of another length.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(path)
    places: dict[str, Any] = {_CUT: {}, _WHOLE: {}}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        kind, _, key = name.partition(".")
        if not isinstance(about, TensorStorageMetadata):
            continue
        shape, dtype = tuple(about.size), about.properties.dtype
        if kind == _CUT:
            if shape[-1] != space.numel:
                raise ValueError(
                    f"The state's entry {key!r} must have {space.numel} numbers in a row, as many "
                    f"as the parameters, got {shape[-1]}. Load it into an optimizer of the "
                    "parameters that it was saved with."
                )
            empty = like.new_empty(*shape[:-1], space.length, dtype=dtype)
            places[_CUT][key] = _as_dtensor(empty, space)
        elif kind == _WHOLE:
            places[_WHOLE][key] = like.new_empty(shape, dtype=dtype)
        else:
            places[_REST] = torch.empty(shape, dtype=dtype)
    load(places, storage_reader=reader, process_group=space.reducer.group)
    rest = torch.load(io.BytesIO(bytes(places[_REST].tolist())), weights_only=True)
    cut = {key: _own_part(value, space) for key, value in places[_CUT].items()}
    return Content(cut, places[_WHOLE], rest)


def _as_dtensor(part: Tensor, space: Sharded) -> Any:
    """This rank's part of vectors (..., P), told as what it is a part of."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(space.reducer.group, part.device.type)
    held = min(space.start + space.length, space.numel) - space.start
    shape = torch.Size([*part.shape[:-1], space.numel])
    stride = torch.empty(shape, device="meta").stride()
    local = part[..., :held].contiguous()
    return DTensor.from_local(local, mesh, [Shard(len(shape) - 1)], shape=shape, stride=stride)


def _own_part(value: Any, space: Sharded) -> Tensor:
    local: Tensor = value.to_local()
    own = local.new_zeros(*local.shape[:-1], space.length)
    own[..., : local.shape[-1]] = local
    return own
