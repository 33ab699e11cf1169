"""HFOptimizer under Accelerate: prepared, the run of a plain loop, the report within reach."""

import pytest
import torch
from example_runs import falls, three_steps
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_hf import GrowingBatchSampler, HFOptimizer, split_batch

accelerate = pytest.importorskip("accelerate")

_generator = torch.Generator().manual_seed(1)
X = torch.randn(50, 6, generator=_generator)
Y = (X[:, 0] > 0).long() + (X[:, 1] * X[:, 2] > 0).long()


@pytest.fixture
def accelerator():
    """Its state is the process's: each test begins and ends without one."""

    def make(**options):
        return accelerate.Accelerator(cpu=True, **options)

    yield make
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def make_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def make_loader():
    """Batches of 20, 20 and 10."""
    return DataLoader(TensorDataset(X, Y), batch_size=20)


def growing_loader():
    sampler = GrowingBatchSampler(len(X), batch_size=9, growth=1.5)
    return DataLoader(TensorDataset(X, Y), batch_sampler=sampler)


def train(network, optimizer, loader, epochs, backward, autocast=None):
    reports, own = [], getattr(optimizer, "optimizer", optimizer)
    for epoch in range(epochs):
        if hasattr(loader.batch_sampler, "set_epoch"):
            loader.batch_sampler.set_epoch(epoch)
        for x, y in loader:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(network(x), y)
                backward(loss)
                return loss

            optimizer.step(closure)
            reports.append(own.last_report)
    return reports


def plain_run(epochs, loader=make_loader):
    network = make_network()
    optimizer = HFOptimizer(network.parameters())
    return network, train(network, optimizer, loader(), epochs, torch.Tensor.backward)


def assert_same(network, other):
    found, truth = list(network.parameters()), list(other.parameters())
    torch.testing.assert_close(found, truth, rtol=0, atol=0)


@pytest.mark.parametrize("loader", [make_loader, growing_loader])
def test_prepared_training_is_a_plain_loops(loader, accelerator):
    a = accelerator()
    model = make_network()
    model, optimizer, batches = a.prepare(model, HFOptimizer(model.parameters()), loader())
    reports = train(model, optimizer, batches, 3, a.backward)
    network, truth = plain_run(3, loader)
    assert [r.loss for r in reports] == [r.loss for r in truth]
    assert [r.batch_cases for r in reports] == [r.batch_cases for r in truth]
    assert len({r.batch_cases for r in reports}) > 1
    assert reports[-1].loss < reports[0].loss
    assert_same(model, network)


def test_growing_batches_grow_when_prepared(accelerator):
    a = accelerator()
    model = make_network()
    model, optimizer, batches = a.prepare(model, HFOptimizer(model.parameters()), growing_loader())
    reports = train(model, optimizer, batches, 3, a.backward)
    assert [r.batch_cases for r in reports[:2]] == [9, 9]
    assert max(r.batch_cases for r in reports) == round(9 * 1.5**2)


def test_a_used_optimizer_may_be_prepared(accelerator):
    """``prepare`` loads the optimizer's state into itself."""
    network, _ = plain_run(1)
    optimizer = HFOptimizer(network.parameters())
    train(network, optimizer, make_loader(), 1, torch.Tensor.backward)
    a = accelerator()
    model, prepared, batches = a.prepare(network, optimizer, make_loader())
    found = train(model, prepared, batches, 1, a.backward)

    other, _ = plain_run(1)
    optimizer = HFOptimizer(other.parameters())
    truth = train(other, optimizer, make_loader(), 2, torch.Tensor.backward)
    assert [r.loss for r in found] == [r.loss for r in truth[3:]]


def test_a_saved_run_resumes_bit_by_bit(accelerator, tmp_path):
    a = accelerator()
    model = make_network()
    model, optimizer, batches = a.prepare(model, HFOptimizer(model.parameters()), make_loader())
    train(model, optimizer, batches, 2, a.backward)
    a.save_state(tmp_path)
    truth = train(model, optimizer, batches, 2, a.backward)

    other = make_network()
    b = accelerator()
    other, restored, batches = b.prepare(other, HFOptimizer(other.parameters()), make_loader())
    b.load_state(tmp_path)
    found = train(other, restored, batches, 2, b.backward)
    assert [r.step for r in found] == [r.step for r in truth]
    assert [r.loss for r in found] == [r.loss for r in truth]
    assert_same(other, model)


def test_bf16(accelerator):
    a = accelerator(mixed_precision="bf16")
    model = make_network()
    model, optimizer, batches = a.prepare(model, HFOptimizer(model.parameters()), make_loader())
    reports = train(model, optimizer, batches, 3, a.backward)
    assert reports[-1].loss < 0.8 * reports[0].loss
    _, truth = plain_run(1)
    assert reports[0].loss == pytest.approx(truth[0].loss, rel=1e-2)
    assert reports[0].loss != truth[0].loss


def test_accumulated_gradients_are_refused_and_batches_serve(accelerator):
    a = accelerator(gradient_accumulation_steps=2)
    model = make_network()
    before = make_network()
    model, optimizer, batches = a.prepare(model, HFOptimizer(model.parameters()), make_loader())

    def run():
        for x, y in batches:
            with a.accumulate(model):

                def closure(x=x, y=y):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x), y)
                    a.backward(loss)
                    return loss

                optimizer.step(closure)

    with pytest.raises(RuntimeError, match=r"optimizer\.optimizer\.step\(closure, batches="):
        run()
    assert_same(model, before)

    def closure(batch):
        x, y = batch
        return F.cross_entropy(model(x), y)

    optimizer.optimizer.step(closure, batches=split_batch((X, Y), 20))
    whole = HFOptimizer(before.parameters())
    with pytest.raises(RuntimeError, match=r"step\(closure, batches=\[batch\]\)"):
        whole.step(lambda: F.cross_entropy(before(X), Y))  # its state does not tell who calls
    whole.step(lambda batch: F.cross_entropy(before(batch[0]), batch[1]), batches=[(X, Y)])
    assert optimizer.optimizer.last_report.new_loss == pytest.approx(
        whole.last_report.new_loss, rel=1e-4
    )


def test_clipping_is_refused(accelerator):
    a = accelerator()
    model = make_network()
    model, optimizer, batches = a.prepare(model, HFOptimizer(model.parameters()), make_loader())

    def backward_and_clip(loss):
        a.backward(loss)
        a.clip_grad_norm_(model.parameters(), 1.0)

    with pytest.raises(RuntimeError, match="Clipping does not change the step"):
        train(model, optimizer, batches, 1, backward_and_clip)
    assert_same(model, make_network())


@pytest.mark.parametrize(
    ("scaled_before", "error", "message"),
    [(False, AssertionError, "_scale is None"), (True, RuntimeError, "mixed_precision='bf16'")],
)
def test_a_gradient_scaler_is_refused(scaled_before, error, message, accelerator):
    """Accelerate makes one for fp16 on a GPU alone: it is given here."""
    a = accelerator()
    model = make_network()
    model, optimizer = a.prepare(model, HFOptimizer(model.parameters()))
    scaler = torch.amp.GradScaler("cpu")
    optimizer = accelerate.optimizer.AcceleratedOptimizer(optimizer.optimizer, scaler=scaler)
    if scaled_before:
        scaler.scale(torch.ones(()))
    with pytest.raises(error, match=message):
        train(model, optimizer, make_loader(), 1, lambda loss: scaler.scale(loss).backward())
    assert_same(model, make_network())


@pytest.mark.slow
def test_the_example(tmp_path):
    _, columns = three_steps("accelerate_digits", cwd=tmp_path)
    assert falls(columns)
