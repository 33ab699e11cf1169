"""Rules that say how fast batches grow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch_hf import _checks
from torch_hf.report import StepReport


class Growth:
    """A growth rule; it keeps no state. The larger of its two answers is the size."""

    def scheduled(self, initial: int, times: int) -> float:
        """Return the size after ``times`` epochs (or steps); the sampler rounds it."""
        return initial

    def measured(self, report: StepReport, size: float) -> float:
        """Return the size a step asks for; ``size`` is the largest asked for so far."""
        return size


@dataclass(frozen=True)
class GeometricGrowth(Growth):
    """Sizes ``initial * factor**k``, factor >= 1: a linear rate (Friedlander & Schmidt 2012)."""

    factor: float

    def __post_init__(self) -> None:
        _checks.between("growth, unless it is a Growth,", self.factor, 1.0)

    def scheduled(self, initial: int, times: int) -> float:
        """Return ``initial * factor**times``."""
        overflows = times * math.log(self.factor) > 700
        return math.inf if overflows else initial * float(self.factor) ** times


@dataclass(frozen=True)
class VarianceGrowth(Growth):
    """The norm test of Byrd, Chin, Nocedal & Wu (2012): grow where noise drowns the gradient.

    Where ``||Var||_1 / |S| > theta**2 * ||grad||**2`` (Var over the cases of the batch S), ask
    for the size that passes, from the next epoch (or batch drawn) on. ``theta`` is positive.
    """

    theta: float = 0.25

    def __post_init__(self) -> None:
        _checks.between("theta", self.theta, 1e-9)

    def measured(self, report: StepReport, size: float) -> float:
        """Return ``||Var||_1 / (theta**2 * ||grad||**2)``; ask for Var if it was not measured."""
        variance = report.gradient_variance
        if variance is None:
            report.requests.gradient_variance = True
            return size
        if not math.isfinite(variance) or math.isnan(report.gradient_norm):
            return size
        norm, exponent = math.frexp(report.gradient_norm)
        allowed = self.theta * self.theta * norm * norm
        variance = _times_power_of_two(variance, -2 * exponent)  # squares of norms overflow
        if not variance > allowed * report.batch_cases:
            return size
        wanted = variance / allowed if allowed > 0 else math.inf
        return math.ceil(wanted) if math.isfinite(wanted) else wanted


def _times_power_of_two(x: float, exponent: int) -> float:
    try:
        return math.ldexp(x, exponent)
    except OverflowError:
        return math.copysign(math.inf, x)


@dataclass(frozen=True)
class RatioGrowth(Growth):
    """Grow faster where steps gain less than their quadratic predicted.

    A step asks for ``1 + least + rate * (1 - rho)`` times the size, rho its ``reduction_ratio``
    within [0, 1], and 0 where there is none. Use it with ``grow_every="step"`` and products on a
    part of each batch: rho is then low where that part represents the batch poorly. It costs
    nothing.

    Example:
        >>> from torch_hf import GrowingBatchSampler
        >>> sampler = GrowingBatchSampler(60_000, 1000, RatioGrowth(), grow_every="step")
    """

    least: float = 0.0025
    rate: float = 0.025

    def __post_init__(self) -> None:
        _checks.between("least", self.least, 0.0)
        _checks.between("rate", self.rate, 0.0)

    def measured(self, report: StepReport, size: float) -> float:
        """Return ``size`` times ``1 + least + rate * (1 - rho)``."""
        ratio = report.reduction_ratio
        if math.isnan(ratio) and report.accepted:  # a light step, whose ratio nobody measured
            return size * (1.0 + self.least)
        kept = 0.0 if math.isnan(ratio) else min(max(ratio, 0.0), 1.0)
        return size * (1.0 + self.least + self.rate * (1.0 - kept))
