"""Losses as people write them: convex with the exact matrix, or refused in words that help."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from reference import dense_gauss_newton
from torch import Tensor, nn
from torch import distributions as dist
from torch.func import functional_call, vmap
from torch.nn import functional as F

from torch_hf import HFOptimizer, diagnose
from torch_hf.curvature import GaussNewtonOperator

_generator = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


X, Y = _normal(6, 3), _normal(6, 3)
ONE = torch.ones((), dtype=torch.float64)
SIGNS = Y.sign()
BITS = (Y > 0).double()
COUNTS = (3 * _normal(6, 3).abs()).round()
CLASSES = torch.tensor([0, 2, 1, 1, 0, 2])
ONE_HOT = F.one_hot(CLASSES, 3).double()
WEIGHTS = _normal(6, 3).exp()
ROOT = _normal(3, 3)
METRIC = ROOT @ ROOT.T
INDEFINITE = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))
PAIRED = _normal(6, 3)
START = [_normal(3, 3), _normal(3, 6)]
PLACES = torch.arange(6)

Params = list[Tensor]
Loss = Callable[[Tensor], Tensor]


def real(params: Params) -> Tensor:
    return torch.tanh(X @ params[0]) @ params[1][:, :3]


def pairs(params: Params) -> Tensor:
    return (torch.tanh(X @ params[0]) @ params[1]).view(6, 3, 2)


def found(loss: Callable[[Params], Tensor]) -> Tensor:
    params = [nn.Parameter(p.clone()) for p in START]
    operator = GaussNewtonOperator.from_closure(lambda: loss(params), params)
    return torch.stack([operator(e) for e in torch.eye(27, dtype=torch.float64)], dim=1)


def assert_exact(matrix: Tensor, truth: Tensor) -> None:
    """The dense matrix, and no negative eigenvalue beyond rounding."""
    assert truth.norm() > 1e-6
    assert torch.linalg.norm(matrix - truth) <= 1e-9 * truth.norm()
    assert torch.linalg.eigvalsh((matrix + matrix.T) / 2).min() >= -1e-10 * truth.norm()


def _einsum(z: Tensor) -> Tensor:
    return torch.einsum("bi,ij,bj->b", z - Y, METRIC, z - Y).mean()


def _largest_subtracted(z: Tensor) -> Tensor:
    top = z.amax(1, keepdim=True)
    return ((z - top).exp().sum(1).log() + top[:, 0] - z[PLACES, CLASSES]).mean()


CONVEX: dict[str, Loss] = {
    "rmse": lambda z: F.mse_loss(z, Y).sqrt(),
    "rmse-eps": lambda z: torch.sqrt(F.mse_loss(z, Y) + 1e-8),
    "rmse-by_hand": lambda z: ((z - Y) ** 2).mean() ** 0.5,
    "rmse-of_columns": lambda z: (z - Y).square().mean(0).sqrt().mean(),
    "rmse-weighted": lambda z: ((WEIGHTS * (z - Y) ** 2).sum() / WEIGHTS.sum()).sqrt(),
    "rmse_and_mse": lambda z: F.mse_loss(z, Y).sqrt() + 0.1 * F.mse_loss(z, Y),
    "charbonnier": lambda z: ((z - Y) ** 2 + 1e-6).sqrt().mean(),
    "charbonnier-scaled": lambda z: (torch.sqrt(1 + ((z - Y) / 0.5) ** 2) - 1).mean(),
    "charbonnier-power": lambda z: ((z - Y) ** 2 + 0.01).pow(0.75).mean(),
    "logsumexp-gather": lambda z: (z.logsumexp(1) - z.gather(1, CLASSES[:, None])[:, 0]).mean(),
    "logsumexp-index": lambda z: (torch.logsumexp(z, -1) - z[PLACES, CLASSES]).sum(),
    "logsumexp-one_hot": lambda z: (z.logsumexp(1) - (z * ONE_HOT).sum(1)).mean(),
    "logsumexp-einsum": lambda z: (z.logsumexp(1) - torch.einsum("ij,ij->i", z, ONE_HOT)).mean(),
    "logsumexp-normalised": lambda z: -(z - z.logsumexp(1, keepdim=True))[PLACES, CLASSES].mean(),
    "log_of_sum_of_exp": lambda z: (z.exp().sum(1).log() - z[PLACES, CLASSES]).mean(),
    "largest_subtracted": _largest_subtracted,
    "Categorical": lambda z: -dist.Categorical(logits=z).log_prob(CLASSES).mean(),
    "OneHotCategorical": lambda z: -dist.OneHotCategorical(logits=z).log_prob(ONE_HOT).mean(),
    "Bernoulli": lambda z: -dist.Bernoulli(logits=z).log_prob(BITS).mean(),
    "Binomial": lambda z: -dist.Binomial(3, logits=z).log_prob(2 * BITS).mean(),
    "Normal": lambda z: -dist.Normal(z, WEIGHTS).log_prob(Y).mean(),
    "Poisson": lambda z: -dist.Poisson(z.exp()).log_prob(COUNTS).mean(),
    "cox": lambda z: (z[:, 0].logcumsumexp(0) - z[:, 0]).mul(BITS[:, 0]).mean(),
    "cox-flipped": lambda z: -(z[:, 0] - z[:, 0].flip(0).logcumsumexp(0).flip(0)).mean(),
    "cox-by_hand": lambda z: (z[:, 0].exp().cumsum(0).log() - z[:, 0]).mean(),
    "plackett_luce": lambda z: (z.flip(1).logcumsumexp(1).flip(1) - z).sum(1).mean(),
    "softplus": lambda z: F.softplus(-SIGNS * z).mean(),
    "logsigmoid": lambda z: -F.logsigmoid(SIGNS * z).mean(),
    "log1p_exp": lambda z: torch.log1p(torch.exp(-SIGNS * z)).mean(),
    "log_1_exp": lambda z: torch.log(1 + torch.exp(-SIGNS * z)).mean(),
    "logistic": lambda z: (F.softplus(z) - BITS * z).mean(),
    "logistic-stable": lambda z: (
        z.clamp(min=0) - z * BITS + torch.log1p(torch.exp(-z.abs()))
    ).mean(),
    "pairwise": lambda z: -F.logsigmoid(z[:, 0] - z[:, 1]).mean(),
    "probit": lambda z: -torch.special.log_ndtr(SIGNS * z).mean(),
    "poisson": lambda z: (z.exp() - COUNTS * z).mean(),
    "xlogy": lambda z: (z.exp() - torch.xlogy(COUNTS, z.exp())).mean(),
    "exp": lambda z: z.exp().mean(),
    "linex": lambda z: ((z - Y).exp() - (z - Y) - 1).mean(),
    "log_cosh": lambda z: torch.log(torch.cosh(z - Y)).mean(),
    "log_cosh-stable": lambda z: (z - Y + F.softplus(-2 * (z - Y)) - math.log(2)).mean(),
    "logaddexp": lambda z: torch.logaddexp(z - Y, Y - z).mean(),
    "logaddexp-zero": lambda z: torch.logaddexp(0 * ONE, -SIGNS * z).mean(),
    "quadratic-cases": lambda z: sum((a - y) @ METRIC @ (a - y) for a, y in zip(z, Y, strict=True)),
    "quadratic-rows": lambda z: ((z - Y) @ METRIC * (z - Y)).sum(1).mean(),
    "quadratic-einsum": _einsum,
    "quadratic-bilinear": lambda z: F.bilinear(z - Y, z - Y, METRIC[None]).mean(),
    "quadratic-trace": lambda z: torch.trace((z - Y) @ METRIC @ (z - Y).T),
    "quadratic-root": lambda z: torch.sqrt(((z - Y) @ METRIC * (z - Y)).sum(1) + 1e-3).mean(),
    "dot-views": lambda z: (z - Y).flatten() @ (z - Y).flatten(),
    "fourth_power": lambda z: ((z - Y) ** 4).mean(),
    "sixth_power": lambda z: (z - Y).pow(6).sum(),
    "power_of_modulus": lambda z: (z - Y).abs().pow(1.5).mean(),
    "norm-p": lambda z: (z - Y).norm(p=3, dim=1).mean(),
    "squared_hinge": lambda z: (1 - SIGNS * z).clamp(min=0).pow(2).mean(),
    "cubed_hinge": lambda z: F.relu(1 - SIGNS * z).pow(3).mean(),
    "perplexity": lambda z: F.cross_entropy(z, CLASSES).exp(),
    "std_and_exp": lambda z: (z - Y).std() + z.exp().mean(),
    "power_of_2": lambda z: (2**z).mean(),
    "sum": lambda z: F.softplus(z).mean() + 0.3 * ((z - Y) ** 4).mean() - 0.1 * z.mean(),
    "vmap-mse": lambda z: vmap(F.mse_loss)(z, Y).mean(),
    "vmap-mse-columns": lambda z: vmap(F.mse_loss, in_dims=1)(z, Y).mean(),
    "vmap-squares": lambda z: vmap(lambda a, y: (a - y).square().sum())(z, Y).mean(),
    "vmap-cross_entropy": lambda z: vmap(F.cross_entropy)(z, CLASSES).mean(),
    "vmap-bce_with_logits": lambda z: vmap(F.binary_cross_entropy_with_logits)(z, BITS).mean(),
    "vmap-huber": lambda z: vmap(F.huber_loss)(z, Y).mean(),
    "vmap-rmse": lambda z: vmap(lambda a, y: F.mse_loss(a, y).sqrt())(z, Y).mean(),
    "vmap-vmap": lambda z: vmap(vmap(lambda a, y: (a - y) ** 2))(z, Y).mean(),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the dense truth
@pytest.mark.parametrize("name", CONVEX)
def test_a_convex_loss_has_the_exact_matrix(name):
    loss = CONVEX[name]
    assert_exact(found(lambda p: loss(real(p))), dense_gauss_newton(real, loss, START))


def test_similarities_of_two_encoders_are_outputs():
    def similarities(params):
        return (X @ params[0]).tanh() @ (PAIRED @ params[1][:, :3]).tanh().T

    def loss(s):
        return (s.logsumexp(1) - s.diagonal()).mean()

    truth = dense_gauss_newton(similarities, loss, START)
    assert_exact(found(lambda p: loss(similarities(p))), truth)


def _fourier(r: Tensor) -> Tensor:
    return (torch.fft.fft(r).abs() ** 2).mean()


COMPLEX: dict[str, Loss] = {
    "abs-pow": lambda r: (r.abs() ** 2).mean(),
    "abs-square": lambda r: r.abs().square().sum(1).mean(),
    "abs-weighted": lambda r: (WEIGHTS * r.abs() ** 2).sum(),
    "vdot": lambda r: torch.vdot(r.flatten(), r.flatten()).real,
    "vecdot": lambda r: torch.linalg.vecdot(r, r).real.mean(),
    "conj-times": lambda r: (r.conj() * r).real.mean(),
    "times-conj": lambda r: (r * torch.conj(r)).sum().abs(),
    "parts": lambda r: (r.real**2 + r.imag**2).mean(),
    "abs": lambda r: r.abs().mean(),
    "abs-fourth": lambda r: r.abs().pow(4).mean(),
    "rms": lambda r: (r.abs() ** 2).mean().sqrt(),
    "charbonnier": lambda r: (r.abs() ** 2 + 0.01).sqrt().mean(),
    "norm": lambda r: torch.linalg.norm(r) ** 2,
    "norm-of_rows": lambda r: r.norm(dim=1).square().mean(),
    "fourier": _fourier,
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_residuals_curve_in_both_parts(name):
    target = torch.complex(Y, PAIRED)

    def loss(z):
        return COMPLEX[name](torch.view_as_complex(z) - target)

    assert_exact(found(lambda p: loss(pairs(p))), dense_gauss_newton(pairs, loss, START))


def _penalty(params: Params) -> Tensor:
    return sum(p.square().sum() for p in params)


def _vmapped_sine(z: Tensor) -> Tensor:
    return vmap(lambda a, y: F.mse_loss(a, y).sin())(z, Y).mean()


class Refused(NamedTuple):
    """A loss that is not convex in z, or has no curvature, and what is said of it."""

    loss: Loss
    says: str
    penalty: bool = False


UNPROVED, FLAT = "could not be proved convex|not a sum of torch's", "first-order optimizer"
REFUSED = {
    "negative_mse": Refused(lambda z: -F.mse_loss(z, Y), "negative weight"),
    "negative_rmse": Refused(lambda z: -F.mse_loss(z, Y).sqrt(), UNPROVED),
    "negative_exp": Refused(lambda z: -z.exp().mean(), UNPROVED),
    "both_signs": Refused(lambda z: (SIGNS * z.exp()).mean(), UNPROVED),
    "indefinite_form": Refused(lambda z: ((z - Y) @ INDEFINITE * (z - Y)).sum(), UNPROVED),
    "third_power": Refused(lambda z: (z**3).mean(), UNPROVED),
    "cauchy": Refused(lambda z: torch.log(1 + (z - Y) ** 2).mean(), UNPROVED),
    "welsch": Refused(lambda z: (1 - (-((z - Y) ** 2)).exp()).mean(), UNPROVED),
    "root_below_0": Refused(lambda z: torch.sqrt((z - Y) ** 2 - 1e-12).mean(), UNPROVED),
    "smaller_square": Refused(lambda z: torch.minimum(z**2, (z - Y) ** 2).mean(), UNPROVED),
    "convex_and_sine": Refused(lambda z: z.exp().mean() + z.sin().mean(), UNPROVED),
    "moving_target": Refused(lambda z: F.kl_div(z.log_softmax(1), z.flip(0).softmax(1)), "target"),
    "penalty_and_sine": Refused(
        lambda z: z.sin().mean(), "only convex term.*penalty", penalty=True
    ),
    "penalty_and_product": Refused(lambda z: (z[0] * z[1]).mean(), "return loss", penalty=True),
    "penalty_and_l1": Refused(lambda z: F.l1_loss(z, Y), FLAT, penalty=True),
    "l1_loss": Refused(lambda z: F.l1_loss(z, Y), FLAT),
    "mean_absolute": Refused(lambda z: (z - Y).abs().mean(), FLAT),
    "percentage": Refused(lambda z: ((Y - z) / Y).abs().mean(), FLAT),
    "hinge": Refused(lambda z: (1 - SIGNS * z).clamp(min=0).mean(), FLAT),
    "hinge-relu": Refused(lambda z: F.relu(1 - SIGNS * z).sum(), FLAT),
    "pinball": Refused(lambda z: torch.maximum(0.9 * (Y - z), 0.1 * (z - Y)).mean(), FLAT),
    "pinball-where": Refused(
        lambda z: torch.where(z < Y, 0.9 * (Y - z), 0.1 * (z - Y)).mean(), FLAT
    ),
    "largest_error": Refused(lambda z: (z - Y).abs().max(), FLAT),
    "linear": Refused(lambda z: z.mean(), FLAT),
    "vmap-sine": Refused(_vmapped_sine, "torch.func.vmap"),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proved_convex_is_refused(name):
    row = REFUSED[name]
    params = [nn.Parameter(p.clone()) for p in START]

    def closure():
        loss = row.loss(real(params))
        return loss + 0.1 * _penalty(params) if row.penalty else loss

    with pytest.raises(RuntimeError, match=f"(?s)No Gauss-Newton split.*({row.says})"):
        HFOptimizer(params).step(closure)
    assert all(torch.equal(p, q) for p, q in zip(params, START, strict=True))


def test_naming_the_outputs_of_a_loss_without_curvature_ends_the_search_too():
    params = [nn.Parameter(p.clone()) for p in START]

    def closure():
        z = real(params)
        return (z - Y).abs().mean(), z

    with pytest.raises(RuntimeError, match=FLAT):
        HFOptimizer(params).step(closure)


def test_maximize_takes_a_loss_as_it_is():
    params = [nn.Parameter(p.clone()) for p in START]
    optimizer = HFOptimizer(params, maximize=True)
    first = float(optimizer.step(lambda: F.mse_loss(real(params), Y)))
    assert optimizer.last_report.new_loss < -first


def test_vmap_over_the_whole_model():
    model = nn.Linear(3, 3).double()
    parts = dict(model.named_parameters())

    def each(x, y):
        return F.mse_loss(functional_call(model, parts, (x,)), y)

    params = list(model.parameters())
    inside = GaussNewtonOperator.from_closure(lambda: vmap(each)(X, Y).mean(), params)
    plain = GaussNewtonOperator.from_closure(lambda: F.mse_loss(model(X), Y), params)
    v = _normal(12)
    torch.testing.assert_close(inside(v), plain(v))


# Closures that a step cannot run again


class Stale(NamedTuple):
    """A closure's return value, of what was computed before: a loss and outputs."""

    value: Callable[[Tensor, Tensor], object]
    what: str


STALE = {
    "loss": Stale(lambda loss, z: loss, "a loss"),
    "loss-scaled": Stale(lambda loss, z: 2 * loss + 1, "a loss"),
    "loss-outputs": Stale(lambda loss, z: (loss, z), "a loss"),
    "outputs": Stale(lambda loss, z: F.mse_loss(z, Y), "outputs"),
    "outputs-softplus": Stale(lambda loss, z: F.softplus(z).mean(), "outputs"),
    "outputs-named": Stale(lambda loss, z: (F.softplus(z).mean(), z), "outputs"),
}


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("name", STALE)
def test_a_graph_from_outside_of_the_closure_is_named(name, curvature):
    params = [nn.Parameter(p.clone()) for p in START]
    z = real(params)
    loss = F.mse_loss(z, Y)
    optimizer = HFOptimizer(params, curvature=curvature)
    with pytest.raises(RuntimeError, match=f"got {STALE[name].what} .*before the closure"):
        optimizer.step(lambda: STALE[name].value(loss, z))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("outside", [False, True])
def test_a_derivative_that_was_held_back_is_named(outside):
    """Also where the input still holds an older gradient, which would be wrong without a word."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.linspace(0, 1, 5)[:, None].requires_grad_()
    if outside:
        model(x).sum().backward()

    def closure(**options):
        model.zero_grad()
        u = model(x)
        u.backward(torch.ones_like(u), create_graph=True, **options)
        return (x.grad + u).square().mean()

    optimizer = HFOptimizer(model.parameters())
    with pytest.raises(RuntimeError, match=r"inputs=\[x\], create_graph=True"):
        optimizer.step(closure)
    x.grad = None
    first = float(optimizer.step(lambda: closure(inputs=[x])))
    assert optimizer.last_report.new_loss < first


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_part_with_buffers():
    torch.manual_seed(0)
    part = torch.jit.script(nn.Sequential(nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))
    model = nn.Sequential(nn.Linear(3, 5), part)
    x, y = X.float(), Y.float()
    assert diagnose(model, x).ok
    optimizer = HFOptimizer(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert dict(part.named_buffers())["0.num_batches_tracked"] == 4
