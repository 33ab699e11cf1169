"""Weight decay is in loss, gradient and curvature, group by group."""

import pytest
import torch
from basics import assert_same
from closures import matrix_of, network, objective_of, total
from reference import flat

from torch_hf import HFOptimizer
from torch_hf.objective import weight_decay


@pytest.mark.parametrize("chunk", [2**22, 3])
def test_weight_decay_is_in_loss_gradient_and_curvature(chunk, monkeypatch):
    monkeypatch.setattr(weight_decay, "CHUNK", chunk)
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
