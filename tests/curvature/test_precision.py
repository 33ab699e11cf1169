"""Differences are judged by the precision that the closure computes in."""

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from torch_hf import HFOptimizer
from torch_hf.curvature import GaussNewtonOperator
from torch_hf.curvature.finite_differences import CentralDifference, StepChoice
from torch_hf.curvature.precision import full_precision, lowered


class Rounded(TorchDispatchMode):
    """Factors of matrix products rounded to ``bits`` of mantissa: TF32 has 10, bfloat16 7."""

    def __init__(self, bits):
        super().__init__()
        self.drop = 23 - bits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            args = tuple(self.rounded(t) for t in args)
        return func(*args, **(kwargs or {}))

    def rounded(self, t):
        if not isinstance(t, torch.Tensor) or t.dtype != torch.float32:
            return t
        half = 1 << (self.drop - 1)
        return ((t.contiguous().view(torch.int32) + half) & ~(2 * half - 1)).view(torch.float32)


def network(kind):
    torch.manual_seed(0)
    between = nn.ReLU if kind == "relu" else nn.Tanh
    return nn.Sequential(
        nn.Linear(8, 20), between(), nn.Linear(20, 20), between(), nn.Linear(20, 4)
    )


def problem(kind="tanh"):
    model = network(kind)
    draw = torch.Generator().manual_seed(1)
    return model, torch.randn(60, 8, generator=draw), torch.randn(60, 4, generator=draw)


def error_by_differences(model, x, y, cast=None, outside=False):
    """Of a product, against double backward in float64."""
    params = list(model.parameters())
    v = torch.randn(sum(p.numel() for p in params), generator=torch.Generator().manual_seed(2))

    def closure():
        with torch.autocast("cpu", torch.bfloat16, enabled=True) if cast else _plain():
            outputs = model(x)
        return F.mse_loss(outputs.float(), y)

    with torch.autocast("cpu", torch.bfloat16) if outside else _plain():
        operator = GaussNewtonOperator.from_closure(closure, params, engine="finite_differences")
        found = operator(v)
    again = operator(v)
    assert torch.equal(found, again) or not outside
    model.double()
    exact = GaussNewtonOperator.from_closure(
        lambda: F.mse_loss(model(x.double()), y.double()),
        model.parameters(),
        engine="double_backward",
    )(v.double())
    return float((found - exact).norm() / exact.norm())


def _plain():
    return contextlib.nullcontext()


@pytest.mark.parametrize(
    ("kind", "around", "cast", "bound"),
    [
        ("tanh", _plain, None, 1e-4),
        ("relu", _plain, None, 1e-2),
        ("tanh", lambda: Rounded(10), None, 1e-2),
        ("tanh", _plain, "bf16", 1e-2),
        ("relu", _plain, "bf16", 2e-2),
    ],
    ids=["float32", "float32, kinks", "TF32", "autocast", "autocast, kinks"],
)
def test_a_product_is_right_or_refused(kind, around, cast, bound):
    with around():
        error = error_by_differences(*problem(kind), cast)
    assert error < bound


@pytest.mark.parametrize("kind", ["tanh", "relu"])
@pytest.mark.parametrize("bits", [3, 7])
def test_rounding_that_cannot_be_switched_off_is_refused(kind, bits):
    before = torch.get_float32_matmul_precision()
    with Rounded(bits), pytest.raises(RuntimeError, match="lower precision than its tensors have"):
        error_by_differences(*problem(kind))
    assert torch.get_float32_matmul_precision() == before


def test_a_step_that_is_refused_changes_nothing():
    model, x, y = problem()
    before = [p.clone() for p in model.parameters()]

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g

    optimizer = HFOptimizer(model.parameters())
    with Rounded(2), pytest.raises(RuntimeError, match="Finite differences are wrong by about"):
        optimizer.step(lambda: F.mse_loss(Once.apply(model(x)), y))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.step(lambda: F.mse_loss(Once.apply(model(x)), y))
    assert optimizer.last_report.engine == "finite_differences"


def test_a_tangent_that_shows_nothing_chooses_nothing():
    theta, choice = [torch.ones(2)], StepChoice()
    along = CentralDifference(lambda values: [values[0][:1] * 3], theta, choice=choice)
    assert along([torch.tensor([0.0, 1.0])])[0].tolist() == [0.0]
    assert choice.factor is None
    assert math.isclose(float(along([torch.tensor([1.0, 0.0])])[0]), 3.0, rel_tol=1e-4)
    assert choice.factor == 1.0


def test_a_tangent_that_shows_only_rounding_chooses_nothing():
    theta, choice = [torch.ones(1)], StepChoice()
    along = CentralDifference(lambda values: [1e6 + 10 * values[0]], theta, choice=choice)
    along([torch.ones(1)])
    assert choice.factor is None


def test_kinks_are_no_lack_of_precision():
    """Differences of every length disagree, and still the values are exact."""
    theta = [torch.zeros(1)]
    steps = [
        torch.finfo(torch.float32).eps ** (1 / 3) * factor for factor in (1 / 16, 1 / 4, 1, 4, 16)
    ]
    kinks = torch.tensor([1.4 * step for step in steps])
    along = CentralDifference(lambda values: [(values[0] - kinks).abs().sum()], theta)
    assert -5.0 <= float(along([torch.ones(1)])[0]) < -1.0


# --- the settings of torch ---


def settings():
    backends = torch.backends
    owners = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    owners += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    return [owner.fp32_precision for owner in owners]


@contextlib.contextmanager
def kept_settings():
    before, matmul = settings(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        backends = torch.backends
        torch.set_float32_matmul_precision(matmul)
        owners = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        owners += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
        for owner, value in zip(owners, before, strict=True):
            owner.fp32_precision = value


def newer(name, value):
    library, operation = name.split(".")
    return lambda: setattr(
        getattr(getattr(torch.backends, library), operation), "fp32_precision", value
    )


LOWERING = {
    "older, high": lambda: torch.set_float32_matmul_precision("high"),
    "older, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "newer, matmul": newer("cuda.matmul", "tf32"),
    "newer, convolutions off": newer("cudnn.conv", "ieee"),
    "newer, mkldnn": newer("mkldnn.matmul", "bf16"),
    "as it comes": lambda: None,
}


@pytest.mark.filterwarnings("ignore:Please use the new API settings")
@pytest.mark.parametrize("lower", LOWERING.values(), ids=LOWERING)
@pytest.mark.parametrize("device", ["cuda", "cpu", "mps"])
def test_precision_is_full_inside_and_as_it_was_afterwards(lower, device):
    device = torch.device(device)
    with kept_settings():
        lower()
        before, named = settings(), lowered(device)
        with pytest.raises(KeyError), full_precision(device):
            assert lowered(device) == []
            raise KeyError
        assert settings() == before
        assert lowered(device) == named


def test_settings_that_lower_precision_are_named_as_they_are_written():
    with kept_settings():
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        found = lowered(torch.device("cuda"))
    assert "torch.backends.cuda.matmul.fp32_precision = 'tf32'" in found
    assert "torch.backends.cudnn.conv.fp32_precision = 'tf32'" in found
