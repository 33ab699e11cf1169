"""Steps of quasi-Newton iterations: what they minimise, keep, refuse, and when auto takes them."""

import copy
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from basics import assert_same, normal
from problems import case_named
from reference import flat
from snapshots import assert_identical, snapshot
from test_exact_steps import FORMS, gradient, values
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.objective.objective import Objective
from torch_hf.optimizer import broyden_step, exact_step, solver_choice
from torch_hf.optimizer.broyden_step import NO_DECREASE, _Inverses
from torch_hf.solver import limited_memory, phases

GENERATOR = torch.Generator().manual_seed(0)
POINTS = torch.rand(160, 2, generator=GENERATOR, dtype=torch.float64)


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """Solves so small as these count as dear."""
    monkeypatch.setattr(phases, "LEAST_PRICE", 1.0)
    monkeypatch.setattr(solver_choice, "LEAST_PRICE", 1.0)


class Run:
    """Has an ``optimizer`` and a ``loss``."""

    def steps(self, n):
        reports = []
        for _ in range(n):
            self.optimizer.step(self.loss)
            reports.append(self.optimizer.last_report)
        return reports


class Equation(Run):
    """``u_xx + u_yy + u = f`` with a network of 191 parameters, all points in every step."""

    def __init__(self, seed=0, dtype=torch.float64, points=POINTS, **options):
        torch.manual_seed(seed)
        self.points = points.to(dtype)
        self.model = nn.Sequential(
            nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 11), nn.Tanh(), nn.Linear(11, 1)
        ).to(dtype)
        self.optimizer = HFOptimizer(self.model.parameters(), **options)

    def loss(self):
        p = self.points.clone().requires_grad_()
        with torch.enable_grad():
            u = self.model(p)
            (slope,) = torch.autograd.grad(u.sum(), p, create_graph=True)
            bend = sum(
                torch.autograd.grad(slope[:, i].sum(), p, create_graph=True)[0][:, i]
                for i in range(2)
            )
        target = 3 * torch.sin(3 * self.points[:, 0]) * torch.cos(2 * self.points[:, 1])
        return (bend + u[:, 0] - target).square().mean()


# --- one step ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mlp-mse", "cnn-cross_entropy", "huber"])
def test_every_iteration_lowers_the_loss_whatever_the_form(name, form):
    case = case_named(name)
    model = case.model()
    optimizer = HFOptimizer(model.parameters(), solver="broyden", weight_decay=0.02)
    before = case.closure_loss(model).item() + 0.01 * float(values(model).square().sum())
    optimizer.step(lambda: form(case, model, optimizer))
    report = optimizer.last_report
    assert report.solver == "broyden" and report.accepted
    after = case.closure_loss(model).item() + 0.01 * float(values(model).square().sum())
    assert report.loss == pytest.approx(before) and report.new_loss == pytest.approx(after)
    assert after < 0.9 * before


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_at_trial_points_are_those_of_the_objective(monkeypatch, decay, maximize, parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = normal(0, 12, 3), normal(1, 12, 2)
    sign = -1.0 if maximize else 1.0
    seen = []
    original = Objective.trial_gradient

    def watched(self, here):
        found = original(self, here)
        theta = values(model)
        with torch.enable_grad():
            slope = gradient(F.mse_loss(model(x), y), model) + decay * theta
        loss = float(F.mse_loss(model(x), y)) + 0.5 * decay * float(theta.square().sum())
        seen.append((found, loss, slope))
        return found

    monkeypatch.setattr(Objective, "trial_gradient", watched)
    options = {"solver": "broyden", "weight_decay": decay, "maximize": maximize}
    optimizer = HFOptimizer(model.parameters(), **options)
    batches = list(zip(x.split([3, 5, 4]), y.split([3, 5, 4]), strict=True))[:parts]
    batches = [(x, y)] if parts == 1 else batches
    optimizer.step(lambda b: sign * F.mse_loss(model(b[0]), b[1]), batches=batches)
    assert len(seen) > 5
    for (loss, slope), true_loss, true_slope in seen:
        assert loss == pytest.approx(true_loss, rel=1e-12)
        assert_same(slope, true_slope)


def test_masks_of_hooks_hold_parameters():
    case = case_named("mlp-mse")
    model = case.model()
    mask = torch.arange(model[0].weight.numel()).view_as(model[0].weight) % 2 == 0
    model[0].weight.register_hook(lambda g: g * mask)
    before = model[0].weight.detach().clone()
    optimizer = HFOptimizer(model.parameters(), solver="broyden")
    for _ in range(2):
        optimizer.step(lambda: case.closure_loss(model))
    assert torch.equal(model[0].weight[~mask], before[~mask])
    assert not torch.equal(model[0].weight[mask], before[mask])


def test_dropout_is_the_same_at_every_trial_point():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))
    x, y = torch.randn(30, 3), torch.randn(30, 1)
    optimizer = HFOptimizer(model.parameters(), solver="broyden")
    optimizer.step(lambda: F.mse_loss(model(x), y))
    assert optimizer.last_report.new_loss < optimizer.last_report.loss
    assert model[2].num_batches_tracked == 1


def test_a_minimum_is_left_alone():
    case = case_named("mlp-mse")
    model = case.model()
    optimizer = HFOptimizer(model.parameters(), solver="broyden")
    for p in model.parameters():
        nn.init.zeros_(p)
    optimizer.step(lambda: sum(p.square().sum() for p in model.parameters()) + 1.0)
    report = optimizer.last_report
    assert not report.accepted and report.new_loss == report.loss == 1.0


def test_the_report_has_no_damping():
    run = Equation(solver="broyden")
    (report,) = run.steps(1)
    assert math.isnan(report.damping) and math.isnan(report.reduction_ratio)
    assert "damping" not in str(report) and "solver broyden" in str(report)
    assert report.evaluations >= 20


# --- what is kept ---


@pytest.mark.parametrize("first", [3, 9])
@pytest.mark.parametrize(
    ("solver", "most", "keys"),
    [
        ("broyden", 4096, {"broyden_inverse"}),
        ("lbfgs", 4096, {"lbfgs_pairs"}),
        ("auto", 4096, {"broyden_inverse", "lbfgs_pairs"}),
        ("auto", 100, {"lbfgs_pairs"}),
    ],
)
def test_a_resumed_run_is_the_same_to_the_bit(solver, most, keys, first, monkeypatch):
    monkeypatch.setattr(broyden_step, "MOST_DENSE", most)
    whole = Equation(solver=solver)
    whole.steps(first)
    saved = copy.deepcopy((whole.model.state_dict(), whole.optimizer.state_dict()))
    written = {k for s in saved[1]["state"].values() for k in s}
    assert written & {"broyden_inverse", "lbfgs_pairs"} == keys
    rest = [r.new_loss for r in whole.steps(12)]
    again = Equation(seed=1, solver=solver)
    again.model.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    assert [r.new_loss for r in again.steps(12)] == rest
    assert torch.equal(flat(again.model.parameters()), flat(whole.model.parameters()))


def test_a_failing_closure_leaves_all_as_it_was():
    run = Equation(solver="broyden")
    run.steps(2)
    before, calls = snapshot(run.model, run.optimizer), 0

    def failing():
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError("the disk is full")
        return run.loss()

    with pytest.raises(OSError, match="full"):
        run.optimizer.step(failing)
    assert_identical(snapshot(run.model, run.optimizer), before)


def test_the_inverse_follows_the_model_to_another_type():
    run = Equation(solver="broyden", dtype=torch.float32)
    run.steps(2)
    run.model.double()
    run.points = run.points.double()
    (report,) = run.steps(1)
    assert report.accepted
    assert run.optimizer._secant.inverse.dtype == torch.float64


def test_a_float64_inverse_of_a_float32_model_follows_it_to_another_device():
    """Only told to be there: this machine has no other device that computes."""
    run = Equation(solver="broyden", dtype=torch.float32, preconditioner="none")
    run.steps(2)
    assert run.optimizer._secant.inverse.dtype == torch.float64
    there = SimpleNamespace(dtype=torch.float32, device=torch.device("meta"))
    run.optimizer._convert(there, SimpleNamespace(reloads=False))
    kept = [t for t in run.optimizer._secant if t is not None]
    assert len(kept) >= 2 and all(t.device.type == "meta" for t in kept)


def test_the_way_of_other_steps_becomes_a_pair():
    run = Equation(solver="broyden")
    run.steps(3)
    secant = run.optimizer._secant
    way = 1e-3 * torch.randn(secant.inverse.shape[0], generator=GENERATOR, dtype=torch.float64)
    moved = secant.moved(way, 0.5).moved(way, 0.5).moved(None, 0.0)
    slope = secant.anchor[0] + 2.0 * way  # of a curvature of 2 along the way
    inverse = _Inverses.of(moved, slope, ("broyden",)).dense.kept()
    torch.testing.assert_close(inverse @ (slope - secant.anchor[0]), way)
    assert inverse is not secant.inverse


# --- the choice ---


def test_auto_begins_with_iterations_and_ends_with_exact_steps():
    reports = Equation().steps(40)
    solvers = [r.solver for r in reports]
    assert solvers[0] == "broyden" and "exact" in solvers
    assert all(b.loss == a.new_loss for a, b in pairwise(reports))
    assert all(r.new_loss <= r.loss for r in reports)
    assert reports[-1].new_loss < 1e-5 * reports[0].loss


def test_where_a_solve_costs_few_gradients_steps_are_exact(monkeypatch):
    monkeypatch.setattr(phases, "LEAST_PRICE", math.inf)
    monkeypatch.setattr(solver_choice, "LEAST_PRICE", math.inf)
    assert {r.solver for r in Equation().steps(8)[1:]} == {"exact"}


def test_new_data_of_another_kind_forget_the_inverse():
    """What was gained on points of the square is lost on points far from it."""
    run = Equation()
    run.steps(4)
    assert run.optimizer._secant is not None and run.optimizer._progress.phase_price > 0
    run.points = 30.0 + 5.0 * torch.rand(160, 2, generator=GENERATOR, dtype=torch.float64)
    with torch.no_grad():  # so that the loss there is high
        run.model[-1].weight.mul_(30.0)
    run.steps(1)
    assert run.optimizer._secant is None
    assert run.optimizer._progress.phase_quasi == run.optimizer._progress.phase_spent == 0.0
    assert run.steps(20)[-1].new_loss < run.optimizer.last_report.loss + 1.0


def drawn(seed):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.rand(400, 2, generator=generator, dtype=torch.float64)


def resampled(run, first, last):
    reports = []
    for k in range(first, last):
        run.points = drawn(k)
        reports += run.steps(1)
    return reports


def test_points_drawn_anew_keep_iterations_and_inverse_while_gains_hold():
    run = Equation()
    reports = resampled(run, 0, 12)
    assert [r.solver for r in reports[:2]] == ["broyden"] * 2
    assert {r.solver for r in reports} <= {"broyden", "exact"}
    assert all(r.new_loss <= r.loss for r in reports)
    plain = Equation(solver="cg")
    others = resampled(plain, 0, 12)
    assert reports[-1].loss < 0.1 * others[-1].loss
    slope, way = run.optimizer._secant.elsewhere().anchor
    assert not slope.any() and not way.any()


def test_where_gains_on_points_do_not_hold_exact_steps_follow_the_iterations(monkeypatch):
    run = Equation()
    resampled(run, 0, 4)
    progress = run.optimizer._progress
    run.optimizer._progress = progress._replace(
        claimed=5.0, found_again=0.5, phase_quasi=1.0, phase_trial=0.0
    )
    (report,) = resampled(run, 4, 5)
    assert report.solver == "exact"  # and its own gains decide what comes then
    assert run.optimizer._secant is None and not run.optimizer._progress.phase_quasi
    assert run.optimizer._progress.holds


@pytest.mark.parametrize("at", [1, 3, 6, 9])
def test_a_run_on_points_drawn_anew_resumes_bit_for_bit(at):
    whole = Equation()
    expected = resampled(whole, 0, 11)
    first = Equation()
    resampled(first, 0, at)
    second = Equation(seed=1)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    found = resampled(second, at, 11)
    assert [r.new_loss for r in found] == [r.new_loss for r in expected[at:]]
    assert_same(values(second.model), values(whole.model))


@pytest.mark.parametrize(
    "options", [{"lr": 0.5}, {"solver": "cg"}, {"solver": "exact"}, {"cg_max_iter": 9}]
)
def test_options_that_ask_for_something_else_keep_iterations_away(options):
    assert "broyden" not in {r.solver for r in Equation(**options).steps(6)}


def test_a_network_too_large_for_the_inverse_takes_limited_memory(monkeypatch):
    monkeypatch.setattr(broyden_step, "MOST_DENSE", 100)
    run = Equation()
    reports = run.steps(40)
    solvers = [r.solver for r in reports]
    assert solvers[0] == "lbfgs" and "exact" in solvers and "broyden" not in solvers
    assert all(r.new_loss <= r.loss for r in reports)
    assert reports[-1].new_loss < 1e-5 * reports[0].loss


def test_where_not_even_pairs_fit_there_are_no_iterations(monkeypatch):
    monkeypatch.setattr(broyden_step, "MOST_DENSE", 100)
    monkeypatch.setattr(limited_memory, "MOST_BYTES", 20 * 191 * 8 - 1)
    assert {"lbfgs", "broyden"}.isdisjoint(r.solver for r in Equation().steps(6))


def test_iterations_of_limited_memory_come_before_lanczos_steps(monkeypatch):
    monkeypatch.setattr(broyden_step, "MOST_DENSE", 100)
    monkeypatch.setattr(exact_step, "exact_is_cheaper", lambda *_: False)
    solvers = [r.solver for r in Equation().steps(70)]
    assert solvers[0] == "lbfgs" and "lanczos" in solvers and "exact" not in solvers


def test_conjugate_gradients_stand_in_where_a_solve_on_trial_cannot_be(monkeypatch):
    run = Equation()
    monkeypatch.setattr(solver_choice, "exact_step", lambda *_: None)
    solvers = [r.solver for r in run.steps(25)]
    count = solvers.count("cg")
    assert solvers[0] == "broyden" and count and solvers.count("broyden") > count
    last = len(solvers) - solvers[::-1].index("cg") - 1
    assert "broyden" in solvers[last:]  # the trial has ended


def test_where_scaled_iterations_are_slow_both_kinds_learn_from_all_steps(monkeypatch):
    monkeypatch.setattr(phases, "SLOW", math.inf)
    monkeypatch.setattr(phases, "SOLVES_BEFORE", math.inf)
    run, solvers, kept = Equation(), [], 0
    for _ in range(5):
        run.steps(1)
        solvers.append(run.optimizer.last_report.solver)
        secant = run.optimizer._secant
        torch.testing.assert_close(secant.anchor[0], gradient(run.loss(), run.model))
        steps, changes = secant.pairs.chunk(2)
        torch.testing.assert_close(secant.inverse @ changes[-1], steps[-1], rtol=1e-5, atol=1e-9)
        assert len(steps) - kept >= (20 if len(solvers) == 2 else 5)
        kept = len(steps)
    assert solvers[:3] == ["broyden", "broyden", "lbfgs"]
    assert run.optimizer._progress.kind_steps == len(solvers)


def test_limited_memory_solves_a_quadratic_of_condition_1000():
    A = torch.diag(torch.logspace(0, 3, 12, dtype=torch.float64))
    x = nn.Parameter(torch.ones(12, dtype=torch.float64))
    optimizer = HFOptimizer([x], solver="lbfgs")
    for _ in range(3):
        optimizer.step(lambda: 0.5 * x @ A @ x)
        assert optimizer.last_report.solver == "lbfgs"
        assert math.isnan(optimizer.last_report.damping)
    assert optimizer.last_report.new_loss < 1e-12


@pytest.mark.parametrize("solver", ["broyden", "lbfgs"])
def test_a_solver_changed_between_steps_begins_with_its_own_memory(solver):
    run = Equation(solver=solver)
    run.steps(2)
    other = {"broyden": "lbfgs", "lbfgs": "broyden"}[solver]
    run.optimizer.param_groups[0]["solver"] = other
    reports = run.steps(2)
    assert [r.solver for r in reports] == [other] * 2 and all(r.accepted for r in reports)
    assert (run.optimizer._secant.inverse is None) == (other == "lbfgs")


@pytest.mark.parametrize("rows", [0, 3, 202])
def test_damaged_pairs_are_refused(rows):
    run = Equation(solver="lbfgs")
    run.steps(1)
    saved = copy.deepcopy(run.optimizer.state_dict())
    for entries in saved["state"].values():
        if "lbfgs_pairs" in entries:
            pairs = entries["lbfgs_pairs"]
            entries["lbfgs_pairs"] = pairs.new_zeros(rows, *pairs.shape[1:])
    before = snapshot(run.model, run.optimizer)
    with pytest.raises(ValueError, match="lbfgs_pairs"):
        run.optimizer.load_state_dict(saved)
    assert_identical(snapshot(run.model, run.optimizer), before)


def test_iterations_that_gain_nothing_hand_over_in_the_same_step(monkeypatch):
    run = Equation()
    run.steps(3)
    original = broyden_step.descend

    def stays(evaluate, loss, gradient, inverse, iterations, kind):
        found = original(evaluate, loss, gradient, inverse, 1, kind)
        return found._replace(displacement=torch.zeros_like(gradient), loss=loss)

    monkeypatch.setattr(broyden_step, "descend", stays)
    (report,) = run.steps(1)
    assert report.solver == "exact" and report.accepted
    assert run.optimizer._progress.phase_trial == 1.0


def test_a_converged_run_says_so_once_and_costs_next_to_nothing():
    x = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None]
    y = 0.3 + torch.sin(5 * x) + 0.2 * torch.cos(31 * x)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizer = HFOptimizer(model.parameters())
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        return F.mse_loss(model(x), y)

    for _ in range(400):
        optimizer.step(closure)
        if optimizer.last_report.converged:
            break
    assert optimizer.last_report.converged
    calls = 0
    optimizer.step(closure)
    assert calls <= 3 and optimizer.last_report.converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_types_get_down(dtype):
    reports = Equation(dtype=dtype).steps(40)
    assert reports[-1].new_loss < (1e-4 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("seed", [1, 2])
def test_float32_gets_as_far_as_its_gradients_allow(seed):
    """Curvatures over eight decades: H in float32 would end a hundred times higher."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=torch.float64))[0]
    spread = torch.logspace(0, -4, 50, dtype=torch.float64)
    A = ((turn * spread) @ turn.T).float()
    x = nn.Parameter(torch.zeros(50))
    target = A @ torch.ones(50)

    def closure():
        residual = A @ x - target
        return residual.square().sum() + 0.1 * residual.pow(4).sum()

    optimizer = HFOptimizer([x], solver="broyden")
    for step in range(30):
        optimizer.step(closure)
        if step == 3:
            assert optimizer._secant.inverse.dtype == torch.float64
    assert optimizer.last_report.new_loss < 3e-12


def test_an_inverse_of_float32_from_an_older_state_is_taken():
    run = Equation(solver="broyden", dtype=torch.float32)
    run.steps(3)
    state = copy.deepcopy(run.optimizer.state_dict())
    for entries in state["state"].values():
        for name in ("broyden_inverse", "broyden_anchor"):
            entries[name] = entries[name].float()
    other = Equation(solver="broyden", dtype=torch.float32)
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(state)
    (report,) = other.steps(1)
    assert report.accepted and other.optimizer._secant.inverse.dtype == torch.float64


# --- refusals ---


def test_the_solver_asked_for_wants_a_rate_of_1():
    with pytest.raises(RuntimeError, match='lr must be 1 with solver="broyden"'):
        Equation(solver="broyden", lr=0.5).steps(1)


def test_an_inverse_that_does_not_fit_is_refused_with_its_bytes(monkeypatch):
    run = Equation(solver="broyden")
    monkeypatch.setattr(broyden_step, "memory_of", lambda device: 1e5)
    before = snapshot(run.model, run.optimizer)
    with pytest.raises(RuntimeError, match=r"needs 8.76e\+05 bytes .* of 191 parameters"):
        run.steps(1)
    assert_identical(snapshot(run.model, run.optimizer), before)


def test_where_nothing_is_lower_it_says_so():
    run = Equation(solver="broyden")
    start = flat(run.model.parameters()).clone()

    def walled():
        away = not torch.equal(flat(run.model.parameters()), start)
        return run.loss() + 100.0 * away

    run.optimizer.step(walled)
    report = run.optimizer.last_report
    assert not report.accepted and report.reason == NO_DECREASE
    assert torch.equal(flat(run.model.parameters()), start)


def test_several_forms_agree():
    case = case_named("mlp-mse")
    found = []
    for form in FORMS:
        model = case.model()
        optimizer = HFOptimizer(model.parameters(), solver="broyden")
        optimizer.step(lambda form=form, model=model, o=optimizer: form(case, model, o))
        found.append(values(model))
    for theta in found[1:]:
        assert_same(theta, found[0])


# --- beside conjugate gradients ---


class Rollout(Run):
    """A network applied step after step, whose Jacobian costs more than products: CG's ground."""

    def __init__(self, width=8, seed=0, **options):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2)).double()
        self.start = torch.rand(6, 2, generator=torch.Generator().manual_seed(1)).double() + 0.5
        self.target = self.rolled(lambda y: torch.stack([y[:, 1], torch.sin(-y[:, 0])], dim=1))
        self.optimizer = HFOptimizer(self.model.parameters(), **options)

    def rolled(self, field):
        y, seen = self.start, []
        for _ in range(25):
            y = y + 0.2 * field(y)
            seen.append(y)
        return torch.stack(seen, dim=1).flatten(1)

    def loss(self):
        return F.mse_loss(self.rolled(self.model), self.target)


@pytest.fixture
def no_exact(monkeypatch):
    """Exact steps cost too much, as with a large network's Jacobian."""
    monkeypatch.setattr(exact_step, "exact_is_cheaper", lambda *_, **__: False)


@pytest.mark.parametrize(("width", "solver"), [(8, "broyden"), (8, "lbfgs")])
def test_iterations_and_conjugate_gradients_share_data_that_stay(
    width, solver, no_exact, monkeypatch
):
    if solver == "lbfgs":
        monkeypatch.setattr(solver_choice, "quasi_newton_of", lambda vector: "lbfgs")
    run = Rollout(width)
    reports = run.steps(30)
    names = [report.solver for report in reports]
    assert names[0] == "cg" and names[1] == solver, names
    assert names[2:].count("cg") >= 2 and names.count(solver) >= 10, names
    assert all(b.new_loss <= a.new_loss for a, b in pairwise(reports))
    alone = Rollout(width, solver="cg").steps(30)
    assert reports[-1].new_loss < alone[-1].new_loss


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "cg"},
        {"curvature": "hessian"},
        {"lr": 0.5},
        {"preconditioner": "lbfgs"},
        {"cg_max_iter": 20},
    ],
)
def test_options_for_conjugate_gradients_keep_them(options, no_exact):
    assert {report.solver for report in Rollout(**options).steps(5)} == {"cg"}


@pytest.mark.parametrize("at", range(1, 14, 2))
def test_a_run_beside_conjugate_gradients_resumes_bit_for_bit(at, no_exact):
    whole, half = Rollout(), Rollout()
    whole.steps(16)
    half.steps(at)
    again = Rollout(seed=5)
    again.model.load_state_dict(half.model.state_dict())
    again.optimizer.load_state_dict(copy.deepcopy(half.optimizer.state_dict()))
    again.steps(16 - at)
    assert torch.equal(values(again.model), values(whole.model))


def test_the_price_of_conjugate_gradients_is_that_of_their_last_step(no_exact):
    run, seen = Rollout(), []
    for _ in range(30):
        (report,) = run.steps(1)
        if report.solver == "cg" and report.step > 1:
            seen.append((run.optimizer._progress.phase_price, 1.2 * report.products))
    assert len(seen) >= 2
    for price, products in seen:
        assert products < price < products + 10


def test_other_data_end_the_phases(no_exact):
    run = Rollout()
    run.steps(3)
    assert run.optimizer._progress.phase_quasi
    run.start = run.start + 0.3
    run.target = run.target - 0.1
    (report,) = run.steps(1)
    assert report.solver in ("cg", "kronecker") and not run.optimizer._progress.phase_price
