"""Where a step's seconds go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class StepTimer:
    """Adds up wall-timer seconds by part, as the host sees them."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        self.parts = dict.fromkeys(parts, 0.0)
        self.start = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what runs inside towards a part."""
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
        """Total, each part, and the rest as ``other``."""
        total = time.perf_counter() - self.start
        return {"total": total, **self.parts, "other": total - sum(self.parts.values())}
