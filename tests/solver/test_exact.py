"""Exact steps against QR decompositions in extended precision."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_hf.solver.exact import MAX_GROUPS, ExactSolver, exact_cost

WIDE, TALL = (40, 60), (60, 40)
EXTENDED = np.finfo(np.longdouble).eps < 1e-18


def least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The least-squares solution by Householder's reflections, in the widest type there is."""
    a, b = matrix.astype(np.longdouble), target.astype(np.longdouble)
    columns = a.shape[1]
    for k in range(columns):
        v = a[k:, k].copy()
        v[0] += np.copysign(np.sqrt(v @ v), v[0])
        a[k:, k:] -= np.outer(v, (2 / (v @ v)) * (v @ a[k:, k:]))
        b[k:] -= v * ((2 / (v @ v)) * (v @ b[k:]))
    x = np.zeros(columns, np.longdouble)
    for k in reversed(range(columns)):
        x[k] = (b[k] - a[k, k + 1 :] @ x[k + 1 :]) / a[k, k]
    return x


class Problem(NamedTuple):
    rows: Tensor
    residual: Tensor
    rest: Tensor | None = None
    decay: Tensor | float = 0.0
    scale: Tensor | None = None

    def solver(self) -> ExactSolver:
        return ExactSolver(self.rows, self.residual, self.rest, decay=self.decay, scale=self.scale)

    def diagonal(self, damping: float) -> np.ndarray:
        p = self.rows.shape[1]
        scale = torch.ones(p).double() if self.scale is None else self.scale
        return (torch.zeros(p).double() + self.decay + damping * scale.square()).numpy()

    def truth(self, damping: float) -> np.ndarray:
        p = self.rows.shape[1]
        roots = np.sqrt(self.diagonal(damping).astype(np.longdouble))
        rest = np.zeros(p) if self.rest is None else self.rest.numpy()
        matrix = np.concatenate([self.rows.double().numpy(), np.diag(roots)])
        return least_squares(matrix, np.concatenate([-self.residual.numpy(), -rest / roots]))


def spectrum(shape: tuple[int, int], decades: float, misfit: float, seed: int = 0) -> Problem:
    """Singular values over so many decades; a residual in R's range but for the misfit."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    m, p = shape
    k = min(shape)
    left, right = torch.linalg.qr(normal(m, k))[0], torch.linalg.qr(normal(p, k))[0]
    rows = left * 10 ** -torch.linspace(0, decades, k).double() @ right.T
    return Problem(rows, rows @ normal(p) + misfit * normal(m))


def error(d: Tensor, truth: np.ndarray) -> float:
    return float(
        np.linalg.norm((d.numpy() - truth).astype(float)) / np.linalg.norm(truth.astype(float))
    )


def value(problem: Problem, d: np.ndarray, damping: float) -> np.longdouble:
    wide = np.longdouble
    rest = 0.0 if problem.rest is None else problem.rest.numpy().astype(wide) @ d
    residual = problem.rows.numpy().astype(wide) @ d + problem.residual.numpy()
    return residual @ residual / 2 + rest + (problem.diagonal(damping).astype(wide) * d) @ d / 2


def options(shape: tuple[int, int]) -> dict[str, dict[str, Tensor | float]]:
    generator = torch.Generator().manual_seed(1)
    p = shape[1]
    noise = torch.randn(2, p, generator=generator, dtype=torch.float64)
    two = torch.where(torch.arange(p) % 3 == 0, 0.0, 1e-3).double()
    scale = (0.5 * noise[0]).exp()
    return {
        "plain": {},
        "decay": {"decay": 1e-4},
        "two decays": {"decay": two},
        "many decays": {"decay": noise[1].square() * 1e-3},
        "scale": {"scale": scale},
        "scale and two decays": {"scale": scale, "decay": two},
        "rest": {"rest": noise[1]},
        "decay's own gradient": {"decay": two, "rest": two * noise[1]},
        "all": {"scale": scale, "decay": two, "rest": noise[1]},
    }


@pytest.mark.parametrize("name", options(WIDE))
@pytest.mark.parametrize("shape", [WIDE, TALL, (50, 50)])
def test_steps_are_the_minimum(shape, name):
    problem = spectrum(shape, 4, 0.1)._replace(**options(shape)[name])
    solver = problem.solver()
    for damping in (1.0, 1e-3, 1e-6):
        truth = problem.truth(damping)
        d = solver.step(damping)
        assert error(d, truth) <= 1e-10
        gap = solver.quadratic(d, damping) - solver.quadratic(
            torch.from_numpy(truth.astype(float)), damping
        )
        assert abs(gap) <= 1e-10 * abs(solver.quadratic(d, damping))


@pytest.mark.skipif(not EXTENDED, reason="no type wider than float64 on this machine")
@pytest.mark.parametrize("relative", [1e-6, 1e-10, 1e-12, 1e-14, 1e-16])
@pytest.mark.parametrize("misfit", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_the_squared_condition_costs_nothing(shape, misfit, relative):
    """Where a Cholesky solve has lost all digits the step is still as good as by LAPACK's SVD."""
    problem = spectrum(shape, 8, misfit)
    damping = relative * float(problem.rows.square().sum())
    truth = problem.truth(damping)
    p = shape[1]
    stacked = torch.cat([problem.rows, damping**0.5 * torch.eye(p).double()])
    target = torch.cat([-problem.residual, torch.zeros(p).double()])
    by_svd = torch.linalg.lstsq(stacked, target[:, None], driver="gelsd").solution[:, 0]
    d = problem.solver().step(damping)
    assert error(d, truth) <= max(1e-10, 5 * error(by_svd, truth))
    least = value(problem, truth, damping)
    assert abs(value(problem, d.numpy().astype(np.longdouble), damping) / least - 1) <= 1e-10


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_each_damping_costs_one_factor(shape):
    solver = spectrum(shape, 4, 0.1).solver()
    for damping in (1.0, 1e-2, 1e-4):
        solver.step(damping)
        solver.solve(damping, torch.ones(shape[0]).double())
    assert solver.factorizations == 3


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_another_gradient_on_the_same_factor(shape):
    problem = spectrum(shape, 4, 0.1)._replace(decay=1e-3)
    other = torch.linspace(-1, 1, shape[0]).double()
    rest = torch.linspace(2, -1, shape[1]).double()
    solver = problem.solver()
    solver.step(1e-2)
    truth = problem._replace(residual=other, rest=rest).truth(1e-2)
    assert error(solver.solve(1e-2, other, rest), truth) <= 1e-10


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_a_damping_that_rounding_swallows_still_gives_a_step_down(shape):
    problem = spectrum(shape, 12, 0.0)
    solver = problem.solver()
    for damping in (1e-30, 0.0):
        d = solver.step(damping)
        before, after = problem.residual.norm(), (problem.residual + problem.rows @ d).norm()
        assert after <= 1e-6 * before


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_float32_rows_are_squared_in_float64(shape):
    problem = spectrum(shape, 6, 0.0)
    single = problem._replace(rows=problem.rows.float())
    damping = 1e-11
    d = single.solver().step(damping)
    assert d.dtype == torch.float32
    assert error(d.double(), single._replace(rows=single.rows.double()).truth(damping)) <= 1e-6


def test_the_quadratic_is_the_predicted_change():
    problem = spectrum(WIDE, 3, 0.5)._replace(**options(WIDE)["all"])
    solver = problem.solver()
    d = torch.linspace(-1, 2, WIDE[1]).double()
    gradient = problem.rows.T @ problem.residual + problem.rest
    matrix = problem.rows.T @ problem.rows + torch.diag(torch.from_numpy(problem.diagonal(0.3)))
    assert solver.quadratic(d, 0.3) == pytest.approx(float(gradient @ d + d @ matrix @ d / 2))
    assert torch.allclose(solver.gradient(), gradient)


def test_the_trace():
    problem = spectrum(WIDE, 3, 0.5)
    for shape in (WIDE, TALL):
        problem = spectrum(shape, 3, 0.5)
        for name, given in options(shape).items():
            scaled = problem._replace(**given)
            scale = 1.0 if scaled.scale is None else scaled.scale
            truth = float((scaled.rows / scale).square().sum())
            assert scaled.solver().trace == pytest.approx(truth, rel=1e-12), name


def test_the_cost_is_that_of_the_smaller_side():
    assert exact_cost(100, 3000).operations == exact_cost(3000, 100).operations
    assert exact_cost(100, 3000).bytes < exact_cost(1000, 3000).bytes
    assert MAX_GROUPS >= 2


def test_rows_that_are_not_finite_end_in_an_error():
    rows = torch.ones(3, 4)
    rows[1, 2] = torch.nan
    with pytest.raises(ValueError, match="rows must be finite"):
        ExactSolver(rows, torch.ones(3)).step(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"residual": torch.ones(4)}, r"residual must have shape \(3,\)"),
        ({"rest": torch.ones(3)}, r"rest must have shape \(4,\)"),
        ({"decay": -1.0}, "decay must not be negative"),
        ({"scale": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "scale must be positive"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExactSolver(torch.ones(3, 4), **arguments)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_wrong_damping(damping):
    with pytest.raises(ValueError, match="damping must be a finite number of at least 0"):
        ExactSolver(torch.ones(3, 4), torch.ones(3)).step(damping)


def test_no_minimum():
    with pytest.raises(ValueError, match="The quadratic has no minimum"):
        ExactSolver(torch.ones(3, 4), rest=torch.ones(4)).step(0.0)
