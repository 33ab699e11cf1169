"""HFOptimizer against dense solves, the textbook run, and its own promises."""

import random
from itertools import pairwise

import pytest
import torch
from basics import assert_same, normal
from problems import case_named, every_case
from reference import STABLE_SETTINGS, HessianFree, dense_gauss_newton, hessian_free, unflat
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from trainings import FORMS, STABLE, Training, least_squares, theta, walled

from torch_hf import HFOptimizer, Stop, head, split_batch

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal", "none"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("rows", [6, 30])
@pytest.mark.parametrize("outputs", [1, 3])
def test_one_step_solves_least_squares(preconditioner, curvature, rows, outputs):
    x, y = least_squares(rows, outputs=outputs)
    model = nn.Linear(6, outputs, bias=False).double()
    optimizer = HFOptimizer(
        model.parameters(),
        damping=1e-12,
        cg_tol=0.0,
        cg_max_iter=250,
        preconditioner=preconditioner,
        curvature=curvature,
    )
    optimizer.step(lambda: F.mse_loss(model(x), y))
    assert_same(model.weight.detach().T, torch.linalg.lstsq(x, y).solution, 1e-8)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.3, 0.3), (0.0, 2.0)])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.5, 0.5), (1.0, 0.25), (0.0, 0.5)])
def test_groups_have_their_own_decay_and_rate(damping, decays, rates):
    x, y = least_squares()
    model = nn.Sequential(nn.Linear(6, 1)).double()
    groups = [
        {"params": [p], "weight_decay": decay, "lr": lr}
        for p, decay, lr in zip([model[0].weight, model[0].bias], decays, rates, strict=True)
    ]
    optimizer = HFOptimizer(groups, damping=damping, cg_tol=0.0, cg_max_iter=250)
    before = theta(model)
    optimizer.step(lambda: 0.5 * F.mse_loss(model(x), y, reduction="sum"))
    design = torch.cat([x, torch.ones(30, 1)], 1)
    decay = torch.tensor([decays[0]] * 6 + [decays[1]]).double()
    G = design.T @ design + decay.diag()
    g = G @ before - design.T @ y[:, 0]
    d = torch.tensor([rates[0]] * 6 + [rates[1]]) * -torch.linalg.solve(
        G + damping * torch.eye(7), g
    )
    assert_same(theta(model), before + d, 1e-8)
    report = optimizer.last_report
    assert report.gradient_norm == pytest.approx(g.norm().item())
    # On a quadratic, actual over predicted change is 1.
    assert report.reduction_ratio == pytest.approx(1.0, abs=1e-6)


def test_a_rate_of_zero_moves_nothing_and_says_so():
    training = Training(case_named("mlp-mse"), lr=0.0)
    before = theta(training.model)
    report = training.step()
    assert_close(theta(training.model), before, rtol=0, atol=0)
    assert not report.accepted
    assert report.reason


# Against the textbook


def _problem(case, model, batch=None):
    params = case.params(model)
    output_fn = case.output_fn(model)

    def loss_fn(v):
        return case.loss_of_outputs(*output_fn(unflat(v, params)))

    def gauss_newton_fn(v):
        return dense_gauss_newton(output_fn, case.loss_of_outputs, unflat(v, params))

    return loss_fn, gauss_newton_fn


TEXTBOOK_CASES = [
    "mlp-cross_entropy",
    "mlp-mse",
    "cnn_batch_norm-cross_entropy",
    "rnn-mse",
    "tied_autoencoder-mse",
    "frozen-cross_entropy",
    "unused-cross_entropy",
    "two_heads-cross_entropy+mse",
    "log_softmax-nll",
    "sum_of_squares-by_hand",
]


@pytest.mark.parametrize("name", TEXTBOOK_CASES)
@pytest.mark.parametrize("preconditioner", ["lbfgs", "none"])
@pytest.mark.parametrize("weight_decay", [0.0, STABLE_SETTINGS["weight_decay"]])
def test_a_run_is_the_textbooks_step_by_step(name, preconditioner, weight_decay):
    training = Training(
        case_named(name), preconditioner=preconditioner, weight_decay=weight_decay, **STABLE
    )
    problem = _problem(training.case, training.case.model())
    settings = {**STABLE_SETTINGS, "weight_decay": weight_decay, "damped_rho": False}
    if preconditioner == "none":
        settings["history_size"] = 0
    for truth in hessian_free(*problem, theta(training.model), 6, **settings):
        report = training.step()
        assert_same(theta(training.model), truth.theta, 1e-6)
        assert (report.cg_iterations, report.accepted) == (truth.iterations, truth.accepted)
        found = [
            report.loss,
            report.new_loss,
            report.reduction_ratio,
            report.damping,
            report.step_length,
        ]
        expected = [truth.loss, truth.new_loss, truth.rho, truth.damping, truth.step_length]
        assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_curvature_batches_are_a_sample_of_their_own():
    training = Training(case_named("mlp-cross_entropy"), preconditioner="lbfgs", **STABLE)
    case, model, batch = training.case, training.case.model(), training.batch
    loss_fn, _ = _problem(case, model)
    params = case.params(model)

    def sample_outputs(params):
        return (case.output_fn(model)(params)[0][:4],)

    def gauss_newton_fn(v):
        return dense_gauss_newton(
            sample_outputs, lambda z: case.criterion(z, case.targets[0][:4]), unflat(v, params)
        )

    run = HessianFree(theta(model), damped_rho=False, **{**STABLE_SETTINGS, "weight_decay": 0.0})
    for curvature_batches in ([head(batch, 4)], split_batch(head(batch, 4), 3)) * 2:
        truth = run.step(loss_fn, gauss_newton_fn)
        report = training.step(batches=[batch], curvature_batches=curvature_batches)
        assert_same(theta(training.model), truth.theta, 1e-8)
        assert (report.batch_cases, report.curvature_cases) == (10, 4)


# Every step


@every_case
@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal"])
def test_the_loss_never_rises_on_the_steps_own_data(case, preconditioner):
    generator = random.Random(0)
    training = Training(case, preconditioner=preconditioner, solver="cg")
    for _ in range(8):
        rows = torch.tensor(generator.sample(range(len(case.inputs[0])), 4))
        batch = (
            tuple(x[rows] for x in case.inputs),
            tuple(y[rows] for y in case.targets),
        )
        before = training.loss(batch)
        report = training.step(batch)
        after = training.loss(batch)
        assert after <= before
        assert (report.loss, report.new_loss) == pytest.approx((before, after), rel=1e-12)
        assert report.accepted == (after < before)


@pytest.mark.parametrize("name", ["mlp-cross_entropy", "mlp-mse", "rnn-mse", "huber"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_reports_follow_the_rules(name, curvature):
    options = {"curvature": curvature, "damping": 0.1, "weight_decay": 1e-3, "solver": "cg"}
    reports = (training := Training(case_named(name), **options)).run(25)
    assert [r.step for r in reports] == list(range(1, 26))
    assert reports[-1].new_loss < reports[0].loss
    for report in reports:
        assert report.new_loss <= report.loss
        assert report.accepted == (report.step_length > 0)
        assert (report.reason == "") == (report.step_length == 1.0)
        assert report.products >= report.cg_iterations
        assert report.evaluations >= 1
        assert (report.batch_cases, report.curvature_cases) == (len(training.batch[0][0]),) * 2
        assert report.seconds["total"] > 0
    for before, after in pairwise(reports):
        assert after.loss == pytest.approx(before.new_loss, rel=1e-12)
        # Only the first step does not know that the data are those of the step before.
        low, high = (0.5, 0.9) if before.step == 1 else (0.25, 0.75)
        solved = before.cg_stop in (Stop.RESIDUAL, Stop.PROGRESS) and before.cg_iterations <= 20
        factor = 1.0
        if not before.accepted or not before.reduction_ratio >= low:
            factor = 1.5
        elif solved and before.step > 1 and 0.9 <= before.reduction_ratio <= 1.1:
            factor = 1 / 4
        elif before.reduction_ratio > high:
            factor = 1 / 1.5
        assert after.damping == pytest.approx(before.damping * factor)
    assert any(r.reduction_ratio > 0.75 for r in reports)


def test_data_are_the_same_only_with_as_many_cases():
    """The mean loss of the same cases twice over is the same: other data that come as near."""
    x, y = least_squares()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = HFOptimizer(model.parameters(), cg_tol=0.0, solver="cg")
    counts = []
    for times in (1, 1, 2, 2):
        optimizer.step(lambda n=times: F.mse_loss(model(x.repeat(n, 1)), y.repeat(n, 1)))
        counts.append(optimizer.last_report.cg_iterations)
    assert counts[0] == counts[2] == 3  # new data on factors
    assert min(counts[1], counts[3]) > 3


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_the_first_damping_is_the_curvature_along_the_gradient(scale):
    x, y = least_squares()
    model = nn.Linear(6, 1, bias=False).double()
    G = scale * x.T @ x
    g = G @ model.weight.detach()[0] - scale * x.T @ y[:, 0]
    optimizer = HFOptimizer(model.parameters(), solver="cg")
    optimizer.step(lambda: scale * 0.5 * (model(x) - y).square().sum())
    assert optimizer.last_report.damping == pytest.approx((g @ G @ g / (g @ g)).item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_rejected_step_leaves_the_bits_and_raises_the_damping(dtype):
    model = nn.Linear(3, 2).to(dtype)
    walls = [p.detach().clone() for p in model.parameters()]
    x, y = normal(1, 5, 3).to(dtype), normal(2, 5, 2).to(dtype)
    optimizer = HFOptimizer(model.parameters(), damping=2.0, solver="cg")
    for damping in (2.0, 3.0, 4.5):
        optimizer.step(lambda: F.mse_loss(model(x), y) + walled(model, walls))
        report = optimizer.last_report
        assert (report.accepted, report.step_length) == (False, 0.0)
        assert report.new_loss == report.loss
        assert report.reason
        assert report.damping == damping
        assert_close(list(model.parameters()), walls, rtol=0, atol=0)


def test_after_a_rejection_the_solve_starts_at_zero():
    case = case_named("mlp-mse")
    training = Training(case, preconditioner="none", cg_max_iter=3)
    model = training.model
    training.step()
    plain, walls = training.closure, [p.detach().clone() for p in model.parameters()]
    training.closure = lambda batch: training._criterion(model, batch) + walled(model, walls)
    rejected = training.step()
    training.closure = plain
    fresh = Training(case, preconditioner="none", cg_max_iter=3, damping=1.5 * rejected.damping)
    fresh.model.load_state_dict(model.state_dict())
    assert not rejected.accepted
    assert training.step().accepted
    fresh.step()
    assert_same(theta(model), theta(fresh.model), 1e-12)


def test_a_zero_gradient_ends_the_step_at_once():
    x = normal(1, 5, 3)
    model = nn.Linear(3, 2).double()
    y = model(x).detach()
    optimizer = HFOptimizer(model.parameters(), damping=2.0)
    runs = []

    def closure():
        runs.append(1)
        return F.mse_loss(model(x), y)

    before = theta(model)
    optimizer.step(closure)
    report = optimizer.last_report
    assert (len(runs), report.products, report.evaluations, report.cg_iterations) == (1, 0, 0, 0)
    assert report.cg_stop is Stop.ZERO_GRADIENT
    assert not report.accepted
    assert_close(theta(model), before, rtol=0, atol=0)
    optimizer.step(lambda: F.mse_loss(model(x), y + 1))
    assert optimizer.last_report.damping == 2.0


@pytest.mark.parametrize("damping", [None, 2.0])
def test_a_gradient_that_is_not_finite_moves_nothing_and_does_not_break_the_next_step(damping):
    model, x = nn.Linear(3, 1).double(), normal(1, 5, 3)
    y = model(x).detach()
    optimizer = HFOptimizer(model.parameters(), damping=damping)
    before = theta(model)
    optimizer.step(lambda: F.mse_loss(model(x), y).sqrt() + F.mse_loss(model(x), y + 1))
    assert not optimizer.last_report.accepted
    assert_close(theta(model), before, rtol=0, atol=0)
    optimizer.step(lambda: F.mse_loss(model(x), y + 1))
    assert optimizer.last_report.accepted
    assert optimizer.last_report.damping > 0


def test_hessian_with_negative_curvature_still_descends():
    p = nn.Parameter(torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64))
    optimizer = HFOptimizer([p], curvature="hessian", damping=0.0, weight_decay=0.0)
    stops = set()
    for _ in range(12):
        optimizer.step(lambda: (p**4 - p**2).sum())
        report = optimizer.last_report
        stops.add(report.cg_stop)
        assert report.new_loss < report.loss or report.converged
    assert Stop.NEGATIVE_CURVATURE in stops
    assert_close(p.detach().abs(), torch.full((3,), 0.5**0.5, dtype=torch.float64))


def test_the_variance_of_the_gradient_is_reported_where_it_is_asked_for():
    training = Training(case_named("mlp-mse"))
    report = training.step()
    assert report.gradient_variance is None
    report.requests.gradient_variance = True
    assert training.step().gradient_variance > 0


def test_learning_rate_schedulers_run():
    training = Training(case_named("mlp-mse"))
    scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, step_size=1, gamma=0.5)
    for lr in (1.0, 0.5, 0.25):
        before = theta(training.model)
        report = training.step()
        scheduler.step()
        assert report.step_length == lr
        assert not torch.equal(theta(training.model), before)


# Closures that differentiate inside


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_a_physics_informed_closure_trains(form, curvature):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    t = torch.linspace(0, 1, 12, dtype=torch.float64)[:, None]

    def criterion(network, batch):
        points = batch.clone().requires_grad_()
        u = network(points)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        start = network(torch.zeros(1, 1, dtype=torch.float64)) - 1
        return ((slope + u) ** 2).mean() + (start**2).sum()  # u' = -u, u(0) = 1

    optimizer = HFOptimizer(network.parameters(), curvature=curvature, damping=1e-2)
    closure = form(optimizer, network, criterion)
    for _ in range(30):
        optimizer.step(lambda: closure(t))
        assert optimizer.last_report.new_loss <= optimizer.last_report.loss
    assert optimizer.last_report.new_loss < 1e-5
    assert (network(t) - torch.exp(-t)).abs().max() < 1e-2
