"""A line search for the strong Wolfe conditions (Nocedal & Wright 2006, algorithms 3.5 and 3.6).

Both conditions are needed by quasi-Newton updates: the loss falls in proportion to the slope, and
the slope at the end is small enough for the change of the gradient to carry curvature. Where
rounding hides the change of the loss, the slopes alone tell (the approximate Wolfe conditions of
Hager & Zhang 2005, "A new conjugate gradient method with guaranteed descent").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

#: Sufficient decrease, and the part of the slope that may be left at the end.
ARMIJO, CURVATURE = 1e-4, 0.9
#: Evaluations of one search, at the most.
MOST_TRIALS = 25
#: By how much a length grows where the loss still falls.
LEAST_GROWTH, MOST_GROWTH = 1.01, 10.0
#: A search ends so many first lengths away: a loss without a bound has no minimum to look for.
FURTHEST = 1e6
#: An interpolation this close to an end, in parts of the width, is moved inwards the second time.
INSIDE, NEXT = 0.1, 1e-3

#: The loss and its gradient (P,) at a length along the direction.
Along = Callable[[float], tuple[float, Tensor]]


class Point(NamedTuple):
    """A point on the line.

    Attributes:
        length: From the beginning.
        loss: There; inf where it is no number.
        gradient: Of shape (P,).
        slope: The gradient's product with the direction.
    """

    length: float
    loss: float
    gradient: Tensor
    slope: float


def strong_wolfe(
    along: Along, start: Point, direction: Tensor, first: float, rounding: float = 0.0
) -> Point:
    """A point where both conditions hold, or the lowest one found; ``start`` where none is lower.

    Args:
        along: The loss along the direction.
        start: Of length 0, with a slope below 0.
        direction: Of shape (P,).
        first: The first length tried.
        rounding: Losses that differ by less count as equal.

    Example:
        >>> import torch
        >>> def along(t):
        ...     return (t - 3.0) ** 2, torch.tensor([2.0 * (t - 3.0)])
        >>> start = Point(0.0, 9.0, torch.tensor([-6.0]), -6.0)
        >>> strong_wolfe(along, start, torch.tensor([1.0]), 1.0).loss <= 4.0
        True
    """
    best, low, high, length, close = start, start, None, first, False
    for _ in range(MOST_TRIALS):
        point = _at(along, direction, length)
        if point.loss < best.loss:
            best = point
        if _rises(point, start, rounding) or _is_higher(point, low, rounding):
            high = point
        elif abs(point.slope) <= CURVATURE * abs(start.slope):
            return point
        elif point.slope * ((high.length if high else math.inf) - low.length) >= 0:
            low, high = point, low  # the slope points back: a minimum lies between the two
        else:
            low, before = point, low
            if high is None:
                if length >= FURTHEST * first:
                    break
                length = _further(before, point)
                continue
        assert high is not None
        length, close = _between(low, high, close)
        if abs(high.length - low.length) <= 1e-12 * max(abs(low.length), abs(high.length)):
            break
    return best


def _at(along: Along, direction: Tensor, length: float) -> Point:
    loss, gradient = along(length)
    slope = float(gradient @ direction)
    if not (math.isfinite(loss) and math.isfinite(slope)):
        return Point(length, math.inf, gradient, math.nan)
    return Point(length, loss, gradient, slope)


def _rises(point: Point, start: Point, rounding: float) -> bool:
    """Whether the loss did not fall in proportion."""
    if abs(point.loss - start.loss) < rounding:
        return point.slope > (2.0 * ARMIJO - 1.0) * start.slope
    return not point.loss <= start.loss + ARMIJO * point.length * start.slope


def _is_higher(point: Point, low: Point, rounding: float) -> bool:
    if abs(point.loss - low.loss) < rounding:
        return False  # the slope there tells
    return point.loss >= low.loss


def _further(before: Point, point: Point) -> float:
    """A greater length, by the cubic through both ends."""
    low, high = LEAST_GROWTH * point.length, MOST_GROWTH * point.length
    least = _minimum(before, point)
    return min(max(least, low), high) if least > point.length else high  # it does not curve upwards


def _between(low: Point, high: Point, was_close: bool) -> tuple[float, bool]:
    """A length between two, and whether it is close to one of them: not twice in a row."""
    left, right = sorted((low.length, high.length))
    margin = INSIDE * (right - left)
    if not math.isfinite(high.loss):
        return low.length + 0.2 * (high.length - low.length), False
    length = _minimum(low, high)
    close = not left + margin <= length <= right - margin
    if close and (was_close or not left < length < right):
        return min(max(length, left + margin), right - margin), False
    least = NEXT * (right - left)  # nearer to an end rounding would hide the difference
    return min(max(length, left + least), right - least), close


def _minimum(a: Point, b: Point) -> float:
    """Where the cubic through two points with these slopes is least (equation 3.59)."""
    width = b.length - a.length
    if not width or not math.isfinite(b.slope):
        return a.length + 0.5 * width
    d1 = a.slope + b.slope - 3.0 * (b.loss - a.loss) / width
    square = d1 * d1 - a.slope * b.slope
    if not 0 <= square < math.inf:
        return a.length + 0.5 * width
    d2 = math.copysign(math.sqrt(square), width)
    below = b.slope - a.slope + 2.0 * d2
    return b.length - width * (b.slope + d2 - d1) / below if below else a.length + 0.5 * width
