"""The reference against itself and torch.func: if these fail, trust no other test."""

import math
from itertools import pairwise

import pytest
import reference
import torch
from basics import normal, positive_definite
from problems import CASES, case_named, every_case
from reference import (
    STABLE_SETTINGS,
    HessianFree,
    bfgs_inverse,
    cg,
    dense_gauss_newton,
    dense_hessian,
    dense_jacobian,
    flat,
    hessian_free,
    kept_iterations,
    martens_stop,
    pcg,
    two_loop,
    unflat,
    uniform_sample,
)
from torch.func import grad, vjp
from torch.nn import functional as F
from torch.testing import assert_close

# The cases


def test_case_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


@every_case
def test_case_is_small_repeatable_and_double(case):
    model, again = case.model(), case.model()
    assert flat(case.params(model)).numel() <= 150
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert_close(case.params(model), case.params(again), rtol=0, atol=0)
    outputs = case.outputs(model)
    assert len(outputs) == case.n_outputs
    assert all(z.dtype == torch.float64 for z in outputs)


@every_case
def test_functional_form_equals_closure(case):
    model = case.model()
    trainable = [p for p in model.parameters() if p.requires_grad]
    params = case.params(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}

    gradient = flat(grad(case.loss_fn(model))(params))
    value = case.loss_fn(model)(params)
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)

    loss = case.closure_loss(model)
    expected = torch.autograd.grad(loss, trainable, allow_unused=True, materialize_grads=True)
    assert_close(value, loss)
    assert_close(gradient, flat(expected), rtol=1e-10, atol=1e-12)


@every_case
def test_gauss_newton_product_by_jvp_and_vjp(case):
    model = case.model()
    params, output_fn = case.params(model), case.output_fn(model)
    v = normal(0, flat(params).numel())
    with case.context():
        outputs, pullback = vjp(output_fn, params)
        # Jv by reverse mode twice: the pullback is linear, its own pullback is J.
        zeros = tuple(torch.zeros_like(z) for z in outputs)
        tangents = vjp(pullback, zeros)[1]((list(unflat(v, params)),))[0]
        loss_grad = grad(case.loss_of_outputs, argnums=tuple(range(len(outputs))))
        curved = vjp(loss_grad, *outputs)[1](tangents)
        product = flat(pullback(tuple(curved))[0])
    G = case.gauss_newton(model)
    assert product.norm() > 1e-6
    assert_close(G @ v, product, rtol=1e-9, atol=1e-12)
    assert_close(G, G.T, rtol=1e-9, atol=1e-12)
    assert torch.linalg.eigvalsh(G).min() > -1e-10


@every_case
def test_hessian_product_by_central_differences(case):
    model = case.model()
    params = case.params(model)
    theta, loss_fn = flat(params), case.loss_fn(model)
    gradient = grad(lambda w: loss_fn(unflat(w, params)))
    v, eps = normal(0, len(theta)), 1e-6
    H = case.hessian(model)
    differences = (gradient(theta + eps * v) - gradient(theta - eps * v)) / (2 * eps)
    assert_close(H @ v, differences, rtol=1e-5, atol=1e-6)
    assert_close(H, H.T, rtol=1e-9, atol=1e-12)


# Dense curvature in closed form


def test_flat_and_unflat_are_inverse():
    tensors = [normal(1, 2, 3), normal(2), normal(3, 4)]
    assert_close(unflat(flat(tensors), tensors), tensors)
    assert_close(unflat(flat(tensors[0]), tensors[0]), tensors[0])


def test_hessian_of_a_quadratic_is_its_matrix():
    A, b = positive_definite(1, 5), normal(2, 5)

    def loss_fn(params):
        x = flat(params)
        return x @ A @ x / 2 + b @ x

    assert_close(dense_hessian(loss_fn, [normal(3, 2), normal(4, 3, 1)]), A)


def test_gauss_newton_of_linear_softmax_in_closed_form():
    X, y, W = normal(1, 7, 3), torch.tensor([0, 1, 2, 2, 1, 0, 1]), normal(2, 4, 3)
    G = dense_gauss_newton(lambda w: X @ w.T, lambda z: F.cross_entropy(z, y), W)
    expected = torch.zeros(12, 12, dtype=torch.float64)
    for x in X:
        p = (W @ x).softmax(0)
        expected += torch.kron(p.diag() - torch.outer(p, p), torch.outer(x, x)) / 7
    assert_close(G, expected)
    # The network is linear, so that the Gauss-Newton matrix is the Hessian.
    assert_close(G, dense_hessian(lambda w: F.cross_entropy(X @ w.T, y), W))


def test_gauss_newton_sees_the_coupling_of_outputs():
    x, w = normal(1, 3), [normal(2, 3), normal(3, 3)]

    def output_fn(params):
        return params[0] @ x, params[1] @ x

    G = dense_gauss_newton(output_fn, lambda a, b: (a - b) ** 2, w)
    J = dense_jacobian(output_fn, w)
    H = torch.tensor([[2.0, -2.0], [-2.0, 2.0]], dtype=torch.float64)
    assert_close(G, J.T @ H @ J)
    assert G[:3, 3:].norm() > 1e-3


# Conjugate gradients


def test_cg_solves_with_conjugate_directions():
    A, b, x0 = positive_definite(1, 8), normal(2, 8), normal(3, 8)
    iterates, directions, products = cg(A, b, x0, 8)
    assert_close(iterates[-1], torch.linalg.solve(A, b))
    P = torch.stack(directions)
    gram = P @ A @ P.T
    assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-8 * gram.max().item())
    assert_close(torch.stack(products), P @ A)
    assert (len(iterates), len(directions)) == (9, 8)


def test_cg_ends_at_a_zero_residual():
    A, b = positive_definite(1, 4), torch.zeros(4, dtype=torch.float64)
    assert len(cg(A, b, b, 5).iterates) == 1
    assert len(pcg(A, b, b, A, 5).iterates) == 1


def test_pcg_is_cg_in_other_coordinates():
    A, b, x0 = positive_definite(1, 8), normal(2, 8), normal(3, 8)
    M_inv = positive_definite(4, 8)
    root = torch.linalg.cholesky(M_inv)
    transformed = cg(root.T @ A @ root, root.T @ b, torch.linalg.solve(root, x0), 5)
    expected = [root @ x for x in transformed.iterates]
    assert_close(pcg(A, b, x0, M_inv, 5).iterates, expected, rtol=1e-7, atol=1e-9)
    exact = pcg(A, b, x0, torch.linalg.inv(A), 1)
    assert_close(exact.iterates[1], torch.linalg.solve(A, b))


@pytest.mark.parametrize("start", [0, 50])
def test_martens_rule_stops_at_the_first_slow_iteration(start):
    steady = [-float(i) for i in range(start)]
    flat_end = [min(steady, default=-1.0)] * 30
    expected = next(
        i
        for i in range(len(steady + flat_end))
        if i > 10 and ((steady + flat_end)[i - 10] / (steady + flat_end)[i]) > 1 - 5e-3
    )
    assert martens_stop(steady + flat_end) == expected


def test_martens_rule_in_its_details():
    assert martens_stop([-1.0] * 11) is None  # i = 10 is not above k
    assert martens_stop([-1.0] * 12) == 11
    assert martens_stop([1.0] * 40) is None  # q must be negative
    assert martens_stop([-1.0] * 40, tol=0.0) is None
    # k grows with i: at i = 201, k is 21.
    falling = [-1.0 - 1e-3 * i for i in range(400)]
    stop = martens_stop(falling, tol=8.4e-4)
    assert stop is not None
    assert 1e-3 / -falling[stop] < 8.4e-4 <= 1e-3 / -falling[stop - 1]


# BFGS


def test_bfgs_inverse_is_the_two_loop_recursion():
    A = positive_definite(1, 6)
    pairs = [(s, A @ s) for s in normal(2, 4, 6)]
    H0, r = positive_definite(3, 6), normal(4, 6)
    H = bfgs_inverse(pairs, H0)
    assert_close(H @ r, two_loop(pairs, lambda v: H0 @ v, r), rtol=1e-8, atol=1e-10)
    assert_close(H @ pairs[-1][1], pairs[-1][0], rtol=1e-8, atol=1e-10)
    assert torch.linalg.eigvalsh(H).min() > 0
    assert_close(bfgs_inverse([], H0), H0)


def test_bfgs_inverse_with_conjugate_pairs_maps_every_y_to_its_s():
    A, b = positive_definite(1, 6), normal(2, 6)
    _, directions, products = cg(A, b, torch.zeros_like(b), 6)
    pairs = list(zip(directions, products, strict=True))
    H = bfgs_inverse(pairs[:4], torch.eye(6, dtype=torch.float64))
    for s, y in pairs[:4]:
        assert_close(H @ y, s, rtol=1e-7, atol=1e-9)
    complete = bfgs_inverse(pairs, torch.eye(6, dtype=torch.float64))
    assert_close(complete, torch.linalg.inv(A), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("m", [2, 4, 6, 20])
def test_uniform_sample_is_roughly_equally_spaced(m):
    for n in range(1, 40 * m):
        held = uniform_sample(n, m)
        assert held[0] == 1
        assert held[-1] == n
        assert len(held) == min(n, m)
        gaps = [b - a for a, b in pairwise(held)]
        spacing = 2 ** max(0, math.ceil(math.log2(n / m)))
        # The newest has taken another's place, and may lie close to the one before it.
        assert sum(gap > spacing for gap in gaps) <= 1
        assert max(gaps, default=1) <= 2 * spacing
        assert min(gaps[:-1], default=spacing) >= spacing / 2


def test_uniform_sample_by_hand():
    assert uniform_sample(0, 4) == []
    assert uniform_sample(4, 4) == [1, 2, 3, 4]
    assert uniform_sample(5, 4) == [1, 3, 4, 5]
    assert uniform_sample(6, 4) == [1, 3, 5, 6]
    assert uniform_sample(7, 4) == [1, 3, 5, 7]
    assert uniform_sample(9, 4) == [1, 5, 7, 9]
    assert uniform_sample(13, 4) == [1, 5, 9, 13]
    with pytest.raises(ValueError, match="even"):
        uniform_sample(5, 3)


# Hessian-free


def _case_problem(case):
    model = case.model()
    params = case.params(model)
    output_fn = case.output_fn(model)

    def loss_fn(theta):
        return case.loss_of_outputs(*output_fn(unflat(theta, params)))

    def gauss_newton_fn(theta):
        return dense_gauss_newton(output_fn, case.loss_of_outputs, unflat(theta, params))

    return loss_fn, gauss_newton_fn, flat(params)


def test_kept_iterations():
    assert kept_iterations(0) == [0]
    assert kept_iterations(1) == [1]
    assert kept_iterations(10) == [1, 2, 3, 4, 5, 7, 9, 10]


@pytest.mark.parametrize(
    ("losses", "q_values", "expected"),
    [
        # Iterates 1, 2, 3, 4, 5 and 6 are kept: 6 is the last.
        ([9, 9, 9, 9, 9, 2, 3], [-1.0] * 7, 5),
        ([9, 1, 1, 9, 3, 3, 4], [-1.0] * 7, 5),  # equal is not better
        ([9, 1, 2, 3, 4, 5, 5], [-1.0] * 7, 6),
        ([0, 1, 2, 3, 4, 5, 6], [-1.0] * 7, 1),  # the start is not kept
        ([9, 9, 9, 1, 2, 3, 4], [0, 1, 1, -1, 1, -1, -1], 3),  # 4 is left out
        ([9, 9, 9, 9, 9, 9, 6], [1.0] * 7, 6),  # the last always stays
    ],
)
def test_walk_back(losses, q_values, expected):
    iterates = [torch.tensor([float(i)]) for i in range(7)]
    run = reference._CGRun(iterates, q_values, [None] * 6, [None] * 6)
    d, loss = reference._walk_back(lambda d: losses[int(d)], run)
    assert (int(d), loss) == (expected, losses[expected])


def test_armijo_takes_the_first_sufficient_step():
    zero, d = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def loss_at(x):
        return (-x + x**2 / 0.8).item()  # falls up to 0.8

    length = reference._armijo(loss_at, zero, 0.0, d, slope=-1.0)
    assert length == pytest.approx(0.8**2)  # 0.8 itself does not fall by 1e-2 of it
    assert reference._armijo(loss_at, zero, 0.0, d, slope=1.0) == 0
    assert reference._armijo(lambda x: 1.0, zero, 0.0, d, slope=-1.0) == 0


@pytest.mark.parametrize("damped_rho", [True, False])
def test_one_step_on_a_quadratic_is_newtons(damped_rho):
    A, b, theta = positive_definite(1, 6), normal(2, 6), normal(3, 6)
    (step,) = hessian_free(
        lambda x: x @ A @ x / 2 - b @ x,
        lambda x: A,
        theta,
        1,
        damping=1e-3,
        tol=0.0,
        max_iter=6,
        damped_rho=damped_rho,
    )
    g = A @ theta - b
    expected = theta - torch.linalg.solve(A + 1e-3 * torch.eye(6), g)
    assert_close(step.theta, expected, rtol=1e-8, atol=1e-10)
    assert step.accepted
    assert step.step_length == 1.0
    assert step.iterations == 6
    # The undamped model is the loss itself; the damped one promises less.
    if damped_rho:
        assert 1 < step.rho < 1.01
    else:
        assert step.rho == pytest.approx(1, abs=1e-9)


def test_preconditioner_holds_the_pairs_of_another_damping_exactly():
    G, b, theta = positive_definite(1, 6), normal(2, 6), normal(3, 6)
    run = HessianFree(theta, damping=0.5, tol=0.0, max_iter=6)
    run.step(lambda x: x @ G @ x / 2 - b @ x, lambda x: G)
    assert run.damping == 0.5 * 2 / 3
    A = G + run.damping * torch.eye(6)
    s, _ = run.pairs[-1]
    assert_close(run._preconditioner(6) @ (A @ s), s, rtol=1e-8, atol=1e-10)


def test_preconditioner_makes_the_second_solve_shorter():
    G, theta = torch.diag(torch.logspace(0, 3, 30, dtype=torch.float64)), normal(3, 30)

    def quartic(x):  # not quadratic, so that a second step is needed
        return x @ G @ x / 2 + (x**4).sum()

    settings = {"damping": 0.1, "tol": 0.0, "residual_tol": 1e-6, "decay": 0.0}
    second = {
        m: hessian_free(quartic, lambda x: G, theta, 2, history_size=m, **settings)[1]
        for m in (0, 40)
    }
    assert second[40].iterations < second[0].iterations / 2


def test_rejected_step_leaves_theta_and_raises_damping():
    theta = normal(1, 4)
    run = HessianFree(theta, damping=1.0)
    # Any move at all is a rise, while the gradient promises a fall.
    wall = theta.clone()

    def loss_fn(x):
        return x.sum() + 1e9 * (x - wall).abs().sum()

    step = run.step(loss_fn, lambda x: torch.eye(4, dtype=torch.float64))
    assert not step.accepted
    assert step.step_length == 0.0
    assert step.new_loss == step.loss
    assert_close(step.theta, theta, rtol=0, atol=0)
    assert run.damping == 1.5
    assert run.last_iterate is None
    assert len(run.pairs) == 1


def test_zero_gradient_moves_nothing():
    theta = torch.zeros(3, dtype=torch.float64)
    run = HessianFree(theta, damping=2.0)
    step = run.step(lambda x: x @ x, lambda x: 2 * torch.eye(3, dtype=torch.float64))
    assert not step.accepted
    assert run.damping == 2.0
    assert_close(run.theta, theta, rtol=0, atol=0)


def test_solve_starts_from_the_decayed_last_iterate():
    A, g = positive_definite(1, 5), normal(2, 5)
    run = HessianFree(torch.zeros(5, dtype=torch.float64), decay=0.9)
    run.last_iterate = normal(3, 5)
    trace = run._solve(A, g)
    assert_close(trace.iterates[0], 0.9 * run.last_iterate)
    assert_close(trace.iterates[-1], -torch.linalg.solve(A, g))
    # The exact solution, decayed by nothing, needs no iteration.
    run.last_iterate, run.decay, run.residual_tol = trace.iterates[-1], 1.0, 1e-9
    assert len(run._solve(A, g).directions) == 0


@pytest.mark.parametrize("history_size", [0, 4, 20])
def test_run_solves_a_convex_problem(history_size):
    X, y = normal(1, 20, 3), torch.arange(20) % 3
    W = normal(2, 3, 3)

    def loss_fn(theta):
        return F.cross_entropy(X @ theta.reshape(3, 3).T, y)

    def gauss_newton_fn(theta):
        return dense_hessian(loss_fn, theta)

    steps = hessian_free(
        loss_fn,
        gauss_newton_fn,
        W.flatten(),
        15,
        damping=1e-2,
        weight_decay=1e-2,
        history_size=history_size,
        tol=0.0,
        residual_tol=1e-8,
    )
    end = steps[-1].theta
    gradient = grad(loss_fn)(end) + 1e-2 * end
    assert gradient.norm() < 1e-8
    # Near the end the model is right, and the damping falls at every step.
    assert steps[5].rho == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("name", ["mlp-cross_entropy", "mlp-mse", "two_heads-cross_entropy+mse"])
def test_run_descends_and_moves_damping_by_its_rule(name):
    loss_fn, gauss_newton_fn, theta = _case_problem(case_named(name))
    steps = hessian_free(loss_fn, gauss_newton_fn, theta, 30, weight_decay=1e-2, history_size=8)
    assert steps[-1].new_loss < steps[0].loss / 4
    for before, after in pairwise(steps):
        assert after.loss == before.new_loss
        assert (before.new_loss < before.loss) == before.accepted
        # What the first step has seen it cannot know to be the same data.
        low, high = (1 / 2, 9 / 10) if before is steps[0] else (1 / 4, 3 / 4)
        solved = before is not steps[0] and before.iterations <= 20  # and not cut off at 250
        if before.rho < low or not before.accepted:
            factor = 3 / 2
        elif solved and 9 / 10 <= before.rho <= 11 / 10:
            factor = 1 / 4
        else:
            factor = 2 / 3 if before.rho > high else 1
        assert after.damping == pytest.approx(before.damping * factor)
    assert {step.rho < 1 / 4 for step in steps} == {True, False}


@every_case
def test_stable_settings_keep_a_trajectory_from_rounding(case):
    loss_fn, gauss_newton_fn, theta = _case_problem(case)
    nudge = 1e-14 * normal(9, len(theta))
    with case.context():
        run, nudged = (
            hessian_free(loss_fn, gauss_newton_fn, start, 6, **STABLE_SETTINGS)
            for start in (theta, theta + nudge)
        )
    assert [s.iterations for s in run] == [s.iterations for s in nudged]
    assert [s.accepted for s in run] == [s.accepted for s in nudged]
    distance = (run[-1].theta - nudged[-1].theta).norm() / theta.norm()
    assert distance < 1e-9
