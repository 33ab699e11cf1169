"""What a step warns of, where, how often; as an error a warning leaves a step whole or undone."""

import copy
import sys
import warnings

import pytest
import torch
from snapshots import assert_identical, snapshot
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from torch_hf import HFOptimizer
from torch_hf.curvature import precision

X = torch.linspace(-1, 1, 14).view(7, 2)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.2), nn.Linear(3, 2))


def step(net, optimizer, times=1):
    for _ in range(times):
        optimizer.step(lambda: F.mse_loss(net(X), X.sin()))


def line():
    return sys._getframe(1).f_lineno


def heard(run):
    """The warnings of a run, as (message, file, line)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [(str(w.message), w.filename, w.lineno) for w in caught if w.category is UserWarning]


def made_with(rates, net):
    if len(rates) == 1:
        return HFOptimizer(net.parameters(), lr=rates[0])
    groups = [{"params": net[i].parameters(), "lr": r} for i, r in zip((0, 3), rates, strict=True)]
    return HFOptimizer(groups)


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ([1e-3], "lr=0.001"),
        ([0.0999], "lr=0.0999"),
        ([0.1], ""),
        ([1.0], ""),
        ([0.0], ""),
        ([1.0, 1e-3], "lr=0.001"),
        ([0.01, 1e-3], "lr=0.001"),
        ([1.0, 0.0], ""),
    ],
)
def test_a_small_rate_is_said_once_when_it_is_given(rates, said):
    net = model()
    made = []
    found = heard(lambda: made.append(made_with(rates, net)))
    assert len(found) == bool(said)
    if said:
        message, file, _ = found[0]
        assert file == __file__
        assert f"Delete {said}" in message
        assert "1.0 is the Newton step" in message
    assert not heard(lambda: step(net, made[0], 3))


def warm_up(optimizer):
    return LambdaLR(optimizer, lambda epoch: min(1.0, 1e-3 * (epoch + 1)))


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=1e-3, total_steps=10, cycle_momentum=False)


@pytest.mark.parametrize("schedule", [warm_up, one_cycle])
def test_a_schedule_that_makes_it_small_is_said_at_the_first_step(schedule):
    net = model()
    optimizer = HFOptimizer(net.parameters())
    scheduler = schedule(optimizer)
    rate = optimizer.param_groups[0]["lr"]
    first = line() + 1
    found = heard(lambda: optimizer.step(lambda: F.mse_loss(net(X), X.sin())))
    assert [(file, where) for _, file, where in found] == [(__file__, first)]
    assert f"lr={rate:g}" in found[0][0]
    assert "schedule" in found[0][0]

    def rest():
        for _ in range(5):
            step(net, optimizer)
            scheduler.step()

    assert not heard(rest)


def test_a_rate_that_falls_later_is_said_then():
    net = model()
    optimizer = HFOptimizer(net.parameters())
    assert not heard(lambda: step(net, optimizer, 2))
    optimizer.param_groups[0]["lr"] = 0.01
    assert len(heard(lambda: step(net, optimizer, 2))) == 1
    assert not heard(lambda: step(*copy.deepcopy((net, optimizer))))


def test_a_group_that_is_added_is_said_at_the_next_step():
    net = model()
    optimizer = HFOptimizer(net[0].parameters())
    optimizer.add_param_group({"params": list(net[3].parameters()), "lr": 1e-3})
    assert len(heard(lambda: step(net, optimizer, 2))) == 1


def test_the_line_is_the_users_also_below_a_class_of_theirs():
    class Theirs(HFOptimizer):
        pass

    net = model()
    first = line() + 1
    found = heard(lambda: Theirs(net.parameters(), lr=1e-3))
    assert [(file, where) for _, file, where in found] == [(__file__, first)]


# as errors


def test_as_an_error_a_small_rate_makes_no_optimizer_and_no_step():
    net = model()
    with pytest.raises(UserWarning, match=r"lr=0\.001"):
        HFOptimizer(net.parameters(), lr=1e-3)
    optimizer = HFOptimizer(net.parameters())
    step(net, optimizer)
    optimizer.param_groups[0]["lr"] = 1e-3
    before = snapshot(net, optimizer)
    with pytest.raises(UserWarning, match=r"lr=0\.001"):
        step(net, optimizer)
    assert_identical(snapshot(net, optimizer), before)
    step(net, optimizer)  # it is said once


def test_as_an_error_that_of_lowered_precision_undoes_the_step(monkeypatch):
    net = model()
    optimizer = HFOptimizer(net.parameters())
    monkeypatch.setattr(precision, "lowered", lambda device: ["x.fp32_precision = 'tf32'"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    real = precision.warn_of_tf32
    pretended = torch.device("cuda")
    monkeypatch.setattr(
        "torch_hf.optimizer.hf.warn_of_tf32", lambda device, *rest: real(pretended, *rest)
    )
    before = snapshot(net, optimizer)
    with pytest.raises(UserWarning, match="TF32"):
        step(net, optimizer)
    assert_identical(snapshot(net, optimizer), before)
    step(net, optimizer)


def rejecting(net, factor):
    return lambda: F.mse_loss(net(X), X.sin()) * factor


def test_as_an_error_the_fifth_rejection_leaves_the_step_whole():
    runs = []
    for action in ("error", "ignore"):
        net, factor = model(), torch.ones(())
        optimizer = HFOptimizer(net.parameters())
        optimizer.step(rejecting(net, factor))
        factor.fill_(float("nan"))
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            for i in range(5):
                if action == "error" and i == 4:
                    with pytest.raises(RuntimeWarning, match="rejected 5 steps"):
                        optimizer.step(rejecting(net, factor))
                else:
                    optimizer.step(rejecting(net, factor))
        assert optimizer.last_report.step == 6
        factor.fill_(1.0)
        optimizer.step(rejecting(net, factor))
        found = snapshot(net, optimizer)
        del found["report"]
        runs.append(found)
    assert_identical(*runs)


# a step that fails


@pytest.mark.parametrize("to_none", [True, False])
def test_a_failed_step_leaves_the_gradients_of_frozen_parameters(to_none):
    net = model()
    net[0].weight.requires_grad_(False)
    optimizer = HFOptimizer(net.parameters())
    frozen = torch.full_like(net[0].weight, 3.0)
    net[0].weight.grad = frozen

    def closure():
        optimizer.zero_grad(set_to_none=to_none)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        optimizer.step(closure)
    assert net[0].weight.grad is frozen
    assert frozen.eq(3.0).all()
