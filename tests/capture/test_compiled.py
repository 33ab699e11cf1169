"""Compiled modules: a step is that of the module itself, nothing is traced, and it is said."""

import warnings

import pytest
import torch
from basics import normal
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from torch_hf import HFOptimizer

pytestmark = pytest.mark.usefixtures("seeded")
X, Y = normal(1, 30, 4), torch.arange(30) % 3


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)
    ).double()


def whole(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def a_part(model, backend):
    model[0] = torch.compile(model[0], backend=backend)
    return model


def a_function(model, backend):
    return torch.compile(lambda x: model(x), backend=backend)


def run(model, called):
    torch.manual_seed(5)
    optimizer = HFOptimizer(model.parameters(), solver="cg")
    for _ in range(10):  # more than dynamo would recompile
        optimizer.step(lambda: F.cross_entropy(called(X), Y))
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), optimizer.last_report


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("compiled", [whole, in_place, a_part, a_function])
def test_a_step_is_that_of_the_module_itself(compiled, backend):
    counters.clear()
    model = network()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, report = run(model, compiled(model, backend))
    of_modules = 0 if compiled is a_function else 1
    assert [str(w.message)[:36] for w in said] == [
        "The closure calls a module under tor"
    ] * of_modules
    assert report.engine == "tangent_rules"
    assert not counters["frames"]
    plain = network()
    truth, _ = run(plain, plain)
    assert torch.equal(found, truth)


@pytest.mark.parametrize("compiled", [whole, in_place, a_part])
def test_where_warnings_are_errors_nothing_fails(compiled):
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = run(model, compiled(model, "aot_eager"))
    assert report.accepted


def test_outside_of_a_step_the_module_is_compiled():
    counters.clear()
    model = network().eval()
    called = torch.compile(model, backend="eager")
    HFOptimizer(model.parameters()).step(lambda: F.cross_entropy(called(X), Y))
    assert not counters["frames"]
    with torch.no_grad():
        called(X)
    assert counters["frames"]["ok"] > 0
