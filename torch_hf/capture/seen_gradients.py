"""What a closure sees in ``.grad`` while ``backward()`` is held back, and what it does to it.

Each ``.grad`` is read as a stand-in that has no memory of its own. Before ``backward()`` it shows
the gradient from outside of the closure, and an edit is made on a copy. After it, it can be cleared
and asked whether it is there, but has no values. So a closure that clears its gradients is told by
what became of them, in whichever way it did so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_hf import _messages
from torch_hf.capture.autograd_graph import leaf_uses

_CLEARING = {torch.ops.aten.zero_.default, torch.ops.aten._foreach_zero_.default}
_OVERWRITING = {
    torch.ops.aten.fill_.Scalar,
    torch.ops.aten.fill_.Tensor,
    torch.ops.aten.copy_.default,
}


class SeenGradients:
    """The gradients of parameters as one run of a closure sees them.

    Args:
        params: What they hold in ``.grad`` at this moment comes from outside of the closure.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = {id(p): p for p in params}
        self.outside = {id(p): p.grad for p in params}
        self.seen: dict[int, Tensor | None] = {}  # what was read or written
        self.held: list[Tensor] = []  # what backward() was called on since the last look

    def read(self, p: Tensor) -> Tensor | None:
        """``p.grad``."""
        self.look()
        gradient = self.outside[id(p)]
        if id(p) not in self.seen:
            self.seen[id(p)] = None if gradient is None else StandIn(Content(self, gradient, True))
        return self.seen[id(p)]

    def write(self, p: Tensor, value: Tensor | None) -> None:
        """``p.grad = value``."""
        self.look()
        self.seen[id(p)] = value

    def look(self) -> None:
        """Lets ``backward()`` arrive, as far as it was held back since the last look."""
        held, self.held = self.held, []
        if not held:
            return
        reached = leaf_uses(held).keys() & self.params.keys()
        for key in reached or self.params.keys():  # nothing is known of those of fully_shard
            before = self.read(self.params[key])
            if not isinstance(before, StandIn):  # there was none, or one that the closure made
                like = self.params[key] if before is None else before
                before = self.seen[key] = StandIn(Content(self, like, False))
            before.content.held_back = True

    def uncleared(self) -> list[Tensor]:
        """The gradients from outside that are still where they were."""
        left = []
        for key, gradient in self.outside.items():
            seen = self.seen.get(key, gradient)
            kept = seen.content.has_outside() if isinstance(seen, StandIn) else seen is gradient
            if gradient is not None and kept:
                left.append(gradient)
        return left


class Content:
    """What one ``.grad`` holds, for all its stand-ins."""

    def __init__(self, owner: SeenGradients, tensor: Tensor, outside: bool) -> None:
        self.owner = ref(owner)  # a closure may keep the stand-in
        self.like = tensor
        self.tensor: Tensor | None = tensor  # None for zeros that nobody has read
        self.outside = outside  # whether a gradient from outside is part of it
        self.copied = False
        self.held_back = False

    def clear(self) -> None:
        """Zeros from here on."""
        self._look()
        self.tensor, self.outside, self.held_back = None, False, False

    def read(self, edit: bool = False) -> Tensor:
        """The values, those from outside as a copy if they may be edited."""
        self._look()
        if self.held_back:
            raise RuntimeError(_messages.HELD_BACK)
        if self.tensor is None:
            self.tensor, self.copied = torch.zeros_like(self.like), True
        elif edit and not self.copied:
            self.tensor, self.copied = self.tensor.clone(), True
        return self.tensor

    def _look(self) -> None:
        owner = self.owner()
        if owner is not None:
            owner.look()

    def has_outside(self) -> bool:
        """Whether more than zeros are left of a gradient from outside."""
        if not self.outside or self.tensor is None:
            return False
        return not self.copied or bool(torch.any(self.tensor))


class StandIn(Tensor):
    """A gradient without memory: every operation on it is one on its :class:`Content`."""

    content: Content
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, content: Content) -> StandIn:  # noqa: D102
        like = content.like
        made: StandIn = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride() if like.layout == torch.strided else None,
            dtype=like.dtype,
            device=like.device,
            layout=like.layout,
        )
        return made

    def __init__(self, content: Content) -> None:
        self.content = content

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        first: Any = args[0] if args else None
        if func is torch.ops.aten.detach.default:
            return cls(first.content)  # as x.data: shares what it holds
        if func in _CLEARING:
            for t in first if isinstance(first, (list, tuple)) else [first]:
                t.content.clear() if isinstance(t, StandIn) else t.zero_()
            return first if isinstance(first, Tensor) else None
        # a view, which shares memory with it, may be edited too
        edits = any(argument.alias_info is not None for argument in func._schema.arguments)
        rest = tree_map_only(StandIn, lambda s: s.content.read(edits), (args[1:], kwargs or {}))
        if func in _OVERWRITING and isinstance(first, StandIn):
            first.content.clear()
        first = tree_map_only(StandIn, lambda s: s.content.read(edits), first)
        result = func(*([first] if args else []), *rest[0], **rest[1])
        return args[0] if result is first else result

    def numpy(self, *, force: bool = False) -> Any:
        """The values as an array."""
        return self.content.read(edit=True).numpy(force=force)

    def tolist(self) -> Any:
        """The values as numbers."""
        return self.content.read().tolist()

    def __deepcopy__(self, memo: Any) -> Tensor:
        """A copy of the values."""
        return self.content.read().clone()
