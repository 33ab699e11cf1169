"""Saddle-free steps against dense eigendecompositions, and the search that goes further."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from torch_hf.report import Stop
from torch_hf.solver.cg import Iterate, conjugate_gradients
from torch_hf.solver.line_search import go_further, search
from torch_hf.solver.negative_curvature import Escape, Subspace, directions_kept

SPECTRA = {
    "all negative": [-3.0, -2.0, -1.0, -0.5],
    "one negative": [-1.0, 0.5, 2.0, 3.0, 5.0, 8.0],
    "damping meets the lowest": [-0.3, 0.5, 2.0, 3.0],
    "mixed": [-4.0, -1.0, -0.1, 0.2, 1.0, 2.0, 7.0],
}


def _symmetric(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return Q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ Q.T


def _normal(seed, n):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _saddle_free(H, g, damping):
    values, vectors = torch.linalg.eigh(H)
    return -vectors @ ((vectors.T @ g) / (values.abs() + damping))


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("damping", [1e-6, 0.1, 0.3])
@pytest.mark.parametrize("start", ["cold", "warm", "uphill"])
@pytest.mark.parametrize("M", ["none", "diagonal"])
def test_the_whole_space_gives_the_dense_step(spectrum, damping, start, M):
    H, n = _symmetric(spectrum), len(spectrum)
    g = _normal(1, n)
    start = {"cold": None, "warm": 0.1 * _normal(2, n), "uphill": 0.1 * g}[start]
    scale = 0.5 + _normal(3, n).abs()
    found = conjugate_gradients(
        lambda v: H @ v + damping * v,
        g,
        start=start,
        preconditioner=None if M == "none" else (lambda r: scale * r),
        tol=0.0,
        damping=damping,
    )
    assert found.stop is Stop.NEGATIVE_CURVATURE
    d = found.last.vector
    assert_close(d, _saddle_free(H, g, damping), rtol=1e-6, atol=1e-6)
    assert found.last.slope == pytest.approx((g @ d).item(), rel=1e-6)
    q = g @ d + 0.5 * (d @ (H @ d) + damping * d @ d)
    assert found.last.value == pytest.approx(q.item(), rel=1e-6, abs=1e-9)
    values, vectors = torch.linalg.eigh(H)
    down = vectors[:, values < 0]
    assert_close(found.last.escape.vector, down @ (down.T @ d), rtol=1e-6, atol=1e-6)
    assert found.last.escape.slope == pytest.approx((g @ found.last.escape.vector).item(), rel=1e-6)


@pytest.mark.parametrize("n", [3, 12, 40])
def test_positive_curvature_takes_the_steps_of_plain_cg(n):
    H, g = _symmetric(torch.linspace(0.01, 5.0, n).tolist()), _normal(1, n)
    plain, watched = (
        conjugate_gradients(lambda v: H @ v + 0.1 * v, g, tol=0.0, damping=damping)
        for damping in (None, 0.1)
    )
    assert (plain.stop, plain.iterations) == (watched.stop, watched.iterations)
    for a, b in zip(plain.iterates, watched.iterates, strict=True):
        assert_close(a.vector, b.vector, rtol=0, atol=0)
        assert b.escape is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_large_space_stops_at_its_bound_and_descends(dtype):
    H = _symmetric(torch.linspace(-1.0, 5.0, 60).tolist()).to(dtype)
    g, calls = _normal(1, 60).to(dtype), []

    def operator(v):
        calls.append(1)
        return H @ v + 0.1 * v

    found = conjugate_gradients(operator, g, tol=0.0, max_iter=25, damping=0.1)
    assert found.iterations == len(calls) == 25  # no product twice
    assert g @ found.last.vector < 0
    whole = _saddle_free(H.double(), g.double(), 0.1)
    assert found.last.slope < 0.8 * (g.double() @ whole).item()


def test_a_product_that_is_not_finite_ends_the_space():
    H, g, calls = _symmetric([-4.0, -3.0, -2.0, 1.0]), _normal(1, 4), []

    def operator(v):
        calls.append(1)
        return H @ v + 0.1 * v if len(calls) == 1 else torch.full_like(v, torch.nan)

    found = conjugate_gradients(operator, g, damping=0.1)
    along = (g @ H @ g / (g @ g)).item()
    assert along < 0
    assert len(calls) == 2
    assert_close(found.last.vector, -g / (abs(along) + 0.1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("numel", "most"), [(3, 3), (10**4, 104), (10**6, 20), (10**9, 20)])
def test_memory_is_bounded(numel, most):
    assert directions_kept(numel, 250) == most


# The search: loss(x) = -x^2/2 until it turns at `turn`


def _loss_along(turn, tried):
    def loss_along(direction, length):
        x = (1.0 + length * direction[0]).item()
        tried.append(x)
        return -0.5 * x**2 if x < turn else -0.5 * turn**2 + (x - turn)

    return loss_along


@pytest.mark.parametrize(("turn", "end"), [(1.5, 1), (2.5, 2), (3.0, 2), (5.0, 4), (100.0, 128)])
def test_it_goes_on_while_the_loss_falls(turn, end):
    step = torch.ones(1, dtype=torch.float64)
    chosen = Iterate(1, -1.5, -1.0, step, Escape(-1.0, step))
    loss_along = _loss_along(turn, [])
    first = loss_along(step, 1.0)
    direction, loss = go_further(loss_along, chosen, 1.0, -0.5, first)
    assert (direction.item(), loss) == (end, loss_along(direction, 1.0))
    found = search(loss_along, [chosen], 1.0, -0.5, 0.0)
    assert (found.direction.item(), found.length, found.loss) == (end, 1.0, loss)
    assert found.ratio == (first + 0.5) / -1.5  # of the step that the quadratic knows


def test_it_does_not_go_on_where_the_slope_is_not_kept():
    step = torch.ones(1, dtype=torch.float64)
    tried = []
    chosen = Iterate(1, -1.5, -1.0, step, Escape(-1.0, step))
    direction, loss = go_further(_loss_along(100.0, tried), chosen, 1.0, 0.0, -0.9)
    assert (tried, loss) == ([], -0.9)
    assert direction is step


@pytest.mark.parametrize("name", SPECTRA)
def test_the_model_of_the_whole_space_has_the_size_of_each_curvature(name):
    H, damping = _symmetric(SPECTRA[name]), 0.3
    g = _normal(1, len(H))
    A = H + damping * torch.eye(len(H))
    space = Subspace(damping, len(H))
    for e in torch.eye(len(H), dtype=torch.float64):
        space.remember(e, A @ e)
    space.settle(g, A @ g)
    theta, Q = torch.linalg.eigh(H)
    truth = -0.5 * ((Q.T @ g).square() / (theta.abs() + damping)).sum()
    assert space.model(g) == pytest.approx(float(truth))


def test_the_space_grows_along_the_preconditioned_product():
    H, solve = _symmetric(SPECTRA["mixed"]), _symmetric([0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0], 1)
    v = _normal(2, 7)
    space = Subspace(0.0, 3)
    space.remember(v, H @ v)
    space.settle(v, H @ v)
    assert space.size == 1
    assert space.extend(lambda u: H @ u, lambda r: solve @ r)
    unit = v / v.norm()
    outside = H @ unit - unit * (unit @ H @ unit)
    new = solve @ outside
    new = new - unit * (unit @ new)
    assert abs(float(space.along(new)[1])) == pytest.approx(float(new.norm()))


@pytest.mark.parametrize(("curvature", "negative"), [(-0.02, True), (-0.005, False), (0.1, False)])
def test_curvature_far_below_lambda_is_not_called_negative(curvature, negative):
    damping, square = 2.0, 3.0
    found = Subspace(damping, 4).is_negative((2.0 * curvature + damping) * square, square)
    assert found is negative
