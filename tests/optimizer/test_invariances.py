"""What must not matter: the loss's scale, the order and grouping of parameters, its sign."""

import pytest
import torch
from basics import assert_same
from problems import case_named
from torch.testing import assert_close
from trainings import STABLE, Training, theta

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal", "none"])
@pytest.mark.parametrize("name", ["mlp-cross_entropy", "two_heads-cross_entropy+mse", "rnn-mse"])
@pytest.mark.parametrize("factor", [1000.0, 1e-3])
def test_the_scale_of_the_loss_does_not_matter(preconditioner, name, factor):
    case, runs = case_named(name), []
    for scale in (1.0, factor):
        torch.manual_seed(0)
        training = Training(
            case,
            preconditioner=preconditioner,
            weight_decay=1e-3 * scale,
            cg_max_iter=6,
            history_size=4,
        )
        criterion, model = training._criterion, training.model
        training.closure = lambda batch, s=scale, c=criterion, m=model: s * c(m, batch)
        reports = training.run(6)
        runs.append((theta(model), [(r.cg_iterations, r.accepted) for r in reports]))
    assert_same(runs[1][0], runs[0][0], 1e-6)
    assert runs[1][1] == runs[0][1]


def _reversed(model):
    return reversed(list(model.parameters()))


def _one_group_each(model):
    return [{"params": [p]} for p in model.parameters()]


def _named(model):
    return model.named_parameters()


@pytest.mark.parametrize("params", [_reversed, _one_group_each, _named])
@pytest.mark.parametrize("name", ["mlp-mse", "frozen-cross_entropy", "unused-cross_entropy"])
def test_order_and_grouping_of_parameters_do_not_matter(params, name):
    truth = Training(case_named(name), weight_decay=1e-3, **STABLE)
    other = Training(case_named(name), params=params, weight_decay=1e-3, **STABLE)
    truth.run(8)
    other.run(8)
    assert_same(theta(other.model), theta(truth.model), 1e-9)


def test_maximising_is_minimising_the_negative():
    case = case_named("mlp-cross_entropy")
    down = Training(case, **STABLE)
    up = Training(case, maximize=True, **STABLE)
    up.closure = lambda batch: -up._criterion(up.model, batch)
    for _ in range(6):
        lower, higher = down.step(), up.step()
        assert_same(theta(up.model), theta(down.model), 1e-12)
        assert (higher.loss, higher.new_loss) == pytest.approx((lower.loss, lower.new_loss))
    for p, q in zip(down.model.parameters(), up.model.parameters(), strict=True):
        assert_close(q.grad, -p.grad)


@pytest.mark.parametrize("name", ["frozen-cross_entropy", "unused-cross_entropy"])
def test_frozen_and_unused_parameters_stay(name):
    training = Training(case_named(name))
    before = {k: p.detach().clone() for k, p in training.model.named_parameters()}
    training.run(3)
    for key, p in training.model.named_parameters():
        still = not p.requires_grad or key.startswith("never")
        assert torch.equal(p, before[key]) == still
        assert not still or p.grad is None
