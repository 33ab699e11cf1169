"""Matrices that cannot be factorized at a trial point: the loss is not defined there."""

import math

import pytest
import torch
from snapshots import assert_identical, snapshot
from torch import nn

from torch_hf import HFOptimizer

#: How far the parameters may be from zero.
EDGE = 1.09
SOLVERS = ("auto", "cg", "exact", "lanczos", "broyden", "lbfgs")


class Valley(nn.Module):
    """A sum of squares that is defined where ``diag(1, 1.09 - |a|)`` is positive definite."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.1, -0.2], dtype=torch.float64))
        self.raised = 0

    def forward(self):
        edge = EDGE - torch.linalg.vector_norm(self.a.detach())
        try:
            torch.linalg.cholesky(torch.diag(torch.stack([torch.ones_like(edge), edge])))
        except torch.linalg.LinAlgError:
            self.raised += 1
            raise
        steep = torch.stack([torch.expm1(1.5 * self.a[0]), torch.exp(-self.a[1]) - 0.2])
        return torch.cat([steep - 2.0, 0.1 * self.a])


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_search_stays_where_it_is(solver):
    model = Valley()
    optimizer = HFOptimizer(model.parameters(), solver=solver, damping=1e-8)
    losses = [float(optimizer.step(lambda: model().square().mean())) for _ in range(25)]
    assert all(math.isfinite(loss) for loss in losses)
    assert model.raised
    assert losses[-1] <= losses[0] and torch.linalg.vector_norm(model.a.detach()) < EDGE


@pytest.mark.parametrize("solver", SOLVERS)
def test_at_the_beginning_it_is_an_error_that_leaves_all_as_it_was(solver):
    model = Valley()
    optimizer = HFOptimizer(model.parameters(), solver=solver)
    optimizer.step(lambda: model().square().mean())
    with torch.no_grad():
        model.a.fill_(3.0)
    before = snapshot(model, optimizer)
    with pytest.raises(torch.linalg.LinAlgError):
        optimizer.step(lambda: model().square().mean())
    assert_identical(snapshot(model, optimizer), before)


def test_other_errors_at_trial_points_are_not_hidden():
    model, runs = Valley(), [0]

    def closure():
        runs[0] += 1
        if runs[0] > 1:
            raise ValueError("a bug")
        return model().square().mean()

    optimizer = HFOptimizer(model.parameters(), solver="broyden")
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="a bug"):
        optimizer.step(closure)
    assert_identical(snapshot(model, optimizer), before)


class GaussianProcess(nn.Module):
    """The marginal likelihood of three length scales, a variance and the noise's."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(60, 3, generator=generator, dtype=torch.float64)
        noise = torch.randn(60, generator=generator, dtype=torch.float64)
        self.y = torch.sin(6 * self.x[:, 0]) + self.x[:, 1] ** 2 + 0.05 * noise
        self.logs = nn.Parameter(torch.rand(5, dtype=torch.float64))
        with torch.no_grad():
            start = torch.Generator().manual_seed(seed)
            self.logs.copy_(torch.rand(5, generator=start, dtype=torch.float64))

    def forward(self):
        z = self.x * self.logs[:3].exp()
        squares = (z[:, None] - z).square().sum(-1)
        kernel = self.logs[3].exp() * torch.exp(-0.5 * squares)
        kernel = kernel + self.logs[4].exp() * torch.eye(60, dtype=torch.float64)
        factor = torch.linalg.cholesky(kernel)
        white = torch.linalg.solve_triangular(factor, self.y[:, None], upper=False)
        return 0.5 * white.square().mean() + factor.diagonal().log().mean()


@pytest.mark.parametrize("seed", range(3))
def test_a_likelihood_below_zero_is_fitted_in_a_few_steps(seed):
    model, reference = GaussianProcess(seed), GaussianProcess(seed)
    optimizer = HFOptimizer(model.parameters())
    reports = []
    for _ in range(12):
        optimizer.step(model)
        reports.append(optimizer.last_report)
    other = torch.optim.LBFGS(
        reference.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_change=0
    )

    def closure():
        other.zero_grad()
        loss = reference()
        loss.backward()
        return loss

    other.step(closure)
    best = float(reference().detach())
    assert best < 0 and reports[-1].new_loss <= best + 1e-8
    assert reports[-1].converged
