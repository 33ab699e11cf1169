"""Every evaluation of an objective sees the same noise and buffers."""

import random

import numpy
import pytest
import torch
from closures import (
    BATCH,
    BATCHES,
    X,
    Y,
    mean_square,
    network,
    objective_of,
)
from torch import Tensor, nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.curvature import ObjectiveOperator


def noisy_by_torch(model):
    return F.mse_loss(model(X) + torch.randn(7, 2), Y)


def noisy_by_numpy(model):
    noise = torch.from_numpy(numpy.random.standard_normal((7, 2)))
    return F.mse_loss(model(X) + noise, Y)


def noisy_by_python(model):
    return F.mse_loss(model(X) * random.uniform(0.5, 2), Y)


NOISE = (noisy_by_torch, noisy_by_numpy, noisy_by_python)
STATES = {
    noisy_by_torch: torch.get_rng_state,
    noisy_by_numpy: lambda: torch.from_numpy(numpy.random.get_state()[1].astype("int64")),
    noisy_by_python: lambda: torch.tensor(random.getstate()[1]),
}


@pytest.mark.parametrize("form", NOISE, ids=lambda form: form.__name__)
def test_every_evaluation_of_a_step_sees_the_same_noise(form):
    model = network()
    objective = objective_of(lambda: form(model), model.parameters())
    here = objective.evaluate()
    assert objective.trial_loss(here) == here.loss
    assert objective.trial_loss(here) == here.loss
    assert form(model).item() != here.loss


@pytest.mark.parametrize("form", NOISE, ids=lambda form: form.__name__)
def test_a_step_draws_from_a_generator_once(form):
    model = network()
    torch.manual_seed(1)
    numpy.random.seed(1)
    random.seed(1)
    form(model)
    once = STATES[form]()
    torch.manual_seed(1)
    numpy.random.seed(1)
    random.seed(1)
    HFOptimizer(model.parameters()).step(lambda: form(model))
    assert torch.equal(STATES[form](), once)


def test_reading_the_batches_may_draw_numbers():
    model = network(batch_norm)

    def batches():
        for batch in BATCHES[:2]:
            torch.rand(3)
            yield batch

    objective = objective_of(
        lambda batch: F.mse_loss(model(batch[0]), batch[1]), model.parameters(), batches=batches()
    )
    here = objective.evaluate()
    assert objective.trial_loss(here) == here.loss


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2)
    )


def spectral_norm() -> nn.Module:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2))
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), layer)


MODELS = (batch_norm, spectral_norm)
SPLITS = {
    "no_batches": ({}, (BATCH,)),
    "batches": ({"batches": BATCHES[:2]}, BATCHES[:2]),
    "curvature_batch": ({"batches": [BATCH], "curvature_batches": [BATCHES[0]]}, (BATCH,)),
    "curvature_batches": ({"batches": [BATCH], "curvature_batches": BATCHES[:2]}, (BATCH,)),
}


def forward_only(model: nn.Module, batches) -> dict[str, Tensor]:
    for x, _, _ in batches:
        model(x)
    return {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("split", SPLITS)
def test_buffers_count_the_data_once(build, split):
    options, batches = SPLITS[split]
    model = network(build)
    torch.manual_seed(1)
    buffers = forward_only(model, batches)
    generator = torch.get_rng_state()

    model = network(build)
    torch.manual_seed(1)
    optimizer = HFOptimizer(model.parameters())
    optimizer.step(lambda batch=BATCH: F.mse_loss(model(batch[0]), batch[1]), **options)
    assert optimizer.last_report.evaluations > 0
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("split", SPLITS)
def test_every_evaluation_sees_the_same_buffers(build, split):
    options, _ = SPLITS[split]
    model = network(build)
    objective = objective_of(
        lambda batch=BATCH: F.mse_loss(model(batch[0]), batch[1]), model.parameters(), **options
    )
    here = objective.evaluate()
    operator = ObjectiveOperator(objective, "ggn", here=here)
    v = torch.ones(objective.vector.numel, dtype=torch.float64)
    product = operator(v).clone()
    assert objective.trial_loss(here) == here.loss
    assert torch.equal(operator(v), product)
    operator.release()
    assert objective.trial_loss(here) == here.loss


def test_a_buffer_that_is_replaced_or_expanded():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
            self.register_buffer("constant", torch.ones(1, dtype=torch.float64).expand(2))

        def forward(self, z):
            self.seen = self.seen + len(z)
            return z * self.constant / self.seen

    model = network(lambda: nn.Sequential(nn.Linear(3, 2), Counter()))
    first = model[1].seen
    objective = objective_of(lambda: mean_square(model), model.parameters())
    here = objective.evaluate()
    assert objective.trial_loss(here) == here.loss
    assert model[1].seen == 7
    objective.replay.undo()
    assert model[1].seen is first
