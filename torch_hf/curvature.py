"""Gauss-Newton and Hessian products, by double backward through a graph kept for many products.

With u a stand-in for the outputs' cotangent, ``g(u) = J^T u`` is linear in u, so the backward
of its graph is the tangent map: ``J v = d<g(u), v>/du`` (the double-backward trick). Then
``G v = J^T (H (J v))`` with H the Hessian of the loss in the outputs (Schraudolph 2002).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import GradientEdge

from torch_hf.capture import Record
from torch_hf.convolution import tangents_only
from torch_hf.frozen import FrozenWorld
from torch_hf.heads import Head, filled
from torch_hf.objective import Graph, Objective
from torch_hf.per_case import EXPONENT, curvature_scale, squared_gradients
from torch_hf.reduce import Reducer
from torch_hf.split import Split, split_by_outputs
from torch_hf.vector import ParameterVector

DOUBLE_BACKWARD, TANGENT_RULES = "double_backward", "tangent_rules"
ENGINES = ("auto", DOUBLE_BACKWARD, TANGENT_RULES)


class Product(Protocol):
    """A symmetric matrix as a map of vectors ``(P,)``."""

    def __call__(self, v: Tensor) -> Tensor:
        """The product with a vector ``(P,)``."""


class _Jacobian:
    """J v and J^T u for network outputs, on a kept graph."""

    def __init__(self, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self.outputs = list(outputs)
        self.params = list(params)
        self.cotangents = [torch.zeros_like(z, requires_grad=True) for z in outputs]
        with torch.enable_grad():
            pulled = grad(
                self.outputs, self.params, self.cotangents, create_graph=True, allow_unused=True
            )
        self.reached = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        self.pulled = [pulled[i] for i in self.reached]

    def push(self, tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with tangents_only():
            found = grad(
                self.pulled,
                self.cotangents,
                [tangents[i] for i in self.reached],
                retain_graph=True,
                allow_unused=True,
            )
        return filled(found, self.outputs)

    def pull(self, cotangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return grad(
            self.outputs, self.params, list(cotangents), retain_graph=True, allow_unused=True
        )


class _Hessian:
    """Hessian products of ``sum(weight * tensor)`` on a kept graph."""

    def __init__(
        self,
        outputs: Sequence[Tensor | GradientEdge],
        weights: Sequence[Tensor] | None,
        params: Sequence[Tensor],
    ) -> None:
        self.params = list(params)
        with torch.enable_grad():
            slopes = grad(
                list(outputs),
                self.params,
                weights,
                create_graph=True,
                allow_unused=True,
            )
        self.curved = [i for i, g in enumerate(slopes) if g is not None and g.requires_grad]
        self.slopes = [slopes[i] for i in self.curved]

    def check_curved(self) -> None:
        if not self.slopes:
            raise RuntimeError(
                "The loss is linear in the parameters, so its Hessian is zero and there is no "
                "curvature to use. Take a first-order optimizer, or a loss with curvature."
            )

    def __call__(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        if not self.slopes:
            return [None] * len(self.params)
        return grad(
            self.slopes,
            self.params,
            [tangents[i] for i in self.curved],
            retain_graph=True,
            allow_unused=True,
        )


class _GaussNewton:
    """G v of one batch: the heads through the network, the remainders by their own Hessian."""

    def __init__(self, split: Split, params: Sequence[Tensor]) -> None:
        self.heads: list[Head] = split.heads
        self.jacobian = _Jacobian([z for head in self.heads for z in head.outputs], params)
        self.remainder = None
        if split.remainders:
            edges, weights = zip(*split.remainders, strict=True)
            self.remainder = _Hessian(edges, weights, params)

    def __call__(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        pushed = iter(self.jacobian.push(tangents))
        curved: list[Tensor] = []
        for head in self.heads:
            curved.extend(head.hessian(*(next(pushed) for _ in head.outputs)))
        product = list(self.jacobian.pull(curved))
        if self.remainder is not None:
            product = [_added(a, b) for a, b in zip(product, self.remainder(tangents), strict=True)]
        return product


class GaussNewtonOperator:
    """The generalized Gauss-Newton matrix of a loss, as a map of flat vectors.

    ``G = J^T H J`` with J the Jacobian of the outputs in the parameters and H the Hessian of
    the loss in the outputs. Terms of the loss that bypass the outputs bring their own Hessian.

    Args:
        loss: A scalar computed from ``outputs``, its graph alive.
        outputs: A tensor or a tuple of tensors, computed from ``params``.
        params: The parameters, P numbers together.

    Raises:
        RuntimeError: The outputs are not connected to the loss, or it is linear in them.

    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient
    descent"; Martens 2010.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> outputs = model(x)
        >>> loss = 0.5 * outputs.square().sum()
        >>> G = GaussNewtonOperator(loss, outputs, model.parameters())
        >>> G(torch.tensor([1.0, 1.0]))
        tensor([1., 4.])
    """

    engine = DOUBLE_BACKWARD

    def __init__(
        self, loss: Tensor, outputs: Tensor | Sequence[Tensor], params: Any
    ) -> None:
        self.vector = ParameterVector([p for p in params if p.requires_grad])
        given = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        split = split_by_outputs(Record(), loss, given, self.vector.params)
        self._local: Any = _GaussNewton(split, self.vector.params)

    @classmethod
    def from_closure(
        cls, closure: Callable[[], Any], params: Any, engine: str = "auto"
    ) -> ObjectiveOperator:
        """The Gauss-Newton operator of a training closure, in any of its three forms.

        Args:
            closure: As for ``HFOptimizer.step``; an L-BFGS closure's ``backward()`` is held back.
            params: The parameters.
            engine: ``"double_backward"`` is autograd's alone; ``"tangent_rules"`` gives
                convolutions a cheaper tangent; ``"auto"`` is the latter, which is never slower.

        Raises:
            ValueError: The engine is unknown.
            RuntimeError: No Gauss-Newton split of the loss was found.
        """
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}.")
        vector = ParameterVector([p for p in params if p.requires_grad])
        objective = Objective(
            closure,
            vector,
            FrozenWorld(vector.device),
            decay=[0.0] * len(vector.params),
            fast_convolutions=engine != DOUBLE_BACKWARD,
            reducer=Reducer(None, vector.device),
        )
        return ObjectiveOperator(objective, "ggn")

    def __call__(self, v: Tensor) -> Tensor:
        """``G v`` for a vector ``(P,)``, as a vector ``(P,)``."""
        return self.vector.flatten(self._local(self.vector.unflatten(v)))


class HessianOperator:
    """The Hessian of a loss, as a map of flat vectors.

    Args:
        loss: A scalar, its graph alive.
        params: The parameters, P numbers together; those the loss does not reach give zeros.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> HessianOperator((w ** 3).sum(), [w])(torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """

    engine = DOUBLE_BACKWARD

    def __init__(self, loss: Tensor, params: Any) -> None:
        self.vector = ParameterVector([p for p in params if p.requires_grad])
        self._local = _Hessian([loss], None, self.vector.params)

    def __call__(self, v: Tensor) -> Tensor:
        """``H v`` for a vector ``(P,)``, as a vector ``(P,)``."""
        return self.vector.flatten(self._local(self.vector.unflatten(v)))


class ObjectiveOperator:
    """Curvature of an :class:`Objective`: averaged over batches, summed over processes.

    A single curvature batch keeps its graph over all products; several are run again for
    each product, at the memory of one.

    Attributes:
        engine: How products are taken.
        cases: Number of cases in the curvature batches.
        products: Number of products taken.
    """

    def __init__(self, objective: Objective, curvature: str) -> None:
        self.objective = objective
        self.curvature = curvature
        self.engine = DOUBLE_BACKWARD
        self.products = 0
        self.split: Split | None = None
        self.decay = objective.vector.spread(objective.decay)
        self._local: Any = None
        counts = []
        for i in range(len(objective.curvature_batches)):
            with objective.curvature_graph(i) as graph:
                if len(objective.curvature_batches) == 1:
                    objective.kept = graph
                counts.append(graph.cases)
                if i == 0:
                    local = self._build(graph)
                if graph.record.fast_convolutions:
                    self.engine = TANGENT_RULES
        if len(counts) == 1:
            self._local = local
        else:
            self.split = None
        self.weights, self.cases = objective.curvature_weights(counts)

    def __call__(self, v: Tensor) -> Tensor:
        """The product with a vector ``(P,)``, weight decay included."""
        self.products += 1
        vector = self.objective.vector
        tangents = vector.unflatten(v)
        total = None
        for i, weight in enumerate(self.weights):
            part = vector.flatten(self._product(i, tangents))
            part = part if weight == 1.0 else part * weight
            total = part if total is None else total.add_(part)
        assert total is not None
        self.objective.reducer.vector(total)
        if isinstance(self.decay, Tensor):
            return total.addcmul_(self.decay, v)
        return total.add_(v, alpha=self.decay) if self.decay else total

    def diagonal(self, damping: float) -> Tensor:
        """Martens' diagonal ``(mean g^2 + lambda)^0.75`` on the curvature batches, (P,)."""
        vector = self.objective.vector
        total = vector.zeros()
        for i, weight in enumerate(self.weights):
            with self.objective.curvature_graph(i) as graph:
                heads = (self.split or self.objective.split(graph)).heads
                squares = squared_gradients(heads, vector.params, graph.record.layers)
                scale = weight * curvature_scale(heads, vector.params)
                total.add_(vector.flatten(squares), alpha=scale)
        self.objective.reducer.vector(total)
        return (total + self.decay + damping).clamp_(min=torch.finfo(total.dtype).tiny) ** EXPONENT

    def release(self) -> None:
        """Lets the kept graph go: parameters may be edited in place after this."""
        self._local = None
        self.split = None
        self.objective.kept = None

    def _build(self, graph: Graph) -> Any:
        if self.curvature == "hessian":
            hessian = _Hessian([graph.loss], None, self.objective.vector.params)
            hessian.check_curved()
            return hessian
        self.split = self.objective.split(graph)
        return _GaussNewton(self.split, self.objective.vector.params)

    def _product(self, i: int, tangents: list[Tensor]) -> Sequence[Tensor | None]:
        if self._local is not None:
            return self._local(tangents)
        with self.objective.curvature_graph(i) as graph:
            return self._build(graph)(tangents)


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
