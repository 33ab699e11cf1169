"""What users do on a GPU, on a CUDA device where there is one, and on the CPU for its logic."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer, split_batch
from torch_hf.curvature.precision import full_precision
from torch_hf.kronecker import KroneckerFactors, KroneckerLinear, KroneckerSGD

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    ),
]
on_each = pytest.mark.parametrize("device", DEVICES)
on_a_gpu = pytest.mark.parametrize("device", DEVICES[1:])


@pytest.fixture(autouse=True)
def full():
    """Float32 as it is: torch's default for convolutions is TF32, of which a step warns."""
    if not torch.cuda.is_available():
        yield
        return
    with full_precision(torch.device("cuda")):
        yield


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
        nn.Conv2d(6, 6, 3, stride=3),
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
    owner = torch.backends.cuda.matmul
    before = owner.fp32_precision
    owner.fp32_precision = "tf32" if allowed else "ieee"
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            lowers(device)
    finally:
        owner.fp32_precision = before
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
    warnings.filterwarnings("ignore", "Deterministic behavior was enabled")  # by cuBLAS
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


def steps_by_cg(model, x, y, replays=True, steps=4, **options):
    """The losses of some steps by CG, and the optimizer."""
    options = {"solver": "cg", "cg_max_iter": 20, "cg_tol": 0.0, "damping": 0.1} | options
    optimizer = HFOptimizer(model.parameters(), **options)
    optimizer._recorder.usable = replays
    losses = [float(optimizer.step(lambda: F.cross_entropy(model(x), y))) for _ in range(steps)]
    return [*losses, optimizer.last_report.new_loss], optimizer


def deep(device):
    """Many small operations: bound by launches on any GPU."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32)]
    for _ in range(8):
        layers += [nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 32)]
    model = nn.Sequential(*layers, nn.Linear(32, 4)).double().to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator).double()
    return model, x.to(device), torch.randint(0, 4, (64,), generator=generator).to(device)


@on_each
def test_products_replayed_as_a_graph_are_the_same(device):
    found = {replays: steps_by_cg(*deep(device), replays=replays) for replays in (True, False)}
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-9)
    recorder = found[True][1]._recorder
    assert recorder.usable
    assert recorder._agreed == (device == "cuda")


@on_a_gpu
def test_replays_take_no_memory_from_step_to_step(device):
    model, x, y = deep(device)
    optimizer = steps_by_cg(model, x, y, steps=3)[1]
    before = torch.cuda.memory_reserved()
    for _ in range(12):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert torch.cuda.memory_reserved() <= before + 2**21


@on_each
def test_random_numbers_after_a_recording(device):
    model, x, y = deep(device)
    model = nn.Sequential(nn.Dropout(0.2), model).to(device)
    losses, optimizer = steps_by_cg(model, x, y)
    assert optimizer.last_report.new_loss < losses[0]
    first, second = (F.dropout(x, 0.5) for _ in range(2))
    assert not torch.equal(first, second)


@on_a_gpu
def test_a_step_on_the_callers_own_stream(device):
    truth = steps_by_cg(*deep(device))[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = steps_by_cg(*deep(device))[0]
        assert torch.cuda.current_stream() == stream
    assert found == pytest.approx(truth, rel=1e-9)


@on_each
def test_a_closure_that_waits_for_the_device(device):
    """Its products run as they are: what they wait for cannot be recorded."""
    model, x, y = deep(device)

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return 2.0 * z

        @staticmethod
        def backward(ctx, g):
            return g * 2.0 if g.detach().abs().sum().item() >= 0.0 else g

    optimizer = HFOptimizer(model.parameters(), solver="cg", cg_max_iter=12, cg_tol=0.0)
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(Own.apply(model(x)), y))
        assert optimizer.last_report.new_loss < optimizer.last_report.loss
    assert not optimizer._recorder._agreed


@on_each
@pytest.mark.parametrize("kind", ["batch", "layer", "group"])
def test_normalisations(device, kind):
    found = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        norm = {"batch": nn.BatchNorm1d(8), "layer": nn.LayerNorm(8), "group": nn.GroupNorm(2, 8)}
        layers = [nn.Linear(5, 8), norm[kind], nn.Tanh(), nn.Linear(8, 3)]
        model = nn.Sequential(*layers).double().to(place)
        x, y = torch.randn(30, 5).double().to(place), torch.randint(0, 3, (30,)).to(place)
        found.append(steps_by_cg(model, x, y, cg_max_iter=8)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-7)
