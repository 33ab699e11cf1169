"""Light steps: when they are taken, that they are what they are said to be, and taken back."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from snapshots import assert_identical
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.optimizer import light_step
from torch_hf.preconditioner.kfac import (
    LIGHT_DAMPING,
    MEASURE_EVERY_LIGHT,
    KroneckerPreconditioner,
)
from torch_hf.solver.natural_gradient import (
    AFTER_OVERSHOT,
    AFTER_REJECTION,
    MOMENTUM,
    initial_radius,
)


class Run:
    """A classifier on batches of a teacher's labels, with a word in what its closure returns."""

    def __init__(self, cases=64, dtype=torch.float64, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        self.teacher = torch.randn(5, 3, dtype=dtype)
        self.optimizer = HFOptimizer(self.model.parameters(), **options)
        self.cases, self.dtype = cases, dtype
        self.spoil = lambda loss: loss

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets)

    def batch(self, number):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(self.cases, 5, generator=generator, dtype=torch.float64).to(self.dtype)
        return x, (x @ self.teacher).argmax(1)

    def step(self, number):
        x, y = self.batch(number)

        def closure():
            return self.spoil(self.loss(self.model(x), y))

        self.optimizer.step(closure)
        return self.optimizer.last_report

    def steps(self, *numbers):
        return [self.step(number) for number in numbers]

    def values(self):
        return nn.utils.parameters_to_vector(self.model.parameters()).detach().clone()


def test_batches_that_change_get_light_steps():
    reports = Run().steps(*range(60))
    kinds = [r.solver for r in reports]
    assert kinds[0] == "cg"
    assert kinds.count("kronecker") > 50
    light = [r for r in reports if r.solver == "kronecker"]
    assert all(r.products == 0 and r.evaluations <= 1 for r in light)
    unmeasured = [r for r in light if not r.evaluations]
    assert len(unmeasured) > 40
    assert all(math.isnan(r.new_loss) and math.isnan(r.reduction_ratio) for r in unmeasured)
    assert sum(r.loss for r in reports[-10:]) < 0.5 * sum(r.loss for r in reports[:10])


def test_data_that_stay_get_none():
    assert "kronecker" not in {r.solver for r in Run().steps(*[0] * 6)}


def test_a_change_now_and_then_gets_none():
    kinds = [r.solver for r in Run().steps(0, 0, 0, 1, 1, 1, 2, 2, 2)]
    assert "kronecker" not in kinds


def test_data_that_stay_after_batches_are_found_out():
    run = Run()
    run.steps(*range(40))
    reports = run.steps(*[99] * (MEASURE_EVERY_LIGHT + 3))
    assert {r.solver for r in reports[-3:] if not r.converged} <= {"cg", "exact", "broyden"}
    assert reports[-1].loss < 1e-6 * reports[0].loss


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "cg"},
        {"cg_max_iter": 5},
        {"cg_decay": 0.5},
        {"preconditioner": "lbfgs"},
        {"curvature": "hessian"},
    ],
)
def test_options_that_ask_for_cg_get_it(options):
    kinds = {r.solver for r in Run(**options).steps(*range(8))}
    assert "kronecker" not in kinds


@pytest.mark.parametrize("preconditioner", ["kronecker", "kronecker-lbfgs"])
def test_a_light_step_is_the_damped_natural_gradient_of_its_factors(preconditioner):
    """Against a dense inverse of the factors in the state, over a whole run."""
    run = Run(preconditioner=preconditioner, weight_decay=0.01)
    prefix = "base_" if preconditioner == "kronecker-lbfgs" else ""
    last, seen = None, 0
    for number in range(30):
        before, radius = run.values(), run.optimizer._progress.radius
        report = run.step(number)
        if report.solver != "kronecker":
            last = None
            continue
        state = run.optimizer.preconditioner.state_dict()
        damping = state[f"{prefix}inverted_at"]
        g = torch.cat([p.grad.flatten() for p in run.model.parameters()]) + 0.01 * before
        blocks, traces = [], 0.0
        for k in range(2):
            inputs, outputs = (state[f"{prefix}factor{2 * k + j}"][..., 0, 0, 0, 0] for j in (0, 1))
            traces += float(inputs.trace() * outputs.trace())
            pi = math.sqrt(inputs.diagonal().mean() / outputs.diagonal().mean())
            e = math.sqrt(damping + 0.01)
            eye = [torch.eye(len(f), dtype=f.dtype) for f in (outputs, inputs)]
            left = torch.linalg.inv(outputs + e / pi * eye[0])
            right = torch.linalg.inv(inputs + pi * e * eye[1])
            blocks.append((left, right))
        if report.evaluations:
            assert damping == pytest.approx(LIGHT_DAMPING * traces / len(g))
        natural, at = [], 0
        for (left, right), (o, i) in zip(blocks, [(8, 5), (3, 8)], strict=True):
            rows = torch.cat([g[at : at + o * i].view(o, i), g[at + o * i :][:o, None]], dim=1)
            rows = left @ rows @ right
            natural += [rows[:, :-1].flatten(), rows[:, -1]]
            at += o * i + o
        natural = torch.cat(natural)
        if last is not None:
            radius = run.optimizer._progress.radius
        else:
            radius = radius or initial_radius(report.loss)
        nu = min(1.0, math.sqrt(radius / float(g @ natural)))
        d = -nu * natural + (MOMENTUM * last if last is not None else 0.0)
        torch.testing.assert_close(run.values() - before, d, rtol=1e-8, atol=1e-12)
        last, seen = d, seen + 1
    assert seen > 15


def test_lr_is_a_factor_on_a_light_step():
    runs = [Run(), Run()]
    for run in runs:
        run.steps(*range(3))
    runs[1].optimizer.param_groups[0]["lr"] = 0.5
    before = runs[0].values()
    for run in runs:
        assert run.step(3).solver == "kronecker"
    whole, half = (run.values() - before for run in runs)
    torch.testing.assert_close(half, 0.5 * whole)


def until_measured(run):
    """Steps until the next light one measures the factors; the number of that step."""
    factors = run.optimizer.preconditioner.factors
    for number in range(100):
        due = factors.wants_layers_light and number > 3
        if due and run.optimizer._progress.light < run.optimizer._progress.full_after:
            return number
        run.step(number)
    raise AssertionError("no measuring step came")


def test_a_measuring_step_that_raises_its_own_loss_is_rejected():
    run = Run()
    number = until_measured(run)
    before, radius = run.values(), run.optimizer._progress.radius
    run.spoil = lambda loss: loss if torch.equal(run.values(), before) else loss + 1.0
    report = run.step(number)
    assert (report.solver, report.accepted) == ("kronecker", False)
    assert report.reason == light_step.RAISED
    assert torch.equal(run.values(), before)
    assert run.optimizer._progress.radius < 1.3 * AFTER_REJECTION * radius


def test_a_step_that_overflows_moves_nothing(monkeypatch):
    run = Run()
    run.steps(*range(6))
    before, radius = run.values(), run.optimizer._progress.radius
    apply = KroneckerPreconditioner.apply
    monkeypatch.setattr(KroneckerPreconditioner, "apply", lambda self, v: apply(self, v) * math.inf)
    report = run.step(6)
    assert (report.accepted, report.reason) == (False, light_step.OVERFLOW)
    assert torch.equal(run.values(), before)
    assert run.optimizer._progress.radius < 1.3 * AFTER_REJECTION * radius
    monkeypatch.undo()
    assert all(r.accepted for r in run.steps(7, 8))


def test_a_step_after_which_the_loss_jumps_is_taken_back():
    run = Run()
    run.steps(*range(15))
    before, radius = run.values(), run.optimizer._progress.radius
    run.step(15)
    run.spoil = lambda loss: loss + 10.0
    report = run.step(16)
    assert report.reason == light_step.TAKEN_BACK
    torch.testing.assert_close(run.values(), before)
    assert run.optimizer._progress.radius < 1.3 * AFTER_OVERSHOT * radius
    run.spoil = lambda loss: loss
    assert run.step(17).accepted


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_step_that_ends_where_the_loss_is_not_finite_is_taken_back(wrong):
    run = Run()
    run.steps(*range(15))
    before = run.values()
    run.step(15)
    there = run.values()
    run.spoil = lambda loss: loss * wrong if torch.equal(run.values(), there) else loss
    report = run.step(16)
    assert report.reason == light_step.TAKEN_BACK
    torch.testing.assert_close(run.values(), before)
    assert math.isfinite(report.new_loss)
    run.spoil = lambda loss: loss
    assert run.step(17).accepted


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_batch_whose_loss_is_not_finite_anywhere_moves_nothing(wrong):
    run = Run()
    run.steps(*range(15))
    before = run.values()
    run.spoil = lambda loss: loss * wrong
    assert not any(report.accepted for report in run.steps(16, 17))
    assert torch.equal(run.values(), before)
    run.spoil = lambda loss: loss
    assert run.step(18).accepted


@pytest.mark.parametrize("at", [5, 16, 21, 40])
def test_a_run_resumes_bit_for_bit(at):
    whole, resumed = Run(), Run()
    whole.steps(*range(at))
    resumed.model.load_state_dict(copy.deepcopy(whole.model.state_dict()))
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    for number in range(at, at + 30):
        whole.step(number)
        resumed.step(number)
        assert torch.equal(whole.values(), resumed.values()), number


def test_a_closure_that_fails_leaves_all_as_it_was():
    run = Run()
    number = until_measured(run)
    before = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    calls = []

    def fails(loss):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("the disk is full")
        return loss

    run.spoil = fails
    with pytest.raises(OSError, match="full"):
        run.step(number)
    assert_identical((run.model.state_dict(), run.optimizer.state_dict()), before)
    run.spoil = lambda loss: loss
    twin = Run()
    twin.steps(*range(number + 1))
    run.step(number)
    assert torch.equal(run.values(), twin.values())


class Regression(Run):
    def batch(self, number):
        x, _ = super().batch(number)
        generator = torch.Generator().manual_seed(1000 + number)
        noise = torch.randn(self.cases, 3, generator=generator, dtype=torch.float64)
        return x, torch.sin(x @ self.teacher) + 0.5 * noise.to(self.dtype)

    def loss(self, outputs, targets):
        return F.mse_loss(outputs, targets)


def test_of_squares_full_steps_come_more_rarely_where_light_ones_are_the_better_bargain():
    reports = Regression(cases=4).steps(*range(200))
    full = [r.step for r in reports if r.solver != "kronecker"]
    gaps = [b - a for a, b in pairwise(full)]
    assert full[0] == 1
    assert 2 < len(full) < 15
    assert max(gaps) > 40


def test_of_classes_the_first_step_alone_is_full():
    reports = Run().steps(*range(100))
    assert [r.step for r in reports if r.solver != "kronecker"] == [1]


def test_full_steps_that_hold_come_more_often():
    from torch_hf.optimizer.progress import Progress

    before = Progress(
        steps=50, last_loss=1.0, last_start=2.0, last_cases=9.0, light_rate=0.001, full_cost=10.0
    )
    assert before.seeing(1.05, same_data=False).full_after == before.full_after / 4
    assert before.seeing(1.9, same_data=False).full_after == before.full_after * 2  # it is lost
    better = before._replace(light_rate=0.2)
    assert better.seeing(1.05, same_data=False).full_after == before.full_after * 2
    assert before.seeing(1.05, same_data=True).full_after == before.full_after


def test_a_light_step_prints_what_is_known_of_it():
    run = Run()
    run.steps(*range(3))
    shown = str(run.step(3))
    assert "solver kronecker" in shown
    assert "nan" not in shown
    assert "damping" not in shown


def test_residuals_of_differential_equations_on_new_points_get_none():
    """The factors say little of a closure that takes derivatives itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    optimizer = HFOptimizer(model.parameters())
    points = [torch.rand(60, 1, dtype=torch.float64).requires_grad_() for _ in range(12)]

    def residual(x):
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        start = model(torch.zeros_like(x))
        return (slope - torch.cos(x)).square().mean() + start.square().mean()

    kinds = set()
    for x in points:
        optimizer.step(lambda x=x: residual(x))
        kinds.add(optimizer.last_report.solver)
    assert "kronecker" not in kinds
