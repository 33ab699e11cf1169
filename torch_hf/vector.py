"""A parameter list as one flat vector; no other module knows the list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class ParameterVector:
    """The parameters, in order, seen as one flat vector of ``numel`` entries.

    Vectors are held in ``dtype``, the widest type among the parameters and at
    least float32, so that CG on half-precision parameters runs in float32.

    Args:
        params: Parameters of any shapes, all on one device and real.
        local: The entries of each that this process holds; None for all.

    Raises:
        ValueError: There is no parameter, or they lie on several devices.
        TypeError: A parameter is complex or not of floating point.
    """

    #: Whether derivatives arrive summed over ranks, which scale them before.
    sums = False

    def __init__(self, params: Sequence[Tensor], local: Sequence[Tensor] | None = None) -> None:
        check_parameters(params)
        self.modules: Iterable[object] = ()  # that have run, where they keep copies of values
        self.params = list(params)
        self.local = self.params if local is None else list(local)
        self.sizes = [p.numel() for p in self.local]
        self.numel = sum(self.sizes)
        self.device = self.params[0].device
        dtype = torch.float32
        for p in self.params:
            dtype = torch.promote_types(dtype, p.dtype)
        self.dtype = dtype
        self._homes: list[Tensor] = []  # the parameters' own memory
        self._kept: list[Tensor] = []  # copies of the values that are to be there in the end

    def zeros(self) -> Tensor:
        """A vector ``(P,)`` of zeros."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One vector ``(P,)`` from a tensor per parameter; None counts as zeros."""
        pieces = [
            p.new_zeros(p.numel(), dtype=self.dtype) if t is None else t.reshape(-1).to(self.dtype)
            for t, p in zip(tensors, self.local, strict=True)
        ]
        return torch.cat(pieces)

    def views(self, vector: Tensor) -> list[Tensor]:
        """The pieces of a vector ``(P,)`` in the parameters' shapes, without copying."""
        pieces = torch.split(vector, self.sizes)
        return [v.view(p.shape) for v, p in zip(pieces, self.local, strict=True)]

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """As :meth:`views`, in each parameter's own dtype."""
        return [v.to(p.dtype) for v, p in zip(self.views(vector), self.params, strict=True)]

    def spread(self, values: Sequence[float]) -> Tensor | float:
        """One number per parameter as a vector ``(P,)``, or as itself where all agree."""
        if len(set(values)) == 1:
            return values[0]
        sizes = torch.tensor(self.sizes, device=self.device)
        numbers = torch.tensor(values, dtype=self.dtype, device=self.device)
        return torch.repeat_interleave(numbers, sizes)

    def gradients(self, vector: Tensor) -> list[Tensor | None]:
        """The pieces of a vector ``(P,)`` as the parameters' gradients."""
        return list(self.unflatten(vector))

    def pieces(self, vectors: Tensor) -> list[Tensor]:
        """Vectors ``(..., P)`` by parameter, ``(..., *shape)``, as views."""
        parts = torch.split(vectors, self.sizes, dim=-1)
        return [
            v.view((*vectors.shape[:-1], *p.shape)) for v, p in zip(parts, self.local, strict=True)
        ]

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """The vectors ``(..., P)`` that have these pieces."""
        lead = pieces[0].shape[: pieces[0].ndim - self.params[0].ndim]
        return torch.cat(
            [v.reshape(*lead, n) for v, n in zip(pieces, self.sizes, strict=True)], dim=-1
        )

    def pull(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], retain_graph: bool
    ) -> list[Tensor | None]:
        """``J^T u`` by parameter; None where the outputs do not depend on it."""
        return list(
            torch.autograd.grad(
                outputs, self.params, cotangents, retain_graph=retain_graph, allow_unused=True
            )
        )

    @torch.no_grad()
    def move(self, direction: Tensor, length: float) -> None:
        """``theta += length * direction``, the very bits that a trial there placed."""
        for p, d in zip(self.local, self.views(direction), strict=True):
            p.copy_(torch.add(p.detach().to(d.dtype), d, alpha=length))
        self.changed()

    def changed(self) -> None:
        """Told after each change of values."""

    def keep(self) -> list[Tensor]:
        """Copies of the values, which :meth:`put_back` puts back."""
        self._kept = [p.detach().clone() for p in self.local]
        return self._kept

    def keep_nothing(self) -> None:
        """The parameters stay as they are from here on."""
        self._homes, self._kept = [], []

    @torch.no_grad()
    def put_back(self) -> None:
        """The parameters as they were, wherever an interrupt has left them."""
        for p, home in zip(self.params, self._homes, strict=bool(self._homes)):
            p.data = home
        for p, old in zip(self.local, self._kept, strict=bool(self._kept)):
            p.copy_(old)
        if self._kept:
            self.changed()

    @contextmanager
    def lent(self, values: Sequence[Tensor]) -> Iterator[None]:
        """The parameters hold other tensors' values inside; a kept graph stays valid.

        Neither storage nor version of a parameter changes. So a graph that saved it can be used
        again afterwards, but not inside.
        """
        self._homes = [p.data for p in self.params]
        try:
            for p, value in zip(self.params, values, strict=True):
                p.data = value
            yield
        finally:
            for p, home in zip(self.params, self._homes, strict=True):
                p.data = home

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Lends the parameters to trial values; their bits are restored on any exit.

        The copies are kept beyond it, until the step is whole.
        """
        trial = Trial(self)
        try:
            yield trial
        finally:
            trial.restore()


class Trial:
    """Places ``theta + length * direction`` into the parameters, from saved bits."""

    def __init__(self, vector: ParameterVector) -> None:
        self.vector = vector
        self.saved = vector.keep()
        self._placed = False

    @torch.no_grad()
    def place(self, direction: Tensor, length: float) -> None:
        """Puts ``theta + length * direction`` into the parameters."""
        self._placed = True
        pieces = self.vector.views(direction)
        for p, old, d in zip(self.vector.local, self.saved, pieces, strict=True):
            p.copy_(torch.add(old.to(d.dtype), d, alpha=length))
        self.vector.changed()

    @torch.no_grad()
    def moves(self, direction: Tensor, length: float) -> bool:
        """Whether ``theta + length * direction`` differs from theta in any bit of this rank's."""
        pieces = self.vector.views(direction)
        return any(
            not torch.equal(torch.add(old.to(d.dtype), d, alpha=length).to(old.dtype), old)
            for old, d in zip(self.saved, pieces, strict=True)
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Puts theta back, bit for bit; a graph stays valid where nothing was placed."""
        if not self._placed:
            return
        for p, old in zip(self.vector.local, self.saved, strict=True):
            p.copy_(old)
        self.vector.changed()


def check_parameters(params: Sequence[Tensor]) -> None:
    """Complains about what cannot be optimized."""
    if not params:
        raise ValueError(
            "params must hold a parameter with requires_grad=True, got none. Pass "
            "model.parameters(), and unfreeze frozen ones with model.requires_grad_(True)."
        )
    for p in params:
        if not p.is_floating_point():
            raise TypeError(
                f"Parameters must be real floating-point tensors, got one of {p.dtype}. Hold the "
                "real and imaginary parts as two parameters and combine them in the model, for "
                "instance with torch.complex(real, imag)."
            )
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise ValueError(
            f"All parameters must be on one device, got {', '.join(devices)}. Move the model with "
            "model.to(device), or give each part its own optimizer."
        )
    if params[0].device.type == "mps":
        raise ValueError(
            "Parameters must be on a device that has float64, which a step's sums need, got mps. "
            "Move the model to the CPU with model.cpu()."
        )
