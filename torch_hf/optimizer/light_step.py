"""A light step: the Kronecker factors alone, one gradient, no product (amortised natural gradient).

On batches that change, a full step solves its quadratic better than a sample deserves, at the
price of ten gradients. A light step costs little more than one. Factors and inverses are measured
now and then; on these occasions the step must lower the loss of its own batch, else it is rejected.
In between, the next batch's gradient says how far a step should have gone
(:mod:`torch_hf.solver.natural_gradient`), and a step that overshot is taken back.

Of sums of squares full steps are taken now and then, to see whether they are the better bargain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from torch_hf.curvature.layer_statistics import LayerStatistics
from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.objective.objective import Objective
from torch_hf.objective.results import Evaluation
from torch_hf.optimizer.progress import LIGHT_COST, Progress
from torch_hf.optimizer.timer import StepTimer
from torch_hf.preconditioner.kfac import KroneckerPreconditioner
from torch_hf.solver import natural_gradient
from torch_hf.solver.choose_solver import AUTO
from torch_hf.solver.line_search import SearchResult

#: So many steps in a row must have seen data change before a light one is taken.
CHANGES = 1.0
#: Weight of earlier losses in their running mean; after so many steps it is known, and a loss by so
#: many standard deviations above it is no accident.
LOSS_MEMORY, STEPS_TO_KNOW, MOST_DEVIATIONS = 0.9, 8, 5.0
#: Said where a step is undone.
TAKEN_BACK = "the last light step overshot and was taken back"
OVERFLOW = "the light step overflows the dtype of the parameters"
RAISED = "the light step raised the loss of its own batch"


class LightStep(NamedTuple):
    """What a light step came to.

    Attributes:
        move: Where the parameters go.
        velocity: The direction d, of shape (P,), which the next step repeats in part; None where
            there is none.
        slope: ``g^T d``.
        radius: For the next step.
        slopes: The mean of slopes at steps' ends.
        curvature: The operator, if factors were measured.
    """

    move: SearchResult
    velocity: Tensor | None
    slope: float
    radius: float
    slopes: float
    curvature: ObjectiveOperator | None = None


def takes_light_step(
    options: Mapping[str, Any],
    curvature: str,
    factors: KroneckerPreconditioner | None,
    progress: Progress,
    same_data: bool,
    differentiates: bool,
) -> bool:
    """Whether this step is a light one.

    Data must have changed at the first step or twice in a row, so that a change now and then does
    not end full steps.
    Exact steps go on where what they gain on one batch is found again on the next. Full steps come
    in between where the loss is a sum of squares: there noise may vanish, and a solve pay. Of
    classes a full step learns a small batch by heart.

    Args:
        options: Of the optimizer; those that ask for conjugate gradients keep steps full.
        curvature: ``"ggn"`` or ``"hessian"``.
        factors: Known Kronecker factors; None where the preconditioner has none.
        progress: Of the steps before.
        same_data: Whether the data are those of the step before.
        differentiates: Whether the closure itself takes derivatives, as for the residual of a
            differential equation: the factors say little of such a loss, and noise is small.
    """
    if differentiates:
        return False
    if factors is None or not factors.has_layer_factors or curvature != "ggn":
        return False
    wants_cg = options["cg_max_iter"] is not None or options["cg_decay"] is not None
    if options["solver"] != AUTO or wants_cg:
        return False
    seldom = progress.steps > 1 and progress.changes < CHANGES
    if same_data or not progress.steps or seldom:
        return False
    if progress.exact and progress.holds:
        return False
    return not progress.squares or progress.light < progress.full_after


def light_step(
    objective: Objective,
    here: Evaluation,
    factors: KroneckerPreconditioner,
    progress: Progress,
    start: Tensor | None,
    rates: list[float],
    timer: StepTimer,
) -> LightStep:
    """One light step.

    Args:
        objective: Of the batch.
        here: At the present parameters.
        factors: The inverses.
        progress: With the radius, and what the last light step promised.
        start: Where the last step ended, of shape (P,): a light step's direction, repeated in part.
        rates: ``lr`` of each parameter.
        timer: Takes the seconds.
    """
    space = objective.space
    last = start if progress.light and progress.promised < 0 else None
    radius = progress.radius or natural_gradient.initial_radius(here.loss)
    slopes = progress.slopes
    if last is not None:
        (along,) = map(float, space.dots((here.gradient, last)))
        rose = unusually_high(progress, here.loss)
        if rose or natural_gradient.overshot(along, progress.promised):
            radius *= natural_gradient.AFTER_OVERSHOT
            move = _scaled(objective, -last, rates, SearchResult(None, 1.0, math.nan))
            return LightStep(move._replace(reason=TAKEN_BACK), None, 0.0, radius, slopes)
        slopes = natural_gradient.mean_slope(slopes, along, progress.promised)
        radius = natural_gradient.adapted_radius(radius, slopes)
    measured, operator = factors.wants_layers_light, None
    with timer.part("preconditioner"):
        if measured:
            operator = ObjectiveOperator(objective, "ggn", here=here)
        statistics = LayerStatistics(operator) if operator else None
        factors.begin_light(objective.vector, objective.decay, statistics)
        if operator:
            operator.release()
        natural = objective.free(factors.apply(here.gradient))
    (square,) = map(float, space.dots((here.gradient, natural)))
    d = natural.mul_(-natural_gradient.step_factor(radius, square))
    if last is not None:
        d.add_(last, alpha=natural_gradient.MOMENTUM)
    (slope,) = map(float, space.dots((here.gradient, d)))
    if not math.isfinite(slope):
        radius *= natural_gradient.AFTER_REJECTION
        move = SearchResult(None, 0.0, here.loss, reason=OVERFLOW)
        return LightStep(move, None, 0.0, radius, slopes, operator)
    move = _scaled(objective, d, rates, SearchResult(None, 1.0, math.nan))
    if measured:
        move = _tried(objective, here, move, slope, timer)
        if move.direction is None:
            radius *= natural_gradient.AFTER_REJECTION
            return LightStep(move, None, 0.0, radius, slopes, operator)
    return LightStep(move, d, slope, radius, slopes, operator)


def undo(
    objective: Objective,
    here: Evaluation,
    progress: Progress,
    start: Tensor | None,
    rates: list[float],
) -> LightStep | None:
    """Takes the last light step back where it, and not the batch, makes the loss non-finite."""
    if start is None or not progress.light or not progress.promised < 0:
        return None
    radius = progress.radius * natural_gradient.AFTER_REJECTION
    move = _scaled(objective, -start, rates, SearchResult(None, 1.0, math.nan, reason=TAKEN_BACK))
    assert move.direction is not None
    with objective.vector.trial() as trial:
        trial.place(objective.space.whole(move.direction), move.length)
        loss = objective.trial_loss(here)
    if not math.isfinite(loss):  # it is the batch
        return None
    move = move._replace(loss=loss)
    return LightStep(move, None, 0.0, radius, progress.slopes)


def _scaled(
    objective: Objective, d: Tensor, rates: list[float], move: SearchResult
) -> SearchResult:
    """A move along d, by ``lr`` of each parameter."""
    rate = objective.vector.spread(rates)
    if isinstance(rate, Tensor):
        return move._replace(direction=d * objective.space.own(rate), length=1.0)
    return move._replace(direction=d, length=rate)


def _tried(
    objective: Objective, here: Evaluation, move: SearchResult, slope: float, timer: StepTimer
) -> SearchResult:
    """The move with its loss, or none if it does not lower the loss of its own batch."""
    assert move.direction is not None
    with objective.vector.trial() as trial, timer.part("evaluations"):
        trial.place(objective.space.whole(move.direction), move.length)
        loss = objective.trial_loss(here)
    ratio = (loss - here.loss) / (move.length * slope) if slope else math.nan
    if not loss < here.loss:
        return SearchResult(None, 0.0, here.loss, ratio, reason=RAISED)
    return move._replace(loss=loss, ratio=ratio)


def _usual(progress: Progress, loss: float) -> tuple[float, float]:
    """The running mean of the losses that light steps begin at, and their scatter."""
    known, scatter = progress.usual_loss, progress.scatter
    if not math.isfinite(loss):
        return known, scatter
    if not math.isfinite(known):
        return loss, 0.0
    deviation = loss - known
    known += (1.0 - LOSS_MEMORY) * deviation
    return known, LOSS_MEMORY * (scatter + (1.0 - LOSS_MEMORY) * deviation**2)


def unusually_high(progress: Progress, loss: float) -> bool:
    """Whether a loss lies so far above those of the steps before that no batch explains it."""
    if progress.light < STEPS_TO_KNOW:
        return False
    return loss - progress.usual_loss > MOST_DEVIATIONS * math.sqrt(progress.scatter)


def after_light(progress: Progress, light: LightStep, here: Evaluation) -> Progress:
    """The numbers that a light step hands to the next."""
    rejected = light.move.direction is None
    usual, scatter = _usual(progress, here.loss)
    return progress._replace(
        rejections=progress.rejections + 1 if rejected else 0,
        last_loss=light.move.loss if math.isfinite(light.move.loss) else math.inf,
        last_start=math.inf,  # such a gain is no evidence for longer solves
        last_cases=here.cases,
        last_ratio=progress.last_ratio if math.isnan(light.move.ratio) else light.move.ratio,
        light=progress.light + 1.0,
        usual_loss=usual,
        scatter=scatter,
        light_start=progress.light_start if progress.light else here.loss,
        radius=light.radius,
        slopes=light.slopes,
        promised=light.slope,
        converged_at=-1.0,
    )


def after_full(
    progress: Progress, here: Evaluation, cost: float, exact: bool, squares: bool
) -> Progress:
    """What a full step notes, so that it can be compared with the light ones around it.

    Args:
        progress: Before it.
        here: Where it began.
        cost: What it cost, in gradients.
        exact: Whether its quadratic was solved exactly.
        squares: Whether the loss is a sum of squares.
    """
    rate, start = math.inf, progress.light_start
    if progress.light and start and math.isfinite(start):
        rate = (start - here.loss) / (abs(start) * progress.light * LIGHT_COST)
    return progress._replace(
        light=0.0,
        promised=0.0,
        light_rate=rate,
        full_cost=cost,
        exact=float(exact),
        squares=float(squares),
    )
