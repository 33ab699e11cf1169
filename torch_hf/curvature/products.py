"""Products of one batch on a kept graph: Jacobian, Gauss-Newton matrix, Hessian.

With u a stand-in for the outputs' cotangent, ``g(u) = J^T u`` is linear in u, so the backward
of its graph is the tangent map: ``J v = d<g(u), v>/du`` (the double-backward trick). Then
``G v = J^T (H (J v))`` with H the Hessian of the loss in the outputs (Schraudolph 2002).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torch_hf.capture.autograd_graph import under, unknown_functions
from torch_hf.capture.op_names import kind
from torch_hf.capture.tangents import tangents_only
from torch_hf.curvature.unknown_functions import belong_together, cut
from torch_hf.loss.ggn_split import Split
from torch_hf.loss.loss_hessians import LossTerm, filled

#: Tangents by parameter to a product by parameter; None counts as zeros.
LocalProduct = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]


class Jacobian:
    """J v and J^T u for network outputs, on a kept graph."""

    def __init__(self, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self.outputs = list(outputs)
        self.params = list(params)
        self.cotangents = [torch.zeros_like(z, requires_grad=True) for z in outputs]

    @cached_property
    def pulled(self) -> tuple[list[int], list[GradientEdge]]:
        """The parameters that J^T u reaches, and the graph of J^T u there.

        It is built with the first J v: a solver that takes J itself needs none.
        """
        with torch.enable_grad():
            pulled = grad(
                self.outputs, self.params, self.cotangents, create_graph=True, allow_unused=True
            )
        reached = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        refuse_errors([pulled[i] for i in reached])
        # Edges, not tensors: J^T 0 itself is a vector of zeros that nobody reads.
        return reached, [get_gradient_edge(pulled[i]) for i in reached]

    def check(self) -> None:
        """Complains where autograd lost a part of J v in a function it does not see through."""
        names = unknown_functions(self.outputs)
        if names and not belong_together(self.push, self.pull, self.outputs, self.params):
            raise RuntimeError(cut(names))

    def push(self, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """J v."""
        reached, edges = self.pulled
        if not edges:  # J^T u is no function of u
            return tuple(torch.zeros_like(z) for z in self.outputs)
        with tangents_only():
            found = grad(
                edges,
                self.cotangents,
                [tangents[i] for i in reached],
                retain_graph=True,
                allow_unused=True,
            )
        return filled(found, self.outputs)

    def pull(self, cotangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """J^T u."""
        return grad(
            self.outputs, self.params, list(cotangents), retain_graph=True, allow_unused=True
        )


class BatchHessian:
    """Hessian products of ``sum(weight * tensor)`` on a kept graph."""

    def __init__(
        self,
        outputs: Sequence[Tensor] | Sequence[GradientEdge],
        weights: Sequence[Tensor] | None,
        params: Sequence[Tensor],
    ) -> None:
        self.params = list(params)
        with torch.enable_grad():
            slopes = grad(
                outputs,
                self.params,
                weights,
                create_graph=True,
                allow_unused=True,
            )
        self.curved = [i for i, g in enumerate(slopes) if g is not None and g.requires_grad]
        refuse_errors([slopes[i] for i in self.curved])
        self.slopes = [get_gradient_edge(slopes[i]) for i in self.curved]

    def check_curved(self) -> None:
        """Complains where the Hessian is identically zero."""
        if not self.slopes:
            raise RuntimeError(
                "The loss is linear in the parameters, so its Hessian is zero and there is no "
                "curvature to use. Use a first-order optimizer, or a loss with curvature."
            )

    def check_symmetric(self, outputs: Sequence[Any]) -> None:
        """Complains where autograd lost a part that makes H v asymmetric.

        Args:
            outputs: Nodes or tensors that the Hessian's graph begins with.
        """
        names = unknown_functions([], more=outputs)
        if names and not belong_together(self, self, self.params, self.params):
            raise RuntimeError(cut(names))

    def __call__(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The product, by parameter."""
        if not self.slopes:
            return [None] * len(self.params)
        return grad(
            self.slopes,
            self.params,
            [tangents[i] for i in self.curved],
            retain_graph=True,
            allow_unused=True,
        )


class BatchGaussNewton:
    """G v of one batch: the loss terms through the network, the remainders by their own Hessian.

    Args:
        split: The loss's.
        params: The parameters.
        check: Whether to look for what autograd does not see through.
        scale: The factor on the product, which goes in before the backward pass: in a module that
            communicates it crosses ranks; None for 1. It is known at the first product.
    """

    def __init__(
        self,
        split: Split,
        params: Sequence[Tensor],
        check: bool = True,
        scale: Callable[[], float] | None = None,
    ) -> None:
        self.scale = scale or (lambda: 1.0)
        self.loss_terms: list[LossTerm] = split.loss_terms
        self.jacobian = Jacobian(
            [z for loss_term in self.loss_terms for z in loss_term.outputs], params
        )
        self.remainder: LocalProduct | None = None
        if split.remainders:
            edges, weights = zip(*split.remainders, strict=True)
            remainder = BatchHessian(edges, weights, params)
            self.remainder = remainder
            if scale is not None:
                own = scale
                self.remainder = DeferredProduct(
                    lambda: BatchHessian(edges, [w * own() for w in weights], params)
                )
        if check:
            self.jacobian.check()
            if split.remainders:
                remainder.check_symmetric([edge.node for edge in edges])

    def __call__(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The product, by parameter."""
        pushed = iter(self.jacobian.push(tangents))
        curved: list[Tensor] = []
        for loss_term in self.loss_terms:
            curved.extend(loss_term.hessian(*(next(pushed) for _ in loss_term.outputs)))
        scale = self.scale()
        product = list(self.jacobian.pull(scaled(curved, scale)))
        if self.remainder is not None:
            product = [_added(a, b) for a, b in zip(product, self.remainder(tangents), strict=True)]
        return product


class DeferredProduct:
    """A product that is built at its first use, when the factor in it is known.

    Args:
        build: Builds it.
    """

    def __init__(self, build: Callable[[], LocalProduct]) -> None:
        self.build = build
        self.built: LocalProduct | None = None

    def __call__(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The product, by parameter."""
        self.built = self.built or self.build()
        return self.built(tangents)


def scaled(tensors: Sequence[Tensor], scale: float) -> list[Tensor]:
    """Multiples; zeros where the scale is 0, though a batch without cases is all NaN."""
    if scale == 1.0:
        return list(tensors)
    return [t * scale if scale else torch.zeros_like(t) for t in tensors]


def refuse_errors(tensors: Sequence[Tensor]) -> None:
    """Complains of what would silently be left out of a product.

    At a ``once_differentiable`` function autograd cuts the graph with a node that would raise, but
    no path leads through it to what is asked for. Under a reentrant checkpoint there is no graph at
    all, so that ``torch.autograd.grad`` finds no path to the parameters inside.
    """
    kinds = {kind(node) for node in under({t.grad_fn for t in tensors} - {None})}
    if "CheckpointFunction" in kinds:
        raise RuntimeError("checkpoint with use_reentrant=True")
    if "Error" in kinds:
        raise RuntimeError("differentiate twice: a function marked once_differentiable")


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
