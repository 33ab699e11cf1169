"""Where a step's seconds go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
CPU = torch.device("cpu")


class StepTimer:
    """Adds up seconds by part: on a GPU its own, between events on the stream, else the host's.

    A host that launches kernels is done with a part long before the GPU is.

    Args:
        parts: Their names.
        device: Where the step computes.
    """

    def __init__(self, parts: tuple[str, ...], device: torch.device = CPU) -> None:
        self.parts = dict.fromkeys(parts, 0.0)
        self.device = device
        self.start = time.perf_counter()
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what runs inside towards a part."""
        if self.device.type == "cuda":
            make: Any = torch.cuda.Event
            begin, end = make(enable_timing=True), make(enable_timing=True)
            begin.record()
            try:
                yield
            finally:
                end.record()
                self._marks.append((name, begin, end))
            return
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] += time.perf_counter() - start

    def timed(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """The function, its time counted towards a part."""

        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            with self.part(name):
                return function(*args, **kwargs)

        return wrapped

    def seconds(self) -> dict[str, float]:
        """Total, each part, and the rest as ``other``; on a GPU it waits for the step's end."""
        if self._marks:
            self._marks[-1][2].synchronize()
            for name, begin, end in self._marks:
                self.parts[name] += begin.elapsed_time(end) / 1e3
            self._marks.clear()
        total = time.perf_counter() - self.start
        return {"total": total, **self.parts, "other": total - sum(self.parts.values())}
