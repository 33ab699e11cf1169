"""What users do on a GPU, on a CUDA device where there is one, and on the CPU for its logic."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer, split_batch
from torch_hf.kronecker import KroneckerFactors, KroneckerLinear, KroneckerSGD

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    ),
]
on_each = pytest.mark.parametrize("device", DEVICES)


def pictures(device, n=48):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 12, 12, generator=generator)
    y = torch.randint(0, 4, (n,), generator=generator)
    return x.to(device), y.to(device)


def network(device):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(96, 4),
    ).to(device)


def lowers(device, steps=4, model=None, loss=F.cross_entropy, **options):
    """A few steps on one batch; the optimizer."""
    x, y = pictures(device)
    model = model or network(device)
    optimizer = HFOptimizer(model.parameters(), **options)
    for _ in range(steps):
        optimizer.step(lambda: loss(model(x), y))
        if solver := options.get("solver"):
            resting = optimizer.last_report.converged
            assert resting or solver in ("auto", optimizer.last_report.solver)
        assert optimizer.last_report.new_loss <= optimizer.last_report.loss
    first = F.cross_entropy(network(device)(x), y).item()
    assert optimizer.last_report.new_loss < 0.9 * first
    return optimizer


@on_each
@pytest.mark.parametrize("solver", ["auto", "cg", "exact", "lanczos", "broyden", "lbfgs"])
def test_every_solver(device, solver):
    lowers(device, solver=solver)


@on_each
@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "kronecker", "lbfgs", "diagonal"])
def test_every_preconditioner(device, preconditioner):
    optimizer = lowers(device, preconditioner=preconditioner, solver="cg")
    state = optimizer.preconditioner.state_dict()
    tensors = [v for v in state.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert all(t.device.type == device for t in tensors)
    if "kronecker" in preconditioner:
        assert any(key.endswith("factor0") for key in state)


@on_each
def test_light_steps_on_batches_that_change(device):
    model, (x, y) = network(device), pictures(device, 256)
    optimizer = HFOptimizer(model.parameters())
    solvers = []
    for step in range(24):
        part = slice(32 * (step % 8), 32 * (step % 8) + 32)
        optimizer.step(lambda part=part: F.cross_entropy(model(x[part]), y[part]))
        solvers.append(optimizer.last_report.solver)
    assert solvers.count("kronecker") > 15
    with torch.no_grad():
        assert F.cross_entropy(model.eval()(x), y).item() < 1.3


@on_each
def test_micro_batches_and_batches_for_products(device):
    model, (x, y) = network(device), pictures(device)
    optimizer = HFOptimizer(model.parameters())
    parts = split_batch((x, y), 16)
    for _ in range(3):
        optimizer.step(
            lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
            batches=parts,
            curvature_batches=parts[:1],
        )
        report = optimizer.last_report
        assert report.new_loss <= report.loss
        assert (report.batch_cases, report.curvature_cases) == (48, 16)


@on_each
def test_autocast_in_bfloat16(device):
    model, (x, y) = network(device), pictures(device)
    optimizer = HFOptimizer(model.parameters())

    def closure():
        with torch.autocast(device, dtype=torch.bfloat16):
            outputs = model(x)
        return F.cross_entropy(outputs.float(), y)

    first = optimizer.step(closure).item()
    for _ in range(4):
        optimizer.step(closure)
    assert optimizer.last_report.new_loss < 0.9 * first


@on_each
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_says_so_and_steps_on(device, allowed):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            lowers(device)
    finally:
        torch.set_float32_matmul_precision(before)
    said = any("TF32" in str(w.message) for w in seen)
    assert said == (allowed and device == "cuda" and torch.cuda.get_device_capability() >= (8, 0))


@on_each
@pytest.mark.parametrize("solver", ["auto", "cg"])
def test_checkpoints_go_on_to_the_bit(device, solver):
    model, (x, y) = network(device), pictures(device)
    optimizer = HFOptimizer(model.parameters(), solver=solver)

    def closure(model=model):
        return F.cross_entropy(model(x), y)

    torch.use_deterministic_algorithms(device == "cuda", warn_only=True)
    try:
        for _ in range(3):
            optimizer.step(closure)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        rest = []
        for _ in range(3):
            optimizer.step(closure)
            rest.append(optimizer.last_report.new_loss)
        other = network(device)
        other.load_state_dict(saved[0])
        again = HFOptimizer(other.parameters(), solver=solver)
        again.load_state_dict(saved[1])
        found = []
        for _ in range(3):
            again.step(lambda: F.cross_entropy(other(x), y))
            found.append(again.last_report.new_loss)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == rest


@on_each
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks(device, kind):
    torch.manual_seed(0)
    cell = kind(3, 8, batch_first=True).to(device)
    head = nn.Linear(8, 1).to(device)
    x = torch.randn(16, 10, 3, generator=torch.Generator().manual_seed(1)).to(device)
    y = x.sum((1, 2), keepdim=False)[:, None] / 5
    optimizer = HFOptimizer([*cell.parameters(), *head.parameters()])
    first = optimizer.step(lambda: F.mse_loss(head(cell(x)[0][:, -1]), y)).item()
    for _ in range(4):
        optimizer.step(lambda: F.mse_loss(head(cell(x)[0][:, -1]), y))
    assert optimizer.last_report.new_loss < 0.7 * first


@on_each
def test_attention(device):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).to(device)
    head = nn.Linear(8, 3).to(device)
    x = torch.randn(12, 6, 8, generator=torch.Generator().manual_seed(1)).to(device)
    y = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(2)).to(device)
    optimizer = HFOptimizer([*layer.parameters(), *head.parameters()])
    first = optimizer.step(lambda: F.cross_entropy(head(layer(x).mean(1)), y)).item()
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(head(layer(x).mean(1)), y))
    assert optimizer.last_report.new_loss < 0.9 * first


@on_each
def test_a_model_moved_between_steps(device):
    model, (x, y) = network("cpu"), pictures("cpu")
    optimizer = HFOptimizer(model.parameters())
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    model.to(device)
    x, y = x.to(device), y.to(device)
    for _ in range(2):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        assert optimizer.last_report.new_loss <= optimizer.last_report.loss


@on_each
def test_kronecker_sgd(device):
    torch.manual_seed(0)
    left, right = torch.randn(20, 5), torch.randn(20, 7)
    factors = KroneckerFactors(left.to(device), right.to(device))
    layer = KroneckerLinear(factors, 1).to(device)
    optimizer = KroneckerSGD(layer.parameters(), lr=1e-2)
    y = torch.randn(20, 1).to(device)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(torch.arange(20, device=device)), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
