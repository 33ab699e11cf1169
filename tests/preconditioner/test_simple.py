"""Martens' diagonal as a preconditioner, and its scale."""

import pytest
import torch
from basics import assert_same, trainable
from moment_problems import (
    EXACT,
    diagonal_of,
)
from problems import case_named
from torch.nn import functional as F

from torch_hf.capture.capture import Capture
from torch_hf.loss.ggn_split import split_by_calls
from torch_hf.statistics.gradient_moments import trace_and_slopes

pytestmark = pytest.mark.usefixtures("seeded")
NAMES = [
    "mlp-cross_entropy",
    "mlp-mse",
    "huber",
    "cnn-cross_entropy",
    "two_heads-cross_entropy+mse",
]


@pytest.mark.parametrize("name", [*NAMES, "kl_div", "sum_of_squares-by_hand", "log_softmax-nll"])
@pytest.mark.parametrize("factor", [1000.0, 1e-3])
def test_the_diagonal_scales_as_the_loss_does(name, factor):
    case = case_named(name)
    model = case.model()
    diagonals = []
    for scale in (1.0, factor):
        torch.manual_seed(0)
        diagonals.append(
            diagonal_of(
                lambda scale=scale: scale * case.closure_loss(model),
                trainable(model),
                damping=0.01 * scale,
                decay=0.02 * scale,
            )
        )
    assert_same(diagonals[1], diagonals[0] * factor**0.75)


def test_the_diagonal_is_martens():
    problem = EXACT["mlp-mse"]()
    params = trainable(problem.model)
    # One residual square in the mean has the Hessian 2 / n; its trace over all slopes squared.
    z = problem.model(problem.x)
    slopes = torch.autograd.grad(F.mse_loss(z, problem.y), z)[0]
    scale = 2.0 / slopes.square().sum()
    squares = scale * problem.rows().square().sum(0)
    truth = (squares + 0.02 + 0.1) ** 0.75
    assert_same(diagonal_of(problem.closure, params, damping=0.1, decay=0.02), truth)


def test_the_diagonal_of_several_batches_is_that_of_their_union():
    problem = EXACT["mlp"]()
    params = trainable(problem.model)

    def closure(batch):
        x, y = batch
        return F.cross_entropy(problem.model(x), y)

    cuts = [slice(0, 4), slice(4, 7)]
    batches = [(problem.x[c], problem.y[c]) for c in cuts]
    whole = (problem.x[:7], problem.y[:7])
    truth = diagonal_of(lambda: closure(whole), params, damping=0.1)
    assert_same(diagonal_of(closure, params, damping=0.1, batches=batches), truth)


@pytest.mark.parametrize("name", NAMES)
def test_the_scale_is_the_heads_trace_over_their_slopes(name):
    case = case_named(name)
    model = case.model()
    params = trainable(model)
    record = Capture(params).run(lambda: case.closure_loss(model))
    loss_terms = split_by_calls(record, record.returned, params).loss_terms
    outputs = [z.detach().requires_grad_() for z in case.outputs(model)]
    loss = case.loss_of_outputs(*outputs)
    slopes = torch.autograd.grad(loss, outputs, create_graph=True)
    trace = sum(
        torch.autograd.grad(entry, z, retain_graph=True)[0].reshape(-1)[i].item()
        for s, z in zip(slopes, outputs, strict=True)
        for i, entry in enumerate(s.reshape(-1))
    )
    squares = sum(s.square().sum().item() for s in slopes)
    assert trace_and_slopes(loss_terms, params) == pytest.approx((trace, squares))
