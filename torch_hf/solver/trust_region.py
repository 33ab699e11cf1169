"""The trust region: all that reads the reduction ratio rho, actual over predicted change.

The prediction and rho itself, the rule for lambda (Levenberg-Marquardt), and how much of CG's last
solution the next solve starts from (its warm start).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_hf.distributed import LOCAL, Space
from torch_hf.solver.cg import Iterate

#: Lambda of the first step in units of the curvature along the gradient.
INITIAL_DAMPING = 1.0
#: Martens 2010, section 4.1 (after Levenberg-Marquardt): the factor, and the thresholds on rho.
DAMPING_FACTOR = 1.5
THRESHOLDS_ON_SAME_DATA = 0.25, 0.75
#: The ratio on a sample is biased upwards for the step fitted to it, so thresholds are higher.
THRESHOLDS_ON_NEW_DATA = 0.5, 0.9
#: Lambda falls by this factor under a good model, where other steps came since it was learnt.
STALE_FACTOR = 10.0
#: Where CG stops by itself within so few iterations, lambda outweighs the curvature and falls by
#: this factor.
EASY_FACTOR, EASY_ITERATIONS = 4.0, 20
#: Where the loss falls by so much of what the quadratic predicted, no earlier iterate is tried, and
#: the next solve starts from the whole ``WARM_START_FACTOR``.
TRUSTED_RATIO = 0.75
#: Beyond it a ratio says less about the model than about the closure.
ABSURD_RATIO = 10.0
#: After so many rejections at one point lambda rises by this factor.
PATIENT_REJECTIONS, HURRIED_FACTOR = 2, 10.0
#: By how much lambda rises at once, at the most.
MOST_PROMISED = 1e16
#: What the next solve starts from of CG's last solution, where the ratio is trusted.
WARM_START_FACTOR = 0.9
#: From a warm start, so few iterations act as momentum.
FEW_ITERATIONS = 3
#: By how many units of rounding a loss may be off: it is a sum over cases in its own precision.
LOSS_ULPS = 4.0
#: Lambda is at most the curvature seen over this power of the rounding unit: 1.6e5 times it in
#: float32, 5e11 times it in float64. Beyond that a step is too short to tell anything.
CEILING_POWER = 0.75


def initial_damping(gradient: Tensor, product: Tensor, space: Space = LOCAL) -> float:
    """The curvature along the gradient, ``g^T G g / g^T g``, whatever the loss's scale.

    Args:
        gradient: g, of shape (P,).
        product: G g, of shape (P,).
        space: Takes the dot products.

    Example:
        >>> import torch
        >>> initial_damping(torch.tensor([2.0, 0.0]), torch.tensor([6.0, 0.0]))
        3.0
    """
    along = curvature_along(gradient, product, space)
    if not along or not math.isfinite(along):
        return 1.0
    # a negative curvature is mirrored by G + lambda I, so that it is never 0
    return INITIAL_DAMPING * along if along > 0 else -2.0 * along


def curvature_along(v: Tensor, product: Tensor, space: Space = LOCAL) -> float:
    """The Rayleigh quotient ``v^T G v / v^T v``; nan where v is zero or too large to square."""
    bend, square = space.dots((v, product), (v, v))
    return float(bend / square)


def resolution(loss: float, dtype: torch.dtype, noise: float = 0.0) -> float:
    """The least change of a loss that says something: its rounding, or the noise measured.

    Args:
        loss: At the present parameters.
        dtype: Of the loss.
        noise: By how much it was seen to scatter where it should have fallen.
    """
    return max(LOSS_ULPS * torch.finfo(dtype).eps * abs(loss), noise)


def damping_without_curvature(gradient_norm: float, loss: float) -> float:
    """Lambda of a gradient step that promises a fall by half of the loss; 0 where there is none.

    Example:
        >>> damping_without_curvature(2.0, 0.5)
        8.0
    """
    if not loss or not math.isfinite(loss):
        return 0.0
    return gradient_norm / abs(loss) * gradient_norm


def damping_ceiling(curvature: float, dtype: torch.dtype) -> float:
    """The largest lambda of use beside this curvature; the largest there is where none was seen.

    Example:
        >>> f"{damping_ceiling(2.0, torch.float32):.1e}, {damping_ceiling(0.0, torch.float32):.1e}"
        '3.1e+05, 4.1e+31'
    """
    kind = torch.finfo(dtype)
    most = kind.max * kind.eps
    return float(min(curvature / kind.eps**CEILING_POWER, most)) if curvature > 0 else most


def predict(
    chosen: Iterate, length: float, damping: float, space: Space = LOCAL
) -> tuple[float, float]:
    """The change that the model predicts for ``length * d``, and the lambda lost in rounding.

    The model is q without the damping term. The ratio to the damped q lies above 1 wherever lambda
    is large, so lambda would fall while it is still needed
    (``docs/records/ratio-without-damping.md`` has the figures).
    """
    bend = chosen.value - chosen.slope  # 1/2 d^T (G + lambda I) d
    square = space.dot(chosen.vector, chosen.vector)
    undamped = bend - 0.5 * damping * square
    floor = torch.finfo(chosen.vector.dtype).eps * abs(2.0 * bend) / square if square else 0.0
    return length * chosen.slope + length**2 * undamped, floor


def reduction_ratio(loss: float, new_loss: float, predicted: float) -> float:
    """Actual over predicted change, ``(new_loss - loss) / q(d)``; nan where q(d) is not below 0.

    Example:
        >>> reduction_ratio(2.0, 1.0, -2.0)
        0.5
    """
    if not predicted < 0 or not math.isfinite(new_loss):
        return math.nan
    return (new_loss - loss) / predicted


def ratio_is_absurd(ratio: float) -> bool:
    """Whether a ratio says that the closure does not repeat, rather than that the model is poor."""
    return not abs(ratio) <= ABSURD_RATIO


def next_damping(
    damping: float,
    ratio: float,
    accepted: bool,
    floor: float,
    *,
    thresholds: tuple[float, float] = THRESHOLDS_ON_SAME_DATA,
    easy: bool = False,
    curvature: float = math.nan,
    doubt: float = 0.0,
    promise: float = 0.0,
    rejections: float = 0,
    stale: bool = False,
) -> float:
    """Lambda for the next step.

    Up by 3/2 where the ratio is below the lower threshold (or undefined, or the step was
    rejected), down by 2/3 above the upper one, never below the floor. A ratio that rounding may
    have put on the other side of a threshold says nothing.

    Args:
        damping: Lambda of this step.
        ratio: Actual over predicted change.
        accepted: Whether the parameters moved.
        floor: The lambda that rounding swallows.
        thresholds: 1/4 and 3/4 (Martens 2010); higher on new data.
        easy: CG stopped by itself after a few iterations, so lambda outweighs the curvature. Where
            the ratio is within 1/10 of 1, it falls by 4, or halfway (in decades) to the curvature
            seen, if that is more.
        curvature: The curvature seen, if it is known.
        doubt: By how much rounding of the loss may have changed the ratio.
        promise: The predicted fall, in units of the loss. Where a rejected step promised many times
            the loss, as from curvature that has vanished, lambda rises by that factor at once.
        rejections: How many steps in a row were rejected before this one, on the same data. From
            the third on lambda rises by 10.
        stale: Lambda is that of conjugate gradients long ago, with steps of another kind since.
            It falls by 10 where the ratio is at least 9/10.

    Example:
        >>> next_damping(3.0, 0.9, True, 1e-8), next_damping(2.0, 0.5, True, 1e-8)
        (2.0, 2.0)
        >>> next_damping(2.0, 0.1, True, 1e-8), next_damping(2.0, 0.9, False, 1e-8)
        (3.0, 3.0)
    """
    low, high = thresholds
    if not accepted and doubt < low and promise > ABSURD_RATIO:
        damping = damping * min(promise, MOST_PROMISED)
    elif not ratio + doubt >= low or (not accepted and doubt < low):
        hurry = not accepted and rejections >= PATIENT_REJECTIONS
        damping = damping * (HURRIED_FACTOR if hurry else DAMPING_FACTOR)
    elif easy and abs(ratio - 1.0) + doubt <= 0.1:
        damping = min(damping / EASY_FACTOR, halfway(damping, curvature))
    elif stale and accepted and ratio - doubt >= 0.9:
        damping = damping / STALE_FACTOR
    elif accepted and ratio - doubt > high:
        damping = damping / DAMPING_FACTOR
    return max(damping, floor)


def halfway(damping: float, curvature: float) -> float:
    """Lambda half of the way, in decades, down to the curvature; itself where it is below."""
    return math.sqrt(damping) * math.sqrt(curvature) if 0 < curvature < damping else damping


def warm_start_factor(ratio: float | None, max_iter: int, ratio_misses_noise: bool) -> float:
    """The factor on CG's last solution where the next solve starts; 0.9 for a ratio above 3/4.

    A few iterations that start near the last solution act as momentum. On small noisy samples the
    loss falls by less than the quadratic predicts, and momentum carries the noise along. So below a
    ratio of 3/4 the factor shrinks with it (``docs/records/cg-start.md`` has the figures).

    Args:
        ratio: Actual over predicted change in the last step, if there was one.
        max_iter: How many iterations CG may make.
        ratio_misses_noise: Whether products use the same new cases as the gradient. The ratio then
            does not see noise, and short solves start at zero.

    Example:
        >>> [warm_start_factor(ratio, 3, False) for ratio in (0.8, 0.375, -3.0)]
        [0.9, 0.45, 0.0]
        >>> warm_start_factor(1.0, 3, True), warm_start_factor(None, 20, True)
        (0.0, 0.9)
    """
    if ratio_misses_noise and max_iter <= FEW_ITERATIONS:
        return 0.0
    if ratio is None:
        return WARM_START_FACTOR
    kept = 0.0 if math.isnan(ratio) else max(ratio, 0.0)  # undefined: nothing was predicted
    return WARM_START_FACTOR * min(kept / TRUSTED_RATIO, 1.0)
