"""A step that cannot hurt: what is not finite, what is not deterministic, random problems."""

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
from guarantees import assert_same_state, bits, problem, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer, Stop

pytestmark = pytest.mark.usefixtures("seeded")


# What is not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_batch_is_rejected_and_training_goes_on(value):
    model, x, y = problem()
    optimizer = HFOptimizer(model.parameters())
    optimizer.step(lambda: F.mse_loss(model(x), y))
    before, damping = bits(model), optimizer.param_groups[0]["damping"]
    bad = x.clone()
    bad[3, 1] = value
    returned = optimizer.step(lambda: F.mse_loss(model(bad), y))
    report = optimizer.last_report
    assert not math.isfinite(returned)
    assert not report.accepted
    assert "loss before the step" in report.reason
    assert report.cg_stop is Stop.NON_FINITE
    assert same(before, bits(model))  # running statistics too
    assert optimizer.param_groups[0]["damping"] == damping  # it says nothing about lambda
    optimizer.step(lambda: F.mse_loss(model(x), y))
    assert optimizer.last_report.accepted


class Fragile(torch.autograd.Function):
    """The identity, its gradient spoilt while the switch is on."""

    on = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * math.nan if Fragile.on else g


def test_a_gradient_that_is_not_finite_is_rejected(monkeypatch):
    model, x, y = problem()
    optimizer = HFOptimizer(model.parameters())
    optimizer.step(lambda: F.mse_loss(Fragile.apply(model(x)), y))
    assert optimizer.last_report.accepted
    monkeypatch.setattr(Fragile, "on", True)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(lambda: F.mse_loss(Fragile.apply(model(x)), y))
    assert optimizer.last_report.reason == "the gradient is not finite"
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_trial_points_that_are_not_finite_are_not_taken():
    theta = nn.Parameter(torch.tensor([1.0]))
    optimizer = HFOptimizer([theta], damping=1e-4)
    for _ in range(20):  # log(theta) is nan beyond 0, where the model sees no wall
        optimizer.step(lambda: (theta - 5 * theta.log() + 3).square().sum())
        assert math.isfinite(optimizer.last_report.new_loss)
        assert torch.isfinite(theta).all()


def test_a_run_of_rejections_warns_and_says_why():
    model, x, y = problem()
    optimizer = HFOptimizer(model.parameters())
    optimizer.step(lambda: F.mse_loss(model(x), y))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            optimizer.step(lambda: F.mse_loss(model(x * math.nan), y))
    (warning,) = caught
    assert "rejected 5 steps in a row" in str(warning.message)
    assert "loss before the step is nan" in str(warning.message)
    assert "diagnose" in str(warning.message)
    assert warning.filename == __file__
    optimizer.step(lambda: F.mse_loss(model(x), y))
    assert optimizer.state[next(model.parameters())]["rejections"] == 0


@pytest.mark.parametrize("preconditioner", ["lbfgs", "kronecker-lbfgs"])
def test_a_batch_without_a_valid_target_counts_nothing(preconditioner):
    """Its rows have places all the same, so for equal Kronecker signs it stands at the end."""
    model = nn.Linear(3, 4)
    x, y = torch.randn(12, 3), torch.randint(4, (12,))
    ignored = torch.full((5,), -100)
    ends = []
    for batches in (
        [(x, y)],
        [(x[:7], y[:7]), (x[7:], y[7:]), (torch.randn(5, 3), ignored)],
        [(torch.randn(5, 3), ignored), (x[:7], y[:7]), (x[7:], y[7:])],
    ):
        if preconditioner != "lbfgs" and batches[0][1] is ignored:
            continue
        own = copy.deepcopy(model)
        optimizer = HFOptimizer(own.parameters(), cg_max_iter=3, preconditioner=preconditioner)
        for _ in range(3):
            optimizer.step(lambda b, own=own: F.cross_entropy(own(b[0]), b[1]), batches=batches)
            assert optimizer.last_report.accepted
        ends.append(own.weight.detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-3, atol=1e-4)


def test_a_failed_step_on_fewer_parameters_forgets_nothing():
    ends = []
    for fails in (False, True):
        torch.manual_seed(0)
        model, x, y = problem()
        optimizer = HFOptimizer(model.parameters(), cg_max_iter=4)
        for _ in range(2):
            optimizer.step(lambda model=model, x=x, y=y: F.mse_loss(model(x), y))
        if fails:
            model[0].requires_grad_(False)
            with pytest.raises(Fault):
                optimizer.step(failing)
            model[0].requires_grad_(True)
        optimizer.step(lambda model=model, x=x, y=y: F.mse_loss(model(x), y))
        ends.append(bits(model))
    assert same(*ends)


def failing():
    raise Fault


# What is not deterministic


def test_a_closure_that_is_not_deterministic_is_named():
    model, _, y = problem()
    own = torch.Generator().manual_seed(0)
    optimizer = HFOptimizer(model.parameters())
    reasons = []
    for _ in range(10):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step(
                lambda: (
                    F.mse_loss(model(torch.randn(16, 3, generator=own)), y)
                    + 10 * torch.rand((), generator=own)
                )
            )
        reasons.append(optimizer.last_report.reason)
    assert any("not deterministic" in reason for reason in reasons)


def test_a_deterministic_closure_is_not_accused():
    model, x, y = problem()
    optimizer = HFOptimizer(model.parameters())
    for _ in range(60):  # to the bottom, where ratios are all rounding
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step(lambda: F.mse_loss(model(x), y))
        assert "deterministic" not in optimizer.last_report.reason


# Random problems


class Fault(Exception):
    pass


problems = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "widths": st.lists(st.integers(1, 4), min_size=2, max_size=4),
        "cases": st.integers(1, 9),
        "scale": st.sampled_from([1e-6, 1e-2, 1.0, 1e3, 1e6]),
        "loss": st.sampled_from(["mse", "cross_entropy", "bce", "huber", "hand"]),
        "activation": st.sampled_from([nn.Tanh, nn.ReLU, nn.Sigmoid, nn.Softplus]),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
        "batches": st.booleans(),
        "fault": st.one_of(st.none(), st.integers(1, 12)),
        "bad": st.sampled_from([None, None, None, math.nan, math.inf, 1e30]),
    }
)
options = st.fixed_dictionaries(
    {
        "curvature": st.sampled_from(["ggn", "hessian"]),
        "damping": st.sampled_from([None, 0.0, 1e-6, 1.0, 1e6]),
        "weight_decay": st.sampled_from([0.0, 0.0, 1e-3, 10.0]),
        "preconditioner": st.sampled_from(["lbfgs", "diagonal", "none"]),
        "history_size": st.sampled_from([2, 4, 20]),
        "cg_max_iter": st.integers(1, 12),
        "cg_decay": st.sampled_from([None, 0.0, 0.95, 1.0]),
        "lr": st.sampled_from([0.1, 1.0, 3.0]),
    }
)
LOSSES = {
    "mse": lambda z, t: F.mse_loss(z, t),
    "cross_entropy": lambda z, t: F.cross_entropy(z, t.softmax(1)),
    "bce": lambda z, t: F.binary_cross_entropy_with_logits(z, t.sigmoid()),
    "huber": lambda z, t: F.huber_loss(z, t),
    "hand": lambda z, t: 0.5 * (z - t).pow(2).sum(1).mean(),
}


def network(widths, activation, dtype):
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def drawn(examples):
    """So many random problems and options, the same at each run."""
    setting = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    return lambda test: setting(given(p=problems, o=options)(test))


@drawn(300)
def test_no_step_hurts(p, o):
    check_that_no_step_hurts(p, o)


@pytest.mark.slow
@drawn(1000)
def test_no_step_hurts_in_more_problems(p, o):
    check_that_no_step_hurts(p, o)


def check_that_no_step_hurts(p, o):
    generator = torch.Generator().manual_seed(p["seed"])
    torch.manual_seed(p["seed"])
    model = network(p["widths"], p["activation"], p["dtype"])
    x = torch.randn(p["cases"], p["widths"][0], generator=generator).to(p["dtype"])
    y = torch.randn(p["cases"], p["widths"][-1], generator=generator).to(p["dtype"])
    loss = LOSSES[p["loss"]]
    optimizer = HFOptimizer(model.parameters(), **o)
    calls, fail_at, factor = 0, None, 1.0

    def closure(batch=(x, y)):
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise Fault
        return p["scale"] * factor * loss(model(batch[0] * factor), batch[1])

    half = (p["cases"] + 1) // 2
    batches = None
    if p["batches"] and p["cases"] > 1:
        batches = [(x[:half], y[:half]), (x[half:], y[half:])]

    for number in range(4):
        calls = 0
        before, state = bits(model), copy.deepcopy(optimizer.state_dict())
        rng = torch.get_rng_state()
        fail_at = p["fault"] if number == 2 else None
        factor = p["bad"] if number == 1 and p["bad"] is not None else 1.0
        try:
            optimizer.step(closure, batches)
        except Fault:
            assert same(before, bits(model))
            assert torch.equal(rng, torch.get_rng_state())
            assert_same_state(state, optimizer.state_dict())
            continue
        except RuntimeError as error:  # the one thing that these closures may be refused for
            assert "linear in the parameters" in str(error)
            assert same(before, bits(model))
            continue
        report = optimizer.last_report
        assert all(torch.isfinite(q).all() for q in model.parameters())
        if math.isfinite(report.loss):
            assert report.new_loss <= report.loss
        assert report.accepted or same(before, bits(model))
        assert report.accepted or report.reason
        damping = optimizer.param_groups[0]["damping"]
        assert damping is None or (math.isfinite(damping) and damping >= 0)
