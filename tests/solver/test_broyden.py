"""Quasi-Newton iterations against textbook formulas, and on functions that can be solved."""

import math
from itertools import pairwise

import pytest
import torch

from torch_hf.solver.broyden import (
    UPDATES,
    InverseHessian,
    descend,
    next_length,
    scaling,
    update_inverse,
    updated,
)

N = 7


def random_pair(seed):
    """H, s and y with positive curvature, and ``s^T H^-1 s``."""
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(N, N, generator=g, dtype=torch.float64)
    inverse = root @ root.T + 0.1 * torch.eye(N, dtype=torch.float64)
    s = torch.randn(N, generator=g, dtype=torch.float64)
    hessian = root.T @ root + torch.eye(N, dtype=torch.float64)
    return inverse, s, hessian @ s, float(s @ torch.linalg.solve(inverse, s))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("seed", range(5))
def test_updates_keep_the_secant_condition_symmetry_and_definiteness(update, seed):
    inverse, s, y, bend = random_pair(seed)
    update_inverse(inverse, s, y, bend, update)
    torch.testing.assert_close(inverse @ y, s)
    torch.testing.assert_close(inverse, inverse.T)
    assert torch.linalg.eigvalsh(inverse)[0] > 0


def test_bfgs_is_the_textbook_formula():
    inverse, s, y, bend = random_pair(0)
    eye = torch.eye(N, dtype=torch.float64)
    left = eye - torch.outer(s, y) / (s @ y)
    expected = left @ inverse @ left.T + torch.outer(s, s) / (s @ y)
    update_inverse(inverse, s, y, bend, "bfgs")
    torch.testing.assert_close(inverse, expected)


def test_a_pair_without_curvature_changes_nothing():
    inverse, s, y, bend = random_pair(0)
    before = inverse.clone()
    for change in (-y, torch.zeros_like(y), y * math.nan, y * math.inf):
        assert updated(inverse, s, change, bend) is inverse
    assert torch.equal(inverse, before)
    assert updated(None, s, -y, bend) is None


def rosenbrock(x):
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        loss = (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        (slope,) = torch.autograd.grad(loss, x)
    return float(loss.detach()), slope


def test_rosenbrock_is_solved_and_every_iteration_lowers_the_loss():
    x = torch.tensor([-1.2, 1.0] * 5, dtype=torch.float64)
    loss, slope = rosenbrock(x)
    inverse, losses = None, [loss]
    for _ in range(150):
        known = None if inverse is None else InverseHessian(inverse)
        found = descend(lambda d, x=x: rosenbrock(x + d), loss, slope, known, 1)
        x, loss, slope, inverse = (
            x + found.displacement,
            found.loss,
            found.gradient,
            found.inverse,
        )
        if not found.iterations:
            break
        losses.append(loss)
    assert all(b < a for a, b in pairwise(losses))
    assert loss < 1e-20
    torch.testing.assert_close(x, torch.ones_like(x))


def test_many_iterations_at_once_are_those_one_by_one():
    x = torch.tensor([-1.2, 1.0] * 5, dtype=torch.float64)
    start = rosenbrock(x)
    at_once = descend(lambda d: rosenbrock(x + d), *start, None, 9)
    first = descend(lambda d: rosenbrock(x + d), *start, None, 5)
    between = x + first.displacement
    second = descend(
        lambda d: rosenbrock(between + d),
        first.loss,
        first.gradient,
        InverseHessian(first.inverse),
        4,
    )
    assert at_once.iterations == 9
    assert second.loss == pytest.approx(at_once.loss, rel=1e-6)


def test_a_spoiled_inverse_is_begun_anew():
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    for bad in (-torch.eye(2), torch.full((2, 2), math.nan), torch.zeros(2, 2)):
        found = descend(
            lambda d: rosenbrock(x + d), *rosenbrock(x), InverseHessian(bad.double()), 3
        )
        assert found.iterations == 3 and found.loss < rosenbrock(x)[0]


def test_at_a_minimum_nothing_moves():
    x = torch.ones(4, dtype=torch.float64)
    found = descend(lambda d: rosenbrock(x + d), *rosenbrock(x), None, 5)
    assert found.iterations == 0 and not found.displacement.any()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dense", [True, False])
def test_pending_updates_are_those_written_at_once(update, dense):
    inverse = random_pair(0)[0] if dense else torch.eye(N, dtype=torch.float64) * 0.3
    known = InverseHessian(inverse) if dense else InverseHessian(torch.ones(N).double(), 0.3)
    before, expected = inverse.clone(), inverse.clone()
    for seed in range(1, 9):
        _, s, y, _ = random_pair(seed)
        bend = float(s @ torch.linalg.solve(expected, s))
        v = torch.linspace(-1, 1, N, dtype=torch.float64)
        moved, product = expected @ y, expected @ v
        torch.testing.assert_close(known.times(y), moved)
        update_inverse(expected, s, y, bend, update)
        new = known.update(s, y, moved, bend, update)
        torch.testing.assert_close(new.product(product, v), expected @ v)
        torch.testing.assert_close(known.times(v), expected @ v)
    torch.testing.assert_close(known.kept(), expected)
    assert torch.equal(inverse, before)


def test_iterations_follow_the_dense_update():
    """A whole trajectory, against the update written into the matrix after every iteration."""
    x = torch.tensor([-1.2, 1.0] * 3, dtype=torch.float64)
    found = descend(lambda d: rosenbrock(x + d), *rosenbrock(x), None, 12)
    here, inverse = torch.zeros_like(x), None
    loss, slope = rosenbrock(x)
    for k in range(1, 13):
        whole = descend(lambda d: rosenbrock(x + d), *rosenbrock(x), None, k)
        step, change = whole.displacement - here, whole.gradient - slope
        if inverse is None:
            inverse = updated(None, step, change, math.nan)
        else:
            bend = float(step @ torch.linalg.solve(inverse, step))
            inverse = updated(inverse, step, change, bend)
        here, slope = whole.displacement, whole.gradient
        torch.testing.assert_close(whole.inverse, inverse, rtol=1e-7, atol=1e-9)
    assert loss > found.loss == whole.loss


@pytest.mark.parametrize("b", [0.0, 1e-320, 1.0, 1e308, math.inf, math.nan])
@pytest.mark.parametrize("h", [0.0, 1e-320, 1e-8, 1.0, 1e308, math.inf, math.nan])
def test_factors_are_numbers_at_any_scale(b, h):
    tau, phi = scaling(b, h, N, "ssbroyden")
    assert math.isfinite(tau) and tau > 0 and math.isfinite(phi)


def test_where_a_search_begins():
    assert next_length(0.25, 0.0) == 0.25  # it ended where the slope is zero
    assert next_length(0.25, -3.0) == 0.125  # beyond that
    assert next_length(0.25, 0.75) == 0.5  # before it
    assert next_length(0.25, 0.99) == 0.5  # at most twice as far (4 in the secant)
    assert next_length(0.25, 1.5) == 0.5  # the slope has grown
    assert next_length(0.9, 0.75) == 1.0


def test_iterations_take_little_more_than_a_gradient_each():
    """The first length of a search is learnt: from the full step it takes half as many again."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(60, 40, generator=g, dtype=torch.float64)
    b = torch.randn(60, generator=g, dtype=torch.float64)
    counted = []

    def evaluate(d):
        counted.append(1)
        r = torch.tanh(A @ d) + 0.1 * (A @ d) - b
        return float(r @ r), 2 * A.T @ (r * (1.1 - torch.tanh(A @ d) ** 2))

    found = descend(evaluate, *evaluate(torch.zeros(40).double()), None, 50)
    assert found.iterations == 50
    assert len(counted) <= 1.35 * 50


def test_a_matrix_that_rounding_has_spoiled_takes_no_update():
    s, y = torch.randn(2, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = InverseHessian(torch.eye(N, dtype=torch.float64))
    for moved in (-y, y * math.inf, y * math.nan):
        new = known.update(s, y, moved, 1.0)
        assert torch.equal(new.product(s, y), s)
    assert torch.equal(known.kept(), torch.eye(N, dtype=torch.float64))


def test_a_loss_without_curvature_is_followed_without_a_matrix():
    slope = torch.tensor([3.0, -4.0], dtype=torch.float64)
    found = descend(lambda d: (float(slope @ d), slope), 0.0, slope, None, 3)
    assert found.iterations == 3 and found.loss < 0 and found.inverse is None


def test_where_the_matrix_leads_nowhere_the_gradient_is_tried():
    slope = torch.tensor([1.0, 1.0], dtype=torch.float64)

    def walled(d):
        return float(slope @ d) if d[0] == d[1] else 1e6, slope

    known = InverseHessian(torch.diag(torch.tensor([1.0, 100.0], dtype=torch.float64)))
    found = descend(walled, 0.0, slope, known, 1)
    assert found.iterations == 1 and found.loss < -0.1


def test_a_step_along_negative_curvature_leaves_the_matrix_as_it_was():
    """The loss falls ever faster, so that no length has a slope small enough."""

    def evaluate(d):
        return float(-0.5 * d @ d - d.sum()), -d - 1.0

    eye = torch.eye(3, dtype=torch.float64)
    found = descend(evaluate, *evaluate(torch.zeros(3).double()), InverseHessian(eye), 1)
    assert found.loss < 0 and torch.equal(found.inverse, eye)


@pytest.mark.parametrize("size", [1e-170, 1e-100, 1e100, 1e160])
def test_gradients_whose_squares_are_no_numbers_begin_no_matrix(size):
    """But the loss falls all the same."""
    A = torch.diag(torch.tensor([1.0, 10.0], dtype=torch.float64)) * size
    x = torch.ones(2, dtype=torch.float64)

    def evaluate(d):
        return float(0.5 * (x + d) @ A @ (x + d)), A @ (x + d)

    found = descend(evaluate, *evaluate(torch.zeros(2).double()), None, 5)
    assert math.isfinite(found.loss) and bool(found.displacement.isfinite().all())
    assert found.inverse is None or bool(found.inverse.isfinite().all())


def test_a_loss_below_the_normal_numbers_is_left_alone():
    calls = []

    def evaluate(d):
        calls.append(d)
        x = 1e-21 * torch.ones(3) + d
        return float(0.5 * x @ x), x

    loss = 1.5e-42
    found = descend(evaluate, loss, 1e-21 * torch.ones(3), None, 20)
    assert found.iterations == 0 and found.loss == loss and not calls
