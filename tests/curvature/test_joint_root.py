"""R over all batches of a step against the dense Gauss-Newton matrix and the gradient."""

import pytest
import torch
from basics import assert_same, normal
from closures import BATCH, BATCHES, network, objective_of
from reference import dense_gauss_newton, flat
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from torch_hf.curvature.joint_root import joint_root, root_size, took_one_backward, why_no_root
from torch_hf.curvature.operators import ObjectiveOperator

#: Losses of outputs z, targets y and classes c, with the number that a batch counts.
LOSSES = {
    "mse": lambda z, y, c: F.mse_loss(z, y),
    "huber": lambda z, y, c: F.huber_loss(z, y, delta=0.5),
    "norm": lambda z, y, c: (z - y).norm(dim=1).mean(),
    "bce": lambda z, y, c: F.binary_cross_entropy_with_logits(z, (y > 0).double()),
    "cross_entropy": lambda z, y, c: F.cross_entropy(z, c.clamp(min=0)),
    "two terms": lambda z, y, c: F.mse_loss(z, y) + 0.3 * F.cross_entropy(z, c.clamp(min=0)),
}
CUTS = {"one": [BATCH], "two": [tuple(t[a:b] for t in BATCH) for a, b in ((0, 4), (4, 7))]} | {
    "three": BATCHES
}


class Setting:
    """A loss on batches, as an operator and as dense matrices on the whole data."""

    def __init__(self, name: str, cuts: str, penalty: float = 0.0, **options: object) -> None:
        self.model, self.loss, self.penalty = network(), LOSSES[name], penalty
        self.objective = objective_of(
            lambda batch: self.of(self.model(batch[0]), batch),
            self.model.parameters(),
            batches=CUTS[cuts],
            **options,
        )

    def of(self, z: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        found = self.loss(z, *batch[1:])
        weight = self.model[0].weight
        return found + self.penalty * weight.square().sum() if self.penalty else found

    def root(self):
        self.here = self.objective.evaluate()
        self.operator = ObjectiveOperator(self.objective, "ggn", here=self.here)
        return joint_root(self.operator)

    def truth(self) -> Tensor:
        names = [n for n, _ in self.model.named_parameters()]
        params = [p.detach().clone() for p in self.model.parameters()]

        def outputs(values: list[Tensor]) -> Tensor:
            return functional_call(self.model, dict(zip(names, values, strict=True)), BATCH[:1])

        return dense_gauss_newton(outputs, lambda z: self.loss(z, *BATCH[1:]), params)

    def gradient(self) -> Tensor:
        loss = self.of(self.model(BATCH[0]), BATCH)
        return flat(torch.autograd.grad(loss, list(self.model.parameters())))


@pytest.mark.parametrize("penalty", [0.0, 0.1])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_square_is_the_matrix_and_the_rest_the_gradient(name, cuts, penalty):
    setting = Setting(name, cuts, penalty)
    root = setting.root()
    matrix = root.rows.T @ root.rows
    extra = torch.zeros(len(matrix)).double()
    extra[: setting.model[0].weight.numel()] = 2 * penalty
    found = matrix if root.diagonal is None else matrix + torch.diag(root.diagonal)
    assert_same(found, setting.truth() + torch.diag(extra))
    slope = root.rows.T @ root.residual
    slope = slope if root.rest is None else slope + root.rest
    assert_same(slope, setting.gradient())
    assert took_one_backward(root) or cuts == "three"  # its last batch is a single case


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_size_is_known_before(name, cuts):
    setting = Setting(name, cuts)
    root, size = setting.root(), root_size(setting.operator)
    assert len(root.rows) <= size.rows
    assert size.params == root.rows.shape[1]
    assert size.cases == max(len(batch[0]) for batch in CUTS[cuts])
    assert not why_no_root(setting.operator)


@pytest.mark.parametrize("cuts", CUTS)
def test_half_the_square_of_the_residual_is_a_squared_loss(cuts):
    setting = Setting("mse", cuts)
    root = setting.root()
    half = 0.5 * float(root.residual.square().sum())
    assert half == pytest.approx(setting.here.loss, rel=1e-12)
    with torch.no_grad():
        for p in setting.model.parameters():
            p.add_(0.1 * normal(5, *p.shape))
    loss, residual = setting.objective.trial_residual(setting.here)
    assert loss == pytest.approx(0.5 * float(residual.square().sum()), rel=1e-12)
    with torch.no_grad():
        assert loss == pytest.approx(float(setting.of(setting.model(BATCH[0]), BATCH)), rel=1e-12)


@pytest.mark.parametrize("cuts", CUTS)
def test_other_losses_have_no_residual_at_trial_points(cuts):
    setting = Setting("two terms", cuts)
    setting.root()
    loss, residual = setting.objective.trial_residual(setting.here)
    assert residual is None
    assert loss == pytest.approx(setting.here.loss, rel=1e-12)


@pytest.mark.parametrize("name", ["mse", "norm"])
def test_entries_that_hooks_hold_have_no_rows(name):
    setting = Setting(name, "two")
    free = []
    for i, p in enumerate(setting.model.parameters()):
        mask = normal(40 + i, *p.shape) > 0
        p.register_hook(lambda g, mask=mask: g * mask)
        free.append(mask)
    free = flat(free)
    root = setting.root()
    assert not root.rows[:, ~free].any()
    assert_same((root.rows.T @ root.rows)[free][:, free], setting.truth()[free][:, free])
    slope = root.rows.T @ root.residual
    slope = slope if root.rest is None else slope + root.rest
    assert_same(slope, setting.here.gradient)


def test_no_root_of_a_loss_that_is_not_convex():
    model: nn.Module = network()

    def closure(batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        z = model(batch[0])
        return (z - batch[1]).sin().mean(), z

    objective = objective_of(closure, model.parameters(), batches=CUTS["two"])
    operator = ObjectiveOperator(objective, "ggn", here=objective.evaluate())
    assert joint_root(operator) is None
