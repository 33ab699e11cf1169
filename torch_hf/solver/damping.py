"""The damping rule: lambda follows how well the quadratic predicted the loss."""

from __future__ import annotations

import math

from torch import Tensor

from torch_hf.distributed import LOCAL, Space

#: Lambda of the first step in units of the curvature along the gradient.
INITIAL = 1.0
#: Martens 2010, section 4.1 (after Levenberg-Marquardt): the factor, and the thresholds on rho.
FACTOR = 1.5
ON_SAME_DATA = 0.25, 0.75
#: A sample flatters the step that was fitted to it: on new data more is asked of it.
ON_NEW_DATA = 0.5, 0.9
#: Where CG ends by itself after so few iterations lambda rules: it falls by this factor.
EASY, EASY_ITERATIONS = 4.0, 20


def initial_damping(gradient: Tensor, product: Tensor, space: Space = LOCAL) -> float:
    """The curvature along the gradient, ``g^T G g / g^T g``, so that the loss's scale is no matter.

    Args:
        gradient: g, of shape (P,).
        product: G g, of shape (P,).
        space: Takes the dot products.

    Example:
        >>> import torch
        >>> initial_damping(torch.tensor([2.0, 0.0]), torch.tensor([6.0, 0.0]))
        3.0
    """
    bend, square = space.dots((gradient, product), (gradient, gradient))
    along = float(bend / square)
    if not along or not math.isfinite(along):
        return 1.0
    return INITIAL * along if along > 0 else -2.0 * along  # G + lambda I mirrors it, never 0


def reduction_ratio(loss: float, new_loss: float, predicted: float) -> float:
    """Actual over predicted change, ``(new_loss - loss) / q(d)``; nan where q(d) is not below 0.

    Example:
        >>> reduction_ratio(2.0, 1.0, -2.0)
        0.5
    """
    if not predicted < 0 or not math.isfinite(new_loss):
        return math.nan
    return (new_loss - loss) / predicted


def next_damping(
    damping: float,
    ratio: float,
    accepted: bool,
    floor: float,
    *,
    thresholds: tuple[float, float] = ON_SAME_DATA,
    easy: bool = False,
) -> float:
    """Lambda for the next step.

    Up by 3/2 where the ratio is below the lower threshold (or undefined, or the step was
    rejected), down by 2/3 above the upper one, never below the floor.

    Args:
        damping: Lambda of this step.
        ratio: Actual over predicted change.
        accepted: Whether the parameters moved.
        floor: The lambda that rounding swallows.
        thresholds: 1/4 and 3/4 (Martens 2010); higher on new data.
        easy: CG ended by itself after a few iterations: lambda outweighs the curvature, and falls
            by 4 where the ratio is within 1/10 of 1.

    Example:
        >>> next_damping(3.0, 0.9, True, 1e-8), next_damping(2.0, 0.5, True, 1e-8)
        (2.0, 2.0)
        >>> next_damping(2.0, 0.1, True, 1e-8), next_damping(2.0, 0.9, False, 1e-8)
        (3.0, 3.0)
    """
    low, high = thresholds
    if not accepted or not ratio >= low:
        damping = damping * FACTOR
    elif easy and abs(ratio - 1.0) <= 0.1:
        damping = damping / EASY
    elif ratio > high:
        damping = damping / FACTOR
    return max(damping, floor)
