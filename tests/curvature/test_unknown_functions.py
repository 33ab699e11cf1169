"""Functions that autograd does not see through: right products, or an error that names one."""

import warnings

import pytest
import torch
from basics import assert_same, normal
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.curvature import GaussNewtonOperator, HessianOperator
from torch_hf.curvature.unknown_functions import agree, belong_together

pytestmark = pytest.mark.usefixtures("seeded")
X, Y = normal(1, 12, 4), normal(2, 12, 2)


def silu_slope(x):
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


class InNumpy(torch.autograd.Function):
    """All is detached."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x.detach())

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * silu_slope(x.detach()).numpy())


class NeedsDetached(InNumpy):
    """``numpy()`` of what requires a gradient is an error."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.numpy() * silu_slope(x.detach()).numpy())


class SlopeDetached(InNumpy):
    """The gradient is seen, the saved input is not: J v is right, H v is not."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * silu_slope(x.detach())


class Once(InNumpy):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * silu_slope(x)


class Visible(InNumpy):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * silu_slope(x)


@torch.library.custom_op("torch_hf_tests::silu", mutates_args=())
def silu_op(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x)


@torch.library.custom_op("torch_hf_tests::silu_backward", mutates_args=())
def silu_backward_op(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return g * silu_slope(x)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _op_backward(ctx, g):
    (x,) = ctx.saved_tensors
    return torch.from_numpy(g.detach().numpy() * silu_slope(x.detach()).numpy())


silu_op.register_autograd(_op_backward, setup_context=_save)

#: A function, and whether J v and H v are right by autograd alone.
KERNELS = {
    "numpy": (InNumpy.apply, False, False),
    "numpy of a gradient": (NeedsDetached.apply, False, False),
    "custom op": (silu_op, False, False),
    "slope detached": (SlopeDetached.apply, True, False),
    "once": (Once.apply, False, False),
    "visible": (Visible.apply, True, True),
}
WAYS = {
    "plain": lambda f, z: f(z),
    "residual": lambda f, z: z + f(z),
    "beside": lambda f, z: torch.cat([f(z[:, :3]), F.silu(z[:, 3:])], 1),
    "weak": lambda f, z: z + 1e-3 * f(z),
}


def network(f, way):
    torch.manual_seed(3)
    first, last = nn.Linear(4, 6).double(), nn.Linear(6, 2).double()
    params = [*first.parameters(), *last.parameters()]
    return params, lambda: last(WAYS[way](f, first(X)))


def dense(operator, params):
    eye = torch.eye(sum(p.numel() for p in params), dtype=torch.float64)
    return torch.stack([operator(e) for e in eye], dim=1)


def gauss_newton(f, way, engine="auto"):
    params, model = network(f, way)
    operator = GaussNewtonOperator.from_closure(lambda: F.mse_loss(model(), Y), params, engine)
    return operator, dense(operator, params)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KERNELS)
def test_gauss_newton_products_are_right(name, way):
    f, by_autograd, _ = KERNELS[name]
    operator, found = gauss_newton(f, way)
    assert (operator.engine == "finite_differences") == (not by_autograd)
    assert_same(found, gauss_newton(F.silu, way)[1], 1e-12 if by_autograd else 1e-8)


@pytest.mark.parametrize("name", [k for k, kernel in KERNELS.items() if not kernel[1]])
def test_an_engine_without_differences_is_an_error_that_names_the_function(name):
    with pytest.raises(RuntimeError, match=r"InNumpy|NeedsDetached|silu|once_diff"):
        gauss_newton(KERNELS[name][0], "residual", "double_backward")


@pytest.mark.parametrize("name", ["numpy", "custom op"])
def test_an_operator_without_a_closure_names_the_function(name):
    params, model = network(KERNELS[name][0], "residual")
    z = model()
    loss = F.mse_loss(z, Y)
    with pytest.raises(RuntimeError, match=r"InNumpy|silu"):
        GaussNewtonOperator(loss, z, params)
    with pytest.raises(RuntimeError, match=r"InNumpy|silu"):
        HessianOperator(loss, params)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_a_step_is_that_of_torchs_own_function(name, way, curvature):
    runs = []
    for f in (KERNELS[name][0], F.silu):
        params, model = network(f, way)
        optimizer = HFOptimizer(
            params, curvature=curvature, cg_max_iter=3, preconditioner="none", damping=1.0
        )
        for _ in range(2):
            optimizer.step(lambda model=model: F.mse_loss(model(), Y))
        runs.append((torch.cat([p.detach().reshape(-1) for p in params]), optimizer.last_report))
    (found, report), (truth, _) = runs
    by_autograd = KERNELS[name][2 if curvature == "hessian" else 1]
    if way != "weak" or curvature == "ggn":  # what is too small to be seen is too small to matter
        assert (report.engine != "finite_differences") == by_autograd
    assert_same(found, truth, 1e-4 if way == "weak" else 1e-6)


class FusedLoss(torch.autograd.Function):
    """The gradient is computed in the forward pass, as fused cross-entropy kernels do."""

    @staticmethod
    def forward(ctx, z, y):
        z = z.detach()
        ctx.save_for_backward(torch.softmax(z, 1) - torch.softmax(y, 1))
        return F.cross_entropy(z, torch.softmax(y, 1), reduction="sum")

    @staticmethod
    def backward(ctx, g):
        (slope,) = ctx.saved_tensors
        return g * slope, None


class SquaredLoss(FusedLoss):
    @staticmethod
    def forward(ctx, z, y):
        ctx.save_for_backward(z, y)
        return (z.detach() - y).square().sum()

    @staticmethod
    def backward(ctx, g):
        z, y = ctx.saved_tensors
        return g * 2 * (z - y), None


class PartlySeen(SquaredLoss):
    @staticmethod
    def backward(ctx, g):
        z, y = ctx.saved_tensors
        return g * 2 * (0.5 * z + 0.5 * z.detach() - y), None


@pytest.mark.parametrize(
    ("loss", "right"), [(FusedLoss, False), (PartlySeen, False), (SquaredLoss, True)]
)
@pytest.mark.parametrize("kernel", ["visible", "numpy"])
def test_a_loss_of_ones_own(loss, right, kernel):
    params, model = network(KERNELS[kernel][0], "plain")

    def closure():
        z = model()
        return loss.apply(z, Y), z

    if not right:
        with pytest.raises(RuntimeError, match=f"{loss.__name__}.*curvature="):
            GaussNewtonOperator.from_closure(closure, params)
        return
    found = dense(GaussNewtonOperator.from_closure(closure, params), params)
    params, model = network(F.silu, "plain")
    truth = GaussNewtonOperator.from_closure(lambda: (model() - Y).square().sum(), params)
    assert_same(found, dense(truth, params), 1e-8)


class Quantized(InNumpy):
    """Straight through: the backward is that of another function, yet autograd sees it."""

    @staticmethod
    def forward(ctx, x):
        return x.detach().mul(4).round().div(4)

    @staticmethod
    def backward(ctx, g):
        return g


class QuantizedInNumpy(Quantized):
    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.detach().numpy().copy())


def test_a_backward_of_another_function_is_taken_at_its_word_or_named():
    operator, found = gauss_newton(Quantized.apply, "plain")
    assert operator.engine != "finite_differences"
    assert_same(found, found.T, 1e-12)
    with pytest.raises(RuntimeError, match="QuantizedInNumpy must be the derivative"):
        gauss_newton(QuantizedInNumpy.apply, "plain")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 300])
def test_what_autograd_sees_is_never_doubted(dtype, width):
    """Rounding, a bias before normalisation and dead units do not look like a lost part."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
    )
    head = nn.Linear(width, 3)
    x, y = torch.randn(200, 4).to(dtype), torch.randint(3, (200,))
    model, head = model.to(dtype), head.to(dtype)
    params = [*model.parameters(), *head.parameters()]
    operator = GaussNewtonOperator.from_closure(
        lambda: F.cross_entropy(head(Visible.apply(model(x))), y), params
    )
    assert operator.engine != "finite_differences"


def test_nothing_is_paid_without_such_a_function(monkeypatch):
    calls = []
    params, model = network(F.silu, "plain")
    monkeypatch.setattr(
        "torch_hf.curvature.products.belong_together", lambda *_: calls.append(1) or True
    )
    GaussNewtonOperator.from_closure(lambda: F.mse_loss(model(), Y), params)
    assert not calls
    params, model = network(Visible.apply, "plain")
    GaussNewtonOperator.from_closure(lambda: F.mse_loss(model(), Y), params)
    assert len(calls) == 1


def test_no_warning_is_given():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gauss_newton(InNumpy.apply, "residual")


@pytest.mark.parametrize(
    ("second", "found", "fits"),
    [
        (1e-6, 2e-6, True),  # beside the whole it is rounding
        (0.3, 0.6, False),
        (0.3, 0.30001, True),
        (0.3, None, False),
    ],
)
def test_products_agree_in_each_tensor_but_for_those_that_are_nothing(second, found, fits):
    truth = [torch.ones(4, dtype=torch.float64), torch.full((4,), second, dtype=torch.float64)]
    other = None if found is None else torch.full((4,), found, dtype=torch.float64)
    assert agree([truth[0].clone(), other], truth) is fits


@pytest.mark.parametrize(("wrong_by", "fits"), [(0.0, True), (1e-9, True), (0.1, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_with_one_matrix_belong_together(wrong_by, fits, dtype):
    J = normal(3, 5, 4).to(dtype)
    params, outputs = [torch.zeros(4, dtype=dtype)], [torch.zeros(5, dtype=dtype)]
    push = lambda v: [(1 + wrong_by) * (J @ v[0])]  # noqa: E731
    assert belong_together(push, lambda u: [J.T @ u[0]], outputs, params) is fits
