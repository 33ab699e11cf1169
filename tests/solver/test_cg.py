"""Conjugate gradients against dense linear algebra and the textbook form."""

import pytest
import torch
from basics import assert_same, normal
from reference import kept_iterations, martens_stop, pcg
from torch.testing import assert_close

import torch_hf.solver.cg
from torch_hf.report import Stop
from torch_hf.solver.cg import conjugate_gradients, progress_is_small


def _with_eigenvalues(seed, values):
    values = torch.as_tensor(values, dtype=torch.float64)
    basis = torch.linalg.qr(normal(seed, len(values), len(values))).Q
    return basis * values @ basis.T


def _q(A, g, d):
    A, g, d = A.double(), g.double(), d.double()
    return (g @ d + d @ A @ d / 2).item()


class Run:
    """A solve with everything it was seen to do."""

    def __init__(self, A, g, **options):
        self.A, self.g, self.start = A, g, options.get("start")
        self.calls = 0
        self.numbers, self.directions, self.products = [], [], []
        self.result = conjugate_gradients(self._operator, g, observe=self._observe, **options)

    def _operator(self, v):
        self.calls += 1
        return self.A @ v

    def _observe(self, number, direction, product):
        self.numbers.append(number)
        self.directions.append(direction.clone())
        self.products.append(product.clone())

    def iterates(self):
        """d_0, d_1, ... by exact minimisation along the directions, in float64."""
        A, g = self.A.double(), self.g.double()
        d = torch.zeros_like(g) if self.start is None else self.start.double()
        found = [d]
        for p in self.directions:
            p = p.double()
            d = d - (g + A @ d) @ p / (p @ A @ p) * p
            found.append(d)
        return found

    def values(self):
        return [_q(self.A, self.g, d) for d in self.iterates()]


SYSTEMS = {
    "one": _with_eigenvalues(1, [3.0]),
    "easy": _with_eigenvalues(2, torch.linspace(1, 5, 12)),
    "clustered": _with_eigenvalues(3, [1e-2] * 10 + [1.0] * 5 + [50.0]),
    "ill": _with_eigenvalues(4, torch.logspace(-4, 2, 40)),
}
every_system = pytest.mark.parametrize("A", SYSTEMS.values(), ids=SYSTEMS)


def _start(seed, A):
    return {"cold": None, "warm": normal(seed, len(A))}


def _preconditioners(A):
    n = len(A)
    dense = _with_eigenvalues(7, torch.linspace(0.2, 3, n))
    diagonal = normal(8, n).exp()
    inverse = torch.linalg.inv(A)
    return {
        "none": None,
        "itself": lambda r: r,
        "a view": lambda r: r[:],
        "diagonal": lambda r: diagonal * r,
        "dense": lambda r: dense @ r,
        "inverse": lambda r: inverse @ r,
    }


every_start = pytest.mark.parametrize("start", ["cold", "warm"])
every_preconditioner = pytest.mark.parametrize("M", _preconditioners(torch.eye(1).double()))


# Where it arrives


@every_system
@every_start
@every_preconditioner
def test_preconditioning_and_start_do_not_change_the_solution(A, start, M):
    g = normal(5, len(A))
    start = _start(6, A)[start]
    run = Run(A, g, start=start, preconditioner=_preconditioners(A)[M], tol=0.0, max_iter=500)
    assert_same(run.result.last.vector, -torch.linalg.solve(A, g), 1e-7)


@every_start
def test_a_preconditioner_that_is_the_inverse_needs_one_iteration(start):
    A, g = SYSTEMS["easy"], normal(5, 12)
    inverse = torch.linalg.inv(A)
    run = Run(A, g, start=_start(6, A)[start], preconditioner=lambda r: inverse @ r, tol=0.0)
    assert run.result.iterations == 1


@every_system
def test_arguments_are_left_alone(A):
    g, start = normal(5, len(A)), normal(6, len(A))
    copies = g.clone(), start.clone()
    conjugate_gradients(lambda v: A @ v, g, start=start)
    assert_close((g, start), copies, rtol=0, atol=0)


def test_an_operator_and_a_preconditioner_may_return_their_argument():
    g = normal(5, 4)
    result = conjugate_gradients(lambda v: v, g, preconditioner=lambda r: r, tol=0.0)
    assert_close(result.last.vector, -g, rtol=0, atol=0)


def test_a_preconditioner_may_return_a_buffer_of_its_own():
    A, g, buffer = SYSTEMS["easy"], normal(5, 12), torch.empty(12, dtype=torch.float64)
    result = conjugate_gradients(lambda v: A @ v, g, preconditioner=buffer.copy_, tol=0.0)
    assert_same(result.last.vector, -torch.linalg.solve(A, g), 1e-9)


# How it gets there


@every_system
@every_start
@pytest.mark.parametrize("M", ["none", "itself", "a view", "diagonal", "dense"])
def test_directions_are_those_of_the_standard_form(A, start, M):
    g, M = normal(5, len(A)), _preconditioners(A)[M]
    start = _start(6, A)[start]
    run = Run(A, g, start=start, preconditioner=M, tol=0.0, max_iter=3)
    identity = torch.eye(len(A), dtype=torch.float64)
    M_inv = identity if M is None else torch.stack([M(row).clone() for row in identity])
    first = torch.zeros_like(g) if start is None else start
    truth = pcg(A, -g, first, M_inv, run.result.iterations)
    for p, q in zip(run.directions, truth.directions, strict=True):
        assert_same(p, q, 1e-7)
    assert_same(run.result.last.vector, truth.iterates[-1], 1e-7)


def test_directions_stay_conjugate_under_a_preconditioner_that_changes():
    A, g = SYSTEMS["easy"], normal(5, 12)
    diagonals = normal(8, 1000, 12).exp()
    calls = iter(diagonals)
    run = Run(A, g, preconditioner=lambda r: next(calls) * r, tol=0.0, max_iter=400)
    assert run.result.stop is Stop.RESIDUAL
    for p, Ap in zip(run.directions[1:9], run.products, strict=False):
        assert abs(p @ Ap) <= 1e-9 * p.norm() * Ap.norm()


@every_system
@every_start
@pytest.mark.parametrize("M", ["none", "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_quadratic_falls_at_every_iteration(A, start, M, dtype):
    A, g = A.to(dtype), normal(5, len(A)).to(dtype)
    start = _start(6, A)[start]
    start = None if start is None else start.to(dtype)
    M = None if M == "none" else _with_eigenvalues(7, torch.linspace(0.2, 3, len(A))).to(dtype)
    preconditioner = None if M is None else (lambda r: M @ r)
    full = Run(A, g, start=start, preconditioner=preconditioner, tol=0.0, max_iter=60)
    last = full.result.last
    rounding = 10 * torch.finfo(dtype).eps * abs(_q(A, g, last.vector))
    rounding += 1e-15 * (A.norm() * last.vector.norm() ** 2).item()  # in this test's own q
    before = _q(A, g, torch.zeros_like(g) if start is None else start)
    for n in full.numbers:
        end = Run(A, g, start=start, preconditioner=preconditioner, tol=0.0, max_iter=n).result
        q = _q(A, g, end.last.vector)
        assert q < before + rounding
        before = q
    assert before < 0


@every_system
@every_start
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_each_kept_iterate_tells_its_value_and_slope(A, start, dtype, rtol):
    g, start = normal(5, len(A)).to(dtype), _start(6, A)[start]
    start = None if start is None else start.to(dtype)
    result = Run(A.to(dtype), g, start=start, tol=0.0, max_iter=120).result
    lowest = abs(_q(A, g, -torch.linalg.solve(A, g.double())))
    for iterate in result.iterates:
        d = iterate.vector.double()
        assert iterate.value == pytest.approx(_q(A, g, d), rel=rtol, abs=rtol * lowest)
        assert iterate.slope == pytest.approx((g.double() @ d).item(), rel=rtol)


@pytest.mark.parametrize("last", [1, 2, 3, 9, 10, 11, 39, 40, 41])
def test_iterates_are_kept_on_the_grid_and_at_the_end(last):
    A, g = SYSTEMS["ill"], normal(5, 40)
    result = Run(A, g, tol=0.0, max_iter=last).result
    assert (result.stop, result.iterations) == (Stop.MAX_ITER, last)
    assert [i.iteration for i in result.iterates] == kept_iterations(last)
    for iterate in result.iterates:  # copies, each as it was then
        then = Run(A, g, tol=0.0, max_iter=iterate.iteration).result.last
        assert_close(iterate.vector, then.vector, rtol=0, atol=0)


# When it stops


@pytest.mark.parametrize("tol", [5e-3, 5e-4, 5e-5])
@pytest.mark.parametrize("start", ["cold", "warm", "uphill"])
@pytest.mark.parametrize("spectrum", [(-1, 1, 40), (-2, 2, 300), (-4, 1, 300)])
def test_it_stops_by_martens_rule(tol, start, spectrum):
    A = torch.logspace(*spectrum, dtype=torch.float64).diag()
    g = normal(5, len(A))
    start = {**_start(6, A), "uphill": 30 * g}[start]
    run = Run(A, g, start=start, tol=tol, max_iter=600)
    assert run.result.stop is Stop.PROGRESS
    assert run.result.iterations == martens_stop(run.values(), tol)


def test_martens_window_grows_with_the_iterations():
    A = torch.logspace(-5, 1, 300, dtype=torch.float64).diag()
    run = Run(A, normal(5, 300), max_iter=600)
    assert run.result.iterations > 110  # where k is no longer 10
    assert run.result.iterations == martens_stop(run.values())


@pytest.mark.parametrize("tol", [0.0, 5e-4, 1e-2])
@pytest.mark.parametrize("steepness", [0.0, 1e-4, 1e-3])
@pytest.mark.parametrize("first", [-1.0, 0.005])
def test_martens_rule_at_every_iteration(tol, steepness, first):
    values = [first - steepness * i for i in range(230)]
    stops = [n for n in range(230) if progress_is_small(values[: n + 1], tol)]
    assert next(iter(stops), None) == martens_stop(values, tol)


@every_start
def test_a_solution_at_hand_is_kept(start):
    A, g = SYSTEMS["easy"], normal(5, 12)
    solution = -torch.linalg.solve(A, g) if start == "warm" else None
    g = g if start == "warm" else torch.zeros_like(g)
    run = Run(A, g, start=solution, tol=0.0)
    assert (run.result.stop, run.result.iterations) == (Stop.RESIDUAL, 0)
    assert [i.iteration for i in run.result.iterates] == [0]
    assert run.calls == (1 if start == "warm" else 0)
    assert_close(run.result.last.vector, torch.zeros_like(g) if solution is None else solution)


# What it costs, and rounding


@every_start
@pytest.mark.parametrize("iterations", [1, 7, 49, 50, 99, 100, 120])
def test_one_product_an_iteration_and_one_a_true_residual(start, iterations):
    A = torch.logspace(-6, 2, 300, dtype=torch.float64).diag()
    g = normal(5, 300)
    start = None if start == "cold" else -1e-3 * g
    run = Run(A, g, start=start, tol=0.0, max_iter=iterations)
    assert run.numbers == list(range(1, iterations + 1))
    assert run.calls == iterations + iterations // 50 + (start is not None)


@pytest.mark.parametrize("refresh", [True, False])
def test_the_true_residual_mends_a_product_that_went_wrong(refresh, monkeypatch):
    if not refresh:  # without it the same solve ends elsewhere
        monkeypatch.setattr(torch_hf.solver.cg, "REFRESH", 10**9)
    A = torch.logspace(-1, 1, 80, dtype=torch.float64).diag()
    g, calls = normal(5, 80), iter(range(10**6))

    def operator(v):
        return A @ v * (1.01 if next(calls) == 7 else 1.0)

    found = conjugate_gradients(operator, g, tol=0.0, max_iter=1000).last.vector
    error = ((found + torch.linalg.solve(A, g)).norm() / found.norm()).item()
    assert (error < 1e-8) == refresh


# Curvature that is not positive


def _first_bad(A, bad, at):
    """A's products, but from call number `at` (from 0) on they are `bad`."""
    calls = iter(range(10**6))
    return lambda v: A @ v if next(calls) < at else torch.full_like(v, bad)


NOT_POSITIVE = {
    "negative at once": (lambda: lambda v: -v, Stop.NEGATIVE_CURVATURE),
    "negative later": (
        lambda: lambda v: _with_eigenvalues(9, torch.linspace(-1.0, 6.0, 12)) @ v,
        Stop.NEGATIVE_CURVATURE,
    ),
    "zero at once": (lambda: torch.zeros_like, Stop.ZERO_CURVATURE),
    "nan at once": (lambda: _first_bad(SYSTEMS["easy"], float("nan"), 0), Stop.NON_FINITE),
    "nan second": (lambda: _first_bad(SYSTEMS["easy"], float("nan"), 1), Stop.NON_FINITE),
    "nan later": (lambda: _first_bad(SYSTEMS["easy"], float("nan"), 5), Stop.NON_FINITE),
    "inf later": (lambda: _first_bad(SYSTEMS["easy"], float("inf"), 5), Stop.NON_FINITE),
    "-inf later": (lambda: _first_bad(SYSTEMS["easy"], -float("inf"), 5), Stop.NON_FINITE),
}


@pytest.mark.parametrize(("operator", "stop"), NOT_POSITIVE.values(), ids=NOT_POSITIVE)
@pytest.mark.parametrize("start", ["cold", "down", "uphill"])
@pytest.mark.parametrize("M", ["none", "diagonal"])
def test_a_direction_of_descent_is_at_hand_where_curvature_is_not_positive(
    operator, stop, start, M
):
    g = normal(5, 12)
    start = {"cold": None, "down": -0.1 * g, "uphill": 0.1 * g}[start]
    preconditioner = _preconditioners(SYSTEMS["easy"])[M]
    result = conjugate_gradients(operator(), g, start=start, preconditioner=preconditioner, tol=0.0)
    assert result.stop is stop
    assert result.last.vector.isfinite().all()
    assert g @ result.last.vector < 0
    assert result.last.slope == pytest.approx((g @ result.last.vector).item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", range(1, 12))
def test_after_a_product_that_is_not_finite_the_value_is_that_of_the_vector(at, bad):
    """Also where the last iterate that was kept is some iterations old."""
    A, g = SYSTEMS["easy"], normal(5, 12)
    result = conjugate_gradients(_first_bad(A, bad, at), g, tol=0.0)
    assert (result.stop, result.iterations) == (Stop.NON_FINITE, at)
    for iterate in result.iterates:
        d = iterate.vector
        assert iterate.value == pytest.approx((g @ d + 0.5 * d @ A @ d).item(), rel=1e-9)
    assert len({iterate.vector.data_ptr() for iterate in result.iterates}) == len(result.iterates)


def test_zero_curvature_after_an_iteration():
    A = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    g = torch.ones(2, dtype=torch.float64)
    result = conjugate_gradients(lambda v: A @ v, g, tol=0.0)
    assert (result.stop, result.iterations) == (Stop.ZERO_CURVATURE, 1)
    assert_close(result.last.vector, -2 * g, rtol=0, atol=0)


def test_what_was_found_before_negative_curvature_is_kept():
    A, g = _with_eigenvalues(9, [-1e-3, *range(1, 12)]), normal(5, 12)
    result = conjugate_gradients(lambda v: A @ v, g, tol=0.0)
    n = result.iterations
    assert result.stop is Stop.NEGATIVE_CURVATURE
    assert n > 4
    assert [i.iteration for i in result.iterates] == kept_iterations(n)
    before = conjugate_gradients(lambda v: A @ v, g, tol=0.0, max_iter=n)
    assert_close(result.last.vector, before.last.vector, rtol=0, atol=0)


def test_a_start_at_a_saddle_gives_a_direction_of_descent():
    A = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    g = torch.tensor([1.0, 2.0], dtype=torch.float64)
    saddle = -torch.linalg.solve(A, g)
    assert g @ saddle > 0
    result = conjugate_gradients(lambda v: A @ v, g, start=saddle)
    assert g @ result.last.vector < 0


def test_negative_curvature_along_the_gradient_goes_as_far_as_its_mirror_image():
    g = normal(5, 3)
    result = conjugate_gradients(lambda v: -2 * v, g)
    assert_close(result.last.vector, -g / 2)
    assert result.last.value == pytest.approx((-0.75 * g @ g).item())


def test_where_nothing_was_solved_the_step_goes_down_under_any_preconditioner():
    """Products are not finite, and the preconditioner points uphill."""
    g = normal(3, 5)
    result = conjugate_gradients(lambda v: v * float("nan"), g, preconditioner=lambda r: -r)
    assert result.last.slope < 0
    assert_same(result.last.vector / result.last.vector.norm(), -g / g.norm())


def test_the_residual_ends_at_a_hundred_units_of_rounding():
    A, g = _with_eigenvalues(4, torch.linspace(1, 2, 30)), normal(5, 30)
    result = conjugate_gradients(lambda v: A @ v, g, tol=0.0)
    assert result.stop is Stop.RESIDUAL
    residual = torch.linalg.vector_norm(A @ result.last.vector + g)
    assert residual <= 150 * 2.0**-52 * torch.linalg.vector_norm(g)
