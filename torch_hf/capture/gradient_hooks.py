"""Hooks on the gradients of parameters: masks are kept, everything else is refused.

A step evaluates the loss, so a gradient that is not the loss's, clipped or scaled, leads nowhere.
A hook that sets entries to 0, the same ones for every gradient, means that they are to stay. This
holds to the bit if no vector of the step has anything there, whatever the preconditioner, weight
decay, the last step's solution and older pairs may bring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_hf import _messages

#: Sizes of the gradients that hooks are shown: exact in every format, and what clips shows.
SIZES = (2.0**-10, 2.0**14)


def free_entries(params: Sequence[Tensor]) -> list[Tensor] | None:
    """What hooks leave of gradients, by parameter: 1 where entries may move, 0 where they stay.

    None where there is no hook that changes anything.

    Raises:
        RuntimeError: A hook does something else to gradients, or wants them in ``.grad``.
    """
    for i, p in enumerate(params):
        if any(not _is_of_torch(h) for h in _hooks(p, "_post_accumulate_grad_hooks")):
            raise RuntimeError(_messages.POST_ACCUMULATE_HOOK.format(_name(i, p)))
    if not any(_hooks(p, "_backward_hooks") for p in params):
        return None
    found = [_free(i, p) for i, p in enumerate(params)]
    return found if any(not bool(f.all()) for f in found) else None


def _free(i: int, p: Tensor) -> Tensor:
    hooks = _hooks(p, "_backward_hooks")
    free = torch.ones_like(p)
    if not hooks:
        return free
    kept = []
    for size in SIZES:
        shown = torch.full_like(p, size)
        shown.view(-1)[1::2] *= -1
        left = shown.clone()
        for hook in hooks:
            changed = hook(left)
            left = left if changed is None else changed
        kept.append(left != 0)
        if not bool(((left == shown) | (left == 0)).all()):
            raise RuntimeError(_messages.HOOK_CHANGES.format(_name(i, p)))
    if not torch.equal(*kept):
        raise RuntimeError(_messages.HOOK_CHANGES.format(_name(i, p)))
    return kept[0].to(p.dtype)


def _hooks(p: Tensor, kind: str) -> list[Callable[[Tensor], Any]]:
    return list((getattr(p, kind, None) or {}).values())


def _is_of_torch(hook: Any) -> bool:
    """Not a user's: of ``DistributedDataParallel``, say."""
    module = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return module.split(".")[0] == "torch"


def _name(i: int, p: Tensor) -> str:
    return f"parameter {i} of shape {tuple(p.shape)}"


def watched(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """A hook on a tensor inside the closure, which may look at gradients and not change them."""

    def looks(gradient: Tensor) -> Any:
        before = gradient.detach().clone()
        changed = hook(gradient)
        _refuse_change(before, gradient if changed is None else changed)
        return changed

    return looks


def hooked(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules with backward hooks of a user's own."""
    return [m for m in modules if any(not _is_of_torch(h) for h in _of_module(m))]


@contextmanager
def modules_watched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, backward hooks of modules may look at gradients and not change them."""
    tables = [table for m in modules for table in _tables(m)]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            table.update({key: _watched_of_module(hook) for key, hook in table.items()})
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.update(hooks)


def _watched_of_module(hook: Callable[..., Any]) -> Callable[..., Any]:
    def looks(module: nn.Module, *gradients: Any) -> Any:
        changed = hook(module, *gradients)
        given = gradients[0] if isinstance(gradients[0], tuple) else (gradients[0],)
        taken = changed if isinstance(changed, tuple) else (changed,)
        for before, after in zip(given, taken, strict=False):
            if before is not None and after is not None:
                _refuse_change(before, after)
        return changed

    return looks


def _of_module(module: nn.Module) -> list[Any]:
    return [hook for table in _tables(module) for hook in table.values()]


def _tables(module: nn.Module) -> list[dict[int, Any]]:
    found = [getattr(module, name, None) for name in ("_backward_hooks", "_backward_pre_hooks")]
    return [table for table in found if isinstance(table, dict)]  # TorchScript has none


def _refuse_change(before: Tensor, after: Tensor) -> None:
    same = (after == before) | ((after != after) & (before != before))
    if not bool(same.all()):
        raise RuntimeError(_messages.HOOK_INSIDE)
