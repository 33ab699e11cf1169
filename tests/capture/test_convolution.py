"""The convolution's own rule against autograd's: outputs, gradients, second order, tangents."""

from dataclasses import dataclass

import pytest
import torch
from basics import normal
from reference import dense_gauss_newton, dense_hessian, flat
from torch import nn
from torch.autograd import grad
from torch.autograd.gradcheck import gradgradcheck
from torch.func import functional_call
from torch.nn import functional as F

from torch_hf.capture.capture import Capture
from torch_hf.capture.convolution import convolve, has_rule
from torch_hf.capture.tangents import tangents_only
from torch_hf.curvature import GaussNewtonOperator, HessianOperator


def assert_same(found, truth, rtol=1e-10):
    found, truth = flat(found), flat(truth)
    assert truth.norm() > 0
    assert torch.linalg.norm(found - truth) <= rtol * torch.linalg.norm(truth)


@dataclass(frozen=True)
class Geometry:
    dims: int
    size: tuple[int, ...]  # of the input
    kernel: tuple[int, ...]
    channels: tuple[int, int] = (2, 3)
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    bias: bool = True

    def arguments(self):
        n_in, n_out = self.channels
        x = normal(1, 2, n_in, *self.size).requires_grad_()
        weight = normal(2, n_out, n_in // self.groups, *self.kernel).requires_grad_()
        bias = normal(3, n_out).requires_grad_() if self.bias else None
        return x, weight, bias

    def settings(self):
        return (self.stride, self.padding, self.dilation, self.groups)

    def truth(self, *arguments):
        function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[self.dims]
        return function(*arguments, *self.settings())

    def ours(self, *arguments):
        return convolve(*arguments, *self.settings())


GEOMETRIES = {
    "1d": Geometry(1, (5,), (2,)),
    "1d everything": Geometry(1, (7,), (2,), (2, 4), 2, 1, 2, 2),
    "2d": Geometry(2, (3, 4), (2, 2)),
    "2d no bias": Geometry(2, (3, 3), (2, 2), bias=False),
    "2d strides": Geometry(2, (5, 4), (2, 2), stride=2),  # not all of the input is read
    "2d strides of two": Geometry(2, (4, 5), (2, 2), stride=(1, 2)),
    "2d padding": Geometry(2, (3, 2), (2, 3), padding=(0, 1)),
    "2d dilation": Geometry(2, (4, 3), (2, 2), dilation=(2, 1)),
    "2d groups": Geometry(2, (3, 3), (2, 2), (4, 2), groups=2),
    "2d depthwise": Geometry(2, (3, 3), (2, 2), (2, 4), groups=2, bias=False),
    "2d everything": Geometry(2, (5, 4), (2, 2), (2, 4), (2, 1), 1, (1, 2), 2),
    "2d pointwise": Geometry(2, (2, 2), (1, 1)),
    "3d": Geometry(3, (2, 3, 2), (2, 2, 1)),
    "3d everything": Geometry(3, (3, 2, 3), (1, 2, 2), (2, 2), (2, 1, 1), 1, 1, 2, False),
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
FROZEN = {"none": (), "input": (0,), "weight": (1,), "bias": (2,), "input and bias": (0, 2)}
every_frozen = pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)


def _arguments(geometry, frozen=()):
    arguments = geometry.arguments()
    for i in frozen:
        if arguments[i] is not None:
            arguments[i].requires_grad_(False)
    return arguments, [t for t in arguments if t is not None and t.requires_grad]


def _replaced(function, arguments, values):
    values = iter(values)
    return function(*(next(values) if t is not None and t.requires_grad else t for t in arguments))


@every_geometry
@every_frozen
def test_output_and_gradient(geometry, frozen):
    arguments, active = _arguments(geometry, frozen)
    truth, found = geometry.truth(*arguments), geometry.ours(*arguments)
    cotangent = normal(4, *truth.shape)
    assert_same(found, truth)
    assert_same(grad(found, active, cotangent), grad(truth, active, cotangent))


@every_geometry
@every_frozen
def test_second_order_is_autograds(geometry, frozen):
    arguments, active = _arguments(geometry, frozen)
    found = []
    for function in (geometry.truth, geometry.ours):
        out = function(*arguments)
        cotangent = normal(4, *out.shape).requires_grad_()
        slopes = grad(out, active, cotangent, create_graph=True)
        weights = [normal(5 + i, *t.shape) for i, t in enumerate(slopes)]
        curved = [(s, w) for s, w in zip(slopes, weights, strict=True) if s.requires_grad]
        inputs = [cotangent, *active]
        slopes, weights = zip(*curved, strict=True)
        found.append(grad(slopes, inputs, weights, allow_unused=True, materialize_grads=True))
    assert_same(found[1], found[0])


@every_geometry
@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
def test_double_backward_by_differences(geometry, frozen):
    arguments, active = _arguments(geometry, frozen)

    def function(*values):
        return _replaced(geometry.ours, arguments, values)

    assert gradgradcheck(function, active, fast_mode=True)


@every_geometry
def test_third_order_is_autograds(geometry):
    found = []
    for function in (geometry.truth, geometry.ours):
        arguments, active = _arguments(geometry)
        first = grad(function(*arguments).pow(3).sum(), active, create_graph=True)
        second = grad(sum(g.pow(2).sum() for g in first), active, create_graph=True)
        found.append(grad(sum(g.square().sum() for g in second), active))
    assert_same(found[1], found[0])


@every_geometry
@every_frozen
def test_tangents_are_autograds(geometry, frozen):
    arguments, active = _arguments(geometry, frozen)
    tangents = [normal(5 + i, *t.shape) for i, t in enumerate(active)]
    _, truth = torch.autograd.functional.jvp(
        lambda *values: _replaced(geometry.truth, arguments, values), tuple(active), tuple(tangents)
    )
    out = geometry.ours(*arguments)
    cotangent = torch.zeros_like(out, requires_grad=True)
    slopes = grad(out, active, cotangent, create_graph=True)
    with tangents_only():
        (found,) = grad(slopes, cotangent, tangents, retain_graph=True)
    assert_same(found, truth)
    for slope, tangent, t in zip(slopes, tangents, active, strict=True):  # and one at a time
        with tangents_only():
            (alone,) = grad(slope, cotangent, tangent, retain_graph=True)
        _, truth = torch.autograd.functional.jvp(
            lambda value, t=t: _replaced(
                geometry.truth, arguments, [value if a is t else a for a in active]
            ),
            t,
            tangent,
        )
        assert_same(alone, truth)


def test_tangents_only_ends_with_its_block_also_on_an_error():
    x, weight, _ = GEOMETRIES["2d"].arguments()
    with pytest.raises(ZeroDivisionError), tangents_only():
        _ = 1 / 0
    out = convolve(x, weight)
    (slope,) = grad(out.square().sum(), x, create_graph=True)
    assert grad(slope.sum(), weight)[0].any()


# In a closure


class _Double(nn.Module):
    """Convolutions one on another, of every dimension there is a rule for."""

    def __init__(self, dims):
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.first, self.last = kind(1, 2, 2), kind(2, 2, 1, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def _problem(dims):
    torch.manual_seed(0)
    model = _Double(dims).double()
    x = normal(1, 2, 1, *[3] * dims)
    return model, x, normal(2, *model(x).shape)


def _dense(operator, numel):
    return torch.stack([operator(column) for column in torch.eye(numel).double()], dim=1)


def _functional(model, x):
    names = [name for name, _ in model.named_parameters()]
    return lambda params, x=x: functional_call(model, dict(zip(names, params, strict=True)), x)


def _penalty_outputs(model, x, squared):
    """Outputs of a loss with a gradient penalty, as a function of the parameters."""
    network = _functional(model, x)

    def outputs(params):
        def total(x):
            z = network(params, x)
            return (z.square() if squared else z).sum()

        return network(params), torch.func.grad(total)(x)

    return outputs


def _penalty_closure(model, x, y, squared):
    def closure():
        points = x.clone().requires_grad_()
        z = model(points)
        total = (z.square() if squared else z).sum()
        (slope,) = torch.autograd.grad(total, points, create_graph=True)
        return F.mse_loss(z, y) + 0.1 * (slope**2).mean()

    return closure


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("engine", ["auto", "double_backward"])
def test_gauss_newton_of_a_loss_that_differentiates_inside(dims, squared, engine):
    model, x, y = _problem(dims)
    params = [p.detach().clone() for p in model.parameters()]
    truth = dense_gauss_newton(
        _penalty_outputs(model, x, squared),
        lambda z, slope: F.mse_loss(z, y) + 0.1 * slope.square().mean(),
        params,
    )
    closure = _penalty_closure(model, x, y, squared)
    operator = GaussNewtonOperator.from_closure(closure, model.parameters(), engine)
    assert operator.engine == ("tangent_rules" if engine == "auto" else engine)
    assert_same(_dense(operator, len(truth)), truth)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("squared", [False, True])
def test_gradient_and_hessian_of_a_loss_that_differentiates_inside(dims, squared):
    model, x, y = _problem(dims)
    params = [p.detach().clone() for p in model.parameters()]
    outputs = _penalty_outputs(model, x, squared)

    def loss_fn(params):
        z, slope = outputs(params)
        return F.mse_loss(z, y) + 0.1 * slope.square().mean()

    own = list(model.parameters())
    record = Capture(own, tangent_rules=True).run(_penalty_closure(model, x, y, squared))
    assert record.has_tangent_rules
    loss = record.returned
    assert_same(loss.detach(), loss_fn(params))
    assert_same(grad(loss, own, retain_graph=True), list(torch.func.grad(loss_fn)(params)))
    truth = dense_hessian(loss_fn, params)
    assert_same(_dense(HessianOperator(loss, own), len(truth)), truth)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gauss_newton_of_a_network_of_convolutions(dims):
    model, x, y = _problem(dims)
    params = [p.detach().clone() for p in model.parameters()]
    network = _functional(model, x)
    truth = dense_gauss_newton(network, lambda z: F.mse_loss(z, y), params)
    operator = GaussNewtonOperator.from_closure(lambda: F.mse_loss(model(x), y), model.parameters())
    assert operator.engine == "tangent_rules"
    assert_same(_dense(operator, len(truth)), truth)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.conv2d(x[0], w),  # one image, without a leading dimension
        lambda x, w: F.conv2d(x, w, padding="same"),
        lambda x, w: F.conv2d(x, w, None, 1, "valid"),
        lambda x, w: F.conv2d(input=x, weight=w, padding=1),
        lambda x, w: F.conv2d(x, weight=w, stride=(2, 1)),
        lambda x, w: torch.conv2d(x, w, stride=[2]),
        lambda x, w: F.conv2d(x, w, None, (1,), (1,), (1,), 1),
        lambda x, w: F.conv_transpose2d(x, w.transpose(0, 1)),
    ],
)
def test_every_way_to_call_a_convolution_gives_torchs_result(call):
    x, weight, _ = Geometry(2, (4, 4), (3, 3)).arguments()
    truth = call(x, weight)
    record = Capture([weight], tangent_rules=True).run(lambda: call(x, weight))
    assert_same(record.returned, truth)
    cotangent = normal(4, *truth.shape)
    found = grad(record.returned, [x, weight], cotangent)
    assert_same(found, grad(truth, [x, weight], cotangent))


def test_the_rule_stands_aside_where_it_does_not_apply():
    x, weight, _ = GEOMETRIES["2d"].arguments()
    assert has_rule("conv2d", (x, weight), {})
    assert not has_rule("conv1d", (x, weight), {})
    assert not has_rule("conv2d", (x.float(), weight), {})
    assert not has_rule("conv2d", (x, weight), {"padding": "same"})
    with torch.no_grad():
        assert not has_rule("conv2d", (x, weight), {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not has_rule("conv2d", (x, weight), {})


def test_single_precision_stays():
    x, weight, bias = (t.detach().float().requires_grad_() for t in GEOMETRIES["2d"].arguments())
    out = convolve(x, weight, bias)
    assert out.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in grad(out.sum(), [x, weight, bias]))
