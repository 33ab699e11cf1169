"""Single, half and mixed precision: formats stay, and double precision is followed."""

import pytest
import torch
from basics import assert_same
from problems import case_named
from torch.nn import functional as F
from trainings import CALM, Training, theta

from torch_hf import HFOptimizer

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal"])
def test_numbers_keep_their_format(dtype, preconditioner):
    case = case_named("mlp-cross_entropy")
    model = case.model().to(dtype)
    x, y = case.inputs[0].to(dtype), case.targets[0]
    optimizer = HFOptimizer(model.parameters(), preconditioner=preconditioner)
    first = F.cross_entropy(model(x), y).item()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
        assert optimizer.last_report.new_loss <= optimizer.last_report.loss
    assert all(p.dtype == dtype == p.grad.dtype for p in model.parameters())
    own = [v for state in optimizer.state.values() for v in state.values()]
    kept = {v.dtype for v in own if isinstance(v, torch.Tensor) and v.is_floating_point()}
    assert kept == {torch.promote_types(dtype, torch.float32)}  # half is too little for CG
    assert F.cross_entropy(model(x), y).item() < 0.9 * first


def test_single_precision_follows_double():
    case = case_named("mlp-mse")
    double, single = Training(case, **CALM), Training(case, model=case.model().float(), **CALM)
    single.batch = (tuple(x.float() for x in case.inputs), tuple(y.float() for y in case.targets))
    double.run(5)
    single.run(5)
    assert_same(theta(single.model).double(), theta(double.model), 1e-4)


def test_parameters_of_several_formats():
    model = case_named("mlp-mse").model()
    model[2].float()
    x, y = case_named("mlp-mse").inputs[0], case_named("mlp-mse").targets[0]
    optimizer = HFOptimizer(model.parameters())
    for _ in range(3):
        optimizer.step(lambda: F.mse_loss(model[2](model[1](model[0](x)).float()).double(), y))
        assert optimizer.last_report.new_loss < optimizer.last_report.loss
    assert [p.dtype for p in model.parameters()] == [torch.float64] * 2 + [torch.float32] * 2
