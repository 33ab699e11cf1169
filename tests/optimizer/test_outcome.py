"""Lambda after a step: how the rules for easy solves, new data and convergence meet."""

from types import SimpleNamespace

import pytest
import torch

from torch_hf.optimizer.outcome import StepDecision
from torch_hf.report import Stop
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
