"""Curvature operators as linear operators: blocks, estimates, SciPy, wrong operands; float64."""

import pytest
import torch
from basics import assert_same
from torch import nn
from torch.nn import functional as F

from torch_hf.curvature import GaussNewtonOperator, HessianOperator


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    outputs = model(torch.randn(6, 2).double())
    return model, outputs, F.mse_loss(outputs, torch.zeros(6, 2).double())


def gauss_newton():
    model, outputs, loss = problem()
    return GaussNewtonOperator(loss, outputs, model.parameters())


def hessian():
    model, _, loss = problem()
    return HessianOperator(loss, model.parameters())


def of_a_closure():
    model, _, _ = problem()
    x = torch.randn(6, 2).double()
    return GaussNewtonOperator.from_closure(
        lambda: F.mse_loss(model(x), torch.zeros(6, 2).double()), model.parameters()
    )


every_operator = pytest.mark.parametrize("make", [gauss_newton, hessian, of_a_closure])


def dense(operator):
    return torch.stack([operator(e) for e in torch.eye(17, dtype=torch.float64)], dim=1)


@every_operator
def test_blocks_are_columns(make):
    operator = make()
    assert operator.shape == (17, 17)
    assert operator.dtype == torch.float64
    matrix, block = dense(operator), torch.randn(17, 3).double()
    assert_same(operator @ torch.eye(17, dtype=torch.float64), matrix)
    assert_same(operator @ block, matrix @ block)
    assert_same(operator @ block[:, 0], matrix @ block[:, 0])
    assert (operator @ block[:, :0]).shape == (17, 0)


@every_operator
def test_estimates_are_within_five_standard_errors(make):
    """Of the variances in the docstrings, which are the textbook's."""
    operator, samples = make(), 400
    matrix = dense(operator)
    beside = matrix - matrix.diag().diag()  # what is off the diagonal
    random = torch.Generator().manual_seed(0)
    error = operator.diagonal(samples, random) - matrix.diag()
    assert (error.abs() <= 5 * (beside.square().sum(dim=1) / samples).sqrt() + 1e-12).all()
    assert error.abs().max() > 0  # it is an estimate
    bound = 5 * (2 * beside.square().sum() / samples).sqrt()
    assert abs(operator.trace(samples, random) - matrix.trace()) <= bound


def test_estimates_of_a_diagonal_matrix_are_exact():
    w = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64, requires_grad=True)
    operator = HessianOperator((w**3).sum(), [w])
    assert_same(operator.diagonal(samples=1), 6 * w.detach())
    assert operator.trace(samples=1) == 0.0


def test_signs_come_from_the_generator():
    operator = gauss_newton()
    twice = [operator.diagonal(3, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*twice)
    state = torch.get_rng_state()
    operator.trace(2, torch.Generator())
    assert torch.equal(state, torch.get_rng_state())


@every_operator
def test_scipy_finds_the_eigenvalues(make):
    linalg = pytest.importorskip("scipy.sparse.linalg")
    operator = make()
    matrix = dense(operator)
    bridge = operator.to_scipy()
    assert bridge.shape == (17, 17)
    found = linalg.eigsh(bridge, k=3, which="LA", return_eigenvectors=False)
    assert_same(torch.from_numpy(found).sort().values, torch.linalg.eigvalsh(matrix)[-3:])
    block = torch.randn(17, 2).double()
    assert_same(torch.from_numpy(bridge @ block.numpy()), matrix @ block)
    assert_same(torch.from_numpy(bridge.T @ block[:, 0].numpy()), matrix @ block[:, 0])


@pytest.mark.parametrize(
    ("operand", "error", "says"),
    [
        (torch.zeros(16).double(), ValueError, r"shape \(17,\) or \(17, k\), got \(16,\)"),
        (torch.zeros(17, 1, 1).double(), ValueError, r"got \(17, 1, 1\)"),
        (torch.tensor(1.0).double(), ValueError, r"got \(\)"),
        (torch.zeros(17), TypeError, r"dtype torch.float64, got torch.float32"),
        ([0.0] * 17, TypeError, "multiplies tensors, got list"),
        (torch.zeros(17, device="meta").double(), ValueError, "on cpu, got a tensor on meta"),
    ],
)
@every_operator
def test_a_wrong_operand_is_refused(make, operand, error, says):
    with pytest.raises(error, match=says):
        make() @ operand


@every_operator
def test_a_call_takes_one_vector(make):
    with pytest.raises(ValueError, match=r"must have shape \(17,\), got \(17, 1\)"):
        make()(torch.zeros(17, 1).double())


def test_estimates_need_a_sample():
    with pytest.raises(ValueError, match="`samples` must be positive, got 0"):
        gauss_newton().trace(samples=0)


@pytest.mark.parametrize("make", [GaussNewtonOperator, HessianOperator])
def test_a_graph_that_was_freed(make):
    model, outputs, loss = problem()
    given = (loss, outputs) if make is GaussNewtonOperator else (loss,)
    operator = make(*given, model.parameters())
    loss.backward()
    with pytest.raises(RuntimeError, match="must stay alive, but it was freed by a backward"):
        operator @ torch.zeros(17).double()
    with pytest.raises(RuntimeError, match="make a new operator"):
        make(*given, model.parameters())


def test_parameters_that_changed():
    model, outputs, loss = problem()
    operator = GaussNewtonOperator(loss, outputs, model.parameters())
    with torch.no_grad():
        next(iter(model[2].parameters())).add_(1.0)
    with pytest.raises(RuntimeError, match="the parameters changed after it was built"):
        operator @ torch.ones(17).double()
