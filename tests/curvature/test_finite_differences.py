"""Finite differences where there is no second derivative: against dense matrices."""

import pytest
import torch
from problems import every_case
from reference import flat
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from torch_hf import HFOptimizer
from torch_hf.curvature import GaussNewtonOperator
from torch_hf.curvature.finite_differences import CentralDifference
from torch_hf.vector import ParameterVector


@every_case
def test_gauss_newton_products_by_differences(case):
    model = case.model()
    params = [p for p in model.parameters() if p.requires_grad]
    operator = GaussNewtonOperator.from_closure(
        lambda: case.closure_loss(model), params, engine="finite_differences"
    )
    assert operator.engine == "finite_differences"
    before = [p.detach().clone() for p in params]
    dense = case.gauss_newton(model)
    for seed in range(3):
        v = torch.randn(len(dense), generator=torch.Generator().manual_seed(seed)).double()
        error = torch.linalg.vector_norm(operator(v) - dense @ v)
        assert error <= 1e-7 * torch.linalg.vector_norm(dense @ v) + 1e-12
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_central_difference_is_exact_for_a_quadratic():
    theta = [torch.randn(3, dtype=torch.float64)]
    along = CentralDifference(lambda values: [values[0].square()], theta)
    v = torch.randn(3, dtype=torch.float64)
    assert_close(along([v])[0], 2 * theta[0] * v, rtol=1e-9, atol=1e-9)
    assert not along([torch.zeros_like(v)])[0].any()


def test_half_precision_is_refused():
    with pytest.raises(RuntimeError, match="float32"):
        CentralDifference(lambda values: values, [torch.zeros(2, dtype=torch.bfloat16)])


def test_parameters_lent_leave_a_kept_graph_good():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    params, x = list(model.parameters()), torch.randn(5, 3)
    outputs = model(x)
    ones = torch.ones_like(outputs)
    before = torch.autograd.grad(outputs, params, ones, retain_graph=True)
    vector = ParameterVector(params)
    with vector.lent([torch.zeros_like(p) for p in params]):
        assert not model(x).any()
    after = torch.autograd.grad(outputs, params, ones)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_parameters_lent_come_back_after_an_error():
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(KeyError), ParameterVector([p]).lent([torch.zeros(2)]):
        raise KeyError
    assert p.tolist() == [1.0, 1.0]


class Sigmoid(torch.autograd.Function):
    """A custom function whose author did not think of second derivatives."""

    @staticmethod
    def forward(ctx, x):
        y = x.sigmoid()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y * (1 - y)


class Layer(nn.Module):
    def forward(self, x):
        return Sigmoid.apply(x)


def twins():
    """Two networks of the same function, of which one cannot be differentiated twice."""
    torch.manual_seed(0)
    once = nn.Sequential(nn.Linear(4, 5), Layer(), nn.Linear(5, 3)).double()
    twice = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    twice.load_state_dict(once.state_dict())
    x = torch.randn(20, 4, dtype=torch.float64)
    return once, twice, x, torch.randint(3, (20,))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "batches"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_a_trajectory_by_differences_is_that_by_double_backward(curvature, split):
    # Double backward of a once_differentiable function gives zeros and no error.
    once, twice, x, y = twins()
    ends = []
    for model, engine in ((once, "finite_differences"), (twice, "double_backward")):
        optimizer = HFOptimizer(
            model.parameters(), curvature=curvature, cg_max_iter=5, weight_decay=1e-3
        )

        def loss(batch, model=model):
            return F.cross_entropy(model(batch[0]), batch[1])

        batches = [(x[:12], y[:12]), (x[12:], y[12:])] if split else [(x, y)]
        for _ in range(4):
            optimizer.step(loss, batches=batches)
            assert optimizer.last_report.engine == engine
        ends.append(flat(p.detach() for p in model.parameters()))
    assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


def test_an_engine_asked_for_is_not_replaced():
    once, _, x, y = twins()
    params = list(once.parameters())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        GaussNewtonOperator.from_closure(
            lambda: F.cross_entropy(once(x), y), params, engine="double_backward"
        )
