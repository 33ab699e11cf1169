"""A closure as an objective: its forms, batches, trial points, randomness and gradients."""

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy
import pytest
import torch
from basics import assert_same, normal
from reference import dense_gauss_newton, flat
from torch import Tensor, nn
from torch.nn import functional as F

from torch_hf import HFOptimizer, split_batch
from torch_hf.curvature import ObjectiveOperator
from torch_hf.distributed import Reducer
from torch_hf.objective.objective import Objective
from torch_hf.objective.replay import Replay
from torch_hf.objective.results import Evaluation
from torch_hf.vector import ParameterVector

CPU = torch.device("cpu")


X, Y = normal(1, 7, 3), normal(2, 7, 2)
CLASSES = torch.tensor([0, 1, 1, -100, 0, -100, 1])


def network(build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build = build or (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        model = build().double()
        for p in model.parameters():
            nn.init.normal_(p, std=0.5)
        return model


def objective_of(closure, params, **options) -> Objective:
    params = list(params)
    options = {"decay": [0.0] * len(params)} | options
    world, reducer = Replay(CPU), Reducer(None, CPU)
    return Objective(closure, ParameterVector(params), world, reducer=reducer, **options)


def gradient_of(loss: Tensor, model: nn.Module) -> Tensor:
    return flat(torch.autograd.grad(loss, list(model.parameters())))


def matrix_of(objective: Objective, here: Evaluation | None = None) -> Tensor:
    operator = ObjectiveOperator(objective, "ggn", here=here)
    eye = torch.eye(objective.vector.numel, dtype=torch.float64)
    return torch.stack([operator(e) for e in eye], dim=1)


# The forms of a closure


def mean_square(model) -> Tensor:
    return F.mse_loss(model(X), Y)


def absolute(model) -> Tensor:
    return F.huber_loss(model(X), Y)


def total(model) -> Tensor:
    return mean_square(model) + 0.5 * absolute(model)


def lbfgs(model):
    model.zero_grad()
    loss = total(model)
    loss.backward()
    return loss


def returning(model):
    return total(model)


def explicit(model):
    z = model(X)
    return F.mse_loss(z, Y) + 0.5 * F.huber_loss(z, Y), z


def explicit_after_backward(model):
    loss, z = explicit(model)
    loss.backward()
    return loss.detach(), [z]


def detached(model):
    return lbfgs(model).detach()


def a_number(model):
    return lbfgs(model).item()


def one_element(model):
    return total(model).reshape(1, 1)


def graph_kept(model):
    loss = total(model)
    loss.backward(retain_graph=True)
    return loss


def two_calls(model):
    first, second = mean_square(model), 0.5 * absolute(model)
    first.backward()
    second.backward()
    return first + second


def with_gradient(model):
    first, second = mean_square(model), absolute(model)
    first.backward()
    second.backward(torch.tensor(0.5, dtype=torch.float64))
    return first + 0.5 * second


def autograd_backward(model):
    torch.autograd.backward([mean_square(model), 0.5 * absolute(model)])
    return torch.zeros(())


def autograd_backward_with_gradients(model):
    weights = [None, torch.tensor(0.5, dtype=torch.float64)]
    torch.autograd.backward(
        tensors=(mean_square(model), absolute(model)), grad_tensors=weights, retain_graph=True
    )
    return 0.0


def towards_the_parameters(model):
    loss = total(model)
    loss.backward(inputs=(p for p in model.parameters()))
    return loss


def a_vector(model):
    z = model(X)
    squares = (z - Y).square().sum(1) / 2
    weights = torch.full((7,), 1 / 7, dtype=torch.float64)
    squares.backward(gradient=weights, retain_graph=True)
    (0.5 * F.huber_loss(z, Y)).backward()
    return squares.mean()


FORMS = (
    lbfgs,
    returning,
    explicit,
    explicit_after_backward,
    detached,
    a_number,
    one_element,
    graph_kept,
    two_calls,
    with_gradient,
    autograd_backward,
    autograd_backward_with_gradients,
    towards_the_parameters,
    a_vector,
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_all_forms_of_a_closure_are_the_same_objective(form):
    model = network()
    truth = total(model)
    slope = gradient_of(truth, model)
    curvature = dense_gauss_newton(*dense_total(model))

    objective = objective_of(lambda: form(model), model.parameters())
    here = objective.evaluate()
    assert here.loss == pytest.approx(truth.item(), rel=1e-14)
    assert_same(here.gradient, slope, 1e-12)
    assert_same(matrix_of(objective), curvature, 1e-10)
    assert objective.trial_loss(here) == here.loss
    assert here.cases == 7


def dense_total(model):
    names = [name for name, _ in model.named_parameters()]

    def outputs(params):
        return torch.func.functional_call(model, dict(zip(names, params, strict=True)), X)

    def loss(z):
        return F.mse_loss(z, Y) + 0.5 * F.huber_loss(z, Y)

    return outputs, loss, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_step_returns_what_the_closure_returned_as_loss(form):
    model = network()
    expected = form(model)
    expected = expected[0] if isinstance(expected, tuple) else expected
    model = network()
    found = HFOptimizer(model.parameters()).step(lambda: form(model))
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        assert not found.requires_grad
        expected = expected.detach()
    assert float(found) == float(expected)


def test_the_closures_own_zero_grad_does_not_reach_the_gradients():
    model = network()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    kept = [p.grad for p in model.parameters()]

    def closure():
        model.zero_grad(set_to_none=False)
        return lbfgs(model)

    objective_of(closure, model.parameters()).evaluate()
    assert all(p.grad is g and g.eq(1).all() for p, g in zip(model.parameters(), kept, strict=True))


# Trial points


def watched(form: Callable, model: nn.Module) -> tuple[Callable, list[bool]]:
    modes: list[bool] = []

    def closure(*batch):
        modes.append(torch.is_grad_enabled())
        return form(model, *batch)

    return closure, modes


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_trial_points_build_no_graph(form):
    model = network()
    closure, modes = watched(form, model)
    optimizer = HFOptimizer(model.parameters())
    optimizer.step(closure)
    assert modes == [True] + [False] * optimizer.last_report.evaluations
    assert len(modes) > 1


def test_trial_points_of_batches_build_no_graph():
    model = network()

    def form(model, batch):
        x, y = batch
        return F.mse_loss(model(x), y)

    closure, modes = watched(form, model)
    objective = objective_of(closure, model.parameters(), batches=split_batch((X, Y), 3))
    objective.trial_loss(objective.evaluate())
    assert modes == [True] * 3 + [False] * 3


def residual_by_grad(model):
    x = X.clone().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope.sum(1) - Y[:, 0]).square().mean() + u.square().mean()


def residual_by_backward(model):
    x = X.clone().requires_grad_()
    u = model(x)
    u.sum().backward(inputs=[x], create_graph=True)
    return (x.grad.sum(1) - Y[:, 0]).square().mean() + u.square().mean()


def residual_by_autograd_backward(model):
    x = X.clone().requires_grad_()
    u = model(x)
    torch.autograd.backward([u.sum()], None, None, True, None, x)
    loss = (x.grad.sum(1) - Y[:, 0]).square().mean() + u.square().mean()
    loss.backward()
    return loss


INNER = (residual_by_grad, residual_by_backward, residual_by_autograd_backward)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("form", INNER, ids=lambda form: form.__name__)
def test_a_closure_that_differentiates_inside_has_its_graph_at_trial_points(form):
    model = network()
    truth = residual_by_grad(model)
    slope = gradient_of(truth, model)
    closure, modes = watched(form, model)
    objective = objective_of(closure, model.parameters())
    here = objective.evaluate()
    assert here.loss == pytest.approx(truth.item(), rel=1e-14)
    assert_same(here.gradient, slope, 1e-12)
    assert objective.trial_loss(here) == here.loss
    assert modes == [True, True]


def hooked(model):
    z = model(X)
    z.register_hook(lambda g: g)
    return F.mse_loss(z, Y)


def keeping_a_gradient(model):
    z = model(X)
    z.retain_grad()
    return F.mse_loss(z, Y)


@pytest.mark.parametrize("form", [hooked, keeping_a_gradient])
def test_a_closure_that_needs_its_graph_gets_it(form):
    model = network()
    closure, modes = watched(form, model)
    objective = objective_of(closure, model.parameters())
    here = objective.evaluate()
    assert objective.trial_loss(here) == here.loss
    assert objective.trial_loss(here) == here.loss
    assert modes == [True, False, True, True]
    assert objective.evaluations == 2


def test_a_users_error_at_a_trial_point_is_not_tried_again():
    model = network()
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("disk full")
        return total(model)

    objective = objective_of(closure, model.parameters())
    here = objective.evaluate()
    with pytest.raises(RuntimeError, match="disk full"):
        objective.trial_loss(here)
    assert len(calls) == 2


# Batches of 4, 2 and 1 cases: averages by cases


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

BATCH = (X, Y, CLASSES)
BATCHES = [tuple(t[a:b] for t in BATCH) for a, b in ((0, 4), (4, 6), (6, 7))]


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


# Weight decay


def test_weight_decay_is_in_loss_gradient_and_curvature():
    model = network()
    params = list(model.parameters())
    decay = [0.1, 0.0, 0.3, 0.0]
    plain = objective_of(lambda: total(model), params)
    decayed = objective_of(lambda: total(model), params, decay=decay)
    base, here = plain.evaluate(), decayed.evaluate()

    theta = flat([p.detach() for p in params])
    rates = flat([torch.full_like(p.detach(), d) for p, d in zip(params, decay, strict=True)])
    penalty = 0.5 * (rates * theta.square()).sum().item()
    assert here.loss == pytest.approx(base.loss + penalty, rel=1e-14)
    assert decayed.trial_loss(here) == here.loss
    assert_same(here.gradient, base.gradient + rates * theta, 1e-12)
    assert_same(matrix_of(decayed), matrix_of(plain) + torch.diag(rates), 1e-12)
    for own, with_decay in zip(base.hand_over_gradients(), here.hand_over_gradients(), strict=True):
        assert torch.equal(own, with_decay)


def test_each_group_has_its_own_weight_decay():
    model = network()
    groups = [
        {"params": [model[0].weight, model[2].weight], "weight_decay": 0.2},
        {"params": [model[0].bias, model[2].bias]},
    ]
    penalty = 0.1 * sum(p.detach().square().sum().item() for p in groups[0]["params"])
    optimizer = HFOptimizer(groups)
    loss = optimizer.step(lambda: total(model)).item()
    assert optimizer.last_report.loss == pytest.approx(loss + penalty, rel=1e-13)


# Randomness and buffers


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


# Gradients after a step, and maximize


def test_after_a_step_grad_is_the_gradient_at_the_old_parameters():
    model = network()
    model.never_called = nn.Linear(2, 2).double()
    reached = [p for layer in (model[0], model[2]) for p in layer.parameters()]
    slopes = torch.autograd.grad(total_of_layers(model), reached)
    optimizer = HFOptimizer(model.parameters(), weight_decay=0.1)

    def closure():
        optimizer.zero_grad()
        loss = total_of_layers(model)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in reached]
    optimizer.step(closure)
    assert optimizer.last_report.accepted
    assert not any(torch.equal(p, old) for p, old in zip(reached, before, strict=True))
    for p, slope in zip(reached, slopes, strict=True):
        torch.testing.assert_close(p.grad, slope, rtol=1e-12, atol=0)
    assert all(p.grad is None for p in model.never_called.parameters())


def total_of_layers(model):
    z = model[2](model[1](model[0](X)))
    return F.mse_loss(z, Y) + 0.5 * F.huber_loss(z, Y)


def test_maximize_is_the_negated_loss_minimised():
    down, up = network(), network()
    lower = HFOptimizer(down.parameters(), weight_decay=0.1)
    higher = HFOptimizer(up.parameters(), weight_decay=0.1, maximize=True)
    for _ in range(3):
        loss = lower.step(lambda: total(down))
        gain = higher.step(lambda: -total(up))
        assert gain == -loss
        assert higher.last_report.loss == lower.last_report.loss
        for p, q in zip(down.parameters(), up.parameters(), strict=True):
            assert torch.equal(p, q)
            assert torch.equal(q.grad, -p.grad)


def test_maximize_with_batches_returns_the_closures_own_value():
    model = network()
    whole = -total(model).item()
    optimizer = HFOptimizer(model.parameters(), maximize=True)

    def closure(batch):
        z = model(batch[0])
        return -F.mse_loss(z, batch[1]) - 0.5 * F.huber_loss(z, batch[1])

    assert optimizer.step(closure, BATCHES).item() == pytest.approx(whole, rel=1e-13)
    assert -total(model).item() > whole
