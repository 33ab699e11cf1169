"""What one step leaves for the next: after a rejection, a failure, a restart; and in bfloat16."""

import copy
import io

import pytest
import torch
from snapshots import assert_identical
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def batch(step, dtype=torch.float64):
    """Other cases at each step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(25, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.sin(1.5 * x[:, :2]).to(dtype)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


class Run:
    def __init__(self, **options):
        self.model = network()
        self.optimizer = HFOptimizer(self.model.parameters(), solver="cg", **options)
        self.fails = self.walled = False
        self.calls = 0

    def step(self, number):
        x, y = batch(number)
        here = values(self.model)
        self.calls = 0

        def closure():
            self.calls += 1
            if self.fails and self.calls == 2:
                raise OSError("the disk is full")
            loss = F.mse_loss(self.model(x), y)
            moved = not all(map(torch.equal, self.model.parameters(), here))
            return loss + 100.0 if self.walled and moved else loss

        self.optimizer.step(closure)


KRONECKER = ["kronecker", "kronecker-lbfgs"]


@pytest.mark.parametrize("preconditioner", KRONECKER)
def test_a_step_that_fails_takes_its_measurement_of_factors_back(preconditioner):
    run = Run(preconditioner=preconditioner)
    measured = []
    for number in range(6):
        twin = copy.deepcopy(run.optimizer.preconditioner.state_dict())
        due = run.optimizer.preconditioner.wants_layers
        run.fails = True
        with pytest.raises(OSError, match="full"):
            run.step(number)
        assert_identical(run.optimizer.preconditioner.state_dict(), twin)
        assert run.optimizer.preconditioner.wants_layers == due
        measured.append(due)
        run.fails = False
        run.step(number)
    assert set(measured) == {True, False}  # steps of both kinds have failed


@pytest.mark.parametrize("preconditioner", KRONECKER)
@pytest.mark.parametrize("stop", range(1, 7))
def test_a_run_on_changing_batches_is_restored_with_the_age_of_its_factors(preconditioner, stop):
    run = Run(preconditioner=preconditioner)
    for number in range(stop):
        run.step(number)
    file = io.BytesIO()
    torch.save([run.model.state_dict(), run.optimizer.state_dict()], file)
    file.seek(0)
    model, state = torch.load(file, weights_only=True)
    other = Run(preconditioner=preconditioner)
    other.model.load_state_dict(model)
    other.optimizer.load_state_dict(state)
    for number in range(stop, stop + 8):
        run.step(number)
        other.step(number)
        assert_identical(values(other.model), values(run.model))
    assert_identical(other.optimizer.state_dict(), run.optimizer.state_dict())


@pytest.mark.parametrize("cg_decay", [0.5, 1.0])
def test_after_a_rejection_cg_starts_at_zero_whatever_its_decay(cg_decay):
    runs = [Run(preconditioner="none", cg_decay=d, cg_max_iter=4) for d in (cg_decay, 0.0)]
    for run in runs:
        run.step(0)
        run.walled = True
        run.step(1)
        assert not run.optimizer.last_report.accepted
        run.walled = False
        run.step(1)
        assert run.optimizer.last_report.accepted
    assert_identical(*(values(run.model) for run in runs))
    for run in runs:
        run.step(1)  # after a step that was accepted the decay matters
    assert not torch.equal(*(values(run.model)[0] for run in runs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lr", [1.0, 0.7, 0.3])
def test_the_parameters_end_at_the_very_bits_of_a_trial(dtype, lr):
    model = network(dtype)
    x, y = batch(0, dtype)
    optimizer = HFOptimizer(model.parameters(), lr=lr, preconditioner="lbfgs")
    accepted = 0
    for _ in range(6):
        tried = []

        def closure(tried=tried):
            loss = F.mse_loss(model(x).float(), y.float())
            tried.append((loss.item(), values(model)))
            return loss

        optimizer.step(closure)
        report = optimizer.last_report
        if report.accepted:
            accepted += 1
            found = [bits for loss, bits in tried[1:] if loss == report.new_loss]
            assert any(all(map(torch.equal, bits, values(model))) for bits in found)
    assert accepted > 2
