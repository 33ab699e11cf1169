"""The search over lambda against its rule written out plainly, and dense least squares."""

import math
from collections.abc import Callable
from itertools import count, product
from typing import NamedTuple

import pytest
import torch
from basics import assert_same, normal
from torch import Tensor

from torch_hf.solver.exact import ExactSolver
from torch_hf.solver.levenberg_marquardt import (
    CONVERGED,
    STUCK,
    DampingSearch,
    DampingState,
    column_scale,
    remembered_norms,
)

EPS = torch.finfo(torch.float64).eps
WIDE, TALL = (6, 9), (12, 5)


class Residuals(NamedTuple):
    """Residuals r(x) of shape (M,); the loss is half of their square."""

    of: Callable[[Tensor], Tensor]
    start: Tensor

    def rows(self, x: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(self.of, x)

    def loss(self, x: Tensor) -> float:
        return 0.5 * float(self.of(x).square().sum())


ROSENBROCK = Residuals(
    lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]),
    torch.tensor([-1.2, 1.0]).double(),
)
_MIX, _TARGET = normal(1, 8, 4), normal(2, 8)
SINES = Residuals(lambda x: torch.sin(3 * _MIX @ x) + _MIX @ x.exp() - _TARGET, normal(3, 4))
DECAY = Residuals(
    lambda x: x[0] * torch.exp(-x[1] * torch.arange(6)) - torch.tensor([5, 2, 1, 0.4, 0.1, 0]),
    torch.tensor([1.0, 3.0]).double(),
)
CURVED = {"rosenbrock": ROSENBROCK, "sines": SINES, "exponential": DECAY}


class Run:
    """A search from a point, its solver and every point where it evaluated."""

    def __init__(
        self,
        problem: Residuals,
        x: Tensor,
        state: DampingState = DampingState(),  # noqa: B008
        *,
        tells_residual: bool = True,
        scale: Tensor | None = None,
        decay: float = 0.0,
        first: float | None = None,
        misled: float = 0.0,
    ) -> None:
        self.problem, self.x, self.points = problem, x, []
        self.tells_residual, self.misled, self.decay = tells_residual, misled, decay
        self.solver = ExactSolver(
            problem.rows(x), problem.of(x), decay * x if decay else None, decay=decay, scale=scale
        )
        loss = self.loss(x)
        self.found = DampingSearch(self.solver, self.evaluate, loss, EPS, state, first).run()

    def loss(self, x: Tensor) -> float:
        return self.problem.loss(x) + 0.5 * self.decay * float(x.square().sum())

    def evaluate(self, d: Tensor) -> tuple[float, Tensor | None]:
        self.points.append(d)
        residual = self.problem.of(self.x + d) if self.tells_residual else None
        return self.loss(self.x + d) + self.misled, residual


def dense_step(rows: Tensor, residual: Tensor, scale: Tensor, damping: float) -> Tensor:
    """The least squares of ``r + R d`` over ``sqrt(lambda) D d``."""
    matrix = torch.cat([rows, math.sqrt(damping) * torch.diag(scale)])
    target = torch.cat([-residual, torch.zeros(len(scale)).double()])
    return torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
def test_a_step_is_that_of_dense_least_squares(shape, damping):
    matrix, target = normal(1, *shape), normal(2, shape[0])
    problem = Residuals(lambda x: matrix @ x - target, normal(3, shape[1]))
    scale = column_scale(matrix.square().sum(0))
    run = Run(problem, problem.start, DampingState(damping), scale=scale)
    assert run.found.damping <= damping
    residual = problem.of(problem.start)
    truth = dense_step(matrix, residual, scale, run.found.damping)
    assert_same(run.found.direction, truth, 1e-9)
    assert run.found.loss == problem.loss(problem.start + run.found.direction)
    assert abs(run.found.ratio - 1) < 1e-8  # of a linear problem


def test_the_first_damping_is_the_mean_diagonal_or_the_one_given():
    matrix = normal(1, *TALL)
    problem = Residuals(lambda x: matrix @ x - 1, torch.zeros(TALL[1]).double())
    scale = column_scale(matrix.square().sum(0))
    mean = float((matrix / scale).square().sum()) / TALL[1]
    for first, known, start in [
        (None, 0.0, mean),
        (7.0, 0.0, 7.0),
        (None, 3.0, 3.0),
        (7.0, 3.0, 3.0),
    ]:
        run = Run(problem, problem.start, DampingState(known), scale=scale, first=first)
        truth = dense_step(matrix, problem.of(problem.start), scale, start)
        assert_same(run.points[0], truth, 1e-9)


# --- the rule --------------------------------------------------------------------------------


def plain_rule(problem: Residuals, x: Tensor, start: float, hit_wall: bool) -> tuple[float, Tensor]:
    """The least lambda of a run of good ones, and its step, by dense matrices."""
    rows, residual = problem.rows(x), problem.of(x)
    matrix, slope, loss = rows.T @ rows, rows.T @ residual, problem.loss(x)
    eye = torch.eye(len(x)).double()

    def model(d: Tensor) -> float:
        return float(slope @ d + 0.5 * d @ matrix @ d)

    def step(damping: float) -> Tensor:
        return dense_step(rows, residual, torch.ones_like(x), damping)

    def ratio(damping: float) -> float:
        d = step(damping)
        new = problem.loss(x + d)
        return (loss - new) / -model(d) if math.isfinite(new) else -math.inf

    damping = start
    if ratio(damping) < 0.1:
        for k in count(1):
            far = max(10.0, math.sqrt(float(matrix.trace()) / damping))
            damping *= 3.0 if k <= 6 else 10.0 if k <= 12 else far
            if ratio(damping) >= 0.1:
                break
        return damping, step(damping)
    if hit_wall and ratio(damping) < 0.5:
        return damping, step(damping)
    d = step(damping)
    further = d - torch.linalg.solve(matrix + damping * eye, slope + matrix @ d)
    if model(d) - model(further) < 0.1 * problem.loss(x + d):
        return damping, d
    for _ in range(5):
        if ratio(damping / 3) < 0.1:
            break
        damping /= 3
    return damping, step(damping)


@pytest.mark.parametrize("hit_wall", [0.0, 1.0])
@pytest.mark.parametrize("name", CURVED)
def test_the_least_good_damping_is_taken(name, hit_wall):
    problem = CURVED[name]
    taken = set()
    for power in range(-9, 6):
        x, start = problem.start, 10.0**power
        for _ in range(3):
            run = Run(problem, x, DampingState(start, hit_wall), tells_residual=False)
            damping, d = plain_rule(problem, x, start, bool(hit_wall))
            assert run.found.damping == pytest.approx(damping, rel=1e-12)
            assert_same(run.found.direction, d, 1e-6)
            assert len(run.points) == run.found.trials
            taken.add(round(math.log(damping / start, 3)))
            x = x + d
    assert min(taken) < 0 < max(taken)  # both ways were gone


def test_lambda_after_a_step():
    """Down untried after an easy step with a misfit left; as it is where it was searched."""
    matrix, target = normal(1, *TALL), normal(4, TALL[0])
    problem = Residuals(lambda x: matrix @ x - target, torch.zeros(TALL[1]).double())
    run = Run(problem, problem.start, DampingState(1e-3))
    assert run.found.damping == 1e-3 and len(run.points) == 1
    assert run.found.state.damping == pytest.approx(1e-3 / 3)
    walls = set()
    for problem, power in product(CURVED.values(), range(-6, 4)):
        run = Run(problem, problem.start, DampingState(10.0**power), tells_residual=False)
        if run.found.trials > 1:  # searched, downwards or upwards
            assert run.found.state.damping == run.found.damping
            failed_last = run.loss(run.x + run.points[-1]) != run.found.loss
            assert run.found.state.hit_wall == float(failed_last)
            walls.add(failed_last)
    assert walls == {True, False}


# --- corrections -----------------------------------------------------------------------------


@pytest.mark.parametrize("power", range(-2, 4))
@pytest.mark.parametrize("name", CURVED)
def test_corrections_lower_the_loss(name, power):
    problem = CURVED[name]
    run = Run(problem, problem.start, DampingState(10.0**power))
    found = run.found
    rows, residual = problem.rows(run.x), problem.of(run.x)
    plain = dense_step(rows, residual, torch.ones_like(run.x), found.damping)
    assert found.loss == problem.loss(run.x + found.direction)
    assert found.loss <= problem.loss(run.x + plain) * (1 + 1e-9)
    if torch.linalg.norm(found.direction - plain) > 1e-6 * torch.linalg.norm(plain):
        # the first correction takes back what the linear model did not promise
        ends = problem.of(run.x + plain) - (residual + rows @ plain)
        more = dense_step(rows, ends, torch.ones_like(run.x), found.damping)
        assert torch.linalg.norm(more) <= 0.2 * torch.linalg.norm(plain)
        gaps = [float(torch.linalg.norm(d - plain - more)) for d in run.points]
        assert min(gaps) <= 1e-6 * float(torch.linalg.norm(plain))


def steps_to_the_end(problem: Residuals, **options) -> tuple[int, int]:
    """Steps and evaluations until the loss is 1e-20."""
    x, state, evaluations = problem.start, DampingState(), 0
    for k in range(1, 200):
        run = Run(problem, x, state, **options)
        assert run.found.loss < problem.loss(x)
        x, state = x + run.found.direction, run.found.state
        evaluations += len(run.points)
        if run.found.loss < 1e-20:
            return k, evaluations
    raise AssertionError("not solved in 200 steps")


def test_corrections_save_steps_on_rosenbrocks_valley():
    corrected, plain = (
        steps_to_the_end(ROSENBROCK),
        steps_to_the_end(ROSENBROCK, tells_residual=False),
    )
    assert corrected[0] < plain[0]


# --- where there is nothing to gain ----------------------------------------------------------


class TestNothingToGain:
    matrix = normal(1, *TALL)

    def problem(self, start: Tensor | None = None) -> Residuals:
        solution = torch.linalg.lstsq(self.matrix, _TARGET12[:, None]).solution[:, 0]
        start = solution if start is None else start
        return Residuals(lambda x: self.matrix @ x - _TARGET12, start)

    @pytest.mark.parametrize("damping", [1e-6, 1e-3, 0.1])
    def test_at_the_minimum_lambda_stays(self, damping):
        problem = self.problem()
        state = DampingState(damping)
        x, converged = problem.start, 0
        for _ in range(5):
            run = Run(problem, x, state)
            assert len(run.points) <= 2 and run.found.trials == 1
            assert run.found.state.damping == damping
            converged += run.found.converged
            if run.found.direction is not None:
                assert run.found.loss < problem.loss(x)
                x = x + run.found.direction
            else:
                assert run.found.reason == CONVERGED and math.isnan(run.found.ratio)
                assert run.found.loss == problem.loss(x)
        assert converged

    @pytest.mark.parametrize("shape", [(1, 2), (2, 1), (3, 3)])
    def test_no_slope_at_all(self, shape):
        """The residual is at a right angle to all columns, so nothing is predicted."""
        m, p = shape
        matrix = torch.zeros(m + 1, p).double()
        matrix[:m] = torch.ones(m, p)
        problem = Residuals(
            lambda x: matrix @ x - torch.eye(m + 1)[m].double(), torch.zeros(p).double()
        )
        run = Run(problem, problem.start, DampingState(0.1))
        assert (run.found.direction, run.found.converged) == (None, True)
        assert run.found.state.damping == 0.1
        assert run.found.trials == 1 and len(run.points) <= 1

    def test_a_huge_lambda_hides_the_slope_and_falls(self):
        problem = self.problem(torch.zeros(TALL[1]).double())
        run = Run(problem, problem.start, DampingState(1e18))
        trace = float(self.matrix.square().sum())
        assert run.found.state.damping == pytest.approx(trace)
        assert not run.found.converged
        run = Run(problem, problem.start, run.found.state)
        assert run.found.loss < problem.loss(problem.start)

    @pytest.mark.parametrize("offset", [0.0, -100.0])
    def test_a_false_model_leaves_lambda(self, offset):
        """No lambda gives a lower loss: all are tried once, then one, until the loss changes."""
        problem = self.problem(torch.zeros(TALL[1]).double())
        solver = ExactSolver(self.matrix, problem.of(problem.start))
        loss, calls = problem.loss(problem.start) + offset, []

        def evaluate(d: Tensor) -> tuple[float, Tensor | None]:
            calls.append(d)
            return loss + 1.0, None

        state = DampingState(0.5)
        for most in (20, 1, 1):
            found = DampingSearch(solver, evaluate, loss, EPS, state).run()
            assert found.direction is None and found.reason == STUCK and not found.converged
            assert len(calls) <= most
            assert found.state.damping == 0.5 and found.state.stuck_at == loss
            state = found.state
            calls.clear()
        DampingSearch(solver, evaluate, loss * 1.1, EPS, state).run()
        assert len(calls) > 1

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_where_the_loss_is_not_finite_lambda_grows(self, bad):
        problem = self.problem(torch.zeros(TALL[1]).double())
        solver = ExactSolver(self.matrix, problem.of(problem.start))

        def evaluate(d: Tensor) -> tuple[float, Tensor | None]:
            far = float(torch.linalg.norm(d)) > 1e-3
            return (bad if far else problem.loss(d)), problem.of(d)

        found = DampingSearch(
            solver, evaluate, problem.loss(problem.start), EPS, DampingState(1e-3)
        ).run()
        assert 1e-4 < float(torch.linalg.norm(found.direction)) <= 1e-3
        assert found.loss < problem.loss(problem.start)


_TARGET12 = normal(4, 12)


@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("first", [None, 0.0])
def test_a_slope_without_any_curvature_is_followed(shape, first):
    """As of Huber's loss, where all cases are outliers: R is 0, and the gradient is not."""
    slope = normal(5, shape[1])
    solver = ExactSolver(torch.zeros(shape).double(), None, slope)
    x, loss, state = torch.zeros_like(slope), 100.0, DampingState()
    for _ in range(6):

        def evaluate(d: Tensor, x: Tensor = x) -> tuple[float, Tensor | None]:
            return 100.0 + float(slope @ (x + d)), None

        found = DampingSearch(solver, evaluate, loss, EPS, state, first).run()
        assert found.loss < loss
        x, loss, state = x + found.direction, found.loss, found.state
    assert loss < 50.0


@pytest.mark.parametrize("powers", [(0, 8, -8, 0, 0), (3, -9, 0, 0, 0), (-6, -7, 0, 0, 0)], ids=str)
def test_units_far_from_the_median_do_not_matter(powers):
    """Parameters in other units take the same way: those that are far away already."""
    mix, target = normal(6, 12, 5), normal(7, 12)
    base = torch.tensor([0.0 if p == 0 else math.copysign(4, p) for p in powers]).double()

    def trajectory(units: Tensor) -> list[float]:
        problem = Residuals(lambda x: torch.tanh(mix @ (units * x)) - target, normal(8, 5) / units)
        x, state, norms, losses = problem.start, DampingState(), None, []
        for _ in range(8):
            norms = remembered_norms(problem.rows(x).square().sum(0), norms)
            # the common factor of D is taken out: it is that of lambda
            scale = column_scale(norms)
            run = Run(problem, x, state, scale=scale / scale[-1])
            if run.found.direction is None:
                break
            x, state = x + run.found.direction, run.found.state
            losses.append(run.found.loss)
        return losses

    truth, found = (trajectory(10.0**p) for p in (base, base + torch.tensor(powers).double()))
    assert found == pytest.approx(truth, rel=1e-6)
    assert truth[-1] < 0.9 * truth[0] or len(truth) < 8
