"""Replay: every run of the closure in a step sees the same noise and the same buffers.

Within a step every evaluation of the closure sees the same noise, and running
statistics count the batch once. Buffers are found by a forward hook common to all
modules, so that the optimizer need not know the model.

Two optimizers may step in two threads: each looks at the modules of its own thread, and at
those of other threads that hold its parameters (a closure may have workers). The global random
generators belong to the process, and a step rewinds them for all threads.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook


class RandomState:
    """The state of Python's, NumPy's and torch's global generators, those of all devices.

    A device's generator is read where its library has been set up; reading sets up none.
    """

    def __init__(self, device: torch.device) -> None:
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy: Any = numpy.random.get_state() if numpy else None
        self.torch = torch.get_rng_state()
        self.devices = [(one, _library(one).get_rng_state(one)) for one in _devices(device)]

    def restore(self) -> None:
        """Puts the state back."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for device, state in self.devices:
            _library(device).set_rng_state(state, device)


def _devices(device: torch.device) -> list[torch.device]:
    """Those that the closure may draw on: every one in use beside the parameters' own."""
    found = [
        torch.device(kind, i)
        for kind in ("cuda", "xpu")
        if getattr(torch, kind).is_initialized()
        for i in range(getattr(torch, kind).device_count())
    ]
    known = {"cpu", "meta"} | {one.type for one in found}
    draws = device.type not in known and hasattr(_library(device), "get_rng_state")
    return [*found, device] if draws else found


def _library(device: torch.device) -> Any:
    """``torch.cuda``, ``torch.mps`` and the like."""
    return getattr(torch, device.type, None)


class Saved(NamedTuple):
    """A module's buffer and a copy of its values at one moment."""

    module: nn.Module
    name: str
    buffer: Tensor | None
    copy: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Saved:
        """A module's buffer as it is now."""
        buffer = _buffer(module, name)
        return cls(module, name, buffer, None if buffer is None else buffer.detach().clone())

    def restore(self) -> None:
        """Puts the state back."""
        if self.buffer is not None and self.copy is not None and _is_writable(self.buffer):
            # Batch norm does not count its edits as versions, and a kept graph that saw them
            # must not learn of this one either.
            self.buffer.data.copy_(self.copy)
        if _buffer(self.module, self.name) is not self.buffer and not _is_scripted(self.module):
            self.module._buffers[self.name] = self.buffer


class Hooks:
    """Hooks common to all modules: taken off where their use ends, for certain where a step does.

    An interrupt may arrive while they are put on or taken off, so that it must be possible to take
    them off again later.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []

    @contextmanager
    def on(self, *registrations: Callable[[], Any]) -> Iterator[None]:
        """Puts hooks on inside, each by a call that returns its handle."""
        before = len(self._handles)
        try:
            for register in registrations:
                self._handles.append(register())
            yield
        finally:
            self.remove(before)

    def remove(self, left: int = 0) -> None:
        """Takes off all but the first few."""
        while len(self._handles) > left:
            self._handles[-1].remove()
            self._handles.pop()


class Buffers:
    """The buffers of every module that ran, as they were before it ran first.

    Args:
        params: Of the optimizer whose closure runs.
        hooks: Puts on the hook that looks at modules.
    """

    def __init__(self, params: Iterable[Tensor] = (), hooks: Hooks | None = None) -> None:
        self.hooks = hooks or Hooks()
        self.thread = threading.get_ident()
        self.params = {id(p) for p in params}
        self.seen: set[nn.Module] = set()
        self.before: list[Saved] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Remembers the buffers of modules that run inside."""
        hook = untraced(self._remember)
        with self.hooks.on(lambda: register_module_forward_pre_hook(hook)):
            yield

    def now(self) -> list[Saved]:
        """The same buffers as they are now."""
        return [Saved.of(s.module, s.name) for s in self.before]

    def _remember(self, module: nn.Module, inputs: Any) -> None:
        if module in self.seen or not self._is_ours(module):
            return
        for part in module.modules():  # a method of a child may run without its own forward
            if part not in self.seen:
                self.seen.add(part)
                self.before.extend(Saved.of(part, name) for name in part._buffers.keys())  # noqa: SIM118

    def _is_ours(self, module: nn.Module) -> bool:
        """Not of another training that goes on in another thread."""
        return threading.get_ident() == self.thread or any(
            id(p) in self.params for p in module.parameters()
        )


def _buffer(module: nn.Module, name: str) -> Tensor | None:
    """A buffer by name; what a scripted module keeps them in is no dict."""
    buffers: Any = module._buffers
    found: Tensor | None = buffers[name] if _is_scripted(module) else buffers.get(name)
    return found


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def untraced(hook: Any) -> Any:
    """A hook that a compiled module, should one run, does not trace."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return hook


class Replay:
    """Runs a closure again with the random numbers and the buffers that its first run saw.

    The first run has its usual effects: generators advance, running statistics count the batch.
    Every later run starts from the same noise and the same buffers, and what it changes is
    undone.

    Args:
        device: The parameters'.
        params: The optimizer's parameters.
    """

    def __init__(self, device: torch.device, params: Iterable[Tensor] = ()) -> None:
        self.device = device
        self.autocast = torch.is_autocast_enabled(device.type)
        self.autocast_dtype = torch.get_autocast_dtype(device.type)
        self.before = RandomState(device)
        self.after = self.before
        self.marks = [self.before]
        self.hooks = Hooks()
        self.buffers = Buffers(params, self.hooks)
        self.buffers_after: list[Saved] = []

    @contextmanager
    def first_run(self) -> Iterator[None]:
        """Around the runs that count."""
        self.marks = [RandomState(self.device)]  # reading the batches may have drawn numbers
        with self.buffers.watched():
            yield
        self.after = RandomState(self.device)
        self.buffers_after = self.buffers.now()

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Around a step: full precision, and attention that can be differentiated twice."""
        with (
            torch.autocast(self.device.type, enabled=False),
            sdpa_kernel(SDPBackend.MATH),  # the fused kernels have no double backward
        ):
            yield

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Around a run of the closure: autocast as its caller has it."""
        torch.clear_autocast_cache()  # of cast weights: it does not see that trial values came
        with torch.autocast(
            self.device.type, dtype=self.autocast_dtype, enabled=self.autocast, cache_enabled=False
        ):
            yield

    def mark(self) -> None:
        """Between two batches of the first run: the next one's noise begins here."""
        self.marks.append(RandomState(self.device))

    @contextmanager
    def rerun(self, batch: int = 0) -> Iterator[None]:
        """Around a run that leaves no mark, with the noise that this batch saw first."""
        self.marks[min(batch, len(self.marks) - 1)].restore()
        try:
            _restore(self.buffers.before)
            with self.buffers.watched():
                yield
        finally:
            _restore(self.buffers.before)
            _restore(self.buffers_after)
            self.after.restore()

    def settle(self, counts: bool) -> None:
        """After a step: what the first run drew is drawn; its statistics, if the loss counts."""
        if not counts:
            _restore(self.buffers.before)
        self.after.restore()

    def undo(self) -> None:
        """As if no run had been: for a step that fails."""
        _restore(self.buffers.before)
        self.before.restore()


def _restore(saved: list[Saved]) -> None:
    for one in saved:
        one.restore()


def _is_writable(buffer: Tensor) -> bool:
    """Not expanded: nobody can have edited a buffer whose entries share their memory."""
    return all(step or size < 2 for step, size in zip(buffer.stride(), buffer.shape, strict=True))
