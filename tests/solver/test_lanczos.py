"""Steps by bidiagonalisation, as a search over lambda asks for them, against Cholesky."""

import pytest
import torch
from basics import assert_same
from torch import Tensor

from torch_hf.solver import lanczos
from torch_hf.solver.exact import ExactSolver
from torch_hf.solver.golub_kahan import GolubKahan
from torch_hf.solver.lanczos import LanczosSolver

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(30, 20, generator=GENERATOR, dtype=torch.float64)
RESIDUAL = torch.randn(30, generator=GENERATOR, dtype=torch.float64)
REST = torch.randn(20, generator=GENERATOR, dtype=torch.float64)
GIVEN = {
    "residual": {},
    "decay": {"decay": 0.3},
    "decay's gradient": {"decay": 0.3, "rest": REST},
    "rest": {"rest": REST},
}


@pytest.fixture(params=GIVEN)
def solvers(request, monkeypatch) -> tuple[LanczosSolver, ExactSolver]:
    monkeypatch.setattr(lanczos, "TOLERANCE", 0.0)
    given = GIVEN[request.param]
    rest, decay = given.get("rest"), given.get("decay", 0.0)
    run = GolubKahan(ROWS.mv, ROWS.T.mv, 20, RESIDUAL, rest, decay=decay)
    ours = LanczosSolver(run, ROWS.mv, ROWS.T.mv, RESIDUAL, 20)
    return ours, ExactSolver(ROWS, RESIDUAL, rest, decay=decay)


@pytest.mark.parametrize("damping", [10.0, 1e-3])
def test_all_that_a_search_asks_for(solvers, damping):
    ours, truth = solvers
    y, d = ours.minimum(damping), truth.minimum(damping)
    assert_same(ours.direction(y), d, 1e-10)
    assert ours.quadratic(y) == pytest.approx(truth.quadratic(d), rel=1e-10)
    assert ours.length(y) == pytest.approx(truth.length(d), rel=1e-10)
    assert_same(ours.times(y), truth.times(d), 1e-10)
    assert_same(ours.direction(ours.further(damping, y)), truth.further(damping, d), 1e-9)
    other = torch.linspace(-1, 1, 30).double()
    correction = ours.direction(ours.correction(damping, other))
    assert_same(correction, truth.correction(damping, other), 1e-9)
    assert_same(ours.direction(ours.gradient()), truth.gradient(), 1e-10)


def test_the_trace_is_that_of_the_first_pairs():
    run = GolubKahan(ROWS.mv, ROWS.T.mv, 20, RESIDUAL)
    solver = LanczosSolver(run, ROWS.mv, ROWS.T.mv, RESIDUAL, 20)
    whole = float(ROWS.square().sum())
    assert 0.2 * whole < solver.trace <= whole


def test_a_smaller_lambda_takes_more_pairs_and_a_larger_one_none():
    taken: list[int] = []

    def times(v: Tensor) -> Tensor:
        taken.append(0)
        return rows @ v

    rows = ROWS * torch.logspace(0, -6, 20).double()
    run = GolubKahan(times, rows.T.mv, 20, rows @ REST)
    solver = LanczosSolver(run, times, rows.T.mv, rows @ REST, 20)
    solver.minimum(1e-3)
    first = len(taken)
    solver.minimum(1e-10)
    second = len(taken)
    solver.minimum(1e-2)
    assert first < second == len(taken) <= 20


def test_the_pairs_end_where_the_run_does():
    run = GolubKahan(ROWS.mv, ROWS.T.mv, 20, RESIDUAL, max_pairs=7)
    solver = LanczosSolver(run, ROWS.mv, ROWS.T.mv, RESIDUAL, 20)
    y = solver.minimum(1e-12)
    assert run.pairs == len(y) == 7
    assert solver.quadratic(y) < 0
