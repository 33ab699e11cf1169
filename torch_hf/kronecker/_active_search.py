"""Which neurons are active: by a scan or by the tree, whichever proves faster."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from torch_hf.kronecker._deferred_updates import Span
from torch_hf.kronecker._geometry import Geometry, Points, Slot
from torch_hf.kronecker._sparse_gradient import Entries
from torch_hf.kronecker.tree import CorrelationTree


class NeuronSearch:
    """Finds active neurons, and keeps a tree up to date while it has one.

    Attributes:
        choice: What ``"auto"`` has chosen, None before it has measured.
        seconds: What it measured: a scan, and a walk down the tree with the update that the step
            after it makes necessary.
        tree: None while scanning.
    """

    def __init__(self) -> None:
        self.choice: str | None = None
        self.seconds: dict[str, float] = {}
        self.tree: CorrelationTree | None = None
        self._rescaled = 0

    def forget(self) -> None:
        """The correlations have changed throughout."""
        self.tree = None

    def find(
        self,
        span: Span,
        weights: Slot,
        geometry: Geometry,
        samples: Tensor,
        threshold: float,
        search: str,
    ) -> Entries:
        """The pre-activations of data points ``samples`` ``(B,)`` above a threshold.

        Args:
            span: What is outstanding for the weights.
            weights: Of the layer.
            geometry: Of the data.
            samples: Which points; ``Entries.row`` is the place among them.
            threshold: In units of a pre-activation.
            search: ``"scan"``, ``"tree"``, or ``"auto"`` for what is the faster.

        Raises:
            RuntimeError: A tree is asked for while there is momentum, or of points in a grid.
        """
        if not isinstance(geometry, Points):
            if search == "tree":
                raise RuntimeError(
                    "A tree needs the products with each point, but points in a grid of two "
                    'tables keep none. Use search="scan", or make the layer with gram="rows".'
                )
            return scan(span.read(weights, samples, geometry), threshold)
        scale = span.mixing[0][0]
        served = span.velocity is None and scale > 0.0
        if search == "tree" and not served:
            raise RuntimeError(
                'search="tree" must be used without momentum, which moves every neuron at every '
                'step, got a layer with momentum. Use search="scan", or momentum=0.'
            )
        if search == "auto":
            search = self._faster(span, weights, geometry, samples, threshold) if served else "scan"
        if search == "scan":
            self.tree = None
            return scan(span.read(weights, samples, geometry), threshold)
        tree = self._grown(span, weights, geometry)
        found = tree.query(samples, threshold / scale)
        values = weights.products[found.neurons, samples[found.positions]]
        return Entries(found.positions, found.neurons, values * scale)

    def touched(self, gradient: Tensor | Entries) -> None:
        """A step has moved the neurons that have a gradient."""
        if self.tree is None:
            return
        if isinstance(gradient, Entries):
            self.tree.update(gradient.neuron)
        else:
            self.tree.update((gradient != 0).any(dim=0).nonzero()[:, 0])

    def _grown(self, span: Span, weights: Slot, geometry: Geometry) -> CorrelationTree:
        if self.tree is None or self._rescaled != span.rescaled:
            span.flush(weights, geometry)
            self.tree, self._rescaled = CorrelationTree(weights.products), span.rescaled
        return self.tree

    def _faster(
        self, span: Span, weights: Slot, geometry: Geometry, samples: Tensor, threshold: float
    ) -> str:
        if self.choice is None:
            tree, scaled = self._grown(span, weights, geometry), threshold / span.mixing[0][0]

            def walk() -> None:
                tree.update(tree.query(samples, scaled).neurons)

            self.seconds = {
                "scan": _timed(lambda: scan(span.read(weights, samples, geometry), threshold)),
                "tree": _timed(walk),
            }
            self.choice = min(self.seconds, key=self.seconds.__getitem__)
        return self.choice


def scan(values: Tensor, threshold: float) -> Entries:
    """The entries of ``(B, m)`` above a threshold."""
    row, neuron = (values > threshold).nonzero(as_tuple=True)
    return Entries(row, neuron, values[row, neuron])


def _timed(run: Callable[[], object]) -> float:
    """The least of three times."""
    best = float("inf")
    for _ in range(3):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
