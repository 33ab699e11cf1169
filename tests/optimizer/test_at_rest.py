"""Losses without a minimum, or with one at 0: a run ends where rounding does, and says so."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.optimizer.broyden_step import rounding_hides
from torch_hf.optimizer.hf import GAVE_UP

LOSSES = {
    "cross entropy": lambda z, y: F.cross_entropy(z, y),
    "binary cross entropy": lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], y.to(z)),
    "softplus": lambda z, y: F.softplus((1 - 2 * y) * z[:, 0]).mean(),
    "logsumexp": lambda z, y: (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean(),
    "log_prob": lambda z, y: -Categorical(logits=z).log_prob(y).mean(),
    "squares": lambda z, y: F.mse_loss(z[:, 0], 3.0 * y - 1.0),
}


class Separable:
    """Two classes that a plane separates, so that the loss falls as long as weights grow."""

    def __init__(self, loss, dtype, **options):
        torch.manual_seed(0)
        self.x = torch.randn(60, 4, dtype=dtype)
        self.y = (self.x.sum(1) > 0).long()
        self.model = nn.Linear(4, 3, dtype=dtype)
        if loss == "squares":  # which this model can fit
            self.x[:, 1:] = 0
            self.x[:, 0] = self.y.to(dtype)
        self.loss = LOSSES[loss]
        self.optimizer = HFOptimizer(self.model.parameters(), **options)

    def closure(self):
        self.optimizer.zero_grad()
        loss = self.loss(self.model(self.x), self.y)
        loss.backward()
        return loss

    def steps(self, n):
        reports = []
        for _ in range(n):
            self.optimizer.step(self.closure)
            reports.append(self.optimizer.last_report)
        return reports


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("solver", ["auto", "cg", "exact", "lanczos", "broyden", "lbfgs"])
@pytest.mark.parametrize("loss", LOSSES)
def test_rests_at_the_end_and_goes_on_with_other_data(loss, solver, dtype):
    run = Separable(loss, dtype, solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reports = run.steps(120)
    least = torch.finfo(dtype).eps
    assert reports[-1].loss <= 100 * least * reports[0].loss
    ends = [r for r in reports if r.converged or r.reason == "the gradient is zero"]
    if ends:
        first = reports.index(ends[0])
        assert sum(not r.accepted for r in reports[:first]) <= 4
        assert sum(r.evaluations for r in reports[-20:]) <= 40
        assert all(r.reason for r in reports[-20:])
    else:  # the logarithm of 1 + x has all digits at any x
        assert all(r.accepted for r in reports)
        assert loss in ("binary cross entropy", "softplus")

    with torch.no_grad():  # other classes
        run.y = 1 - run.y if loss != "squares" else 2 * run.y + 1
    later = run.steps(25)
    assert later[-1].loss < 0.1 * later[0].loss


def test_a_loss_far_from_zero_is_not_taken_for_one_at_rest():
    """A search that fails at a large loss is a failure still."""
    run = Separable("cross entropy", torch.float64, solver="cg")
    run.steps(1)

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return -slope

    model = run.model
    run.loss = lambda z, y: F.cross_entropy(Wrong.apply(z), y)
    run.steps(1)
    before = [p.clone() for p in model.parameters()]
    report = run.steps(1)[0]
    assert not report.accepted and not report.converged
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def of(loss, slope, x):
    x = torch.tensor(x, dtype=torch.float64)
    return (lambda d: (float(loss(x + d)), slope(x + d))), float(loss(x)), slope(x)


@pytest.mark.parametrize(
    ("loss", "slope", "x", "hidden"),
    [
        # a fall of 1e-18 beside 1 is hidden, one of 1e-6 is not
        (lambda x: 1 + 0.5 * x @ x, lambda x: x, [1e-9, 1e-9], True),
        (lambda x: 1 + 0.5 * x @ x, lambda x: x, [1e-3, 1e-3], False),
        # a gradient of the wrong sign is no rounding
        (lambda x: 1 + 0.5 * x @ x, lambda x: -x, [1e-3, 1e-3], False),
        # so large a step is inf, a shorter one not
        (lambda x: torch.cosh(x).sum(), torch.sinh, [1e-9, 0.0], True),
        (lambda x: torch.cosh(x).sum(), torch.sinh, [1e-2, 0.0], False),
        # its square underflows
        (lambda x: 1 + 0.5 * x @ x, lambda x: x, [1e-170, 0.0], True),
        # a fall still to be had, however small the gradient
        (lambda x: 1 + 1e-12 * x.sum(), lambda x: 1e-12 * torch.ones_like(x), [0.0, 0.0], False),
    ],
)
def test_what_rounding_hides(loss, slope, x, hidden):
    evaluate, here, gradient = of(loss, slope, x)
    least = 16 * torch.finfo(torch.float64).eps * here
    assert rounding_hides(evaluate, here, gradient, least) is hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("solver", ["auto", "cg", "exact", "lanczos", "broyden", "lbfgs"])
def test_a_new_optimizer_at_the_end_soon_gives_up_and_goes_on_with_other_data(solver, dtype):
    """It does not know how far the loss has come. So it tries, warns once at most, and rests."""
    old = Separable("cross entropy", dtype)
    old.steps(120)
    old.optimizer = HFOptimizer(old.model.parameters(), solver=solver)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        reports = old.steps(40)
    assert len(said) <= 1
    assert sum(r.evaluations for r in reports[-20:]) <= 40
    assert all(r.new_loss <= r.loss for r in reports)
    old.y = 1 - old.y
    later = old.steps(25)
    assert later[-1].loss < 0.1 * later[0].loss


def test_another_damping_is_tried_after_giving_up():
    run = Separable("cross entropy", torch.float64, solver="cg")
    start = [p.detach().clone() for p in run.model.parameters()]
    plain = run.loss

    def walled(z, y):
        here = run.model.parameters()
        return plain(z, y) + any(not torch.equal(p, s) for p, s in zip(here, start, strict=True))

    run.loss = walled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reports = run.steps(9)
    assert [r.reason == GAVE_UP for r in reports] == [False] * 6 + [True] * 3
    assert [r.evaluations for r in reports[6:]] == [0, 0, 0]
    run.optimizer.param_groups[0]["damping"] *= 2.0
    assert run.steps(1)[0].evaluations > 0


def test_after_an_accepted_step_lambda_rises_slowly_again():
    run = Separable("cross entropy", torch.float64, solver="cg")
    plain, walled = run.loss, True
    start = [p.detach().clone() for p in run.model.parameters()]

    def wall(z, y):
        here = run.model.parameters()
        away = any(not torch.equal(p, s) for p, s in zip(here, start, strict=True))
        return plain(z, y) + (walled and away)

    run.loss = wall
    assert not any(r.accepted for r in run.steps(3))
    walled = False
    assert run.steps(1)[0].accepted
    start[:] = [p.detach().clone() for p in run.model.parameters()]
    walled = True
    (report,) = run.steps(1)
    assert not report.accepted
    assert run.optimizer.param_groups[0]["damping"] == pytest.approx(1.5 * report.damping)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e6])
@pytest.mark.parametrize("name", ["logsumexp", "log_prob"])
def test_terms_without_curvature_leave_exact_steps_those_of_cross_entropy(name, scale):
    """In them the loss's gradient is not that of the terms that have curvature."""
    found = []
    for loss in (name, "cross entropy"):
        run = Separable(loss, torch.float64, solver="exact")
        run.loss = lambda z, y, loss=loss: scale * LOSSES[loss](z, y)
        reports = run.steps(3)
        assert all(r.solver == "exact" and r.accepted for r in reports)
        found.append(nn.utils.parameters_to_vector(run.model.parameters()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("loss", ["logsumexp", "log_prob"])
def test_auto_is_exact_with_terms_without_curvature(loss):
    run = Separable(loss, torch.float64)
    assert "exact" in {r.solver for r in run.steps(4)}


def test_lambda_may_be_that_of_a_gradient_step_where_no_curvature_was_seen():
    run = Separable("cross entropy", torch.float64, solver="cg")
    run.steps(1)
    progress = run.optimizer._progress
    run.optimizer._progress = progress._replace(curvature_seen=1e-30)
    run.optimizer.param_groups[0]["damping"] = 1e9
    (report,) = run.steps(1)
    assert report.damping == pytest.approx(report.gradient_norm**2 / report.loss)
