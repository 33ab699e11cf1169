"""Lambda after a step: how the rules for easy solves, new data and convergence meet."""

from types import SimpleNamespace

import pytest
import torch

from torch_hf.optimizer.outcome import FAILURES, NOTHING_LEFT, StepDecision
from torch_hf.optimizer.progress import Progress
from torch_hf.report import Stop
from torch_hf.solver.levenberg_marquardt import STUCK
from torch_hf.solver.line_search import SearchResult


def decision(
    ratio=1.0,
    iterations=20,
    stop=Stop.PROGRESS,
    same_data=True,
    curvature=float("nan"),
    accepted=True,
    converged=False,
) -> StepDecision:
    direction = torch.ones(1) if accepted else None
    move = SearchResult(direction, 1.0, 0.0, ratio, converged=converged)
    solution = SimpleNamespace(iterations=iterations, stop=stop)
    return StepDecision(move, 6.0, solution, same_data=same_data, curvature_seen=curvature)


EASY, DOWN, SAME, UP = 1.5, 4.0, 6.0, 9.0


@pytest.mark.parametrize(
    ("case", "damping"),
    [
        ({}, EASY),
        ({"iterations": 21}, DOWN),  # the bound
        ({"stop": Stop.RESIDUAL}, EASY),
        ({"stop": Stop.MAX_ITER}, DOWN),  # it did not end by itself
        ({"stop": Stop.NEGATIVE_CURVATURE}, DOWN),
        ({"ratio": 0.91}, EASY),
        ({"ratio": 0.89}, DOWN),
        ({"ratio": 1.09}, EASY),
        ({"ratio": 1.11}, DOWN),
        ({"same_data": False}, DOWN),  # a sample flatters the step
        ({"same_data": False, "ratio": 0.89}, SAME),
        ({"same_data": False, "ratio": 0.49}, UP),
        ({"ratio": 0.49}, SAME),
        ({"curvature": 0.06}, 0.6),  # half of the way in decades
        ({"curvature": 3.0}, EASY),  # more than half of the way
        ({"curvature": 60.0}, EASY),
        ({"curvature": 0.06, "iterations": 21}, DOWN),
        ({"accepted": False}, UP),
        ({"accepted": False, "converged": True, "curvature": 0.06}, 0.6),
        ({"accepted": False, "converged": True, "curvature": 60.0}, SAME),
    ],
)
def test_lambda_after_a_step(case, damping):
    assert decision(**case).next_damping() == pytest.approx(damping)


@pytest.mark.parametrize("change", [{"damping": None}, {"nothing_to_do": True}])
def test_a_step_that_learnt_nothing_keeps_lambda(change):
    before = decision()._replace(**change)
    assert before.next_damping() == before.damping


def failed(reason=STUCK, squares=False, converged=False, direction=None):
    move = SearchResult(direction, 0.0, 0.0, reason=reason, converged=converged)
    return StepDecision(move, 6.0, curvature=SimpleNamespace(squares=squares))


@pytest.mark.parametrize(
    ("loss", "squares", "rests"),
    [
        (1e-7 * 60, False, True),
        (1e-7 * 70, False, False),
        (1e-14 * 60, True, True),
        (1e-14 * 70, True, False),
        (1e-7, True, False),
        (-1e-7, False, True),
        (0.5, False, False),
    ],
)
def test_a_search_that_fails_near_the_rounding_of_the_start_has_converged(loss, squares, rests):
    progress = Progress(highest=1.0)
    step = failed(squares=squares).settled(progress, SimpleNamespace(loss=loss), 1e-7)
    assert step.move.converged is rests
    assert (step.move.reason == NOTHING_LEFT) is rests


@pytest.mark.parametrize("reason", FAILURES)
def test_each_kind_of_failure_counts_but_nothing_else(reason):
    progress, here = Progress(highest=1.0), SimpleNamespace(loss=1e-9)
    assert failed(reason).settled(progress, here, 1e-7).move.converged
    assert not failed("lr is 0").settled(progress, here, 1e-7).move.converged
    changed = failed(reason)._replace(same_data=False)
    assert not changed.settled(progress, here, 1e-7).move.converged  # the start is forgotten


def test_the_highest_loss_is_that_of_these_data():
    progress = Progress().with_highest(3.0, False).with_highest(2.0, True)
    assert progress.highest == 3.0
    assert progress.with_highest(-5.0, True).highest == 5.0
    assert progress.with_highest(float("nan"), True).highest == 3.0
    assert progress.with_highest(1.0, False).highest == 1.0


def test_rejections_are_counted_at_one_point():
    progress = Progress(last_loss=2.0)
    for count in (1.0, 2.0, 3.0):
        progress = progress.with_rejection(2.0, 0.5, 6.0)
        assert progress.rejected_here == count
    assert progress.with_rejection(2.0, 0.4, 6.0).rejected_here == 1.0
    assert progress._replace(last_loss=1.0).with_rejection(2.0, 0.5, 6.0).rejected_here == 1.0
