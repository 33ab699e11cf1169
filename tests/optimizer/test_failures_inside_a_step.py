"""A step that cannot hurt: whatever is raised inside it, all is as it was before."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from snapshots import assert_identical, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from torch_hf import HFOptimizer, LBFGSPreconditioner

X = torch.linspace(-1, 1, 14).view(7, 2)
Y = X.flip(1).sin()
BATCH = (X, Y)
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def network() -> nn.Module:
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)
    return nn.Sequential(
        nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.2), nn.Linear(3, 2)
    )


def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    """Noise from all three generators, running statistics from batch norm."""
    return model(x) * (1 + 0.01 * numpy.random.rand()) + 0.01 * random.random()


def lbfgs(model, optimizer, batch):
    optimizer.zero_grad(set_to_none=False)
    loss = F.mse_loss(outputs_of(model, batch[0]), batch[1])
    loss.backward()
    return loss


def two_backwards(model, optimizer, batch):
    optimizer.zero_grad()
    z = outputs_of(model, batch[0])
    first, second = F.mse_loss(z, batch[1]), z.square().mean()
    first.backward(retain_graph=True)
    second.backward()
    return first.item() + second.item()


def returning(model, optimizer, batch):
    return F.mse_loss(outputs_of(model, batch[0]), batch[1])


def explicit(model, optimizer, batch):
    z = outputs_of(model, batch[0])
    return F.mse_loss(z, batch[1]), z


def with_cases(model, optimizer, batch):
    loss, z = explicit(model, optimizer, batch)
    return loss, (z,), len(z)


def differentiating(model, optimizer, batch):
    x = batch[0].clone().requires_grad_()
    u = outputs_of(model, x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope - batch[1]).square().mean()


class Setting(NamedTuple):
    """A form of closure, what `step` is given and how the optimizer is made."""

    name: str
    form: Callable[..., Any]
    step: dict[str, Any] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012


SETTINGS = (
    Setting("lbfgs", lbfgs),
    Setting("two_backwards", two_backwards),
    Setting("returning", returning),
    Setting("explicit", explicit),
    Setting("differentiating", differentiating),
    Setting("hessian", returning, options={"curvature": "hessian"}),
    Setting("diagonal", lbfgs, options={"preconditioner": "diagonal"}),
    Setting("batches", lbfgs, {"batches": BATCHES}),
    Setting("batches-with_cases", with_cases, {"batches": BATCHES}),
    Setting("curvature_batch", explicit, {"batches": [BATCH], "curvature_batches": [BATCHES[0]]}),
    Setting("curvature_batches", lbfgs, {"batches": BATCHES, "curvature_batches": [BATCH]}),
)
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)


class Run:
    """A model and its optimizer after one step; the closure may be told to fail."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.model = network()
        options = {"cg_max_iter": 2, "weight_decay": 0.01} | setting.options
        self.optimizer = HFOptimizer(self.model.parameters(), **options)
        self.calls = 0
        self.fail_at: int | None = None
        self.error: type[BaseException] = RuntimeError
        self.step()

    def closure(self, batch=BATCH):
        self.calls += 1
        result = self.setting.form(self.model, self.optimizer, batch)
        if self.calls == self.fail_at:
            raise self.error("injected")
        return result

    def step(self, fail_at: int | None = None) -> None:
        self.calls, self.fail_at = 0, fail_at
        self.optimizer.step(self.closure, **self.setting.step)

    def snapshot(self) -> dict[str, Any]:
        found = snapshot(self.model, self.optimizer)
        report = found.pop("report").to_dict()
        found["report"] = {k: v for k, v in report.items() if not k.startswith("seconds")}
        return found

    def fails(self, k: int, error: type[BaseException]) -> None:
        """A step that fails at the k-th call raises that error and changes nothing."""
        before = self.snapshot()
        report = self.optimizer.last_report
        self.error = error
        with pytest.raises(error, match="injected"):
            self.step(fail_at=k)
        assert self.calls == k
        assert_identical(self.snapshot(), before)
        assert self.optimizer.last_report is report


@every_setting
def test_an_error_at_any_call_changes_nothing(setting):
    healthy = Run(setting)
    healthy.step()
    assert healthy.calls >= 2
    for k in range(1, healthy.calls + 1):
        run = Run(setting)
        run.fails(k, RuntimeError)
        run.step()
        assert_identical(run.snapshot(), healthy.snapshot())


@every_setting
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError])
def test_any_error_at_any_call_changes_nothing(setting, error):
    healthy = Run(setting)
    healthy.step()
    run = Run(setting)
    for k in range(1, healthy.calls + 1):
        run.fails(k, error)
    run.step()
    assert_identical(run.snapshot(), healthy.snapshot())


def test_an_error_in_the_first_step_changes_nothing():
    model = network()
    optimizer = HFOptimizer(model.parameters())
    before = snapshot(model, optimizer)

    def closure():
        lbfgs(model, optimizer, BATCH)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert_identical(snapshot(model, optimizer), before)
    assert optimizer.last_report is None


def test_gradients_stay_the_same_objects():
    model = network()
    optimizer = HFOptimizer(model.parameters())
    kept = [torch.ones_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), kept, strict=True):
        p.grad = g

    def closure():
        lbfgs(model, optimizer, BATCH)
        raise ValueError("injected")

    with pytest.raises(ValueError, match="injected"):
        optimizer.step(closure)
    for p, g in zip(model.parameters(), kept, strict=True):
        assert p.grad is g
        assert g.eq(1).all()


class _Fragile(torch.autograd.Function):
    """The identity, whose derivatives fail when their turn has come."""

    left = 10**9

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, g):
        _Fragile.left -= 1
        if _Fragile.left == 0:
            raise OSError("injected")  # a RuntimeError there is met by differences
        return _Fragile.apply(g)


@pytest.mark.parametrize("preconditioner", ["lbfgs", "diagonal", "diagonal_lbfgs"])
def test_an_error_in_any_derivative_changes_nothing(preconditioner):
    def make() -> Run:
        choice = preconditioner
        if choice == "diagonal_lbfgs":
            choice = LBFGSPreconditioner(4, base="diagonal")

        def form(model, optimizer, batch):
            return F.mse_loss(_Fragile.apply(outputs_of(model, batch[0])), batch[1])

        return Run(Setting("fragile", form, options={"preconditioner": choice}))

    healthy = make()
    _Fragile.left = 10**9
    healthy.step()
    derivatives = 10**9 - _Fragile.left
    assert derivatives > 4
    run = make()
    before = run.snapshot()
    for k in range(1, derivatives + 1):
        _Fragile.left = k
        with pytest.raises(OSError, match="injected"):
            run.step()
        assert_identical(run.snapshot(), before)
    _Fragile.left = 10**9
    run.step()
    assert_identical(run.snapshot(), healthy.snapshot())


# Numbers that are not finite


def finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class Poisoned:
    """A loss that is not finite at some of the trial points."""

    def __init__(self, value: float, poisons: Callable[[int], bool]) -> None:
        self.model = network()
        self.optimizer = HFOptimizer(self.model.parameters())
        self.value, self.poisons, self.calls = value, poisons, -1

    def __call__(self):
        self.calls += 1
        torch.manual_seed(0)
        loss = F.mse_loss(self.model(X), Y)
        return loss + self.value if self.calls and self.poisons(self.calls) else loss


NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("last", [1, 2, 5])
def test_the_first_trial_points_are_not_finite(value, last):
    closure = Poisoned(value, lambda call: call <= last)
    closure.optimizer.step(closure)
    report = closure.optimizer.last_report
    assert report.accepted
    assert report.new_loss < report.loss
    assert abs(report.new_loss) < float("inf")
    assert finite(closure.model)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_all_trial_points_are_not_finite(value):
    closure = Poisoned(value, lambda call: True)
    before = parameters(closure.model)
    closure.optimizer.step(closure)
    report = closure.optimizer.last_report
    assert not report.accepted
    assert report.new_loss == report.loss
    assert report.reason
    assert_identical(parameters(closure.model), before)
    assert closure.optimizer.param_groups[0]["damping"] > report.damping > 0


@pytest.mark.parametrize("value", NOT_FINITE)
def test_one_trial_point_is_not_finite(value):
    """Each trial point in turn: the step is accepted at a finite loss or not at all."""
    for poisoned in range(1, 8):
        closure = Poisoned(value, lambda call, poisoned=poisoned: call == poisoned)
        before = parameters(closure.model)
        closure.optimizer.step(closure)
        report = closure.optimizer.last_report
        assert abs(report.new_loss) < float("inf")
        assert report.new_loss <= report.loss
        assert finite(closure.model)
        if not report.accepted:
            assert_identical(parameters(closure.model), before)


def test_a_trial_point_that_overflows_in_the_network():
    """The Newton step of the first parameter lands where the other term is infinite."""
    w = nn.Parameter(torch.tensor([0.0]))
    optimizer = HFOptimizer([w], damping=1e-12)

    def closure():
        overflow = torch.exp(60 * (w - 1.0))  # infinite in float32 beyond 2.5
        return (w - 5).square().sum() + 1e-9 * overflow.square().sum()

    for _ in range(5):
        optimizer.step(closure)
        report = optimizer.last_report
        assert w.isfinite().all()
        assert report.new_loss <= report.loss < float("inf")
    assert 0.5 < w.item() < 2.5


@pytest.mark.parametrize("used", [False, True])
def test_a_gradient_that_is_not_finite(used):
    w = nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = HFOptimizer([w])
    if used:
        optimizer.step(lambda: w.square().sum())
    with torch.no_grad():
        w.copy_(torch.tensor([0.0, 1.0]))
    damping = optimizer.param_groups[0]["damping"]
    optimizer.step(lambda: w.square().sum() + w.abs().sqrt().sum())
    report = optimizer.last_report
    assert torch.equal(w, torch.tensor([0.0, 1.0]))
    assert not report.accepted
    assert "gradient" in report.reason
    assert optimizer.param_groups[0]["damping"] == damping
    optimizer.step(lambda: w.square().sum())
    assert optimizer.last_report.accepted
    assert optimizer.last_report.damping > 0


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_products_that_are_not_finite(curvature):
    """The slope of |w|^1.5 is 0 at 0, its curvature infinite."""
    w = nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = HFOptimizer([w], curvature=curvature)

    def closure():
        return w.abs().pow(1.5).sum() + (w - 1).square().sum()

    for _ in range(3):
        optimizer.step(closure)
        report = optimizer.last_report
        assert w.isfinite().all()
        assert report.new_loss <= report.loss
        assert report.damping > 0
        assert report.damping < float("inf")
