"""What users bring around a step: autocast, compiled and checkpointed modules, thawed layers."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torch_hf import HFOptimizer, Stop
from torch_hf.solver.cg_budget import is_same_data

pytestmark = pytest.mark.usefixtures("seeded")


def classifier():
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    return model, torch.randn(40, 6), torch.randint(3, (40,))


def train(model, closure, steps=3, **options):
    optimizer = HFOptimizer(model.parameters(), **options)
    for _ in range(steps):
        optimizer.step(closure)
        assert optimizer.last_report.accepted
        assert optimizer.last_report.new_loss < optimizer.last_report.loss
    return optimizer


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_inside_the_closure_or_around_the_step(inside):
    model, x, y = classifier()

    def loss():
        return F.cross_entropy(model(x).float(), y)

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss()

    if inside:
        train(model, closure, damping=0.1)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            train(model, loss, damping=0.1)


@pytest.mark.filterwarnings("ignore")  # torch's own, of hooks that it does not trace
def test_a_compiled_module_whose_backend_keeps_autograd():
    model, x, y = classifier()
    compiled = torch.compile(model, backend="eager")
    train(model, lambda: F.cross_entropy(compiled(x), y))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.head(attended.mean(1))


@pytest.mark.parametrize("module", [Attention, lambda: classifier()[0]])
def test_checkpointing_that_is_not_reentrant(module):
    model = module()
    x = torch.randn(20, 5, 8) if isinstance(model, Attention) else torch.randn(20, 6)
    y = torch.randint(3, (20,))
    train(model, lambda: F.cross_entropy(checkpoint(model, x, use_reentrant=False), y))


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_layer(training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True).train(training)
    x, y = torch.randn(10, 5, 8), torch.randn(10, 5, 8)
    train(layer, lambda: F.mse_loss(layer(x), y))


class Last(nn.Module):
    def __init__(self, recurrent):
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x):
        return self.recurrent(x)[0][:, -1]


@pytest.mark.parametrize(
    "module",
    [
        Attention,
        lambda: Last(nn.LSTM(8, 3, batch_first=True)),
        lambda: Last(nn.GRU(8, 3, batch_first=True)),
        lambda: nn.Sequential(
            nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 3)
        ),
        lambda: nn.Sequential(
            nn.Conv1d(5, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(24, 3)
        ),
    ],
)
def test_data_that_stay_are_known_in_float32(module):
    """With and without a graph kernels may differ; the loss must not, beyond a few roundings."""
    model, x, y = module(), torch.randn(200, 5, 8), torch.randint(3, (200,))
    optimizer = HFOptimizer(model.parameters())
    reports = []
    for _ in range(4):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        reports.append(optimizer.last_report)
    for before, after in pairwise(reports):
        last = {"last_loss": before.new_loss, "last_cases": before.batch_cases}
        assert is_same_data(last, after.loss, after.batch_cases, torch.float32)


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(recurrent):
    layer, x, y = recurrent(4, 6, batch_first=True), torch.randn(8, 7, 4), torch.randn(8, 7, 6)
    train(layer, lambda: F.mse_loss(layer(x)[0], y))


@pytest.mark.parametrize(
    "look", [lambda p: p.grad.norm(), lambda p: nn.utils.clip_grad_value_([p], 1.0)]
)
def test_a_closure_that_looks_at_gradients_is_told_where_they_are(look):
    model, x, y = classifier()

    def closure():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for p in model.parameters():
            if look(p) is None and p.grad is None:
                raise AttributeError("'NoneType' object has no attribute 'grad'")
        return loss

    with pytest.raises(RuntimeError, match=r"intercepts backward\(\)"):
        HFOptimizer(model.parameters()).step(closure)


def least_squares(reduction, copies=10):
    x = torch.randn(12, 4, dtype=torch.float64)
    y = torch.randn(12, 1, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    optimizer = HFOptimizer(model.parameters(), damping=1e-9)
    whole = (x.repeat(copies, 1), y.repeat(copies, 1))
    optimizer.step(
        lambda batch: F.mse_loss(model(batch[0]), batch[1], reduction=reduction),
        batches=[whole],
        curvature_batches=[(x, y)],
    )
    return optimizer.last_report


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_smaller_curvature_sample_stands_for_the_whole(reduction):
    report = least_squares(reduction)
    assert report.reduction_ratio == pytest.approx(1.0, abs=1e-6)
    assert report.step_length == 1.0


def test_uneven_batches_add_up_to_the_gradient_of_the_whole():
    model = nn.Linear(3, 2)

    def closure(batch):
        return F.mse_loss(model(batch), torch.zeros(len(batch), 2))

    weight = torch.randn(24, 3)
    whole = HFOptimizer(model.parameters(), damping=1.0)
    start = copy.deepcopy(model.state_dict())
    whole.step(closure, batches=[weight])
    expected = [p.grad.clone() for p in model.parameters()]
    model.load_state_dict(start)
    parts = HFOptimizer(model.parameters(), damping=1.0)
    parts.step(closure, batches=list(weight.split(5)))
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("thaw_first", [True, False])
def test_a_state_of_other_parameters_is_not_mixed_in(frozen, thaw_first):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    x, y = torch.randn(9, 4), torch.randn(9, 4)
    saved, loaded = build(), build()
    (saved if thaw_first else loaded)[frozen].requires_grad_(False)
    old = HFOptimizer(saved.parameters())
    for _ in range(2):
        old.step(lambda: F.mse_loss(saved(x), y))
    new = HFOptimizer(loaded.parameters())
    new.load_state_dict(old.state_dict())
    new.step(lambda: F.mse_loss(loaded(x), y))
    assert new.last_report.accepted


def test_a_state_is_loaded_into_a_model_of_another_precision():
    model, x, y = classifier()
    old = train(model, lambda: F.cross_entropy(model(x), y))
    double = copy.deepcopy(model).double()
    new = HFOptimizer(double.parameters())
    new.load_state_dict(old.state_dict())
    new.step(lambda: F.cross_entropy(double(x.double()), y))
    assert new.last_report.accepted


@pytest.mark.parametrize("d", [1, 3])
def test_the_first_lambda_under_negative_curvature_is_not_singular(d):
    w = nn.Parameter(torch.full((d,), 3.0, dtype=torch.float64))
    optimizer = HFOptimizer([w], curvature="hessian")
    optimizer.step(lambda: torch.log1p(w**2).sum())
    assert optimizer.last_report.accepted
    assert optimizer.last_report.evaluations < 10


def test_a_rate_of_zero_leaves_lambda_alone():
    model, x, y = classifier()
    optimizer = train(model, lambda: F.cross_entropy(model(x), y), steps=2)
    damping = optimizer.param_groups[0]["damping"]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert optimizer.param_groups[0]["damping"] == damping
    assert optimizer.last_report.cg_stop is Stop.NOT_RUN
    assert optimizer.last_report.reason == "lr is 0"


def test_a_gradient_that_is_not_finite_is_reported_as_such():
    w = nn.Parameter(torch.zeros(2))
    optimizer = HFOptimizer([w], curvature="hessian")
    optimizer.step(lambda: w.abs().sqrt().sum())
    assert optimizer.last_report.cg_stop is Stop.NON_FINITE
    assert math.isnan(optimizer.last_report.reduction_ratio)


def test_a_copied_optimizer_goes_on_as_the_original_does():
    model, x, y = classifier()
    optimizer = train(model, lambda: F.cross_entropy(model(x), y))
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    optimizer_copy.step(lambda: F.cross_entropy(model_copy(x), y))
    for p, q in zip(model.parameters(), model_copy.parameters(), strict=True):
        assert torch.equal(p, q)
