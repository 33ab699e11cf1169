"""Runs of ``solver="exact"`` and ``"lanczos"``: resuming, failing, converging, changing data."""

import io
import math
from collections.abc import Callable

import pytest
import torch
from basics import normal
from closures import network
from snapshots import assert_identical, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from torch_hf import HFOptimizer

X, Y = normal(1, 12, 3), normal(2, 12, 2)
CLASSES = (Y[:, 0] > 0).long()
LOSSES: dict[str, Callable[[nn.Module], Tensor]] = {
    "mse": lambda model: F.mse_loss(model(X), Y),
    "cross_entropy": lambda model: F.cross_entropy(model(X), CLASSES),
    "huber": lambda model: F.huber_loss(model(X), Y, delta=0.3),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


class Run:
    """A model with its optimizer, and steps on one loss."""

    def __init__(self, loss: Callable[[nn.Module], Tensor], **options: object) -> None:
        self.model, self.loss, self.calls = network(), loss, 0
        options = {"solver": "exact", "weight_decay": 1e-3} | options
        self.optimizer = HFOptimizer(self.model.parameters(), **options)

    def closure(self) -> Tensor:
        self.calls += 1
        return self.loss(self.model)

    def steps(self, *solvers: str) -> None:
        for solver in solvers:
            self.optimizer.param_groups[0]["solver"] = solver
            self.optimizer.step(self.closure)
            assert self.optimizer.last_report.solver == solver

    def snapshot(self) -> dict[str, object]:
        found = snapshot(self.model, self.optimizer)
        found["report"] = None  # it has seconds in it
        return found


def through_file(state: object) -> object:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- resuming --------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("carry", [lambda state: state, through_file], ids=["dict", "file"])
@pytest.mark.parametrize(
    "solvers",
    [
        ("exact",) * 6,
        ("exact", "cg", "exact", "exact", "cg", "exact"),
        ("cg",) * 3 + ("exact",) * 3,
        ("lanczos",) * 6,
        ("exact", "lanczos", "cg", "lanczos", "exact", "lanczos"),
    ],
    ids=["exact", "in turns", "late", "lanczos", "all in turns"],
)
def test_resuming_to_the_bit(loss, carry, solvers):
    whole = Run(loss)
    whole.steps(*solvers)
    for cut in (1, 3, 5):
        first, second = Run(loss), Run(loss)
        first.steps(*solvers[:cut])
        second.model.load_state_dict(carry(first.model.state_dict()))
        second.optimizer.load_state_dict(carry(first.optimizer.state_dict()))
        second.steps(*solvers[cut:])
        assert_identical(second.snapshot(), whole.snapshot())


@pytest.mark.parametrize("own", ["cg", "auto"])
def test_a_state_brings_its_solver(own):
    """As it brings ``lr``: options of groups are those of the state, and the run goes on."""
    whole, first = Run(LOSSES["mse"]), Run(LOSSES["mse"])
    whole.steps("exact", "exact", "exact")
    first.steps("exact", "exact")
    second = Run(LOSSES["mse"], solver=own)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert second.optimizer.param_groups[0]["solver"] == "exact"
    second.optimizer.step(second.closure)
    assert_identical(second.snapshot(), whole.snapshot())


def test_a_state_of_before_there_were_solvers_takes_the_optimizers():
    first, second = Run(LOSSES["mse"]), Run(LOSSES["mse"], solver="exact")
    first.steps("cg", "cg")
    state = first.optimizer.state_dict()
    del state["param_groups"][0]["solver"]
    for entries in state["state"].values():
        for name in [n for n in entries if n.startswith("exact_") or n == "column_norms"]:
            del entries[name]
    second.optimizer.load_state_dict(state)
    second.optimizer.step(second.closure)
    assert second.optimizer.last_report.solver == "exact"
    assert second.optimizer.last_report.accepted


# --- failing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["exact", "lanczos"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("data", [{}, {"batches": [slice(0, 5), slice(5, 12)]}], ids=["one", "two"])
def test_an_error_in_any_call_leaves_all_as_it_was(data, error, solver):
    class Failing(Run):
        fail_at = 0

        def step(self, fail_at: int = 0) -> None:
            self.calls, self.fail_at = 0, fail_at
            take = self.closure if not data else self.on_batch
            self.optimizer.step(take, **data)

        def on_batch(self, part: slice) -> Tensor:
            self.calls += 1
            if self.calls == self.fail_at:
                raise error("injected")
            return F.mse_loss(self.model(X[part]), Y[part])

        def closure(self) -> Tensor:
            return self.on_batch(slice(0, 12))

    healthy = Failing(LOSSES["mse"], solver=solver)
    healthy.step()
    healthy.step()
    assert healthy.optimizer.last_report.solver == solver and healthy.calls >= 2
    run = Failing(LOSSES["mse"], solver=solver)
    run.step()
    for k in range(1, healthy.calls + 1):
        before, report = run.snapshot(), run.optimizer.last_report
        with pytest.raises(error, match="injected"):
            run.step(fail_at=k)
        assert_identical(run.snapshot(), before)
        assert run.optimizer.last_report is report
    run.step()
    assert_identical(run.snapshot(), healthy.snapshot())


@every_loss
def test_a_batch_of_nan_in_the_middle_is_passed_over(loss):
    whole, run = Run(loss), Run(loss)
    whole.steps(*["exact"] * 5)
    run.steps("exact", "exact", "exact")
    before = [p.detach().clone() for p in run.model.parameters()]
    run.optimizer.step(lambda: loss(run.model) * math.nan)
    report = run.optimizer.last_report
    assert not report.accepted and "nan" in report.reason
    assert_identical([p.detach() for p in run.model.parameters()], before)
    run.steps("exact", "exact")
    assert_identical(list(run.model.parameters()), list(whole.model.parameters()))


# --- changes between steps -------------------------------------------------------------------


def test_the_model_becomes_double():
    run = Run(lambda model: F.mse_loss(model(X.to(model[0].weight)), Y.to(model[0].weight)))
    run.model.float()
    run.steps("exact", "exact", "exact")
    norms = run.optimizer.state[run.model[0].weight]["column_norms"].clone()
    run.model.double()
    run.steps("exact")
    found = run.optimizer.state[run.model[0].weight]["column_norms"]
    assert found.dtype == torch.float64
    assert bool((found >= 0.6 * norms.double() * (1 - 1e-6)).all())  # remembered, with a loss
    assert run.optimizer.last_report.accepted
    run.steps("exact", "exact")
    assert run.optimizer.last_report.new_loss < run.optimizer.last_report.loss


@pytest.mark.parametrize("solver", ["exact", "lanczos"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["fits", "misfit"])
def test_converged_steps_are_cheap_and_new_targets_are_solved(dtype, noise, solver):
    x = normal(3, 30, 4).to(dtype)
    y = (x @ normal(4, 4, 2).to(dtype) + 1 + noise * normal(5, 30, 2)).to(dtype)
    model = network(lambda: nn.Linear(4, 2)).to(dtype)
    optimizer = HFOptimizer(model.parameters(), solver=solver)
    for _ in range(20):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(200):
        optimizer.step(lambda: F.mse_loss(model(x), y))
        report = optimizer.last_report
        assert report.converged or report.gradient_norm == 0.0
        assert report.evaluations <= 2
    assert_identical([p.detach() for p in model.parameters()], before)
    y = y.flip(0) * 3
    for _ in range(8):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    ones = torch.cat([x, torch.ones(30, 1).to(dtype)], 1).double()
    best = torch.linalg.lstsq(ones, y.double()).solution
    truth = float((ones @ best - y.double()).square().mean())
    assert optimizer.last_report.new_loss == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("solver", ["exact", "lanczos"])
@pytest.mark.parametrize("offset", [3.0, -3.0, -1.0 - 2.0**-30])
def test_a_point_that_no_lambda_leaves_costs_one_trial(offset, solver):
    """Also where the loss is below zero."""
    model, calls = network(), []
    optimizer = HFOptimizer(model.parameters(), solver=solver)

    def closure() -> Tensor:
        loss = F.mse_loss(model(X), Y)
        calls.append(0)  # each trial is worse than where the step began
        return loss + offset if len(calls) == 1 else loss + offset + 10

    counts = []
    for _ in range(3):
        calls.clear()
        optimizer.step(closure)
        assert not optimizer.last_report.accepted
        counts.append(optimizer.last_report.evaluations)
    assert counts[0] > 2 and max(counts[1:]) <= 2  # a lambda, with one correction


@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_near_a_loss_of_zero_a_forced_solver_takes_the_losss_own_gradient(solver):
    """In float32 the gradient of cross-entropy cancels before that of the rows does."""
    model = network(lambda: nn.Linear(5, 2)).float()
    x = normal(6, 30, 5).float()
    y = (x[:, 0] > 0).long()
    optimizer = HFOptimizer(model.parameters(), solver=solver)
    last = math.inf
    for _ in range(18):
        loss = optimizer.step(lambda: F.cross_entropy(model(x), y)).item()
        assert loss <= last
        assert optimizer.last_report.solver == solver
        last = loss
    assert last < 1e-5


def test_norms_that_overflow_are_not_kept():
    """Columns of 1e22 have squared norms beyond float32; their products with the weights are 1."""
    torch.manual_seed(0)
    x, y = 1e22 * torch.randn(20, 3), torch.randn(20, 1)
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.mul_(1e-22)
    optimizer = HFOptimizer(model.parameters(), solver="exact")
    for _ in range(2):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    assert optimizer.last_report.solver == "exact"
    copied = HFOptimizer(model.parameters(), solver="exact")
    copied.load_state_dict(optimizer.state_dict())
    norms = optimizer.state[model.weight].get("column_norms")
    assert norms is None or bool(norms.isfinite().all())
