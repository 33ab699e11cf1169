"""Products replayed as one CUDA graph, where launching them takes longer than running them.

A product on a kept graph is the same kernels on the same memory each time, but for its vector. On a
GPU a small network's product is bound by its launches: hundreds, at 5 to 60 microseconds of the
host each. From the third product of a solve on they are replayed together
(``torch.cuda.CUDAGraph``). The first product is timed, the second's kernels are recorded. Where
anything waits for the host, belongs to users' own code or differs, products stay as they were.

Kernels are recorded on a stream of their own, and autograd runs a backward on the stream of the
forward: so the whole step runs on that stream, ordered after the caller's work and before it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]

#: Solves with fewer products than this are not worth a recording, which costs about one.
LEAST_PRODUCTS = 6
#: The device may be busy for this part of a product's time after its last launch.
MOST_BUSY = 0.5
#: A recording keeps its memory from solve to solve: not where less than this part is free.
LEAST_FREE = 0.25
#: Relative difference of the first replay and its product, which are the same kernels; some add up
#: in an order of their own.
AGREEMENT = 1e-3


class Recording(NamedTuple):
    """Kernels on fixed memory.

    Attributes:
        replay: Runs them.
        operand: The vector that they read, (P,).
        result: The vector that they write, (P,).
    """

    replay: Callable[[], Any]
    operand: Tensor
    result: Tensor


class Recorder:
    """What the solves of one optimizer share: a stream, memory, and whether recordings work.

    Attributes:
        usable: False once a recording failed or did not agree.
    """

    def __init__(self) -> None:
        self.usable = True
        self._agreed = False
        self._streams: dict[torch.device, Any] = {}
        self._last: Any = None  # its memory is the next one's

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return Recorder, ()  # copies share no memory

    @contextmanager
    def stream(self, device: torch.device, alone: bool) -> Iterator[None]:
        """A stream that can be recorded, inside; after the caller's work, and before what follows.

        Args:
            device: The parameters'; on others than CUDA nothing happens.
            alone: Whether this process shares its sums with no other.
        """
        if device.type != "cuda" or not (self.usable and alone):
            yield
            return
        outside = torch.cuda.current_stream(device)
        inside = self._streams.get(outside.device)
        if inside is None:
            inside = self._streams[outside.device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        inside.wait_stream(outside)
        try:
            with torch.cuda.stream(inside):
                yield
        finally:
            outside.wait_stream(inside)

    def can_record(self, device: torch.device) -> bool:
        """Whether kernels that are launched now could be recorded."""
        return (
            self.usable
            and device.type == "cuda"
            and torch.cuda.current_stream(device) == self._streams.get(device)
            and not torch.is_anomaly_enabled()
        )

    def is_bound_by_launches(self, product: Product, v: Tensor) -> tuple[Tensor, bool]:
        """A product, and whether recording others would pay: no wait, and an idle device."""
        torch.cuda.current_stream(v.device).synchronize()
        start = time.perf_counter()
        with waits_are_noted() as waits:
            found = product(v)
        launched = time.perf_counter()
        torch.cuda.current_stream(v.device).synchronize()
        busy, total = time.perf_counter() - launched, time.perf_counter() - start
        return found, not waits and busy < MOST_BUSY * total

    def record(self, product: Product, v: Tensor) -> Recording | None:
        """The kernels of ``product(v)``, not yet run; None where it fails or memory is scarce."""
        if not has_room(v.device):
            return None
        graph = torch.cuda.CUDAGraph()
        operand = v.clone()
        pool = None if self._last is None else self._last.pool()
        stream = torch.cuda.current_stream(v.device)
        try:
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                result = product(operand)
        except RuntimeError:  # out of memory, too
            self.usable = False
            return None
        self._last = graph
        return Recording(graph.replay, operand, result)

    def agrees(self, found: Tensor, product: Product, v: Tensor) -> bool:
        """Whether the first replay of all gave the product."""
        if not self._agreed:
            truth = product(v)
            difference = torch.linalg.vector_norm(found - truth)
            self._agreed = bool(difference <= AGREEMENT * torch.linalg.vector_norm(truth))
            self.usable = self._agreed
        return self._agreed


class ReplayedProduct:
    """A product of one solve that is recorded when it pays.

    Args:
        product: A vector (P,) to a vector (P,), the same kernels each time.
        recorder: Who records.
        expected: The most products that are to come.
    """

    def __init__(self, product: Product, recorder: Recorder, expected: int) -> None:
        self.product = product
        self.recorder = recorder
        self.expected = expected
        self.recording: Recording | None = None
        self._taken = 0
        self._pays = False

    def __call__(self, v: Tensor) -> Tensor:
        """The product with v, as memory of its own."""
        if self.recording is not None:
            return self._replayed(self.recording, v)
        self._taken += 1
        if self.expected < LEAST_PRODUCTS or not self.recorder.can_record(v.device):
            return self.product(v)
        if self._taken == 1:
            found, self._pays = self.recorder.is_bound_by_launches(self.product, v)
            return found
        if self._taken > 2 or not self._pays:
            return self.product(v)
        recording = self.recorder.record(self.product, v)
        if recording is None:
            return self.product(v)
        found = self._replayed(recording, v)
        if not self.recorder.agrees(found, self.product, v):
            return self.product(v)
        self.recording = recording
        return found

    def _replayed(self, recording: Recording, v: Tensor) -> Tensor:
        recording.operand.copy_(v)
        recording.replay()
        return recording.result.clone()


def has_room(device: torch.device) -> bool:
    """Whether enough of a GPU's memory is free, or held by torch for nothing."""
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + held >= LEAST_FREE * total


@contextmanager
def waits_are_noted() -> Iterator[list[str]]:
    """What makes the host wait for the device inside, which no recording can hold."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in seen:
        if "synchroniz" in str(warning.message):
            found.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
