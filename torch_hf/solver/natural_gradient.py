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
INITIAL_RADIUS = 0.013
#: The weight of earlier slopes in their running mean; how fast the logarithm of the radius follows
#: it, per step, and the most that it changes in one.
SLOPE_MEMORY, ADAPTATION, MOST_CHANGE = 0.95, 0.15, 0.025
#: The slope at a step's end, over that at its beginning, that keeps the radius: on noisy batches
#: the loss rises at the end of steps long before shorter ones would be the faster way.
KEPT_SLOPE = 0.02
#: A single slope counts for no more than this.
MOST_SLOPE = 1.0
#: Beyond it the step is taken back.
OVERSHOT_SLOPE = 5.0
#: The factor on the radius where a step raised the loss of its own batch, or overshot on the next.
AFTER_REJECTION, AFTER_OVERSHOT = 0.5, 0.5


def initial_radius(loss: float) -> float:
    """The first radius: a part of the loss, so that the loss's scale does not matter.

    Example:
        >>> initial_radius(2.0)
        0.026
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


def mean_slope(before: float, slope: float, promised: float) -> float:
    """The running mean of slopes at steps' ends, over those at their beginnings.

    Args:
        before: The mean so far.
        slope: ``g^T d`` of the next batch's gradient along the last step.
        promised: The same of its own batch's gradient, below 0.

    Example:
        >>> mean_slope(0.0, -1.0, -2.0) < 0.0 < mean_slope(0.0, 1.0, -2.0)
        True
    """
    if not promised < 0 or not math.isfinite(slope):
        return before
    end = min(max(slope / -promised, -MOST_SLOPE), MOST_SLOPE)
    return SLOPE_MEMORY * before + (1.0 - SLOPE_MEMORY) * end


def adapted_radius(radius: float, mean: float) -> float:
    """The radius of the next step: longer where the loss still fell at the ends of the last ones.

    Args:
        radius: r of the last step.
        mean: Of the slopes, see :func:`mean_slope`.

    Example:
        >>> adapted_radius(1.0, -0.1) > 1.0 > adapted_radius(1.0, 0.1)
        True
    """
    change = ADAPTATION * (mean - KEPT_SLOPE)
    return radius * math.exp(-min(max(change, -MOST_CHANGE), MOST_CHANGE))


def overshot(slope: float, promised: float) -> bool:
    """Whether the last step went so far beyond the minimum that it is to be taken back."""
    if not promised < 0:
        return False
    return not slope <= -OVERSHOT_SLOPE * promised
