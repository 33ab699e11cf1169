"""From CG's iterates to a move: walk back while the loss improves, then Armijo's rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_hf.distributed import LOCAL, Space
from torch_hf.solver.cg import Iterate
from torch_hf.solver.trust_region import TRUSTED_RATIO, predict, reduction_ratio

#: Martens 2010's code: sufficient decrease c, shrinking factor, most tries.
SUFFICIENT_DECREASE, SHRINK, MAX_TRIES = 1e-2, 0.8, 60
#: A step goes at most 2 to this times as far along negative curvature as its size says.
MAX_DOUBLINGS = 30
#: Said where rounding hides what is left to gain.
CONVERGED = "converged: the predicted decrease is below the rounding of the loss"
#: Said where no length lowers the loss.
NO_DECREASE = "the line search found no decrease of the loss"
NO_DESCENT = "CG found no descent direction"

#: The loss at ``theta + length * direction``.
LossAlong = Callable[[Tensor, float], float]


class Backtracked(NamedTuple):
    """The iterate chosen and the loss at its end."""

    iterate: Iterate
    loss: float


class Step(NamedTuple):
    """How far to go along a direction, and the loss there; length 0 is no step."""

    length: float
    loss: float
    noise: float = 0.0  # how far losses lay above the first where lengths came to nothing


class SearchResult(NamedTuple):
    """What a search came to.

    Attributes:
        direction: Of shape (P,); None where the parameters are to stay.
        length: The factor on it.
        loss: The loss where the parameters will be.
        ratio: Actual over predicted change at the iterate that backtracking chose.
        floor: The lambda below which rounding swallows it.
        reason: Why the step was rejected or shortened; empty otherwise.
        doubt: By how much rounding of the loss may have changed the ratio.
        noise: By how much the loss scatters, as far as this search saw.
        converged: Whether rounding hides what is left to gain.
        promise: The predicted fall, in units of the loss; 0 where nothing was predicted.
    """

    direction: Tensor | None
    length: float
    loss: float
    ratio: float = math.nan
    floor: float = 0.0
    reason: str = ""
    doubt: float = 0.0
    noise: float = 0.0
    converged: bool = False
    promise: float = 0.0


def search(
    loss_along: LossAlong,
    candidates: Sequence[Iterate],
    length: float,
    start_loss: float,
    damping: float,
    space: Space = LOCAL,
    least: float = 0.0,
) -> SearchResult:
    """Backtracking, then the line search, and the ratio that the damping rule goes by.

    Where the quadratic predicts less than what can be told from rounding, nothing is tried.

    Args:
        loss_along: The loss at theta + length * direction.
        candidates: CG's iterates, in the order of the solve.
        length: The factor on them to start from, ``lr``.
        start_loss: The loss at theta.
        damping: Lambda in the iterates' values of q.
        space: Takes the dot products.
        least: The least change of the loss that says something.
    """
    if length == 0.0:
        return SearchResult(None, 0.0, start_loss, reason="lr is 0")
    if not candidates[-1].slope < 0:
        return SearchResult(None, 0.0, start_loss, reason=NO_DESCENT)
    predicted, floor = predict(candidates[-1], length, damping, space)
    if -least < predicted < 0 and -least < length * candidates[-1].slope:
        return SearchResult(None, 0.0, start_loss, floor=floor, reason=CONVERGED, converged=True)
    enough = start_loss + TRUSTED_RATIO * predicted if predicted < 0 else -math.inf
    chosen, loss = backtrack(loss_along, candidates, length, enough)
    step = armijo(
        loss_along,
        chosen.vector,
        start_loss=start_loss,
        slope=chosen.slope,
        length=length,
        first_loss=loss,
        least=least,
    )
    if chosen is not candidates[-1]:
        predicted, floor = predict(chosen, length, damping, space)
    vector = chosen.vector
    if chosen.escape is not None and step.length == length:
        vector, lower = go_further(loss_along, chosen, length, start_loss, loss)
        step = step._replace(loss=lower)
    ratio = reduction_ratio(start_loss, loss, predicted)
    noise = max(least, step.noise)
    found = SearchResult(
        vector if step.length else None,
        step.length,
        step.loss,
        ratio,
        floor,
        doubt=noise / abs(predicted) if predicted else 0.0,
        noise=step.noise,
        promise=-predicted / abs(start_loss) if start_loss else 0.0,
    )
    if step.length == 0.0:
        if abs(predicted) <= noise:
            return found._replace(reason=CONVERGED, converged=True)
        return found._replace(reason=NO_DECREASE)
    if step.length != length:
        reason = f"line search shortened the step to {step.length / length:.3g} of its length"
        return found._replace(reason=reason)
    return found


def scaled(
    iterates: Sequence[Iterate],
    rates: Tensor | float,
    gradient: Tensor,
    product: Callable[[Tensor], Tensor],
    space: Space = LOCAL,
) -> tuple[Sequence[Iterate], float]:
    """CG's iterates under ``lr``, and the length to start the search from.

    A common rate is that length. Where parameters have their own, the last iterate alone is scaled
    by them, if it still is a direction of descent.

    Args:
        iterates: In the order of the solve.
        rates: One for all parameters, or of shape (P,).
        gradient: g, of shape (P,).
        product: v to ``(G + lambda I) v``.
        space: Where the vectors live.
    """
    if not isinstance(rates, Tensor):
        return iterates, rates
    last = iterates[-1]
    d = last.vector * space.own(rates)
    slope = space.dot(gradient, d)
    if not slope < 0:
        return iterates, float(rates.max())
    bend = space.dot(d, product(d))
    return [Iterate(last.iteration, slope + 0.5 * bend, slope, d)], 1.0


def repeats(loss_along: LossAlong, direction: Tensor) -> bool:
    """Whether the loss at the present parameters is the same when it is computed again."""
    first, second = loss_along(direction, 0.0), loss_along(direction, 0.0)
    return same_loss(first, second, direction.dtype)


def same_loss(first: float, second: float, dtype: torch.dtype) -> bool:
    """Whether two losses at the same parameters differ by no more than kernels may."""
    if not (math.isfinite(first) and math.isfinite(second)):
        return math.isnan(first) == math.isnan(second)
    allowed = math.sqrt(torch.finfo(dtype).eps) * max(abs(first), abs(second))
    return abs(first - second) <= allowed


def backtrack(
    loss_along: LossAlong,
    iterates: Sequence[Iterate],
    length: float,
    enough: float = -math.inf,
) -> Backtracked:
    """Walks back over CG's iterates while the loss falls (Martens 2010, section 4.6).

    Args:
        loss_along: The loss at theta + length * direction.
        iterates: In the order of the solve; those where q or its slope is not below 0
            are passed over.
        length: The factor on each iterate, ``lr``.
        enough: A loss at the last iterate up to which no other is tried.
    """
    last, *earlier = reversed(iterates)
    best = Backtracked(last, loss_along(last.vector, length))
    if best.loss <= enough:
        return best
    for iterate in earlier:
        if not (iterate.value < 0 and iterate.slope < 0):
            continue
        loss = loss_along(iterate.vector, length)
        if not (loss < best.loss or not math.isfinite(best.loss)):
            break
        best = Backtracked(iterate, loss)
    return best


def go_further(
    loss_along: LossAlong, chosen: Iterate, length: float, start_loss: float, loss: float
) -> tuple[Tensor, float]:
    """Twice as far along negative curvature, again and again, while the loss confirms it.

    As long as the way there bends down the loss has fallen by more than the slope says; where it
    has not, the negative curvature is behind, and a longer step would be a leap into the dark.

    Args:
        loss_along: The loss at theta + length * direction.
        chosen: A step with a part along negative curvature.
        length: The factor on it, ``lr``.
        start_loss: The loss at theta.
        loss: The loss at its end.

    Returns:
        The direction that went lowest, and the loss there.
    """
    assert chosen.escape is not None
    best, slope, part = chosen.vector, chosen.slope, chosen.escape
    for doubling in range(MAX_DOUBLINGS):
        if not loss - start_loss < length * slope:
            break
        further = torch.add(best, part.vector, alpha=2.0**doubling)
        new = loss_along(further, length)
        if not -math.inf < new < loss:
            break
        best, loss, slope = further, new, slope + 2.0**doubling * part.slope
    return best, loss


def armijo(
    loss_along: LossAlong,
    direction: Tensor,
    *,
    start_loss: float,
    slope: float,
    length: float,
    first_loss: float,
    least: float = 0.0,
) -> Step:
    """The first length of ``length * 0.8^j`` with enough decrease (Armijo 1966).

    Args:
        loss_along: The loss at theta + length * direction.
        direction: Of shape (P,).
        start_loss: The loss at theta.
        slope: The gradient times the direction, below 0.
        length: The first length to try.
        first_loss: The loss there, known already.
        least: The least change of the loss that says something: where the slope promises less,
            the search ends.

    Returns:
        The step; of length 0 and with ``start_loss`` where no try was good enough.
    """
    loss = first_loss
    for tries in range(MAX_TRIES):
        if tries:
            if length * SHRINK * abs(slope) < least:
                break
            length *= SHRINK
            loss = loss_along(direction, length)
        if -math.inf < loss <= start_loss + SUFFICIENT_DECREASE * length * slope:
            return Step(length, loss)
    return Step(0.0, start_loss, _noise(start_loss, length * slope, loss, direction.dtype))


def _noise(start_loss: float, change: float, loss: float, dtype: torch.dtype) -> float:
    """By how much the loss scatters: its rise at a length where the slope alone should show.

    A rise of more than half of the digits is no rounding: the gradient is not that of the loss.
    """
    rise = loss - start_loss
    most = math.sqrt(torch.finfo(dtype).eps) * abs(start_loss)
    return rise if abs(change) < rise <= most else 0.0
