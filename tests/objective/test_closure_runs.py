"""The forms of a closure are one objective, and trial points build no graph they do not need."""

from collections.abc import Callable

import pytest
import torch
from basics import assert_same
from closures import (
    X,
    Y,
    absolute,
    matrix_of,
    mean_square,
    network,
    objective_of,
    total,
)
from reference import dense_gauss_newton, flat
from torch import Tensor, nn
from torch.nn import functional as F

from torch_hf import HFOptimizer, split_batch


def gradient_of(loss: Tensor, model: nn.Module) -> Tensor:
    return flat(torch.autograd.grad(loss, list(model.parameters())))


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
    optimizer = HFOptimizer(model.parameters(), solver="cg")
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
