"""Runs of a user's closure: on one batch as a graph, or on all for their losses alone."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from torch_hf import _messages
from torch_hf.capture.capture import Capture, Record
from torch_hf.loss.case_counts import Cases, count_cases
from torch_hf.objective import checks
from torch_hf.objective.replay import Replay
from torch_hf.objective.results import Graph
from torch_hf.vector import ParameterVector

#: Stands for the batch of a closure that takes none.
NO_BATCH = object()
#: How autograd says that it was asked for a derivative where no graph was built.
_NEEDS_GRAPH = re.compile(r"requires?[_ ]grad|used in the graph")
#: Compiled modules of which was said that they run uncompiled.
_SAID: WeakSet[nn.Module] = WeakSet()


class ClosureRuns:
    """A closure in any of its three forms, called with ``backward()`` held back.

    Args:
        closure: It takes a batch, unless all batches are ``NO_BATCH``.
        vector: The parameters; their gradients are the same after a run as before it.
        replay: Random states, buffers and autocast around the runs.
        sign: 1.0, or -1.0 where the closure's objective is to grow.
        layers: Whether graphs keep the inputs and outputs of linear layers.
        tangent_rules: Whether convolutions and normalisations take the rules for Gauss-Newton
            products.

    Attributes:
        needs_graph: Whether the closure differentiates by itself, so that its loss needs a graph.
        normalizations: Whether these take their rule, too; to be unset where products are unlikely.
        uncleared: Gradients from outside that ``backward()`` would have added to.
    """

    def __init__(
        self,
        closure: Callable[..., Any],
        vector: ParameterVector,
        replay: Replay,
        *,
        sign: float,
        layers: bool,
        tangent_rules: bool,
    ) -> None:
        self.closure = closure
        self.vector = vector
        self.replay = replay
        self.sign = sign
        self.layers = layers
        self.tangent_rules = tangent_rules
        self.needs_graph = False
        self.normalizations = True
        self.uncleared: list[Tensor] = []

    @torch.enable_grad()
    def graph(self, batch: Any) -> Graph:
        """A batch's loss with its graph.

        Raises:
            TypeError, ValueError, RuntimeError: The closure returned something unusable; the
                message says what was expected.
        """
        capture = Capture(
            self.vector.params,
            layers=self.layers,
            tangent_rules=self.tangent_rules,
            normalizations=self.normalizations,
        )
        record = self._call(capture, batch)
        if record.held:
            found = [*self.uncleared, *capture.gradients.uncleared()]
            self.uncleared = list({id(g): g for g in found}.values())
        record.negated = self.sign < 0
        loss = self._objective(record)
        returned, outputs, cases = checks.returned(record.returned)
        if not loss.requires_grad:
            raise RuntimeError(
                "The closure's loss must be connected to the parameters, got a constant. Compute "
                "it from the model's output without detach(), item() or torch.no_grad()."
            )
        self._say_compiled()
        checks.fresh(record, loss, outputs, self.vector.params)
        counted = count_cases(record, loss, outputs, self.vector.params)
        if cases is not None:
            counted = Cases(cases, adds=False, denominators=(cases,))
        shown = returned.detach() if isinstance(returned, Tensor) else returned
        return Graph(loss, outputs, record, shown, counted)

    @torch.enable_grad()
    def loss(self, batch: Any) -> Tensor:
        """A batch's loss with its graph and nothing else: as a trial point needs it."""
        return self._objective(self._call(Capture(self.vector.params, calls=False), batch))

    def _say_compiled(self) -> None:
        """Once of each module, and never as an error: the step goes well."""
        if "torch._dynamo" not in sys.modules:
            return
        optimized = sys.modules["torch._dynamo"].OptimizedModule
        for module in self.replay.buffers.seen:
            compiled = isinstance(module, optimized) or getattr(module, "_compiled_call_impl", None)
            if compiled and module not in _SAID:
                _SAID.add(module)
                with suppress(RuntimeWarning):
                    warnings.warn(_messages.COMPILED, RuntimeWarning, stacklevel=2)

    def losses(self, batches: Sequence[Any]) -> list[Tensor]:
        """Each batch's loss as in the first run, without a graph if it can."""
        if not self.needs_graph:
            try:
                return self._losses(batches, grad=False)
            except RuntimeError as error:
                if not _NEEDS_GRAPH.search(str(error)):
                    raise
                self.needs_graph = True  # the closure differentiates in a way that was not seen
        return self._losses(batches, grad=True)

    def _losses(self, batches: Sequence[Any], grad: bool) -> list[Tensor]:
        losses = []
        with self.replay.rerun(), torch.set_grad_enabled(grad):
            for batch in batches:
                capture = Capture(self.vector.params, calls=False)
                losses.append(self._objective(self._call(capture, batch)).detach())
        return losses

    def _call(self, capture: Capture, batch: Any) -> Record:
        args = () if batch is NO_BATCH else (batch,)
        gradients = [p.grad for p in self.vector.params]
        for p in self.vector.params:
            p.grad = None  # the closure sees stand-ins, whatever looks past these sees none
        try:
            with self.replay.surroundings():
                return capture.run(self.closure, *args)
        except (AttributeError, RuntimeError) as error:
            if capture.record.held and _messages.misses_gradients(error):
                raise RuntimeError(_messages.HELD_BACK) from error
            raise
        finally:
            for p, g in zip(self.vector.params, gradients, strict=True):
                p.grad = g

    def _objective(self, record: Record) -> Tensor:
        loss, _, _ = checks.returned(record.returned)
        terms = [checks.scalar(term) for term in record.held or [loss]]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total if self.sign == 1.0 else -total
