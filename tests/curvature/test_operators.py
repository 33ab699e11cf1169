"""Gauss-Newton and Hessian products against dense matrices, float64."""

import pytest
import torch
from basics import assert_same, trainable
from problems import every_case

from torch_hf.curvature import GaussNewtonOperator, HessianOperator


def dense(operator, numel):
    eye = torch.eye(numel, dtype=torch.float64)
    return torch.stack([operator(column) for column in eye], dim=1)


def lbfgs_closure(case, model):
    def closure():
        model.zero_grad()
        loss = case.closure_loss(model)
        loss.backward()
        return loss

    return closure


def returning_closure(case, model):
    return lambda: case.closure_loss(model)


def explicit_closure(case, model):
    def closure():
        outputs = case.outputs(model)
        return case.loss_of_outputs(*outputs), outputs

    return closure


@every_case
@pytest.mark.parametrize("engine", ["auto", "double_backward"])
@pytest.mark.parametrize("form", [lbfgs_closure, returning_closure, explicit_closure])
def test_gauss_newton_of_a_closure_is_the_dense_matrix(case, form, engine):
    model = case.model()
    truth = case.gauss_newton(model)
    operator = GaussNewtonOperator.from_closure(form(case, model), trainable(model), engine)
    assert_same(dense(operator, len(truth)), truth)


@every_case
def test_gauss_newton_of_loss_and_outputs_is_the_dense_matrix(case):
    model = case.model()
    truth = case.gauss_newton(model)
    with case.context():
        outputs = case.outputs(model)
        loss = case.loss_of_outputs(*outputs)
        operator = GaussNewtonOperator(loss, outputs, model.parameters())
        assert_same(dense(operator, len(truth)), truth)


@every_case
def test_hessian_is_the_dense_matrix(case):
    model = case.model()
    truth = case.hessian(model)
    with case.context():
        operator = HessianOperator(case.closure_loss(model), model.parameters())
        assert_same(dense(operator, len(truth)), truth)
