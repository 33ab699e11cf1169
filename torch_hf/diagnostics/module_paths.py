"""Which module each node of autograd's graph was made in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from torch_hf.capture.autograd_graph import under
from torch_hf.objective.replay import Hooks, untraced


class Owners:
    """Nodes of the graph and the innermost module that each was made in."""

    def __init__(self) -> None:
        self.stack: list[nn.Module] = []
        self.owner: dict[Any, tuple[nn.Module, nn.Module]] = {}  # node -> root, module

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """Before a module's forward: what its inputs come from is not its own."""
        if not self.stack:
            self._claim(inputs, None)
        else:
            self._claim(inputs, (self.stack[0], self.stack[-1]))
        self.stack.append(module)

    def leave(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """After it: what is new in its outputs' graph is its own."""
        self._claim(outputs, (self.stack[0], module))
        while self.stack and self.stack.pop() is not module:
            pass  # a module that raised inside has not left

    def path(self, node: Any) -> str:
        """Path and class of the module; empty for what ran outside of any."""
        found = self.owner.get(node)
        if found is None:
            return ""
        root, module = found
        name = next((n for n, m in root.named_modules() if m is module), "")
        inside = f".{name} ({type(module).__name__})" if name else ""
        return type(root).__name__ + inside

    def _claim(self, tensors: Any, owner: Any) -> None:
        ends = {t.grad_fn for t in tree_leaves(tensors) if isinstance(t, Tensor)} - {None}
        new = [node for node in ends if node not in self.owner]
        for node in under(new, closed=self.owner):
            self.owner[node] = owner


@contextmanager
def attributed(hooks: Hooks) -> Iterator[Owners]:
    """Modules that run inside tell which nodes they make."""
    owners = Owners()
    enter, leave = untraced(owners.enter), untraced(owners.leave)
    with hooks.on(
        lambda: register_module_forward_pre_hook(enter),
        lambda: register_module_forward_hook(leave),
    ):
        yield owners
