"""A restored run goes on bit by bit, groups come and go, and a failed step changes nothing."""

import io
import math

import pytest
import torch
from basics import assert_same, normal
from problems import CASES, case_named
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from trainings import (
    Training,
    noisy,
    theta,
    walled,
)

from torch_hf import HFOptimizer, LBFGSPreconditioner

pytestmark = pytest.mark.usefixtures("seeded")


class _Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def _wide_training(layers, **options):
    torch.manual_seed(3)
    model = _Wide().double()
    for layer in {"first", "last"} - set(layers):
        getattr(model, layer).requires_grad_(False)
    params = [p for layer in layers for p in getattr(model, layer).parameters()]
    return model, HFOptimizer(params, **options)


def _wall_once(model, x, y):
    walls = [p.detach().clone() for p in model.parameters()]
    return lambda: F.mse_loss(model(x), y) + walled(model, walls)


@pytest.mark.parametrize("rejected", [False, True])
@pytest.mark.parametrize("preconditioner", ["kronecker-lbfgs", "lbfgs", "diagonal"])
def test_a_group_may_be_added_between_steps(rejected, preconditioner):
    model, optimizer = _wide_training(["first"], preconditioner=preconditioner)
    x, y = normal(1, 10, 4), normal(2, 10, 2)

    def closure():
        return F.mse_loss(model(x), y)

    optimizer.step(closure)
    if rejected:
        optimizer.step(_wall_once(model, x, y))
        assert not optimizer.last_report.accepted
    damping = optimizer.param_groups[0]["damping"]
    model.last.requires_grad_(True)
    optimizer.add_param_group({"params": model.last.parameters(), "weight_decay": 0.1})
    before = model.last.weight.detach().clone()
    optimizer.step(closure)
    assert optimizer.last_report.damping == damping
    assert optimizer.last_report.accepted
    assert not torch.equal(model.last.weight, before)
    assert optimizer.last_report.new_loss < optimizer.last_report.loss


def test_directions_of_parameters_frozen_in_turn_are_not_mixed_up():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x, y = normal(1, 10, 4), normal(2, 10, 4)
    optimizer = HFOptimizer(model.parameters(), cg_max_iter=250)
    for i in (0, 2, 0, 2):
        model[0].requires_grad_(i == 0)
        model[2].requires_grad_(i == 2)
        damping = optimizer.param_groups[0]["damping"]
        torch.manual_seed(3)
        other = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        other.load_state_dict(model.state_dict())
        fresh = HFOptimizer(other[i].parameters(), damping=damping, cg_max_iter=250)
        for layer in {0, 2} - {i}:
            other[layer].requires_grad_(False)
        optimizer.step(lambda: F.mse_loss(model(x), y))
        fresh.step(lambda other=other: F.mse_loss(other(x), y))
        assert_same(theta(model), theta(other), 1e-9)


PRECONDITIONERS = {
    "kronecker-lbfgs": lambda: "kronecker-lbfgs",
    "kronecker": lambda: "kronecker",
    "lbfgs": lambda: "lbfgs",
    "diagonal": lambda: "diagonal",
    "none": lambda: "none",
    "pairs on the diagonal": lambda: LBFGSPreconditioner(6, base="diagonal"),
}


def _through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through", [lambda state: state, _through_a_file], ids=["", "file"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_restored_run_goes_on_bit_by_bit(preconditioner, dtype, through, steps):
    case, runs = case_named("mlp-cross_entropy"), []
    x, y = case.inputs[0].to(dtype), case.targets[0]

    def start():
        model = case.model().to(dtype)
        return model, HFOptimizer(model.parameters(), preconditioner=preconditioner(), lr=0.9)

    def run(model, optimizer, steps):
        for _ in range(steps):
            optimizer.step(lambda: F.cross_entropy(model(x), y))

    model, optimizer = start()
    run(model, optimizer, steps)
    other, restored = start()
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(through(optimizer.state_dict()))
    for pair in ((model, optimizer), (other, restored)):
        torch.manual_seed(5)
        run(*pair, 4)
        runs.append(pair)
    assert_close(list(other.parameters()), list(model.parameters()), rtol=0, atol=0)
    reports = [optimizer.last_report for _, optimizer in runs]
    for name in ("step", "loss", "new_loss", "damping", "reduction_ratio", "cg_iterations"):
        assert getattr(reports[0], name) == getattr(reports[1], name)


def _single(*layers):
    return lambda: nn.Sequential(*(make() for make in layers)).double()


#: Layers alone, of shapes that a factor's may be taken for, and networks beside.
RESUMED = {
    "1 to 1": _single(lambda: nn.Linear(1, 1, bias=False)),
    "1 to 3": _single(lambda: nn.Linear(1, 3, bias=False)),
    "3 to 3": _single(lambda: nn.Linear(3, 3, bias=False)),
    "3 to 1": _single(lambda: nn.Linear(3, 1, bias=False)),
    "1 to 3 with a bias": _single(lambda: nn.Linear(1, 3)),
    "convolution": _single(lambda: nn.Conv1d(3, 3, 1, bias=False)),
    "convolution of images": _single(lambda: nn.Conv2d(1, 3, 1, bias=False)),
    "network": _single(lambda: nn.Linear(4, 5), nn.Tanh, lambda: nn.Linear(5, 3)),
}


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_run_on_changing_batches_goes_on_bit_by_bit(preconditioner, name, steps):
    """At whichever age of the factors, and at dampings other than that of their inverses."""

    def start():
        torch.manual_seed(3)
        model = RESUMED[name]()
        return model, HFOptimizer(
            model.parameters(), preconditioner=preconditioner(), weight_decay=1e-3
        )

    def run(model, optimizer, steps):
        shape = next(model.parameters()).shape
        inputs = (shape[1], 4, 4)[: len(shape) - 1]
        for step in steps:
            x = normal(10 + step, 12, *inputs)
            y = normal(50 + step, *model(x).shape)
            optimizer.step(lambda x=x, y=y: F.mse_loss(torch.tanh(model(x)), y))

    whole, optimizer = start()
    run(whole, optimizer, range(steps))
    part, restored = start()
    part.load_state_dict(whole.state_dict())
    restored.load_state_dict(_through_a_file(optimizer.state_dict()))
    run(whole, optimizer, range(steps, steps + 5))
    run(part, restored, range(steps, steps + 5))
    assert torch.equal(theta(part), theta(whole))
    assert restored.last_report.damping == optimizer.last_report.damping


def test_a_decay_that_changes_counts_before_and_after_a_restart():
    runs = []
    for restarts in (False, True):
        torch.manual_seed(3)
        model = RESUMED["network"]()
        optimizer = HFOptimizer(model.parameters(), preconditioner="kronecker", cg_max_iter=3)
        for step in range(4):
            if step == 2:
                optimizer.param_groups[0]["weight_decay"] = 0.1
                if restarts:
                    saved = optimizer.state_dict()
                    optimizer = HFOptimizer(
                        model.parameters(), preconditioner="kronecker", cg_max_iter=3
                    )
                    optimizer.load_state_dict(saved)
            x, y = normal(10 + step, 12, 4), normal(50 + step, 12, 3)
            optimizer.step(lambda x=x, y=y, m=model: F.mse_loss(m(x), y))
        runs.append(theta(model))
    assert torch.equal(*runs)


@pytest.mark.parametrize("shapes", [[()], [(3,)], [(), (3,)], [(4,), (2, 2), ()]])
def test_state_of_parameters_of_any_shape_is_restored(shapes):
    starts = [normal(i, *shape) for i, shape in enumerate(shapes)]
    A = normal(9, 12, sum(s.numel() for s in starts))

    def start():
        params = [nn.Parameter(s.clone()) for s in starts]
        return params, HFOptimizer(params, history_size=4, cg_max_iter=3)

    def run(params, optimizer, steps):
        def closure():
            z = A @ torch.cat([p.reshape(-1) for p in params])
            return F.mse_loss(torch.tanh(z), torch.ones(12).double())

        for _ in range(steps):
            optimizer.step(closure)

    params, optimizer = start()
    run(params, optimizer, 3)
    others, restored = start()
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q)
    restored.load_state_dict(_through_a_file(optimizer.state_dict()))
    run(params, optimizer, 3)
    run(others, restored, 3)
    assert_close(others, params, rtol=0, atol=0)


def test_state_is_tensors_and_numbers_under_their_parameters():
    training = Training(case_named("unused-cross_entropy"))
    training.run(2)
    for p, state in training.optimizer.state.items():
        assert p.requires_grad
        for value in state.values():
            assert isinstance(value, (torch.Tensor, int, float))
            assert not isinstance(value, torch.Tensor) or value.isfinite().all()


def test_step_without_a_closure_makes_state_and_moves_nothing():
    model = nn.Linear(3, 1)
    optimizer = HFOptimizer(model.parameters(), lr=0.0)
    before = theta(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert set(optimizer.state) == set(model.parameters())
    assert_close(theta(model), before, rtol=0, atol=0)


def test_step_without_a_closure_is_an_error_in_training():
    model = nn.Linear(3, 1)
    with pytest.raises(RuntimeError, match="closure"):
        HFOptimizer(model.parameters()).step()


def test_a_failed_step_leaves_everything():
    model, x, y = noisy(), normal(1, 10, 4), normal(2, 10, 2)
    optimizer = HFOptimizer(model.parameters())
    countdown = [-1]

    def closure():
        countdown[0] -= 1
        if countdown[0] == 0:
            raise OSError("the disk is full")
        return F.mse_loss(model(x), y)

    optimizer.step(closure)
    for run in (1, 2):  # the first run, and an evaluation
        countdown[0] = run
        state = [theta(model), [b.clone() for b in model.buffers()], torch.get_rng_state()]
        saved = optimizer.state_dict()["state"]
        saved = {k: {n: torch.as_tensor(v).clone() for n, v in s.items()} for k, s in saved.items()}
        with pytest.raises(OSError, match="disk"):
            optimizer.step(closure)
        assert_close(
            [theta(model), list(model.buffers()), torch.get_rng_state()], state, rtol=0, atol=0
        )
        after = optimizer.state_dict()["state"]
        after = {k: {n: torch.as_tensor(v) for n, v in s.items()} for k, s in after.items()}
        assert_close(after, saved, rtol=0, atol=0)


def test_reports_are_finite_numbers():
    for case in CASES[:4]:
        row = Training(case).step().to_dict()
        numbers = [v for v in row.values() if isinstance(v, float)]
        assert numbers
        assert all(math.isfinite(v) for v in numbers)
