"""Every evaluation of a step sees the same noise and buffers, and the data count once."""

import random
from itertools import cycle

import pytest
import torch
from basics import assert_same, normal
from problems import case_named
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from trainings import FORMS, Training, least_squares, noisy, walled

from torch_hf import HFOptimizer, split_batch

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal"])
def test_every_evaluation_sees_the_same_noise(form, size, preconditioner):
    model, x, y = noisy(), normal(1, 10, 4), normal(2, 10, 2)
    optimizer = HFOptimizer(model.parameters(), preconditioner=preconditioner, solver="cg")
    masks = []

    def criterion(model, batch):
        x, y = batch
        masks.append((x[0, 0].item(), F.dropout(torch.ones(40))))
        return F.mse_loss(model(x), y) + 0 * random.random()

    closure = form(optimizer, model, criterion)
    for _ in range(3):
        masks.clear()
        if size is None:
            optimizer.step(lambda: closure((x, y)))
        else:
            optimizer.step(closure, split_batch((x, y), size))
        report = optimizer.last_report
        first = dict(reversed(masks))  # by batch
        assert len(masks) >= 2 * len(first)
        for key, mask in masks:
            assert torch.equal(mask, first[key])
        assert len({tuple(m.tolist()) for m in first.values()}) == (1 if size is None else 3)
        assert report.new_loss < report.loss
    # and the next step's is another
    old = masks[0][1]
    masks.clear()
    optimizer.step(lambda: closure((x, y)))
    assert not torch.equal(masks[0][1], old)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal"])
@pytest.mark.parametrize("lr", [1.0, 0.0])
def test_statistics_and_generators_are_as_after_one_run(form, size, preconditioner, lr):
    numpy = pytest.importorskip("numpy")
    x, y = normal(1, 10, 4), normal(2, 10, 2)
    batches = [(x, y)] if size is None else split_batch((x, y), size)

    def criterion(model, batch):
        x, y = batch
        return F.mse_loss(model(x), y) + 0 * random.random() + 0 * numpy.random.rand()

    states = []
    for stepping in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        model = noisy()
        if stepping:
            optimizer = HFOptimizer(model.parameters(), lr=lr, preconditioner=preconditioner)
            closure = form(optimizer, model, criterion)
            optimizer.step(closure, batches)
            assert optimizer.last_report.accepted == (lr > 0)
            assert (optimizer.last_report.evaluations > 0) == (lr > 0)
        else:
            for batch in batches:
                criterion(model, batch)
        states.append(
            (
                [b.clone() for b in model.buffers()],
                torch.get_rng_state(),
                torch.tensor(random.getstate()[1]),
                torch.from_numpy(numpy.random.get_state()[1].astype("int64")),
            )
        )
    assert_close(states[1], states[0], rtol=0, atol=0)
    assert model[1].num_batches_tracked == len(batches)


class _Counting(nn.Linear):
    """Its output depends on a buffer that each run moves on, as spectral_norm's does."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        return super().forward(x) * self.runs


@pytest.mark.parametrize("batched", [False, True])
def test_every_run_sees_the_buffers_of_the_first(batched):
    x, y = least_squares()
    model = _Counting(6, 1).double()
    optimizer = HFOptimizer(model.parameters(), damping=1e-12, cg_tol=0.0, cg_max_iter=250)
    options = {"curvature_batches": [(x, y)]} if batched else {}
    optimizer.step(lambda batch: F.mse_loss(model(batch[0]), batch[1]), [(x, y)], **options)
    assert model.runs == 1
    assert_same(model.weight.detach().T, torch.linalg.lstsq(x, y).solution, 1e-8)
    model.runs.zero_()
    assert optimizer.last_report.new_loss == pytest.approx(F.mse_loss(model(x), y).item())


def test_a_rejected_step_counts_the_batch_once():
    training = Training(case_named("cnn_batch_norm-cross_entropy"))
    model = training.model
    walls = [p.detach().clone() for p in model.parameters()]
    training.closure = lambda batch: training._criterion(model, batch) + walled(model, walls)
    assert not training.step().accepted
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_in_any_order_do_not_look_like_other_data(dtype):
    """Kernels with atomic sums scatter the loss and its gradient by some ten units of rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
    x, y = normal(1, 40, 4).to(dtype), 3.0 * normal(2, 40, 1).to(dtype)
    eps, dice = torch.finfo(dtype).eps, random.Random(0)

    def closure():
        loss = F.mse_loss(model(x), y)
        return loss * (1.0 + dice.choice((-50, 50)) * eps)

    optimizer = HFOptimizer(model.parameters())
    for step in range(20):
        optimizer.step(closure)
        if step:
            assert optimizer._progress.changes == 0.0
            assert optimizer.last_report.solver == "exact"
    assert optimizer.last_report.new_loss < 0.5 * float(F.mse_loss(0 * y, y))


def test_other_data_are_seen_at_once_and_the_same_data_soon_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    x, y = normal(1, 80, 4).float(), normal(2, 80, 1).float()
    optimizer, parts = HFOptimizer(model.parameters()), [slice(0, 40), slice(40, 80)]
    changes = []
    for part in (0, 0, 0, 1, 1, 1, 0, 1, 0):
        rows = parts[part]
        optimizer.step(lambda rows=rows: F.mse_loss(model(x[rows]), y[rows]))
        changes.append(optimizer._progress.changes)
    assert changes == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0]


def test_after_a_change_data_that_scatter_count_as_unchanged_after_three_steps():
    """The scatter is beyond the ten units that hold after a change; three times is no chance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = normal(1, 80, 4).double(), normal(2, 80, 1).double()
    eps, signs = torch.finfo(torch.float64).eps, cycle((-50, 50))
    optimizer, parts = HFOptimizer(model.parameters()), [slice(0, 40), slice(40, 80)]
    changes = []
    for part in (0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0):
        rows = parts[part]

        def closure(rows=rows):
            return F.mse_loss(model(x[rows]), y[rows]) * (1.0 + next(signs) * eps)

        optimizer.step(closure)
        changes.append(optimizer._progress.changes)
    assert changes == [0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 1.0, 2.0, 3.0]
