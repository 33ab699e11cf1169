"""What torch.optim's users do around an optimizer: schedulers, hooks, groups, hand-over."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from torch_hf import HFOptimizer
from torch_hf.plotting import plot_training
from torch_hf.tracking import CSVLogger, read_csv

_generator = torch.Generator().manual_seed(1)
X = torch.randn(40, 4, generator=_generator)
Y = torch.tanh(X[:, :1] * X[:, 1:2])


class Run:
    def __init__(self, make=HFOptimizer, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        self.optimizer = make(self.model.parameters(), **options)

    def closure(self):
        self.optimizer.zero_grad()
        loss = F.mse_loss(self.model(X), Y)
        loss.backward()
        return loss

    def step(self):
        self.optimizer.step(self.closure)
        return self.optimizer.last_report

    def theta(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


# Schedulers

SCHEDULERS = {
    "StepLR": (lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5), [1, 0.5, 0.25]),
    "LambdaLR": (lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)), [1, 1 / 2, 1 / 3]),
    "Exponential": (lambda o: lr_scheduler.ExponentialLR(o, 0.9), [1, 0.9, 0.81]),
    "Cosine": (lambda o: lr_scheduler.CosineAnnealingLR(o, 4), [1, (2 + 2**0.5) / 4, 0.5]),
    "Warm-up": (lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=2), [0.5, 0.75, 1]),
    "OneCycle without momentum": (
        lambda o: lr_scheduler.OneCycleLR(
            o, 1.0, total_steps=4, div_factor=8, cycle_momentum=False
        ),
        None,
    ),
}


@pytest.mark.parametrize(("make", "rates"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_set_the_rate_of_each_step(make, rates):
    run = Run()
    scheduler = make(run.optimizer)
    for k in range(3):
        rate = run.optimizer.param_groups[0]["lr"]
        assert rates is None or rate == pytest.approx(rates[k])
        report = run.step()
        assert report.step_length == pytest.approx(rate) or report.reason
        scheduler.step()


def test_reduce_on_plateau():
    run = Run()
    scheduler = lr_scheduler.ReduceLROnPlateau(run.optimizer, factor=0.5, patience=0)
    scheduler.step(1.0)
    scheduler.step(2.0)
    assert run.optimizer.param_groups[0]["lr"] == 0.5
    report = run.step()
    assert report.step_length == 0.5 or report.reason


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
def test_cycles_of_momentum_are_refused_by_torch_and_leave_a_way_out(scheduler):
    run = Run()
    options = {"base_lr": 0.5}
    if scheduler == "OneCycleLR":
        options = {"total_steps": 4, "div_factor": 2}
    with pytest.raises(ValueError, match="momentum"):
        getattr(lr_scheduler, scheduler)(run.optimizer, max_lr=1.0, **options)
    getattr(lr_scheduler, scheduler)(run.optimizer, max_lr=1.0, cycle_momentum=False, **options)
    assert run.step().accepted


# Hooks


def test_hooks_run_once_a_step_and_see_it_before_and_after():
    run, seen = Run(), []

    def before(optimizer, args, kwargs):
        seen.append(("before", run.theta()))

    def after(optimizer, args, kwargs):
        seen.append(("after", run.theta()))

    handles = [
        run.optimizer.register_step_pre_hook(before),
        run.optimizer.register_step_post_hook(after),
    ]
    start = run.theta()
    run.step()
    assert [name for name, _ in seen] == ["before", "after"]
    assert torch.equal(seen[0][1], start)
    assert torch.equal(seen[1][1], run.theta())
    assert not torch.equal(run.theta(), start)
    for handle in handles:
        handle.remove()
    run.step()
    assert len(seen) == 2


def test_a_pre_hook_may_replace_the_closure():
    run, other = Run(), Run()

    def doubled():
        return 2 * F.mse_loss(run.model(X), Y)

    run.optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, doubled), {}))
    run.optimizer.step(run.closure)
    assert run.optimizer.last_report.loss == pytest.approx(2 * other.step().loss, rel=1e-6)


def test_state_hooks():
    run, calls = Run(), []
    run.optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    run.optimizer.register_load_state_dict_post_hook(lambda o: calls.append("load"))
    run.step()
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert calls == ["save", "load"]


# Gradients


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("outside", [True, False])
def test_zero_grad_in_either_way_and_either_place(set_to_none, outside):
    run, other = Run(), Run()

    def closure():
        if not outside:
            run.optimizer.zero_grad(set_to_none=set_to_none)
        loss = F.mse_loss(run.model(X), Y)
        loss.backward()
        return loss

    for _ in range(3):
        if outside:
            run.optimizer.zero_grad(set_to_none=set_to_none)
        run.optimizer.step(closure)
        other.step()
    assert torch.equal(run.theta(), other.theta())
    run.optimizer.zero_grad(set_to_none=set_to_none)
    for p in run.model.parameters():
        assert p.grad is None if set_to_none else not p.grad.any()


def test_gradients_that_wait_from_outside_are_refused_unless_they_are_cleared():
    run, before = Run(), Run()
    F.mse_loss(run.model(X), Y).backward()

    def accumulating():
        loss = F.mse_loss(run.model(X), Y)
        loss.backward()
        return loss

    waiting = [p.grad.clone() for p in run.model.parameters()]
    with pytest.raises(RuntimeError, match=r"batches=\[\.\.\.\]"):
        run.optimizer.step(accumulating)
    assert torch.equal(run.theta(), before.theta())
    assert all(map(torch.equal, [p.grad for p in run.model.parameters()], waiting))

    run.step()  # this closure clears them
    assert torch.equal(run.theta(), (before.step(), before.theta())[1])
    run.optimizer.step(accumulating)  # the optimizer's own gradients are no one's sum
    before.step()
    assert torch.equal(run.theta(), before.theta())


def test_a_closure_that_returns_its_loss_takes_no_note_of_gradients():
    run, other = Run(), Run()
    F.mse_loss(run.model(X), Y).backward()
    run.optimizer.step(lambda: F.mse_loss(run.model(X), Y))
    other.step()
    assert torch.equal(run.theta(), other.theta())


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_clipping_in_a_closure_is_refused(clip):
    run, before = Run(), Run()

    def closure():
        loss = run.closure()
        clip(run.model.parameters(), 0.1)
        return loss

    with pytest.raises(RuntimeError, match="Clipping does not change the step"):
        run.optimizer.step(closure)
    assert torch.equal(run.theta(), before.theta())
    run.step()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)  # after the step: for whoever logs


def test_gradients_read_quietly_in_a_closure_are_refused():
    run = Run()

    def closure():
        loss = run.closure()
        _ = [p.grad.norm() for p in run.model.parameters() if p.grad is not None]
        return loss

    with pytest.raises(RuntimeError, match=r"reads \.grad after backward"):
        run.optimizer.step(closure)


def test_a_gradient_scaler_is_refused():
    run, scaler = Run(), torch.amp.GradScaler("cpu")
    scaler.scale(F.mse_loss(run.model(X), Y)).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(run.optimizer, run.closure)
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.step(run.optimizer, run.closure)
    assert run.optimizer.last_report.accepted


# Groups and parameters


@pytest.mark.parametrize("grouped", [False, True])
def test_named_parameters(grouped):
    def make(_):
        named = list(run.model.named_parameters())
        return HFOptimizer([{"params": named[:2]}, {"params": named[2:]}] if grouped else named)

    run, other = Run(), Run()
    run.optimizer = make(None)
    for _ in range(3):
        run.step()
        other.step()
    torch.testing.assert_close(run.theta(), other.theta(), rtol=1e-6, atol=1e-7)
    names = [n for g in run.optimizer.param_groups for n in g["param_names"]]
    assert names == [n for n, _ in run.model.named_parameters()]
    saved = run.optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"][0] == "0.weight"
    run.optimizer.load_state_dict(saved)
    assert run.step().step == 4


def test_a_group_added_under_a_scheduler():
    run = Run()
    extra = nn.Parameter(torch.zeros(1))
    scheduler = lr_scheduler.StepLR(run.optimizer, 1, gamma=0.5)
    run.step()
    scheduler.step()
    run.optimizer.add_param_group({"params": [extra], "lr": 0.25})
    run.optimizer.step(lambda: F.mse_loss(run.model(X) + extra, Y + 1))
    assert extra.item() != 0


def test_maximize_climbs():
    run = Run(maximize=True)
    losses = []
    for _ in range(3):
        losses.append(-run.step().loss)
    assert losses == sorted(losses)
    assert losses[-1] > losses[0]


# Hand-over


def test_adam_then_hf_in_one_log(tmp_path):
    run = Run(torch.optim.Adam, lr=1e-2)
    with CSVLogger(tmp_path / "run.csv") as logger:
        for step in range(1, 21):
            logger.log({"step": step, "loss": run.optimizer.step(run.closure).item()})
        adams = F.mse_loss(run.model(X), Y).item()
        run.optimizer = HFOptimizer(run.model.parameters())  # the one line
        for step in range(21, 31):
            logger.log(run.step(), step=step)
    columns = read_csv(tmp_path / "run.csv")
    assert columns["step"] == list(range(1, 31))
    assert columns["loss"][20] == pytest.approx(adams)
    assert columns["new_loss"][-1] < 0.1 * adams
    assert all(map(math.isnan, columns["damping"][:20]))
    assert not any(map(math.isnan, columns["damping"][20:]))
    plot_training(tmp_path / "run.csv", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


# Options of other optimizers

FOREIGN = {
    "differentiable": (True, ["cannot be differentiated", "torch.optim.SGD"]),
    "foreach": (True, ["kernels", "Remove this option"]),
    "fused": (True, ["kernels", "Remove this option"]),
    "capturable": (True, ["CUDA graph", "Remove this option"]),
    "max_iter": (20, ["cg_max_iter", "take more steps"]),
    "max_eval": (25, ["Remove this option"]),
    "tolerance_grad": (1e-7, ["optimizer.last_report.gradient_norm"]),
    "tolerance_change": (1e-9, ["optimizer.last_report.new_loss"]),
    "line_search_fn": ("strong_wolfe", ["always uses a line search", "Remove this option"]),
    "betas": ((0.9, 0.999), ["no averages", "Remove this option"]),
    "momentum": (0.9, ["cg_decay", "Remove this option"]),
    "nesterov": (True, ["Remove this option"]),
    "eps": (1e-8, ["damping", "Remove this option"]),
    "dampening": (0.1, ["Remove this option"]),
    "amsgrad": (True, ["Remove this option"]),
    "cg_max_iters": (9, ["Did you mean cg_max_iter?"]),
    "qqq": (9, ["It has", "history_size"]),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_options_that_are_not_there_say_what_to_write(name):
    value, says = FOREIGN[name]
    with pytest.raises(TypeError) as caught:
        Run(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"HFOptimizer has no option {name}. ")
    for part in says:
        assert part in message


def test_flags_that_other_optimizers_have_are_refused_when_off_too():
    with pytest.raises(TypeError, match="no option foreach"):
        Run(foreach=False)
