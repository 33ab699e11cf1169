"""What preconditioners of a user's own may ask, may say, and are checked for."""

import math

import pytest
import torch
from basics import assert_same, normal
from problems import case_named
from snapshots import assert_identical, snapshot
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer

X, Y = normal(0, 30, 3), normal(1, 30, 2)


class Own:
    """A matrix that is made at the beginning of each solve."""

    wants_layers = False

    def __init__(self, make=lambda damping, curvature: None, exact=False):
        self.make, self.exact, self.calls, self.matrix = make, exact, 0, None

    def begin(self, damping, curvature):
        self.matrix = self.make(damping, curvature)

    def apply(self, r):
        self.calls += 1
        return r if self.matrix is None else self.matrix.to(r) @ r

    def observe(self, iteration, direction, product):
        pass

    def end(self):
        pass

    def abandon(self):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def loss_of(model, dtype=torch.float64):
    return F.mse_loss(model(X.to(dtype)), Y.to(dtype))


def size(curvature):
    return curvature.vector.numel


def skewed(damping, curvature):
    n = size(curvature)
    upper = torch.triu(torch.ones(n, n, dtype=torch.float64), 1)
    return torch.eye(n, dtype=torch.float64) + 0.5 * (upper - upper.T)


def indefinite(damping, curvature):
    diagonal = torch.ones(size(curvature), dtype=torch.float64)
    diagonal[::2] = -1e3
    return diagonal.diag()


BAD = {
    "negative": (lambda d, c: -torch.eye(size(c), dtype=torch.float64), "positive definite"),
    "indefinite": (indefinite, "positive definite"),
    "zero": (lambda d, c: torch.zeros(size(c), size(c), dtype=torch.float64), "positive definite"),
    "nan": (lambda d, c: math.nan * torch.eye(size(c), dtype=torch.float64), "positive definite"),
    "skewed": (skewed, "must be symmetric"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_precondition_is_an_error_that_leaves_all_as_it_was(name, dtype):
    make, message = BAD[name]
    model = network(dtype)
    optimizer = HFOptimizer(model.parameters(), preconditioner=Own(make))
    before = snapshot(model, optimizer)
    for _ in range(2):  # it is looked at until it passes
        with pytest.raises(RuntimeError, match=message) as caught:
            optimizer.step(lambda: loss_of(model, dtype))
        assert "Own" in str(caught.value)
    assert_identical(snapshot(model, optimizer), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_good_one_is_looked_at_once(dtype):
    model, own = network(dtype), Own()
    optimizer = HFOptimizer(model.parameters(), preconditioner=own, cg_max_iter=1)
    calls = []
    for _ in range(3):
        before = own.calls
        optimizer.step(lambda: loss_of(model, dtype))
        calls.append(own.calls - before)
    assert calls[0] == calls[1] + 2 and calls[1] == calls[2]


def inverse(damping, curvature):
    root, rest = curvature.root()
    matrix = root.T @ root + torch.diag(rest + damping)
    return torch.linalg.inv(matrix)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", ["mse", "cross-entropy"])
def test_the_root_is_that_of_the_matrix(name, parts, decay):
    seen = []
    model = network()

    def make(damping, curvature):
        root, rest = curvature.root()
        matrix = root.T @ root + torch.diag(rest)
        for column in torch.eye(size(curvature), dtype=torch.float64)[::3]:
            assert_same(matrix @ column, curvature.product(column.clone()))
        seen.append(matrix)

    def closure(batch):
        x, y = batch
        z = model(x)
        return F.mse_loss(z, y) if name == "mse" else F.cross_entropy(z, y.argmax(dim=1))

    optimizer = HFOptimizer(model.parameters(), preconditioner=Own(make), weight_decay=decay)
    batches = list(zip(X.tensor_split(parts), Y.tensor_split(parts), strict=True))
    optimizer.step(closure, batches=batches)
    assert len(seen) == 1 and torch.linalg.matrix_norm(seen[0]) > 0


@pytest.mark.parametrize("parts", [1, 3])
def test_an_exact_one_needs_two_iterations_at_most(parts):
    model = network()
    own = Own(inverse, exact=True)
    optimizer = HFOptimizer(model.parameters(), preconditioner=own, damping=1e-3)
    batches = list(zip(X.tensor_split(parts), Y.tensor_split(parts), strict=True))
    for _ in range(6):
        optimizer.step(lambda b: F.mse_loss(model(b[0]), b[1]), batches=batches)
        report = optimizer.last_report
        assert report.solver == "cg" and report.cg_iterations <= 2
        assert report.accepted and report.new_loss < report.loss


def test_a_first_exact_step_is_the_dense_one():
    model, seen = network(), {}

    def make(damping, curvature):
        seen["matrix"] = inverse(damping, curvature)
        return seen["matrix"]

    options = {"preconditioner": Own(make, exact=True), "damping": 10.0}
    optimizer = HFOptimizer(model.parameters(), **options)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    slope = torch.autograd.grad(loss_of(model), list(model.parameters()))
    optimizer.step(lambda: loss_of(model))
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    wanted = -seen["matrix"] @ nn.utils.parameters_to_vector(slope)
    assert optimizer.last_report.step_length == 1.0
    assert_same(after - before, wanted)


def test_one_that_is_not_exact_is_told_so():
    model = network()

    def halved(damping, curvature):
        return 0.5 * inverse(damping, curvature)

    optimizer = HFOptimizer(model.parameters(), preconditioner=Own(halved, exact=True))
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"Own\.exact is true, but .* 0\.5 of its length"):
        optimizer.step(lambda: loss_of(model))
    assert_identical(snapshot(model, optimizer), before)


def test_where_there_is_no_root_it_is_an_error():
    model = network()
    own = Own(inverse)
    optimizer = HFOptimizer(model.parameters(), preconditioner=own, curvature="hessian")
    with pytest.raises(RuntimeError, match=r"no root R .* the curvature is the Hessian"):
        optimizer.step(lambda: loss_of(model))


@pytest.mark.parametrize("choice", ["lbfgs", "kronecker-lbfgs", "kronecker", "diagonal", "none"])
def test_those_built_in_cost_no_look(choice):
    case = case_named("mlp-mse")
    model = case.model()
    optimizer = HFOptimizer(model.parameters(), preconditioner=choice, solver="cg", cg_max_iter=3)
    calls = []
    original = optimizer.preconditioner.apply
    optimizer.preconditioner.apply = lambda r: calls.append(1) or original(r)
    optimizer.step(lambda: case.closure_loss(model))
    assert len(calls) <= 3
