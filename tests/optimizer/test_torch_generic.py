"""What torch asks of each of its optimizers, asked of this one, with an entry of torch's own table.

Table and inputs are those of ``torch.testing._internal.common_optimizers``. Its tests are no
part of an installed torch, so the checks are written here; ``torch.optim.LBFGS``, the optimizer
with a closure, passes each of them, too, which shows that they ask no more than torch does.

Left out, since they hold for no optimizer that calls a closure: gradients without one, sparse and
complex parameters, several devices, ``foreach``, ``fused``, ``capturable``, ``differentiable``.
"""

import copy
import io
import pickle
import sys
import types
import unittest
import warnings

import pytest
import torch
from snapshots import assert_identical
from torch.nn import Parameter
from torch.optim import LBFGS
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from torch_hf import HFOptimizer

if "expecttest" not in sys.modules:  # torch's helpers name it, for tests of other things
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
common = pytest.importorskip("torch.testing._internal.common_optimizers")
# The import forbids the whole process to set torch.backends' flags; other tests set some.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True


pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:lr=.*makes every step:UserWarning"),
    pytest.mark.filterwarnings("ignore:HFOptimizer has rejected:RuntimeWarning"),  # at the minimum
]


def inputs(device, dtype=None):
    """Options of this optimizer, each other than its default."""
    options = {
        "default": {},
        "smaller lr": {"lr": 0.5},
        "weight_decay": {"weight_decay": 0.1},
        "damping": {"damping": 1.0},
        "maximize": {"maximize": True, "damping": 10.0},
        "hessian": {"curvature": "hessian"},
        "cg": {"cg_max_iter": 5, "cg_tol": 1e-3, "cg_decay": 0.5},
    } | {
        name: {"preconditioner": name}
        for name in ("lbfgs", "kronecker", "kronecker-lbfgs", "diagonal", "none")
    }
    return [common.OptimizerInput(params=None, kwargs=k, desc=d) for d, k in options.items()]


def error_inputs(device, dtype):
    """Those of all optimizers, but for tensors as ``lr``."""
    found = common.get_error_inputs_for_all_optims(device, dtype)
    return [e for e in found if "Tensor lr" not in e.optimizer_error_input.desc]


HF = common.OptimizerInfo(
    HFOptimizer,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    supported_impls=(),
    not_og_supported_flags=(),
    supports_complex=False,
    step_requires_closure=True,
    supports_multiple_devices=False,
)
TORCH = next(info for info in common.optim_db if info.optim_cls is LBFGS)
CASES = [
    pytest.param(info, given, id=f"{info.optim_cls.__name__}-{given.desc}")
    for info in (HF, TORCH)
    for given in info.optim_inputs_func("cpu")
]
each = pytest.mark.parametrize(("info", "given"), CASES)
both = pytest.mark.parametrize("info", [HF, TORCH], ids=lambda info: info.optim_cls.__name__)


class Problem:
    """A small quadratic; concave where it is to be maximised."""

    def __init__(self, info, kwargs, groups=None, contiguous=True, dtype=torch.float32):
        torch.manual_seed(0)
        if contiguous:
            weight, bias = torch.randn(10, 5), torch.randn(10)
        else:
            weight, bias = torch.randn(10, 5, 2)[..., 0], torch.randn(10, 2)[..., 0]
        self.weight, self.bias = Parameter(weight.to(dtype)), Parameter(bias.to(dtype))
        self.x = torch.randn(5).to(dtype)
        self.sign = -1.0 if kwargs.get("maximize") and info is HF else 1.0
        params = groups(self.weight, self.bias) if groups else [self.weight, self.bias]
        self.optimizer = info.optim_cls(params, **kwargs)

    def closure(self):
        self.optimizer.zero_grad()
        loss = self.sign * (self.weight.mv(self.x) + self.bias).square().sum()
        loss.backward()
        return loss

    def steps(self, count):
        for _ in range(count):
            self.optimizer.step(self.closure)
        return self

    def values(self):
        return [self.weight.detach().clone(), self.bias.detach().clone()]


@both
def test_bad_arguments_are_refused(info):
    for bad in info.optim_error_inputs_func("cpu", torch.float32):
        given = bad.optimizer_error_input
        params = [Parameter(torch.randn(1, 1))] if given.params is None else given.params
        if issubclass(bad.error_type, Warning):
            with pytest.warns(bad.error_type, match=bad.error_regex):
                info.optim_cls(params, **given.kwargs)
        else:
            with pytest.raises(bad.error_type, match=bad.error_regex):
                info.optim_cls(params, **given.kwargs)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("scheduler", [None, 0, 1])
@each
def test_a_loop_goes_in_the_right_direction(info, given, scheduler, contiguous):
    problem = Problem(info, given.kwargs, contiguous=contiguous)
    makers = info.scheduler_inputs[0]
    schedule = None if scheduler is None else makers[scheduler](problem.optimizer)
    repr(problem.optimizer)
    first = problem.closure().item()
    for _ in range(20):
        problem.steps(1)
        if isinstance(schedule, ReduceLROnPlateau):
            schedule.step(problem.closure().detach())
        elif schedule is not None:
            schedule.step()
    last = problem.closure().item()
    assert last > first if given.kwargs.get("maximize") else last < first


@each
def test_a_state_is_deterministic_and_loads_into_a_twin(info, given):
    one = Problem(info, given.kwargs).steps(3)
    state = one.optimizer.state_dict()
    kept = copy.deepcopy(state)
    other = Problem(info, given.kwargs)
    with torch.no_grad():
        other.weight.copy_(one.weight)
        other.bias.copy_(one.bias)
    other.optimizer.load_state_dict(state if info is HF else copy.deepcopy(state))
    assert_identical(state, kept)  # what was given is not edited
    for _ in range(3):
        one.steps(1)
        other.steps(1)
        assert_identical(other.values(), one.values())
    assert_identical(other.optimizer.state_dict(), one.optimizer.state_dict())


@each
def test_a_state_saved_loads_with_weights_only(info, given):
    problem = Problem(info, given.kwargs).steps(3)
    file = io.BytesIO()
    torch.save(problem.optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_identical(loaded, problem.optimizer.state_dict())


@each
def test_a_state_is_not_empty_after_steps(info, given):
    for state in Problem(info, given.kwargs).steps(2).optimizer.state.values():
        assert state
        break


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@each
def test_copies_have_all_public_attributes(info, given, how):
    optimizer = Problem(info, given.kwargs).steps(2).optimizer
    copied = how(optimizer)
    for one in (optimizer, copied):
        assert {k for k in vars(one) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
    assert_identical(copied.state_dict(), optimizer.state_dict())


@both
def test_hooks_of_steps_run_in_order(info):
    problem, seen = Problem(info, {}), []
    optimizer = problem.optimizer
    hooks = [
        optimizer.register_step_pre_hook(lambda o, a, k: seen.append("before")),
        optimizer.register_step_post_hook(lambda o, a, k: seen.append("after")),
        register_optimizer_step_pre_hook(lambda o, a, k: seen.append("all")),
        register_optimizer_step_post_hook(lambda o, a, k: seen.append("end")),
    ]
    problem.steps(1)
    assert seen == ["all", "before", "after", "end"]
    for hook in hooks:
        hook.remove()
    problem.steps(1)
    assert len(seen) == 4


@both
def test_hooks_of_states_see_and_change_them(info):
    problem = Problem(info, {}).steps(2)
    optimizer = problem.optimizer
    seen = []

    def before_saving(o):
        seen.append("before saving")

    def after_saving(o, state):
        seen.append("after saving")
        return state | {"mark": 1}

    def before_loading(o, state):
        seen.append("before loading")
        assert "mark" in state
        return state | {"param_groups": [g | {"lr": 0.25} for g in state["param_groups"]]}

    def first_before_loading(o, state):
        seen.append("first before loading")

    def after_loading(o):
        seen.append("after loading")
        assert o.param_groups[0]["lr"] == 0.25
        o.state["test"] = {"seen": True}

    optimizer.register_state_dict_pre_hook(before_saving)
    optimizer.register_state_dict_post_hook(after_saving)
    state = optimizer.state_dict()
    assert state["mark"] == 1
    optimizer.register_load_state_dict_pre_hook(before_loading)
    optimizer.register_load_state_dict_pre_hook(first_before_loading, prepend=True)
    optimizer.register_load_state_dict_post_hook(after_loading)
    optimizer.load_state_dict(state)
    assert optimizer.state["test"] == {"seen": True}
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert seen == [
        "before saving",
        "after saving",
        "first before loading",
        "before loading",
        "after loading",
    ]


def test_groups_have_their_own_rate_and_decay():
    """Of this optimizer alone: LBFGS has no groups."""
    still = Problem(HF, {}, lambda w, b: [{"params": [w]}, {"params": [b], "lr": 0.0}])
    before = still.values()
    still.steps(2)
    assert not torch.equal(still.weight, before[0])
    assert torch.equal(still.bias, before[1])
    decayed = Problem(
        HF, {}, lambda w, b: [{"params": [w], "weight_decay": 10.0}, {"params": [b]}]
    ).steps(15)
    assert decayed.weight.norm() < Problem(HF, {}).steps(15).weight.norm()


@both
def test_a_gradient_of_zeros_moves_nothing(info):
    problem = Problem(info, {})
    before = problem.values()

    def closure():
        problem.optimizer.zero_grad()
        loss = 0.0 * (problem.weight.square().sum() + problem.bias.square().sum())
        loss.backward()
        return loss

    for _ in range(2):
        problem.optimizer.step(closure)
    assert_identical(problem.values(), before)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("loads", [False, True])
@both
def test_names_of_parameters_come_and_go_with_a_state(info, saved, loads):
    def named(w, b):
        return [("weight", w), ("bias", b)]

    one = Problem(info, {}, named if saved else None).steps(2)
    other = Problem(info, {}, named if loads else None)
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    names = other.optimizer.param_groups[0].get("param_names")
    assert names == (["weight", "bias"] if saved or loads else None)
    other.steps(1)


@both
def test_the_default_dtype_does_not_matter(info):
    before = torch.get_default_dtype()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            torch.set_default_dtype(torch.float64)
            problem = Problem(info, {}, dtype=torch.float32).steps(3)
            assert problem.weight.dtype == torch.float32
        finally:
            torch.set_default_dtype(before)
