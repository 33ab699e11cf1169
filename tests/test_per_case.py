"""Martens' diagonal and the gradient's variance against loops over single cases."""

import pytest
import torch
from basics import assert_same, normal, trainable
from cases import case_named
from torch import nn
from torch.nn import functional as F

from torch_hf.capture.capture import Capture
from torch_hf.curvature import ObjectiveOperator
from torch_hf.curvature.layer_statistics import LayerStatistics
from torch_hf.distributed import Reducer
from torch_hf.loss.ggn_split import split_by_calls
from torch_hf.objective.objective import Objective
from torch_hf.objective.replay import Replay
from torch_hf.statistics.gradient_moments import squared_gradients, trace_and_slopes
from torch_hf.vector import ParameterVector

pytestmark = pytest.mark.usefixtures("seeded")

CASES, DRAWS = 7, 400


class Problem:
    """A network, cases that do not mix in it, and a loss that is a mean over them."""

    def __init__(self, build, shape, criterion, target, per_case=1.0):
        torch.manual_seed(1)
        self.model, self.x, self.y = build().double(), normal(2, *shape), target
        self.criterion, self.share = criterion, per_case / len(self.x)

    def closure(self):
        return self.criterion(self.model(self.x), self.y)

    def rows(self):
        """(cases, P): each case's part of the loss's gradient."""
        params = trainable(self.model)
        rows = []
        for x, y in zip(self.x, self.y, strict=True):
            loss = self.share * self.criterion(self.model(x[None]), y[None])
            found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in found]))
        return torch.stack(rows)

    def estimate(self):
        """Sums of squared gradients as the package finds them, (P,)."""
        params = trainable(self.model)
        record = Capture(params, layers=True).run(self.closure)
        loss_terms = split_by_calls(record, record.returned, params).loss_terms
        found = squared_gradients(loss_terms, params, record.layers)
        return torch.cat([s.reshape(-1) for s in found])


def _mlp(bias=True):
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3, bias=bias))


def _frozen_layers():
    model = nn.Sequential(*_mlp(), nn.Tanh(), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


class _Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.never, self.last = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


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


class _TwoHeads(nn.Module):
    """Logits and values, side by side, from one trunk."""

    def __init__(self):
        super().__init__()
        self.trunk, self.label, self.value = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        return torch.cat([self.label(hidden), self.value(hidden)], 1)


def _two_losses(z, y):
    return F.cross_entropy(z[:, :3], y) + 2 * F.mse_loss(z[:, 3:], F.one_hot(y, 3).double())


CLASSES = torch.tensor([0, 2, 1, 1, 0, 2, 2])
VALUES = normal(3, CASES, 3)


def _classifier(build, shape=(CASES, 3)):
    return lambda: Problem(build, shape, F.cross_entropy, CLASSES)


def _regression(build, shape=(CASES, 3)):
    return lambda: Problem(build, shape, F.mse_loss, VALUES)


EXACT = {
    "mlp": _classifier(_mlp),
    "mlp-mse": _regression(_mlp),
    "no bias": _classifier(lambda: _mlp(bias=False)),
    "frozen": _classifier(_frozen_layers),
    "unused": _classifier(_Unused),
    "two losses": lambda: Problem(_TwoHeads, (CASES, 3), _two_losses, CLASSES),
    "sum": lambda: Problem(
        _mlp, (CASES, 3), lambda z, y: F.mse_loss(z, y, reduction="sum"), VALUES, per_case=CASES
    ),
}
SIGNED = {
    "bias in two layers": _classifier(_BiasTwice),
    "layer used twice": _classifier(_TwiceLinear),
    "tied weight": _classifier(_Tied),
    "weight used elsewhere": _classifier(_Scaled),
    "convolution": _classifier(_cnn, (CASES, 1, 3)),
    "layer norm": _regression(_layer_norm),
    "weight norm": _regression(_normalised_weight),
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
    assert_same(_diagonal(problem.closure, params, 0.1), _diagonal(plain, params, 0.1))


def test_positions_of_a_sequence_count_as_cases():
    problem = Problem(_mlp, (CASES, 4, 3), F.mse_loss, normal(3, CASES, 4, 3))
    flat = Problem(_mlp, (CASES * 4, 3), F.mse_loss, normal(3, CASES, 4, 3).reshape(-1, 3))
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


def _objective(closure, params, decay=0.0, **options):
    vector = ParameterVector(params)
    return Objective(
        closure,
        vector,
        Replay(vector.device),
        decay=[decay] * len(params),
        layers=True,
        reducer=Reducer(None, vector.device),
        **options,
    )


def _diagonal(closure, params, damping, decay=0.0, **options):
    objective = _objective(closure, params, decay, **options)
    operator = ObjectiveOperator(objective, "ggn", here=objective.evaluate())
    return LayerStatistics(operator).diagonal(damping)


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
            _diagonal(
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
    assert_same(_diagonal(problem.closure, params, damping=0.1, decay=0.02), truth)


def test_the_diagonal_of_several_batches_is_that_of_their_union():
    problem = EXACT["mlp"]()
    params = trainable(problem.model)

    def closure(batch):
        x, y = batch
        return F.cross_entropy(problem.model(x), y)

    cuts = [slice(0, 4), slice(4, 7)]
    batches = [(problem.x[c], problem.y[c]) for c in cuts]
    whole = (problem.x[:7], problem.y[:7])
    truth = _diagonal(lambda: closure(whole), params, damping=0.1)
    assert_same(_diagonal(closure, params, damping=0.1, batches=batches), truth)


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
        objective = _objective(closure, params, decay, batches=batches)
        here = objective.evaluate()
        draws.append(objective.gradient_variance(here))
        torch.rand(1)  # on to other signs
    mean = torch.tensor(draws, dtype=torch.float64).mean().item()
    assert mean == pytest.approx(truth, rel=0.1)


def test_gradient_variance_of_a_single_case_is_zero():
    problem = EXACT["mlp"]()
    objective = _objective(
        lambda: F.cross_entropy(problem.model(problem.x[:1]), problem.y[:1]),
        trainable(problem.model),
    )
    assert objective.gradient_variance(objective.evaluate()) == 0.0
