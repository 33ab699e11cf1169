"""Products with R over all batches of a step against R itself."""

import pytest
import torch
from basics import assert_same, normal
from closures import BATCH, network, objective_of
from reference import flat
from test_joint_root import CUTS, LOSSES, Setting
from torch import Tensor

from torch_hf.curvature.joint_root import joint_root
from torch_hf.curvature.operators import ObjectiveOperator
from torch_hf.curvature.root_products import RootProducts
from torch_hf.loss.hessian_roots import NoRootError


def assert_same_maps(products: RootProducts, root) -> None:
    assert products.rows == len(root.rows)
    v, u = normal(50, root.rows.shape[1]), normal(51, len(root.rows))
    free = products.objective.free(v)
    assert_same(products.times(v), root.rows @ free)
    assert_same(products.transposed(u), root.rows.T @ u)
    assert_same(products.residual, root.residual)
    for ours, truth in ((products.rest, root.rest), (products.diagonal, root.diagonal)):
        assert (ours is None) == (truth is None)
        if ours is not None:
            assert_same(ours, truth)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_products_are_those_of_the_rows(name, cuts, penalty):
    setting = Setting(name, cuts, penalty)
    root = setting.root()
    assert_same_maps(RootProducts(setting.operator), root)


@pytest.mark.parametrize("cuts", ["one", "two"])
def test_entries_that_hooks_hold_stay(cuts):
    setting = Setting("norm", cuts, 0.1)
    for i, p in enumerate(setting.model.parameters()):
        mask = normal(40 + i, *p.shape) > 0
        p.register_hook(lambda g, mask=mask: g * mask)
    root = setting.root()
    products = RootProducts(setting.operator)
    free = ~setting.objective.fixed
    v, u = normal(50, len(free)), normal(51, len(root.rows))
    assert_same(products.times(v), root.rows @ v)
    assert_same(products.transposed(u), root.rows.T @ u)
    assert not products.rest[~free].any()


def test_each_pair_of_products_counts_as_one():
    setting = Setting("mse", "two")
    setting.root()
    products = RootProducts(setting.operator)
    before = setting.operator.products
    products.transposed(products.times(normal(50, setting.objective.vector.numel)))
    assert setting.operator.products == before + 1


def test_a_loss_that_is_not_convex_has_no_products():
    model = network()

    def closure(batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        z = model(batch[0])
        return (z - batch[1]).sin().mean(), z

    objective = objective_of(closure, model.parameters(), batches=[BATCH])
    operator = ObjectiveOperator(objective, "ggn", here=objective.evaluate())
    assert joint_root(operator) is None
    with pytest.raises(NoRootError):
        RootProducts(operator)


def test_no_products_of_a_released_operator():
    setting = Setting("mse", "one")
    setting.root()
    products = RootProducts(setting.operator)
    setting.operator.release()
    with pytest.raises(RuntimeError, match="was released"):
        products.times(flat([torch.zeros_like(p) for p in setting.model.parameters()]))
