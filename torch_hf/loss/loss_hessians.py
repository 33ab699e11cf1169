"""Loss terms as convex functions of network outputs: their Hessian products in output space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import grad

from torch_hf.capture.autograd_graph import connects, edge_of, is_foreign
from torch_hf.capture.op_names import kind

#: Second derivatives that are zero although autograd has an edge for them, and which edge.
FLAT = {
    "Sgn": 0,
    "Sign": 0,
    "NllLossBackward": 1,
    "NllLoss2DBackward": 1,
    "ThresholdBackward": 1,
    "LeakyReluBackward": 1,
}

#: Where a loss term's result lies, its weight in the loss, the outputs it is a function of.
Piece = tuple[Any, Tensor, tuple[Tensor, ...]]


class LossTerm(Protocol):
    """A term of the loss, seen as a function of the network's outputs."""

    outputs: tuple[Tensor, ...]
    squares: bool  # whether it is a sum of squares, so that its Hessian is the same everywhere

    def hessian(self, *tangents: Tensor) -> tuple[Tensor, ...]:
        """The term's Hessian in the outputs times tangents of the outputs' shapes."""

    def gradient(self) -> tuple[Tensor, ...]:
        """The term's gradient in the outputs."""

    def trace(self) -> Tensor:
        """The trace of the term's Hessian in the outputs, or an unbiased estimate."""

    def sample(self, *signs: Tensor) -> tuple[Tensor, ...]:
        """A root of the term's Hessian times random signs: the Hessian is the mean of its square.

        Of a Hessian that is not positive its positive part counts.
        """


class _TermInGraph:
    """A loss function's result in the graph, and how strongly the objective counts it.

    Attributes:
        squares: Whether it is a sum of squares, so that its Hessian is the same everywhere.
    """

    squares = False

    def __init__(
        self,
        result: Any,  # a tensor or a gradient edge
        coefficient: Tensor | None,
        outputs: tuple[Tensor, ...],
    ) -> None:
        self.result = [result]
        self.coefficient = None if coefficient is None else [coefficient]
        self.outputs = outputs

    def gradient(self) -> tuple[Tensor, ...]:
        """See :class:`LossTerm`."""
        found = grad(
            self.result, self.outputs, self.coefficient, retain_graph=True, allow_unused=True
        )
        return filled(found, self.outputs)

    def trace(self) -> Tensor:
        """See :class:`LossTerm`."""
        raise NotImplementedError

    def sample(self, *signs: Tensor) -> tuple[Tensor, ...]:
        """Where no root is known: the gradient under a sign for each case, in the trace's units."""
        slopes = self.gradient()
        squares = torch.stack([g.square().sum() for g in slopes]).sum()
        ratio = torch.where(squares > 0, self.trace().clamp(min=0) / squares, 0.0).sqrt()
        first = signs[0].flatten(1)[:, 0] if signs[0].ndim > 1 else signs[0]
        return tuple(
            g * ratio * first.view(-1, *[1] * (g.ndim - 1)) if g.ndim else g * ratio for g in slopes
        )

    def _gradient_graph(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            found = grad(
                self.result, outputs, self.coefficient, create_graph=True, allow_unused=True
            )
        return filled(found, outputs)


class DiagonalTerm(_TermInGraph):
    """A loss that treats each entry of its output by itself: the Hessian is ``diag(weight)``."""

    def __init__(self, piece: Piece, weight: Tensor) -> None:
        super().__init__(*piece)
        self.weight = weight  # broadcast to the output

    def hessian(self, *tangents: Tensor) -> tuple[Tensor, ...]:
        """See :class:`LossTerm`."""
        return (tangents[0] * self.weight,)

    def trace(self) -> Tensor:
        """See :class:`LossTerm`."""
        return self.weight.expand_as(self.outputs[0]).sum()

    def sample(self, *signs: Tensor) -> tuple[Tensor, ...]:
        """See :class:`LossTerm`."""
        return (signs[0] * self.weight.clamp(min=0).sqrt(),)


class ElementwiseTerm(_TermInGraph):
    """As :class:`DiagonalTerm`, its weight by double backward, like ``huber_loss``.

    With two arguments it is a function of their difference, as the losses of
    :data:`~torch_hf.capture.op_names.LOSSES` with two are; the second must not depend on the first.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        (first,) = self._gradient_graph(self.outputs[:1])
        (self.diagonal,) = grad(first, self.outputs[:1], torch.ones_like(first), retain_graph=True)

    def gradient(self) -> tuple[Tensor, ...]:
        """See :class:`LossTerm`."""
        (first,) = grad(self.result, self.outputs[:1], self.coefficient, retain_graph=True)
        return (first,) if len(self.outputs) == 1 else (first, -first)

    def hessian(self, *tangents: Tensor) -> tuple[Tensor, ...]:
        """See :class:`LossTerm`."""
        if len(tangents) == 1:
            return (self.diagonal * tangents[0],)
        product = self.diagonal * (tangents[0] - tangents[1])
        return product, -product

    def trace(self) -> Tensor:
        """See :class:`LossTerm`."""
        return len(self.outputs) * self.diagonal.sum()

    def sample(self, *signs: Tensor) -> tuple[Tensor, ...]:
        """See :class:`LossTerm`."""
        first = signs[0] * self.diagonal.clamp(min=0).sqrt()
        return (first,) if len(signs) == 1 else (first, -first)


class NormTerm(_TermInGraph):
    """``sum(c * |r|)``: the Hessian is ``c (I - u u^T) / |r|`` with u the unit vector of r."""

    def __init__(self, piece: Piece, weight: Tensor, dim: Any) -> None:
        super().__init__(*piece)
        self.dim = dim
        r = self.outputs[0].detach()
        norm = torch.linalg.vector_norm(r, dim=dim, keepdim=True)
        self.weight = torch.where(norm > 0, weight / norm, 0.0)  # at 0 autograd's slope is 0 too
        self.unit = torch.where(norm > 0, r / norm, 0.0)

    def hessian(self, *tangents: Tensor) -> tuple[Tensor, ...]:
        """See :class:`LossTerm`."""
        along = (self.unit * tangents[0]).sum(self.dim, keepdim=True)
        return (self.weight * (tangents[0] - self.unit * along),)

    def trace(self) -> Tensor:
        """See :class:`LossTerm`."""
        return (self.weight * (1 - self.unit.square())).sum()

    def sample(self, *signs: Tensor) -> tuple[Tensor, ...]:
        """See :class:`LossTerm`."""
        along = (self.unit * signs[0]).sum(self.dim, keepdim=True)
        return (self.weight.clamp(min=0).sqrt() * (signs[0] - self.unit * along),)


class SoftmaxTerm(_TermInGraph):
    """Cross-entropy of ``softmax(z)``: the Hessian is ``s (diag(p) - p p^T)`` in each position.

    The closed form needs two copies of the logits where double backward holds ten.
    """

    def __init__(self, piece: Piece, weight: Tensor, dim: int) -> None:
        super().__init__(*piece)
        self.dim = dim
        self.probability = torch.softmax(self.outputs[0].detach(), dim)
        self.weight = weight  # s, broadcast along dim

    def hessian(self, *tangents: Tensor) -> tuple[Tensor, ...]:
        """See :class:`LossTerm`."""
        weighted = self.probability * tangents[0]
        centre = weighted.sum(self.dim, keepdim=True)
        product = (weighted - self.probability * centre) * self.weight
        return (product.to(tangents[0].dtype),)

    def trace(self) -> Tensor:
        """See :class:`LossTerm`."""
        return (self.weight * (self.probability - self.probability.square())).sum()

    def sample(self, *signs: Tensor) -> tuple[Tensor, ...]:
        """See :class:`LossTerm`: with r = sqrt(p), ``r e - p (r^T e)`` has this covariance."""
        rooted = self.probability.sqrt() * signs[0]
        sample = rooted - self.probability * rooted.sum(self.dim, keepdim=True)
        return ((sample * self.weight.clamp(min=0).sqrt()).to(signs[0].dtype),)


class AutogradTerm(_TermInGraph):
    """Any twice-differentiable loss, by double backward through its kept graph."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        slopes = self._gradient_graph(self.outputs)
        ends = {edge_of(z) for z in self.outputs}
        self._places = [i for i, g in enumerate(slopes) if g.requires_grad and _curves(g, ends)]
        self._slopes = [slopes[i] for i in self._places]
        self.curved = bool(self._slopes)

    def hessian(self, *tangents: Tensor) -> tuple[Tensor, ...]:
        """See :class:`LossTerm`."""
        if not self._slopes:
            return tuple(torch.zeros_like(t) for t in tangents)
        found = grad(
            self._slopes,
            self.outputs,
            [tangents[i] for i in self._places],
            retain_graph=True,
            allow_unused=True,
        )
        return filled(found, self.outputs)

    def trace(self) -> Tensor:
        """See :class:`LossTerm`."""
        signs = tuple(random_signs(z.shape, z) for z in self.outputs)
        products = self.hessian(*signs)
        terms = [(s * h).sum() for s, h in zip(signs, products, strict=True)]
        return torch.stack(terms).sum()


def _curves(slope: Tensor, ends: set[Any]) -> bool:
    """Whether a slope's graph reaches an output otherwise than by derivatives that are zero."""
    return connects(
        edge_of(slope), ends, lambda node: None if is_foreign(node) else FLAT.get(kind(node))
    )


def random_signs(shape: Sequence[int], like: Tensor) -> Tensor:
    """Rademacher signs: plus or minus one, each with probability 1/2."""
    return torch.randint(0, 2, shape, device=like.device).to(like.dtype) * 2 - 1


def filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """None, where autograd found no path, as zeros."""
    return tuple(torch.zeros_like(z) if g is None else g for g, z in zip(found, like, strict=True))


def entropy_weights(logits: Tensor, settings: Mapping[str, Any], coefficient: Tensor) -> Tensor:
    """``s`` of :class:`SoftmaxTerm` for ``F.cross_entropy`` with all of its options."""
    target, weight = settings["target"], settings.get("weight")
    smoothing = settings.get("label_smoothing", 0.0)
    mean = settings.get("reduction", "mean") == "mean"
    dim = 1 if logits.ndim > 1 else 0
    classes = logits.shape[dim]
    # bfloat16 counts to 256 and no further
    dtype = torch.promote_types(logits.dtype, torch.float32)
    w = logits.new_ones(classes, dtype=dtype) if weight is None else weight.to(dtype)
    if target.is_floating_point():
        shape = [1] * logits.ndim
        shape[dim] = classes
        soft = target * (1 - smoothing) + smoothing / classes
        s = (soft * w.view(shape)).sum(dim)
        denominator: Any = max(s.numel(), 1)
    else:
        valid = target != settings.get("ignore_index", -100)
        picked = w[torch.where(valid, target, 0)] * valid
        s = picked * (1 - smoothing) + smoothing / classes * w.sum() * valid
        denominator = picked.sum()
    s = s * coefficient / (denominator if mean else 1)
    weights: Tensor = s.unsqueeze(dim).detach()
    return weights
