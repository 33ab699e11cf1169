"""Products by central differences, where an operation cannot be differentiated twice.

``J v = (f(theta + eps v) - f(theta - eps v)) / (2 eps)`` needs two more runs of the closure and
no second derivative; ``J^T`` is ordinary backward on the kept graph. For the Hessian the same is
done with the gradient. With ``eps |v| = u^(1/3) (1 + |theta|)``, u the rounding error of the
parameters' dtype, truncation and rounding are of one size (Nocedal & Wright 2006, section 8.1).

What counts is the precision of the computation, which no dtype shows: TF32 and autocast round
inside. Runs for differences are made without them as far as they can be switched off, and the
first difference is compared with that of the doubled step: where the two differ, other steps are
tried, and where rounding leaves none that serves, the product is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torch_hf.curvature.precision import WithoutAutocast, casts, full_precision, lowered
from torch_hf.curvature.products import scaled
from torch_hf.distributed import LOCAL, Space
from torch_hf.loss.ggn_split import Split
from torch_hf.vector import ParameterVector

#: Values for the parameters to what is differentiated, by tensor.
AtValues = Callable[[list[Tensor]], Sequence[Tensor | None]]


#: A difference that differs from that of the doubled step by less is good; by more, of no use.
GOOD, USELESS = 1e-3, 1e-2
#: Below so many units of rounding of the values a difference shows nothing of its own error.
UNSEEN = 100.0
#: Factors on the step that are tried where the usual one is not good.
FACTORS = (0.25, 0.0625, 4.0, 16.0)
#: Values that waver by more units of rounding over a minute step are computed in less than theirs.
WAVERS, MINUTE = 64.0, 1e-4


@dataclass
class StepChoice:
    """What the first difference showed, for all that come after it.

    Attributes:
        factor: On the usual step; None as long as none was chosen.
        without_autocast: Whether the closure's own autocast is to be switched off.
    """

    factor: float | None = None
    without_autocast: bool = False


class CentralDifference:
    """The derivative of ``at`` at the parameters' present values, along tangents.

    Args:
        at: What is differentiated.
        params: Tensors that hold the values.
        space: Adds up squares over ranks that hold parts of them.
        choice: Shared by differences of the same function.
        outputs: Values of ``at`` with their graph, which shows whether types are cast.

    Raises:
        RuntimeError: A parameter is in half precision, where differences are all rounding; when
            called, that the computation is.
    """

    def __init__(
        self,
        at: AtValues,
        params: Sequence[Tensor],
        space: Space = LOCAL,
        choice: StepChoice | None = None,
        outputs: Sequence[Tensor] = (),
    ) -> None:
        self.run = at
        self.space = space
        self.choice = StepChoice() if choice is None else choice
        self.outputs = outputs
        self.values = [p.detach() for p in params]
        self.nothing = torch.zeros((), dtype=torch.float64, device=self.values[0].device)
        dtypes = [p.dtype for p in params]
        if any(d not in (torch.float32, torch.float64) for d in dtypes):
            raise RuntimeError(
                "Finite differences need parameters in float32 or float64, got "
                f"{', '.join(sorted({str(d) for d in dtypes}))}. Rounding in half precision hides "
                "the differences. Keep the parameters in float32."
            )
        self.rounding = max(torch.finfo(d).eps for d in dtypes)
        self.unit = self.rounding ** (1 / 3)
        self.size = self._norm(self.values)

    def __call__(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """The derivative, by tensor; None where there is none."""
        length = self._norm(tangents)
        if length == 0.0 or not math.isfinite(length):
            return [None if t is None else t * length for t in self.at(self.values)]
        step = self.unit * (1.0 + self.size) / length
        if self.choice.factor is None:
            return self._chosen(tangents, step)
        return self._along(tangents, step * self.choice.factor)

    def at(self, values: list[Tensor]) -> Sequence[Tensor | None]:
        """The values, computed as exactly as torch can be told to."""
        device = values[0].device
        bare = WithoutAutocast(device) if self.choice.without_autocast else nullcontext()
        with full_precision(device), bare:
            return self.run(values)

    def _along(self, tangents: Sequence[Tensor], step: float) -> list[Tensor | None]:
        ahead, behind = self._moved(tangents, step), self._moved(tangents, -step)
        return [None if d is None else d.div_(2.0 * step) for d in _minus(ahead, behind)]

    def _moved(self, tangents: Sequence[Tensor], step: float) -> Sequence[Tensor | None]:
        return self.at([p + step * t for p, t in zip(self.values, tangents, strict=True)])

    # --- the step's choice, at the first difference ---

    def _chosen(self, tangents: Sequence[Tensor], step: float) -> list[Tensor | None]:
        """The derivative by the step that serves best, which is kept for the next ones."""
        found, error = self._judged(tangents, step)
        if error is None:  # nothing to be seen along this tangent: the next may show more
            return found
        if error > GOOD and casts(self.outputs) and not self.choice.without_autocast:
            self.choice.without_autocast = True
            found, error = self._judged(tangents, step)
        tried = [(error or 0.0, 1.0, found)]
        for factor in FACTORS if tried[0][0] > GOOD else ():
            found, error = self._judged(tangents, step * factor)
            tried.append((math.inf if error is None else error, factor, found))
            if tried[-1][0] <= GOOD:
                break
        error, factor, found = min(tried, key=lambda one: one[0])
        if error > USELESS and self._wavers(tangents, step):
            raise RuntimeError(self._refusal(error))
        self.choice.factor = factor
        return found

    def _judged(
        self, tangents: Sequence[Tensor], step: float
    ) -> tuple[list[Tensor | None], float | None]:
        """The derivative, and how far that of the doubled step differs; None if unseen."""
        ahead, behind = self._moved(tangents, step), self._moved(tangents, -step)
        size = self._norm(ahead)
        found = [None if d is None else d.div_(2.0 * step) for d in _minus(ahead, behind)]
        doubled = self._along(tangents, 2.0 * step)
        change, length = self._norm(_minus(found, doubled)), self._norm(found)
        if not length or 2.0 * step * length < UNSEEN * self.rounding * size:
            return found, None
        return found, change / length

    def _wavers(self, tangents: Sequence[Tensor], step: float) -> bool:
        """Whether values are rounded to less than their type holds: their fourth differences.

        Over a minute step they are rounding alone, whatever kinks the function has (More & Wild
        2011, "Estimating computational noise").
        """
        minute = step * max(MINUTE, 100.0 * self.rounding) / self.unit
        rows = [list(self._moved(tangents, k * minute)) for k in (-2, -1, 0, 1, 2)]
        size = self._norm(rows[2])
        for _ in range(4):
            rows = [_minus(high, low) for low, high in pairwise(rows)]
        noise = self._norm(rows[0]) / math.sqrt(70.0)
        return noise > WAVERS * self.rounding * size

    def _refusal(self, error: float) -> str:
        device = self.values[0].device
        settings = "; ".join(lowered(device)) or "none that torch reports"
        return (
            f"Finite differences are wrong by about {error:.0%} here: the closure computes in "
            f"lower precision than its tensors have ({self.values[0].dtype}). Compute the "
            "network's outputs without autocast, half-precision or quantized layers: with "
            f'torch.autocast("{device.type}", enabled=False): ... Settings that lower precision: '
            f"{settings}."
        )

    def _norm(self, tensors: Sequence[Tensor | None]) -> float:
        found = [t.detach() for t in tensors if t is not None]
        norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in found]
        square = torch.stack([*norms, self.nothing]).square().sum()
        return math.sqrt(float(self.space.sum(square)))


def _minus(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(a, b, strict=True)
    return [None if x is None or y is None else x - y for x, y in pairs]


class DifferenceGaussNewton:
    """G v of one batch: tangents of the outputs by differences, the rest on the kept graph.

    Args:
        split: Of the batch's kept graph.
        vector: The parameters.
        outputs_at: Values for the parameters to the outputs of the split's loss terms.
        space: Adds up squares over ranks that hold parts of the parameters.
        scale: The factor on the product where it arrives summed over ranks.
        choice: Of the step, shared by the batches of one operator.
    """

    def __init__(
        self,
        split: Split,
        vector: ParameterVector,
        outputs_at: AtValues,
        space: Space = LOCAL,
        scale: Callable[[], float] = lambda: 1.0,
        choice: StepChoice | None = None,
    ) -> None:
        if split.remainders:
            raise RuntimeError(
                "A term of the loss bypasses the outputs, and finite differences cannot compute "
                "its Hessian. For an L2 penalty on parameters, use weight_decay."
            )
        self.loss_terms = split.loss_terms
        self.outputs = [z for loss_term in self.loss_terms for z in loss_term.outputs]
        if any(z.dtype not in (torch.float32, torch.float64) for z in self.outputs):
            raise RuntimeError(
                "Finite differences need outputs that are computed in float32 or float64, got "
                "lower precision. Disable autocast around the network."
            )
        self.vector = vector
        self.scale = scale
        self.push = CentralDifference(outputs_at, vector.local, space, choice, self.outputs)

    def __call__(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The product, by parameter."""
        pushed = iter(self.push(tangents))
        curved: list[Tensor] = []
        for loss_term in self.loss_terms:
            along = [next(pushed) for _ in loss_term.outputs]
            curved.extend(loss_term.hessian(*(t for t in along if t is not None)))
        return self.vector.pull(self.outputs, scaled(curved, self.scale()), True)
