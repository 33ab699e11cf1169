"""The normalisations' own rule against autograd's: outputs, gradients, second order, tangents."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from basics import normal
from reference import dense_gauss_newton, flat
from torch import nn
from torch.autograd import grad
from torch.autograd.gradcheck import gradgradcheck
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from torch_hf import HFOptimizer
from torch_hf.capture import normalization
from torch_hf.capture.capture import Capture
from torch_hf.capture.normalization import rule
from torch_hf.capture.tangents import tangents_only
from torch_hf.curvature import GaussNewtonOperator
from torch_hf.curvature.operators import TANGENT_RULES


@dataclass(frozen=True)
class Case:
    function: Any
    shape: tuple[int, ...]
    width: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    affine: bool = True

    def arguments(self):
        x = (2.0 * normal(1, *self.shape) + 0.5).requires_grad_()
        if not self.affine:
            return (x,)
        weight, bias = normal(2, *self.width).requires_grad_(), normal(3, *self.width)
        return x, weight, bias.requires_grad_()

    def call(self, *arguments):
        """Our own, or torch's."""
        names = dict(zip(("input", "weight", "bias"), arguments, strict=False))
        return lambda function: function(**names, **self.extra())

    def extra(self):
        found = dict(self.settings)
        if found.pop("running", False):
            found["running_mean"] = normal(4, *self.width)
            found["running_var"] = normal(5, *self.width).square() + 0.3
        elif self.function is F.batch_norm:
            found["running_mean"] = found["running_var"] = None
        return found

    def truth(self, *arguments):
        return self.call(*arguments)(self.function)

    def ours(self, *arguments):
        names = dict(zip(("input", "weight", "bias"), arguments, strict=False))
        found = rule(self.function, (), names | self.extra())
        assert found is not None
        return found()


BATCH = (("training", True), ("eps", 1e-3))
CASES = {
    "batch 1d": Case(F.batch_norm, (6, 3), (3,), BATCH),
    "batch 2d": Case(F.batch_norm, (4, 3, 2, 3), (3,), BATCH),
    "batch plain": Case(F.batch_norm, (4, 3, 5), (3,), BATCH, affine=False),
    "batch moving": Case(F.batch_norm, (4, 3, 2), (3,), (*BATCH, ("running", True))),
    "batch fixed": Case(F.batch_norm, (4, 3, 2), (3,), (("running", True),)),
    "batch fixed plain": Case(F.batch_norm, (4, 3), (3,), (("running", True),), affine=False),
    "layer": Case(F.layer_norm, (3, 2, 5), (5,), (("normalized_shape", (5,)),)),
    "layer over two": Case(F.layer_norm, (3, 2, 4), (2, 4), (("normalized_shape", (2, 4)),)),
    "layer plain": Case(F.layer_norm, (3, 5), (5,), (("normalized_shape", [5]),), affine=False),
    "group": Case(F.group_norm, (3, 4, 2, 2), (4,), (("num_groups", 2),)),
    "group plain": Case(F.group_norm, (3, 6, 2), (6,), (("num_groups", 3),), affine=False),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def assert_same(found, truth, rtol=1e-10):
    found, truth = flat(found), flat(truth)
    assert truth.norm() > 0
    assert torch.linalg.norm(found - truth) <= rtol * torch.linalg.norm(truth)


def pulled(outcome, arguments):
    u = normal(7, *outcome.shape).requires_grad_()
    return u, grad(outcome, arguments, u, create_graph=True)


@each_case
def test_output_and_gradient(case):
    arguments = case.arguments()
    ours, truth = case.ours(*arguments), case.truth(*arguments)
    assert torch.equal(ours, truth)
    u = normal(7, *truth.shape)
    assert_same(grad(ours, arguments, u), grad(truth, arguments, u), rtol=1e-13)


@each_case
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2,)])
def test_gradient_of_some(case, wanted):
    arguments = case.arguments()
    if max(wanted) >= len(arguments):
        pytest.skip("it has no weight and no bias")
    for i, argument in enumerate(arguments):
        argument.requires_grad_(i in wanted)
    chosen = [arguments[i] for i in wanted]
    ours, truth = case.ours(*arguments), case.truth(*arguments)
    u = normal(7, *truth.shape)
    assert_same(grad(ours, chosen, u), grad(truth, chosen, u), rtol=1e-13)


@each_case
def test_second_order_is_autograds(case):
    found = []
    for make in (case.ours, case.truth):
        arguments = case.arguments()
        u, gradients = pulled(make(*arguments), arguments)
        along = [normal(10 + i, *g.shape) for i, g in enumerate(gradients)]
        total = sum((g * t).sum() for g, t in zip(gradients, along, strict=True))
        found.append([t for t in grad(total, (*arguments, u), allow_unused=True) if t is not None])
    assert len(found[0]) == len(found[1])
    assert_same(*found)


@pytest.mark.parametrize("name", ["batch 2d", "batch fixed", "layer", "group"])
def test_double_backward_by_differences(name):
    assert gradgradcheck(CASES[name].ours, CASES[name].arguments())


@pytest.mark.parametrize("name", ["layer", "group"])  # torch has none of batch_norm
def test_third_order_is_autograds(name):
    case, found = CASES[name], []
    for make in (case.ours, case.truth):
        arguments = case.arguments()
        first = grad(make(*arguments).pow(3).sum(), arguments[0], create_graph=True)[0]
        second = grad(first.pow(2).sum(), arguments[0], create_graph=True)[0]
        found.append(grad(second.pow(2).sum(), arguments[:2]))
    assert_same(*found)


@each_case
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,), (0, 2)])
def test_tangents_are_autograds(case, wanted):
    arguments = case.arguments()
    if max(wanted) >= len(arguments):
        pytest.skip("it has no weight and no bias")
    u, gradients = pulled(case.ours(*arguments), arguments)
    along = [normal(10 + i, *arguments[i].shape) for i in wanted]
    with tangents_only():
        (found,) = grad([gradients[i] for i in wanted], [u], along)
    everywhere = [
        normal(10 + i, *a.shape) if i in wanted else torch.zeros_like(a)
        for i, a in enumerate(arguments)
    ]
    _, truth = torch.autograd.functional.jvp(case.truth, arguments, tuple(everywhere))
    assert_same(found, truth)


def test_running_statistics_move_as_torchs():
    found = []
    for training in (rule, None):
        mean, variance = torch.zeros(3).double(), torch.ones(3).double()
        x = (2.0 * normal(1, 6, 3) + 0.5).requires_grad_()
        given = (x, mean, variance, None, None, True, 0.3)
        if training is rule:
            rule(F.batch_norm, given, {})()
        else:
            F.batch_norm(*given)
        found.append([mean, variance])
    assert torch.equal(flat(found[0]), flat(found[1]))
    assert found[0][0].norm() > 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"input": torch.randn(1, 3, requires_grad=True), "running_mean": None},
        {"input": torch.randn(4, 3), "running_mean": None},
        {"input": torch.randn(4, 3, dtype=torch.half, requires_grad=True), "weight": torch.ones(3)},
        {"input": torch.randn(4, 3, requires_grad=True), "weight": torch.ones(3)},
        {"input": torch.randn(0, 3, requires_grad=True), "running_mean": None},
        {"wrong": 1},
    ],
    ids=["one case", "no gradient", "two dtypes", "no bias", "no case", "not torch's"],
)
def test_the_rule_stands_aside(arguments):
    usual = {} if "wrong" in arguments else {"running_mean": None, "running_var": None}
    assert rule(F.batch_norm, (), usual | arguments | {"training": True}) is None


def test_the_rule_stands_aside_under_autocast_and_transforms():
    x = torch.randn(4, 3, requires_grad=True)
    assert rule(F.layer_norm, (x, (3,)), {}) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rule(F.layer_norm, (x, (3,)), {}) is None
    with torch.no_grad():
        assert rule(F.layer_norm, (x, (3,)), {}) is None
    seen = []
    torch.func.grad(lambda z: (seen.append(rule(F.layer_norm, (z, (3,)), {})), z.sum())[1])(x)
    assert seen == [None]


def networks():
    torch.manual_seed(0)
    image = [
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2),
        nn.GroupNorm(2, 4),
    ]
    yield nn.Sequential(*image, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)), normal(1, 6, 2, 5, 5)
    plain = [nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4)]
    yield nn.Sequential(*plain, nn.Tanh(), nn.Linear(4, 3)), normal(1, 7, 5)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_gauss_newton_of_a_network(which, training):
    model, x = list(networks())[which]
    model = model.double().train(training)
    y = torch.randint(0, 3, (len(x),), generator=torch.Generator().manual_seed(3))
    names = [name for name, _ in model.named_parameters()]
    params = list(model.parameters())
    still = copy.deepcopy(model)  # transforms take no buffer that moves
    for module in still.modules() if training else ():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False

    def outputs(values):
        return functional_call(still, dict(zip(names, values, strict=True)), (x,))

    truth = dense_gauss_newton(outputs, lambda z: F.cross_entropy(z, y), params)
    operator = GaussNewtonOperator.from_closure(lambda: F.cross_entropy(model(x), y), params)
    assert operator.engine == TANGENT_RULES
    eye = torch.eye(len(truth)).double()
    found = torch.stack([operator(v) for v in eye])
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function._schema.name.split("::")[1] not in ("view", "t", "detach", "expand")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("which", "most"), [(0, 70), (1, 60)])
def test_a_product_takes_few_operations(which, most):
    model, x = list(networks())[which]
    model, y = model.double(), torch.randint(0, 3, (len(x),))
    params = list(model.parameters())
    operator = GaussNewtonOperator.from_closure(lambda: F.cross_entropy(model(x), y), params)
    v = torch.randn(operator.shape[0]).double()
    operator(v)
    with Operations() as seen:
        operator(v)
    assert seen.number <= most


@pytest.mark.parametrize("solver", ["exact", "cg", "auto"])
def test_steps_are_the_same_by_our_rule_and_by_autograds(solver, monkeypatch):
    losses = []
    for by_rule in (True, False):
        if not by_rule:
            monkeypatch.setattr("torch_hf.capture.normalization.rule", lambda *_: None)
        torch.manual_seed(0)
        layers = [nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.GroupNorm(2, 8)]
        model = nn.Sequential(*layers, nn.Linear(8, 1)).double()
        model.insert(4, nn.Unflatten(1, (8, 1)))
        model.insert(6, nn.Flatten())
        x = normal(1, 20, 3)
        y = x.prod(1, keepdim=True)
        optimizer = HFOptimizer(model.parameters(), solver=solver)
        for _ in range(4):
            optimizer.step(lambda model=model, x=x, y=y: F.mse_loss(model(x), y))
        losses.append(optimizer.last_report.new_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_closure_that_differentiates_through_a_normalisation():
    found = []
    for solver in ("exact", "cg"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)).double()
        x = normal(1, 12, 1).requires_grad_()
        optimizer = HFOptimizer(model.parameters(), solver=solver, cg_max_iter=60)

        def closure(model=model, x=x):
            u = model(x)
            (slope,) = grad(u.sum(), x, create_graph=True)
            return (slope - x.cos()).square().mean() + u.mean().square()

        first = optimizer.step(closure).item()
        for _ in range(5):
            optimizer.step(closure)
        found.append(optimizer.last_report.new_loss / first)
    assert max(found) < 0.5


def test_capture_says_that_a_rule_was_used():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    x = torch.randn(5, 3)
    params = list(model.parameters())
    assert Capture(params, tangent_rules=True).run(lambda: model(x)).has_tangent_rules
    assert not Capture(params).run(lambda: model(x)).has_tangent_rules


def test_light_steps_do_without_the_rule(monkeypatch):
    """Their products are few, and its calls from Python are in each gradient."""
    calls, known = [], normalization.rule
    monkeypatch.setattr(
        "torch_hf.capture.normalization.rule", lambda *a: (calls.append(1), known(*a))[1]
    )
    torch.manual_seed(0)
    layers = [nn.Linear(20, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 5)]
    model = nn.Sequential(*layers)
    x, y = torch.randn(2000, 20), torch.randint(0, 5, (2000,))
    optimizer = HFOptimizer(model.parameters())
    found = []
    for step in range(14):
        calls.clear()
        part = slice(100 * step, 100 * step + 100)
        optimizer.step(lambda part=part: F.cross_entropy(model(x[part]), y[part]))
        found.append((optimizer.last_report.solver, len(calls)))
    assert found[0] == ("cg", 1)
    assert [n for solver, n in found[2:] if solver == "kronecker"].count(0) > 8
