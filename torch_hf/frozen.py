"""The world a closure runs in, frozen: random generators and module buffers.

Within a step every evaluation of the closure sees the same noise, and running
statistics count the batch once. Buffers are found by a forward hook common to all
modules, so that the optimizer need not know the model.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class RandomState:
    """The state of torch's, NumPy's and Python's global generators at one moment."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.python = random.getstate()
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        numpy = sys.modules.get("numpy")
        self.numpy: Any = numpy.random.get_state() if numpy else None

    def restore(self) -> None:
        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


class Buffers:
    """The buffers of every module that ran, as they were before it ran first."""

    def __init__(self) -> None:
        self.seen: set[nn.Module] = set()
        self.saved: list[tuple[nn.Module, str, Tensor, Tensor, int]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        handle = register_module_forward_pre_hook(self._remember)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def restore(self) -> None:
        for module, name, tensor, copy, version in self.saved:
            if tensor._version != version:
                tensor.copy_(copy)
            if module._buffers.get(name) is not tensor:
                module._buffers[name] = tensor

    def _remember(self, module: nn.Module, inputs: Any) -> None:
        if module in self.seen:
            return
        for part in module.modules():  # a method of a child may run without its own forward
            if part not in self.seen:
                self.seen.add(part)
                for name, buffer in part._buffers.items():
                    if buffer is not None:
                        copy = buffer.detach().clone()
                        self.saved.append((part, name, buffer, copy, buffer._version))


class FrozenWorld:
    """Runs a closure again and again in the world that its first run saw.

    The first run goes on as it would anyway and leaves its marks: generators move
    on, running statistics count the batch. Every later run starts from the same
    noise, and what it changes is put back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = RandomState(device)
        self.after = self.before
        self.marks = [self.before]
        self.buffers = Buffers()

    @contextmanager
    def first_run(self) -> Iterator[None]:
        with self.buffers.watched():
            yield
        self.after = RandomState(self.device)

    def mark(self) -> None:
        """Between two batches of the first run: the next one's noise begins here."""
        self.marks.append(RandomState(self.device))

    @contextmanager
    def rerun(self, batch: int = 0) -> Iterator[None]:
        marks = Buffers()
        self.marks[min(batch, len(self.marks) - 1)].restore()
        try:
            with marks.watched():
                yield
        finally:
            marks.restore()
            self.after.restore()

    def undo(self) -> None:
        """As if no run had been: for a step that fails."""
        self.buffers.restore()
        self.before.restore()

