"""Products by central differences, where an operation cannot be differentiated twice.

``J v = (f(theta + eps v) - f(theta - eps v)) / (2 eps)`` needs two more runs of the closure and
no second derivative; ``J^T`` is ordinary backward on the kept graph. For the Hessian the same is
done with the gradient. With ``eps |v| = u^(1/3) (1 + |theta|)``, u the rounding error of the
parameters' dtype, truncation and rounding are of one size (Nocedal & Wright 2006, section 8.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_hf.distributed import LOCAL, Space
from torch_hf.loss.ggn_split import Split
from torch_hf.vector import ParameterVector

#: Values for the parameters to what is differentiated, by tensor.
AtValues = Callable[[list[Tensor]], Sequence[Tensor | None]]


class CentralDifference:
    """The derivative of ``at`` at the parameters' present values, along tangents.

    Raises:
        RuntimeError: A parameter is in half precision, where differences are all rounding.
    """

    def __init__(self, at: AtValues, params: Sequence[Tensor], space: Space = LOCAL) -> None:
        self.at = at
        self.space = space
        self.values = [p.detach() for p in params]
        dtypes = [p.dtype for p in params]
        if any(d not in (torch.float32, torch.float64) for d in dtypes):
            raise RuntimeError(
                "Finite differences need parameters in float32 or float64; in half precision they "
                "are lost in rounding. Keep the parameters in float32."
            )
        self.unit = max(torch.finfo(d).eps for d in dtypes) ** (1 / 3)
        self.size = self._norm(self.values)

    def __call__(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """The derivative, by tensor; None where there is none."""
        length = self._norm(tangents)
        if length == 0.0 or not math.isfinite(length):
            return [None if t is None else t * length for t in self.at(self.values)]
        step = self.unit * (1.0 + self.size) / length
        ahead = self.at([p + step * t for p, t in zip(self.values, tangents, strict=True)])
        behind = self.at([p - step * t for p, t in zip(self.values, tangents, strict=True)])
        return [
            None if a is None or b is None else (a - b).div_(2.0 * step)
            for a, b in zip(ahead, behind, strict=True)
        ]

    def _norm(self, tensors: Sequence[Tensor]) -> float:
        norms = [torch.linalg.vector_norm(t.detach(), dtype=torch.float64) for t in tensors]
        square = torch.stack(norms).square().sum()
        return math.sqrt(float(self.space.sum(square)))


class DifferenceGaussNewton:
    """G v of one batch: tangents of the outputs by differences, the rest on the kept graph.

    Args:
        split: Of the batch's kept graph.
        vector: The parameters.
        outputs_at: Values for the parameters to the outputs of the split's loss terms.
        space: Adds up squares over ranks that hold parts of the parameters.
        scale: The factor on the product where it arrives summed over ranks.
    """

    def __init__(
        self,
        split: Split,
        vector: ParameterVector,
        outputs_at: AtValues,
        space: Space = LOCAL,
        scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        if split.remainders:
            raise RuntimeError(
                "A term of the loss bypasses the outputs, and finite differences cannot take its "
                "Hessian."
            )
        self.loss_terms = split.loss_terms
        self.outputs = [z for loss_term in self.loss_terms for z in loss_term.outputs]
        if any(z.dtype not in (torch.float32, torch.float64) for z in self.outputs):
            raise RuntimeError("Finite differences need outputs in float32 or float64.")
        self.vector = vector
        self.scale = scale
        self.push = CentralDifference(outputs_at, vector.local, space)

    def __call__(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The product, by parameter."""
        pushed = iter(self.push(tangents))
        curved: list[Tensor] = []
        for loss_term in self.loss_terms:
            along = [next(pushed) for _ in loss_term.outputs]
            curved.extend(loss_term.hessian(*(t for t in along if t is not None)))
        if (scale := self.scale()) != 1.0:
            curved = [c * scale for c in curved]
        return self.vector.pull(self.outputs, curved, True)
