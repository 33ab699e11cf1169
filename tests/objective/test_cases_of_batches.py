"""Batches are the whole: losses, gradients and curvature averaged by cases."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from basics import assert_same, normal
from closures import (
    BATCH,
    BATCHES,
    matrix_of,
    network,
    objective_of,
)
from reference import flat
from torch import Tensor, nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.loss.case_counts import Cases, agreed_terms


class Loss(NamedTuple):
    """A loss of z and a batch (x, y, classes), and the number of cases a whole batch has."""

    name: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    cases: float = 7


CLASS_WEIGHTS = torch.tensor([0.5, 3.0], dtype=torch.float64)
ENTROPY = F.cross_entropy
LOSSES = (
    Loss("cross_entropy", lambda z, y, c: ENTROPY(z, c.clamp(0))),
    Loss("cross_entropy-ignore", lambda z, y, c: ENTROPY(z, c), 5),
    Loss("cross_entropy-weight", lambda z, y, c: ENTROPY(z, c, weight=CLASS_WEIGHTS), 10),
    Loss("cross_entropy-sum", lambda z, y, c: ENTROPY(z, c, reduction="sum")),
    Loss("cross_entropy-none-mean", lambda z, y, c: ENTROPY(z, c, reduction="none").mean()),
    Loss(
        "cross_entropy-none-weight-mean",
        lambda z, y, c: ENTROPY(z, c, weight=CLASS_WEIGHTS, reduction="none").mean(),
    ),
    Loss("cross_entropy-probabilities", lambda z, y, c: ENTROPY(z, y.softmax(1))),
    Loss("nll", lambda z, y, c: F.nll_loss(z.log_softmax(1), c, ignore_index=-100), 5),
    Loss("nll-by_hand", lambda z, y, c: -z.log_softmax(1).gather(1, c.clamp(0)[:, None]).mean()),
    Loss("bce", lambda z, y, c: F.binary_cross_entropy(z.sigmoid(), y.sigmoid())),
    Loss(
        "kl_div",
        lambda z, y, c: F.kl_div(z.log_softmax(1), y.softmax(1), reduction="batchmean"),
    ),
    Loss("mse", lambda z, y, c: F.mse_loss(z, y)),
    Loss("mse-sum", lambda z, y, c: F.mse_loss(z, y, reduction="sum")),
    Loss("mse-sum-over_cases", lambda z, y, c: F.mse_loss(z, y, reduction="sum") / len(z)),
    Loss("mse-none-mean", lambda z, y, c: F.mse_loss(z, y, reduction="none").sum(1).mean()),
    Loss("mean_square", lambda z, y, c: ((z - y) ** 2).mean()),
    Loss("sum_of_squares", lambda z, y, c: 0.5 * (z - y).square().sum()),
    Loss("masked", lambda z, y, c: ((z - y) ** 2 * (c >= 0)[:, None]).sum() / (c >= 0).sum()),
    Loss("half", lambda z, y, c: F.huber_loss(z, y) / 2),
    Loss("two_terms", lambda z, y, c: F.mse_loss(z, y) + 2 * ENTROPY(z, c.clamp(0))),
    Loss("two_sums", lambda z, y, c: (z - y).square().sum() + ENTROPY(z, c, reduction="sum")),
)


@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)
def test_batches_are_the_whole(row):
    model = network()

    def closure(batch):
        x, y, c = batch
        loss = row.loss(model(x), y, c)
        loss.backward()
        return loss

    whole = objective_of(closure, model.parameters(), batches=[BATCH])
    parts = objective_of(closure, model.parameters(), batches=iter(BATCHES))
    truth, here = whole.evaluate(), parts.evaluate()
    assert here.loss == pytest.approx(truth.loss, rel=1e-13)
    assert here.cases == truth.cases == row.cases
    assert_same(here.gradient, truth.gradient, 1e-12)
    assert parts.trial_loss(here) == pytest.approx(truth.loss, rel=1e-13)
    assert_same(matrix_of(parts), matrix_of(whole), 1e-10)


@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.name)
def test_curvature_batches_are_averaged_likewise(row):
    model = network()

    def closure(batch):
        x, y, c = batch
        return row.loss(model(x), y, c)

    parts = objective_of(
        closure, model.parameters(), batches=[BATCH], curvature_batches=iter(BATCHES)
    )
    whole = objective_of(closure, model.parameters(), batches=[BATCH])
    other = objective_of(
        closure, model.parameters(), batches=BATCHES, curvature_batches=[BATCHES[0]]
    )
    first = objective_of(closure, model.parameters(), batches=[BATCHES[0]])
    assert_same(matrix_of(parts, parts.evaluate()), matrix_of(whole, whole.evaluate()), 1e-10)
    here, there = other.evaluate(), first.evaluate()
    adds = first.curvature_graph(0).cases.adds
    scale = here.cases / there.cases if adds else 1.0  # a sum over some stands for that over all
    assert_same(matrix_of(other, here), matrix_of(first, there) * scale, 1e-12)


class Scaled(nn.Module):
    """Multiplies by a buffer that every run edits in place: a graph that saved it is spoilt."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        self.scale.mul_(1.5)
        return z * self.scale


@pytest.mark.parametrize("curvature_batches", [None, BATCHES[:1], BATCHES[:2]])
@pytest.mark.parametrize("batches", [[BATCH], BATCHES])
def test_the_variance_does_not_spoil_the_curvatures_graph(batches, curvature_batches):
    def stepped(asks) -> Tensor:
        model = network(
            lambda: nn.Sequential(nn.Linear(3, 6), Scaled(), nn.Tanh(), nn.Linear(6, 2))
        )
        optimizer = HFOptimizer(model.parameters())
        optimizer._requests.gradient_variance = asks
        for _ in range(2):
            optimizer.step(
                lambda batch: F.mse_loss(model(batch[0]), batch[1]), batches, curvature_batches
            )
            assert (optimizer.last_report.gradient_variance is not None) is asks
        return flat(model.parameters())

    assert torch.equal(stepped(True), stepped(False))


def test_outputs_count_the_cases_of_a_loss_that_does_not_tell():
    model = network()

    def closure(batch):
        z = model(batch[0])
        return (z - batch[1]).square().logsumexp(1).mean(), z

    whole = objective_of(closure, model.parameters(), batches=[BATCH]).evaluate()
    parts = objective_of(closure, model.parameters(), batches=BATCHES).evaluate()
    assert parts.loss == pytest.approx(whole.loss, rel=1e-13)
    assert parts.cases == 7


def test_cases_that_the_closure_returns_are_the_weights():
    model = network()

    def closure(batch):
        z = model(batch[0])
        mask = batch[2] >= 0
        loss = ENTROPY(z, batch[2]) + F.mse_loss(z[mask], batch[1][mask])
        return loss, z, mask.sum()

    whole = objective_of(closure, model.parameters(), batches=[BATCH])
    parts = objective_of(closure, model.parameters(), batches=BATCHES)
    truth, here = whole.evaluate(), parts.evaluate()
    assert here.loss == pytest.approx(truth.loss, rel=1e-13)
    assert here.cases == truth.cases == 5
    assert_same(here.gradient, truth.gradient, 1e-12)
    assert_same(matrix_of(parts), matrix_of(whole), 1e-10)


def test_sequences_of_several_lengths_count_by_their_entries():
    model = network()
    sequences = [(normal(3, 2, 5, 3), normal(4, 2, 5, 2)), (normal(5, 2, 1, 3), normal(6, 2, 1, 2))]

    def closure(batch):
        return F.mse_loss(model(batch[0]), batch[1])

    truth = sum(F.mse_loss(model(x), y, reduction="sum") for x, y in sequences) / 24
    here = objective_of(closure, model.parameters(), batches=sequences).evaluate()
    assert here.loss == pytest.approx(truth.item(), rel=1e-13)


def test_a_penalty_on_parameters_is_no_case():
    model = network()

    def closure(batch):
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.mse_loss(model(batch[0]), batch[1]) + 0.1 * penalty

    whole = objective_of(closure, model.parameters(), batches=[BATCH])
    parts = objective_of(closure, model.parameters(), batches=BATCHES)
    truth, here = whole.evaluate(), parts.evaluate()
    assert here.loss == pytest.approx(truth.loss, rel=1e-13)
    assert_same(matrix_of(parts), matrix_of(whole), 1e-10)


def test_a_step_with_batches_is_the_step_on_the_whole():
    steps = []
    for batches in ([BATCH], BATCHES):
        model = network()
        optimizer = HFOptimizer(model.parameters())

        def closure(batch, model=model):
            return ENTROPY(model(batch[0]), batch[2])

        for _ in range(3):
            returned = optimizer.step(closure, batches)
        assert returned == pytest.approx(optimizer.last_report.loss, rel=1e-13)
        steps.append(flat([p.detach() for p in model.parameters()]))
    assert_same(*steps, 1e-8)


def test_ranks_that_weight_the_terms_of_a_loss_differently_do_not_agree():
    known = [Cases(7.0, False, d) for d in ((2.0, 3.0, 4.0), (4.0, 6.0, 8.0), (2.0, 4.0, 3.0))]
    first, twice, swapped = map(agreed_terms, known)
    assert first == pytest.approx(twice)  # a factor common to all is the number of cases
    assert first != pytest.approx(swapped)


def test_outputs_of_different_lengths_are_no_number_of_cases():
    model = network()

    def closure(batch):
        x, y, _ = batch
        z = model(x)
        return (z - y).square().logsumexp(1).mean(), (z, z[:1])

    optimizer = HFOptimizer(model.parameters(), curvature="hessian")
    with pytest.raises(ValueError, match="number of cases in common"):
        optimizer.step(closure, batches=BATCHES)
