"""Natural-gradient steps on Kronecker factors: how long they are, and how that length adapts.

With F the factors' approximation of the curvature, the step on one batch is

    d = mu d_last - nu F^-1 g,    nu = min(1, sqrt(r / g^T F^-1 g)),

so that its new part changes the model by at most ``r / 2`` of the loss's own quadratic (for
cross-entropy a Kullback-Leibler divergence in nats; Ba, Grosse & Martens 2017). No product and no
second loss is computed. The radius r adapts to what the next batch says: its gradient along the
last step is an unbiased estimate of the loss's slope where that step ended. A slope that still
falls asks for longer steps, one that rises for shorter ones, as in hypergradient descent (Baydin et
al. 2018), here on the logarithm of r.
"""

from __future__ import annotations

import math

#: mu, the part of the last step that the next one repeats.
MOMENTUM = 0.5
#: The first radius, as a part of the loss.
INITIAL_RADIUS = 0.01
#: How fast the logarithm of the radius follows the slopes, per step.
ADAPTATION = 0.1
#: The slope at a step's end, over that at its beginning, that keeps the radius: batches are noisy,
#: and a radius that ends exactly where the slope vanishes is too short for the steps to come.
KEPT_SLOPE = 0.03
#: Slopes beyond these say no more.
LEAST_SLOPE, MOST_SLOPE = -1.0, 5.0
#: The factor on the radius where a step raised the loss of its own batch, or overshot on the next.
AFTER_REJECTION, AFTER_OVERSHOT = 0.25, 0.5


def initial_radius(loss: float) -> float:
    """The first radius: a part of the loss, so that the loss's scale does not matter.

    Example:
        >>> initial_radius(2.0)
        0.02
    """
    return INITIAL_RADIUS * abs(loss)


def step_factor(radius: float, square: float) -> float:
    """nu, the factor on ``F^-1 g`` that keeps the step within the radius.

    Args:
        radius: r, in units of the loss.
        square: ``g^T F^-1 g``, the squared length of the whole natural gradient.

    Example:
        >>> step_factor(0.04, 1.0), step_factor(0.04, 0.01)
        (0.2, 1.0)
    """
    return 1.0 if square <= radius else math.sqrt(radius / square)


def adapted_radius(radius: float, slope: float, promised: float) -> float:
    """The radius after the next batch's gradient was seen.

    Args:
        radius: r of the last step.
        slope: ``g^T d`` of the next batch's gradient along the last step.
        promised: The same of its own batch's gradient, below 0.

    Example:
        >>> adapted_radius(1.0, -1.0, -2.0) > 1.0  # it still falls there: go further
        True
        >>> adapted_radius(1.0, 1.0, -2.0) < 1.0  # it rises: too far
        True
    """
    if not promised < 0 or not math.isfinite(slope):
        return radius
    end = min(max(slope / -promised, LEAST_SLOPE), MOST_SLOPE)
    return radius * math.exp(-ADAPTATION * (end - KEPT_SLOPE))


def overshot(slope: float, promised: float) -> bool:
    """Whether the last step went so far beyond the minimum that it is to be taken back."""
    if not promised < 0:
        return False
    return not slope <= -MOST_SLOPE * promised
