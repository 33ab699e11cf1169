"""Parameters that ``fully_shard`` has cut over the ranks (FSDP2), as a vector of local entries.

Autograd sees other tensors than these, so that derivatives are not found by
``torch.autograd.grad``: they arrive in ``.grad``, averaged over ranks, from ``backward()``, which
may be run again and again on a kept graph.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_hf.capture.autograd_graph import reaches
from torch_hf.vector import ParameterVector


def is_fully_sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(p, module.DTensor)


def parameter_vector(params: Sequence[Tensor]) -> ParameterVector:
    """The vector of plain or of fully sharded parameters."""
    sharded = [is_fully_sharded(p) for p in params]
    if any(sharded) and not all(sharded):
        raise ValueError(
            "Either all parameters must be sharded (DTensor) or none, got some of each. Call "
            "fully_shard(model) on the whole model."
        )
    return FullyShardedVector(params) if any(sharded) else ParameterVector(params)


class FullyShardedVector(ParameterVector):
    """The entries that this rank holds of DTensor parameters, in order.

    Raises:
        ValueError: The parameters lie on several meshes, or on one that is neither of one dimension
            nor, for HSDP, of two: copies and parts.

    Attributes:
        copies: How many ranks hold the same entries (HSDP); 1 elsewhere.
    """

    sums = True

    def __init__(self, params: Sequence[Any]) -> None:
        with torch.no_grad():
            local = [p.to_local() for p in params]
        super().__init__(params, local)
        mesh = params[0].device_mesh
        if any(p.device_mesh != mesh for p in params) or not _is_of_data(mesh, params):
            raise ValueError(
                "Fully sharded parameters must be on one device mesh of one dimension, or of two "
                "over all ranks for HSDP, got other meshes. Call fully_shard(model, "
                'mesh=init_device_mesh("cuda", (ranks,))), or with a mesh of (copies, parts).'
            )
        self.group = mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD
        last = mesh.ndim - 1
        self.parts, self.part = mesh.size(last), mesh.get_local_rank(last)
        self.ranks, self.copies = mesh.size(), mesh.size() // self.parts
        self.checked = False

    def pull(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], retain_graph: bool
    ) -> list[Tensor | None]:
        """``J^T u`` summed over ranks, this rank's entries of it."""
        if not self.checked:
            self._check_graph(outputs)
        before = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        try:
            torch.autograd.backward(
                list(outputs),
                list(cotangents),
                retain_graph=retain_graph,
            )
            return [None if p.grad is None else self._summed(p) for p in self.params]
        finally:
            for p, g in zip(self.params, before, strict=True):
                p.grad = g

    def _check_graph(self, outputs: Sequence[Tensor]) -> None:
        """Under ``fully_shard`` autograd sees gathered copies, never the parameters themselves."""
        own = {id(p) for p in self.params}
        if reaches({z.grad_fn for z in outputs} - {None}, own):
            raise RuntimeError(
                "The loss must depend on DTensor parameters only through the forward of modules "
                "under fully_shard, got a direct dependence. Tensor parallelism, or a penalty on "
                "parameters in the closure, causes this. For an L2 penalty, use weight_decay."
            )
        self.checked = True

    def _summed(self, p: Any) -> Tensor:
        local: Tensor = p.grad.to_local()
        return local.mul_(self.ranks)  # fully_shard has divided by it

    def gradients(self, vector: Tensor) -> list[Tensor | None]:
        """A vector as gradients of the parameters: DTensors."""
        return [self.like(p, v) for p, v in zip(self.params, self.unflatten(vector), strict=True)]

    def pieces(self, vectors: Tensor) -> list[Tensor]:
        """Vectors by parameter, as DTensors (..., *shape)."""
        local = super().pieces(vectors)
        return [self.like(p, v) for p, v in zip(self.params, local, strict=True)]

    def joined(self, pieces: Sequence[Any]) -> Tensor:
        """The local entries of the vectors that have these pieces, sharded or whole."""
        lead = pieces[0].ndim - self.params[0].ndim
        local = [self._own(p, v, lead) for p, v in zip(self.params, pieces, strict=True)]
        shape = local[0].shape[:lead]
        return torch.cat([v.reshape(*shape, n) for v, n in zip(local, self.sizes, strict=True)], -1)

    def _own(self, p: Any, piece: Any, lead: int) -> Tensor:
        """This rank's entries of a piece (..., *shape), as ``fully_shard`` cuts the parameter."""
        if is_fully_sharded(piece):
            own: Tensor = piece.to_local()
        elif p.placements[-1].is_shard():
            dim = p.placements[-1].dim + lead
            parts = piece.chunk(self.parts, dim)
            none = piece.narrow(dim, 0, 0)
            own = (*parts, *[none] * (self.parts - len(parts)))[self.part]
        else:
            own = piece
        if own.shape[lead:] != p.to_local().shape:
            raise ValueError(
                "The state's vectors must be whole, or sharded over the same number of ranks as "
                "here, got another sharding. Save whole tensors: full_tensor(), or "
                "StateDictOptions(full_state_dict=True)."
            )
        return own

    def like(self, p: Any, local: Tensor) -> Tensor:
        """Local entries (..., *local shape) as a DTensor sharded as the parameter is."""
        tensor, placement = sys.modules["torch.distributed.tensor"], p.placements[-1]
        lead = local.ndim - p.ndim
        shape = torch.Size([*local.shape[:lead], *p.shape])
        if placement.is_shard():
            placement = tensor.Shard(placement.dim + lead)
        stride = torch.empty(shape, device="meta").stride()
        whole: Tensor = tensor.DTensor.from_local(
            local.contiguous(),
            p.device_mesh,
            [*p.placements[:-1], placement],
            shape=shape,
            stride=stride,
        )
        return whole

    @contextmanager
    def lent(self, values: Sequence[Tensor]) -> Iterator[None]:
        """The parameters hold other values inside."""
        saved = self.keep()
        try:
            self._place(values)
            yield
        finally:
            self._place(saved)

    @torch.no_grad()
    def _place(self, values: Sequence[Tensor]) -> None:
        for t, value in zip(self.local, values, strict=True):
            t.copy_(value)
        self.changed()

    def changed(self) -> None:
        """Modules that still hold gathered parameters let them go."""
        for module in self.modules:
            reshard = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()


def _is_of_data(mesh: Any, params: Sequence[Any]) -> bool:
    """Whether a mesh is that of ``fully_shard``: parts, or copies of parts over all ranks."""
    if mesh.ndim == 1:
        return True
    if mesh.ndim != 2 or mesh.size() != dist.get_world_size():
        return False
    return all(p.placements[0].is_replicate() for p in params)
