"""Martens' diagonal and the gradient's variance against loops over single cases."""

import pytest
import torch
from basics import assert_same, normal, trainable
from moment_problems import (
    CASES,
    DRAWS,
    EXACT,
    VALUES,
    Problem,
    classifier,
    diagonal_of,
    mlp,
    objective_of,
    regression,
)
from torch import nn
from torch.nn import functional as F

from torch_hf.capture.capture import Capture
from torch_hf.loss.ggn_split import split_by_calls
from torch_hf.statistics.gradient_moments import _balanced_signs, squared_gradients

pytestmark = pytest.mark.usefixtures("seeded")


class _BiasTwice(nn.Module):
    """One bias in two layers: each weight is used once, the bias is not."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.bias = self.first.bias

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class _Tied(nn.Module):
    """A weight in `F.linear` as itself and transposed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return torch.tanh(F.linear(x, self.weight)) @ self.weight


class _TwiceLinear(nn.Module):
    """The same layer in two places."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class _Scaled(nn.Module):
    """A weight that also enters elementwise."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x) * self.layer.weight.diagonal() + self.layer.bias


def _cnn():
    return nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))


def _layer_norm():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))


def _normalised_weight():
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))


SIGNED = {
    "bias in two layers": classifier(_BiasTwice),
    "layer used twice": classifier(_TwiceLinear),
    "tied weight": classifier(_Tied),
    "weight used elsewhere": classifier(_Scaled),
    "convolution": classifier(_cnn, (CASES, 1, 3)),
    "layer norm": regression(_layer_norm),
    "weight norm": regression(_normalised_weight),
}


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_squares_are_exact_for_linear_layers(make):
    problem = make()
    assert_same(problem.estimate(), problem.rows().square().sum(0))


def test_a_penalty_on_parameters_is_no_case():
    problem = EXACT["mlp"]()
    truth, plain = problem.rows().square().sum(0), problem.closure
    problem.closure = lambda: plain() + _penalty(problem.model)
    assert_same(problem.estimate(), truth)
    params = trainable(problem.model)
    assert_same(diagonal_of(problem.closure, params, 0.1), diagonal_of(plain, params, 0.1))


def test_positions_of_a_sequence_count_as_cases():
    problem = Problem(mlp, (CASES, 4, 3), F.mse_loss, normal(3, CASES, 4, 3))
    flat = Problem(mlp, (CASES * 4, 3), F.mse_loss, normal(3, CASES, 4, 3).reshape(-1, 3))
    flat.x = problem.x.reshape(-1, 3)
    assert_same(problem.estimate(), flat.rows().square().sum(0))


@pytest.mark.parametrize("make", SIGNED.values(), ids=SIGNED)
def test_squares_by_random_signs_have_the_right_mean(make):
    problem = make()
    params, truth = trainable(problem.model), problem.rows().square().sum(0)
    found = torch.stack([problem.estimate() for _ in range(DRAWS)])
    sizes = [p.numel() for p in params]
    pieces = zip(found.split(sizes, 1), truth.split(sizes), strict=True)
    for draws, square in pieces:
        if draws.var(0).max() < 1e-20 * square.max() ** 2:  # an exact layer beside
            assert_same(draws[0], square)
            continue
        # Drawn two thirds towards the tensor's mean, as the docstring says.
        blended = square / 3 + 2 / 3 * square.mean()
        error = (draws.mean(0) - blended).abs()
        assert (error <= 5 * draws.std(0) / DRAWS**0.5 + 1e-12).all()
        assert (draws.mean(0).sum() / square.sum() - 1).abs() < 0.15


def test_a_layer_used_twice_under_autocast_does_not_count_as_used_once():
    model, x = _TwiceLinear(), torch.randn(CASES, 3)

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):  # its two uses share one cast
            z = model(x)
        return F.mse_loss(z.float(), VALUES.float())

    params = trainable(model)
    record = Capture(params, layers=True).run(closure)
    loss_terms = split_by_calls(record, record.returned, params).loss_terms
    draws = [squared_gradients(loss_terms, params, record.layers)[0] for _ in range(2)]
    assert len(record.layers) == 2
    assert not torch.equal(*draws)  # by random signs


def test_autocast_squares_what_the_layer_would_in_full_precision():
    """Softplus gives float32 there, so that inputs and gradients of a layer differ in type."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Softplus(), nn.Linear(3, 3))
    x, params, found = torch.randn(CASES, 3), trainable(model), []
    for enabled in (True, False):

        def closure(enabled=enabled):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                return F.mse_loss(model(x).float(), VALUES.float())

        record = Capture(params, layers=True).run(closure)
        loss_terms = split_by_calls(record, record.returned, params).loss_terms
        squares = squared_gradients(loss_terms, params, record.layers)
        assert all(s.dtype == torch.float32 for s in squares)
        found.append(torch.cat([s.flatten() for s in squares]))
    torch.testing.assert_close(*found, rtol=0.1, atol=0.01 * found[1].max().item())


# The gradient's variance


def _variance_of_rows(rows):
    """The L1 norm of the variance over cases, each case's gradient unscaled."""
    return rows.mul(len(rows)).var(0).sum().item()


def _penalty(model):
    return 0.5 * sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize("batches", [None, [slice(0, 7)], [slice(0, 5), slice(5, 7)]])
@pytest.mark.parametrize(("decay", "penalty"), [(0.0, False), (0.5, True)])
def test_gradient_variance_is_that_of_the_cases(batches, decay, penalty):
    problem = EXACT["mlp"]()
    params, truth = trainable(problem.model), _variance_of_rows(problem.rows())

    def closure(cut=slice(None)):
        loss = F.cross_entropy(problem.model(problem.x[cut]), problem.y[cut])
        return loss + _penalty(problem.model) if penalty else loss

    draws = []
    for _ in range(DRAWS // 4):
        objective = objective_of(closure, params, decay, batches=batches)
        here = objective.evaluate()
        draws.append(objective.gradient_variance(here))
        torch.rand(1)  # on to other signs
    mean = torch.tensor(draws, dtype=torch.float64).mean().item()
    assert mean == pytest.approx(truth, rel=0.1)


def test_gradient_variance_of_a_single_case_is_zero():
    problem = EXACT["mlp"]()
    objective = objective_of(
        lambda: F.cross_entropy(problem.model(problem.x[:1]), problem.y[:1]),
        trainable(problem.model),
    )
    assert objective.gradient_variance(objective.evaluate()) == 0.0


@pytest.mark.parametrize("cases", [2, 3, 5, 8])
def test_balanced_signs_have_the_sum_0_and_the_squares_of_signs(cases):
    signs = _balanced_signs(cases, torch.zeros(1, dtype=torch.float64))
    assert signs.sum().item() == pytest.approx(0.0, abs=1e-12)
    assert signs.square().sum().item() == pytest.approx(cases)
