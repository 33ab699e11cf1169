"""What the split makes of each way to write a loss, against dense matrices, float64."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from reference import dense_gauss_newton, dense_hessian
from torch import Tensor, nn
from torch.nn import functional as F

from torch_hf.curvature import GaussNewtonOperator

_generator = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


X, Y = _normal(6, 3), _normal(6, 3)
BITS = (_normal(6, 3) > 0).double()
CLASSES = torch.tensor([0, 2, 1, 1, 0, 2])
PROBABILITIES = _normal(6, 3).softmax(1)
WEIGHTS = _normal(6, 3).exp()
START = [_normal(3, 3), _normal(3, 3)]

Params = list[Tensor]


def network(params: Params) -> Tensor:
    return torch.tanh(X @ params[0]) @ params[1]


def found(loss: Callable[[Params], Tensor]) -> Tensor:
    """The matrix that the split of a loss gives, column by column."""
    params = [nn.Parameter(p.clone()) for p in START]

    def closure():
        value = loss(params)
        value.backward()
        return value

    operator = GaussNewtonOperator.from_closure(closure, params)
    return torch.stack([operator(e) for e in torch.eye(18, dtype=torch.float64)], dim=1)


def assert_same(matrix: Tensor, truth: Tensor) -> None:
    assert torch.linalg.norm(matrix - truth) <= 1e-10 * torch.linalg.norm(truth)


class Row(NamedTuple):
    """A loss as users write it, of z (6, 3); the cut is where the network ends, if not at z."""

    name: str
    loss: Callable[[Tensor], Tensor]
    cut: Callable[[Tensor], Tensor] | None = None
    loss_of_cut: Callable[[Tensor], Tensor] | None = None


def _in_place(z: Tensor) -> Tensor:
    loss = F.mse_loss(z, Y)
    loss += 0.1 * z.square().mean()
    loss *= 0.5
    return loss


def _in_place_squares(z: Tensor) -> Tensor:
    squares = (z - Y) ** 2
    squares *= WEIGHTS
    return squares.mean()


def _square(r: Tensor) -> Tensor:
    return r * r


def _self_product(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def loss(z: Tensor) -> Tensor:
        residual = (z - Y).flatten()
        return product(residual, residual)

    return loss


def _bernoulli_by_hand(p: Tensor) -> Tensor:
    return -(BITS * p.log() + (1 - BITS) * (1 - p).log()).mean()


def _each(loss: Callable[..., Tensor], z: Tensor, y: Tensor) -> list[Tensor]:
    return [loss(a, b) for a, b in zip(z, y, strict=True)]


CLASSIFICATION = (
    Row("cross_entropy", lambda z: F.cross_entropy(z, CLASSES)),
    Row("CrossEntropyLoss", lambda z: nn.CrossEntropyLoss(reduction="sum")(z, CLASSES)),
    Row("cross_entropy-1d", lambda z: F.cross_entropy(z[0], CLASSES[0])),
    Row(
        "cross_entropy-sequence",
        lambda z: F.cross_entropy(z.view(2, 3, 3).permute(0, 2, 1), CLASSES.view(2, 3)),
    ),
    Row("cross_entropy-legacy", lambda z: F.cross_entropy(z, CLASSES, WEIGHTS[0], None, 1)),
    Row(
        "cross_entropy-smoothing-weight-ignore",
        lambda z: F.cross_entropy(
            z, CLASSES, weight=WEIGHTS[0], ignore_index=1, label_smoothing=0.2
        ),
    ),
    Row(
        "cross_entropy-smoothing-ignore",
        lambda z: F.cross_entropy(z, CLASSES, ignore_index=1, label_smoothing=0.2),
    ),
    Row(
        "cross_entropy-probabilities-weight-smoothing",
        lambda z: F.cross_entropy(z, PROBABILITIES, weight=WEIGHTS[0], label_smoothing=0.2),
    ),
    Row(
        "cross_entropy-probabilities-sequence",
        lambda z: (
            F.cross_entropy(
                z.view(2, 3, 3), PROBABILITIES.view(2, 3, 3), weight=WEIGHTS[0], reduction="none"
            )
            .sum(1)
            .mean()
        ),
    ),
    Row(
        "cross_entropy-cases_weighted",
        lambda z: (F.cross_entropy(z, CLASSES, reduction="none") * WEIGHTS[:, 0]).mean(),
    ),
    Row("log_softmax-nll", lambda z: F.nll_loss(F.log_softmax(z, 1), CLASSES)),
    Row("LogSoftmax-NLLLoss", lambda z: nn.NLLLoss()(nn.LogSoftmax(-1)(z), CLASSES)),
    Row("torch.log_softmax", lambda z: F.nll_loss(torch.log_softmax(z, -1), CLASSES)),
    Row("special.log_softmax", lambda z: F.nll_loss(torch.special.log_softmax(z, 1), CLASSES)),
    Row("Tensor.log_softmax", lambda z: F.nll_loss(z.log_softmax(dim=1), CLASSES)),
    Row("nll-dim0", lambda z: F.nll_loss(z.T.log_softmax(0).T, CLASSES)),
    Row("nll-1d", lambda z: F.nll_loss(z[0].log_softmax(0), CLASSES[0])),
    Row(
        "nll-sequence-transposed",
        lambda z: F.nll_loss(z.view(2, 3, 3).log_softmax(-1).transpose(1, 2), CLASSES.view(2, 3)),
    ),
    Row(
        "nll-sequence-dim1",
        lambda z: F.nll_loss(z.view(2, 3, 3).mT.log_softmax(1), CLASSES.view(2, 3)),
    ),
    Row(
        "nll-sequence-flattened",
        lambda z: F.nll_loss(z.view(2, 3, 3).log_softmax(-1).flatten(0, 1), CLASSES),
    ),
    Row(
        "nll-sequence-shifted",
        lambda z: F.nll_loss(
            z.view(2, 3, 3).log_softmax(-1)[:, :-1].reshape(-1, 3),
            CLASSES.view(2, 3)[:, 1:].reshape(-1),
        ),
    ),
    Row(
        "nll-weight-ignore",
        lambda z: F.nll_loss(z.log_softmax(1), CLASSES, weight=WEIGHTS[0], ignore_index=1),
    ),
    Row("softmax-log-nll", lambda z: F.nll_loss(torch.log(torch.softmax(z, 1)), CLASSES)),
    Row(
        "softmax-view-log-nll",
        lambda z: F.nll_loss(z.view(2, 3, 3).softmax(-1).view(6, 3).log(), CLASSES),
    ),
    Row("nll-by_hand-gather", lambda z: -z.log_softmax(1).gather(1, CLASSES[:, None]).mean()),
    Row("nll-by_hand-index", lambda z: -z.log_softmax(1)[torch.arange(6), CLASSES].sum()),
    Row("soft_targets-by_hand", lambda z: -(PROBABILITIES * z.log_softmax(1)).sum(1).mean()),
    Row("soft_targets-log", lambda z: -(PROBABILITIES * z.softmax(1).log()).sum(1).mean()),
    Row(
        "nll-log-of_probabilities",
        lambda z: F.nll_loss(torch.log(z.softmax(1) + 1e-3), CLASSES),
        lambda z: z.softmax(1),
        lambda p: F.nll_loss(torch.log(p + 1e-3), CLASSES),
    ),
    Row("bce_with_logits", lambda z: F.binary_cross_entropy_with_logits(z, BITS)),
    Row(
        "bce_with_logits-weights",
        lambda z: F.binary_cross_entropy_with_logits(
            z, BITS, weight=WEIGHTS, pos_weight=WEIGHTS[0]
        ),
    ),
    Row("sigmoid-bce", lambda z: F.binary_cross_entropy(torch.sigmoid(z), BITS)),
    Row("Sigmoid-BCELoss", lambda z: nn.BCELoss(reduction="sum")(nn.Sigmoid()(z), BITS)),
    Row(
        "sigmoid-bce-weight-squeezed",
        lambda z: F.binary_cross_entropy(
            torch.special.expit(z[:, :1]).squeeze(1), BITS[:, 0], weight=WEIGHTS[:, 0]
        ),
    ),
    Row(
        "sigmoid-bce-none",
        lambda z: (F.binary_cross_entropy(z.sigmoid().T, BITS.T, reduction="none") * 3).mean(),
    ),
    Row(
        "bce-by_hand", lambda z: _bernoulli_by_hand(z.sigmoid()), torch.sigmoid, _bernoulli_by_hand
    ),
    Row("soft_margin", lambda z: F.soft_margin_loss(z, 2 * BITS - 1)),
    Row("multilabel_soft_margin", lambda z: F.multilabel_soft_margin_loss(z, BITS)),
)

DIVERGENCES = tuple(
    Row(
        f"kl_div-{reduction}-{'log_' if log else ''}target",
        lambda z, reduction=reduction, target=target, log=log: F.kl_div(
            F.log_softmax(z, 1), target, reduction=reduction, log_target=log
        ).sum(),
    )
    for reduction in ("batchmean", "mean", "sum", "none")
    for target, log in ((PROBABILITIES, False), (PROBABILITIES.log(), True))
)

REGRESSION = (
    Row("mse", lambda z: F.mse_loss(z, Y)),
    Row("mse-other_way_round", lambda z: F.mse_loss(Y, z)),
    Row("MSELoss-over_batch", lambda z: nn.MSELoss(reduction="sum")(z, Y) / len(z)),
    Row("mse-none", lambda z: (F.mse_loss(z, Y, reduction="none") * WEIGHTS).sum(1).mean()),
    Row("huber", lambda z: F.huber_loss(z, Y, delta=0.5)),
    Row("smooth_l1", lambda z: F.smooth_l1_loss(z, Y, beta=0.5, reduction="sum")),
    Row("poisson", lambda z: F.poisson_nll_loss(z, BITS)),
    Row(
        "poisson-rate",
        lambda z: F.poisson_nll_loss(z.exp(), BITS, log_input=False),
        torch.exp,
        lambda rate: F.poisson_nll_loss(rate, BITS, log_input=False),
    ),
    Row("gaussian_nll", lambda z: nn.GaussianNLLLoss(full=True)(z, Y, WEIGHTS)),
    Row("pow-mean", lambda z: ((z - Y) ** 2).mean()),
    Row("pow-sum", lambda z: (z - Y).pow(2).sum()),
    Row("square-mean", lambda z: (z - Y).square().mean()),
    Row("product", lambda z: _square(z - Y).mean()),
    Row("torch.mean", lambda z: torch.mean((z - Y) ** 2)),
    Row("nanmean", lambda z: ((z - Y) ** 2).nanmean()),
    Row("weighted", lambda z: (WEIGHTS * (z - Y) ** 2).mean()),
    Row("weights_over_sum", lambda z: ((z - Y) ** 2 * WEIGHTS).sum() / WEIGHTS.sum()),
    Row("weighted-matvec", lambda z: ((z - Y).square() @ WEIGHTS[0]).mean()),
    Row("norm-squared", lambda z: torch.norm(z - Y) ** 2),
    Row("norm-fro", lambda z: torch.norm(z - Y, p="fro").square()),
    Row("norm-2", lambda z: (z - Y).norm(2).pow(2)),
    Row("norm-product", lambda z: _square((z - Y).norm())),
    Row("linalg.norm", lambda z: torch.linalg.norm(z - Y) ** 2),
    Row("linalg.vector_norm", lambda z: torch.linalg.vector_norm(z - Y, 2).square()),
    Row("linalg.matrix_norm", lambda z: torch.linalg.matrix_norm(z - Y) ** 2),
    Row("norm-of_rows", lambda z: ((z - Y).norm(dim=1) ** 2).mean()),
    Row(
        "norm-of_rows-keepdim",
        lambda z: (torch.norm(z - Y, dim=-1, keepdim=True).pow(2) * WEIGHTS[:, :1]).mean(),
    ),
    Row("norm-of_columns", lambda z: torch.linalg.norm(z - Y, 2, 0).view(3, 1).square().sum()),
    Row("norm-not_squared", lambda z: torch.norm(z - Y) / torch.norm(Y)),
    Row("norm-of_rows-not_squared", lambda z: (z - Y).norm(dim=1).mean()),
    Row(
        "norm-spectral",
        lambda z: torch.linalg.norm(z - Y, 2) ** 2,
        lambda z: torch.linalg.norm(z - Y, 2),
        lambda s: s**2,
    ),
    Row("dot", _self_product(torch.dot)),
    Row("vdot", _self_product(torch.vdot)),
    Row("inner", _self_product(torch.inner)),
    Row("matmul", _self_product(torch.matmul)),
    Row("at", _self_product(lambda r, s: r @ s)),
    Row("mask-product", lambda z: ((z - Y) ** 2 * BITS).sum() / BITS.sum()),
    Row("mask-index", lambda z: ((z - Y)[BITS.bool()] ** 2).mean()),
    Row("mask-where", lambda z: torch.where(BITS > 0, (z - Y) ** 2, torch.zeros(())).sum()),
    Row("masked_select", lambda z: ((z - Y) ** 2).masked_select(BITS.bool()).mean()),
    Row("masked_fill", lambda z: ((z - Y) ** 2).masked_fill(BITS.bool(), 0.0).mean()),
)

SUMS = (
    Row(
        "three_terms",
        lambda z: (
            0.3 * F.cross_entropy(z, CLASSES) + 2 * F.mse_loss(z, Y) + 0.1 * z.square().sum() / 4
        ),
    ),
    Row("add-alpha", lambda z: torch.add(F.mse_loss(z, Y), z.square().mean(), alpha=0.1)),
    Row(
        "log_partition",
        lambda z: F.cross_entropy(z, CLASSES) + 0.1 * torch.logsumexp(z, 1).mean(),
    ),
    Row("minus", lambda z: F.mse_loss(z, Y) - 0.01 * z.square().mean()),
    Row("broadcast", lambda z: ((z - Y).square().sum(1) + z.square().mean()).mean()),
    Row("stack", lambda z: torch.stack(_each(F.mse_loss, z, Y)).mean()),
    Row("stack-weighted", lambda z: torch.dot(torch.stack(_each(F.mse_loss, z, Y)), WEIGHTS[:, 0])),
    Row("cat", lambda z: torch.cat([z.square(), (z - Y).square()], 1).mean()),
    Row("sum", lambda z: sum(_each(F.mse_loss, z, Y)) / 6),
    Row("unbind", lambda z: sum((z - Y).square().unbind(1)).mean()),
    Row("split", lambda z: (z - Y).square().split(2)[1].mean() + z.square().chunk(2)[0].sum()),
    Row("cumsum", lambda z: (z - Y).square().cumsum(0).mean()),
    Row("in_place", _in_place),
    Row("in_place-squares", _in_place_squares),
    Row(
        "negated_entropy_term", lambda z: F.cross_entropy(z, CLASSES) + z.log_softmax(1).mean() / 9
    ),
)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize(
    "row", CLASSIFICATION + DIVERGENCES + REGRESSION + SUMS, ids=lambda row: row.name
)
def test_the_split_is_gauss_newton_at_the_outputs(row):
    def outputs(params):
        z = network(params)
        return z if row.cut is None else row.cut(z)

    truth = dense_gauss_newton(outputs, row.loss_of_cut or row.loss, START)
    assert_same(found(lambda params: row.loss(network(params))), truth)


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("legacy", [{"size_average": False}, {"reduce": False}])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss], ids=lambda f: f.__name__)
def test_the_old_arguments_for_reduction(loss, legacy):
    target = CLASSES if loss is F.cross_entropy else Y
    truth = dense_gauss_newton(network, lambda z: loss(z, target, reduction="sum"), START)
    assert_same(found(lambda params: loss(network(params), target, **legacy).sum()), truth)


# Terms that are no convex function of the outputs bring their own Hessian


def _cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z, CLASSES)


def _l2(params: Params) -> Tensor:
    return sum(p.pow(2).sum() for p in params)


class Sum(NamedTuple):
    """Cross-entropy and a further term, of the parameters and of z."""

    name: str
    further: Callable[[Params, Tensor], Tensor]


FURTHER = (
    Sum("l2", lambda p, z: 0.1 * _l2(p)),
    Sum("l2-norms", lambda p, z: 0.1 * sum(q.norm() ** 2 for q in p)),
    Sum("l2-dot", lambda p, z: 0.1 * sum(q.flatten() @ q.flatten() for q in p)),
    Sum("group_lasso", lambda p, z: 0.1 * sum(q.norm(dim=1).sum() for q in p)),
    Sum("l1", lambda p, z: 0.1 * sum(q.abs().sum() for q in p)),
    Sum("linear_in_parameters", lambda p, z: 0.1 * p[0].sum()),
    Sum("sine_of_parameters", lambda p, z: 0.1 * torch.sin(p[0]).sum()),
    Sum("log_of_parameters", lambda p, z: 0.1 * torch.log(p[0].square().sum())),
    Sum("linear_in_outputs", lambda p, z: 0.1 * z.mean()),
    Sum("sigmoid", lambda p, z: 0.1 * z.sigmoid().mean()),
    Sum("probabilities", lambda p, z: 0.1 * (WEIGHTS * z.softmax(1)).mean()),
    Sum("entropy", lambda p, z: -0.1 * (z.softmax(1) * z.log_softmax(1)).sum(1).mean()),
    Sum("concave_log", lambda p, z: 0.1 * z.exp().log().mean()),
    Sum("concave_norm", lambda p, z: -0.1 * z.norm()),
    Sum("target_of_parameters", lambda p, z: 0.1 * F.cross_entropy(z / 2, z.softmax(1))),
    Sum("only_target_of_parameters", lambda p, z: 0.1 * F.cross_entropy(Y, z.softmax(1))),
    Sum("function_of_the_loss", lambda p, z: torch.sin(_cross_entropy(z))),
)


@pytest.mark.parametrize("row", FURTHER, ids=lambda row: row.name)
def test_a_further_term_brings_its_own_hessian(row):
    def loss(params):
        z = network(params)
        return _cross_entropy(z) + row.further(params, z)

    truth = dense_gauss_newton(network, _cross_entropy, START)
    truth += dense_hessian(lambda params: row.further(params, network(params)), START)
    assert_same(found(loss), truth)


def test_a_further_term_keeps_its_weight_where_the_loss_reaches_it_twice():
    def loss(params):
        value = _cross_entropy(network(params))
        return value + 0.1 * value.sin()

    truth = dense_gauss_newton(network, _cross_entropy, START)
    truth += dense_hessian(lambda params: 0.1 * _cross_entropy(network(params)).sin(), START)
    assert_same(found(loss), truth)


def test_a_penalty_enters_as_exactly_twice_its_coefficient():
    plain = found(lambda params: _cross_entropy(network(params)))
    penalised = found(lambda params: _cross_entropy(network(params)) + 0.125 * _l2(params))
    assert torch.equal(penalised, plain + 0.25 * torch.eye(18, dtype=torch.float64))


def test_l1_loss_has_no_curvature_beside_other_terms():
    truth = dense_gauss_newton(network, _cross_entropy, START)

    def loss(params):
        z = network(params)
        return _cross_entropy(z) + F.l1_loss(z, Y)

    assert_same(found(loss), truth)


def test_the_terms_of_an_evidence_bound():
    """The reconstruction and mu**2 are convex; the variance's terms bring their Hessian."""

    def encoder(params):
        return X @ params[0], torch.tanh(X) @ params[1]

    def convex(mu, log_variance):
        return F.mse_loss(mu, Y) + 0.5 * mu.square().mean()

    def rest(log_variance):
        return 0.5 * (log_variance.exp() - 1 - log_variance).mean()

    def loss(params):
        mu, s = encoder(params)
        return F.mse_loss(mu, Y) - 0.5 * (1 + s - mu**2 - s.exp()).mean()

    truth = dense_gauss_newton(encoder, convex, START)
    truth += dense_hessian(lambda params: rest(encoder(params)[1]), START)
    assert_same(found(loss), truth)


def test_modules_with_backward_hooks():
    soft, criterion = nn.LogSoftmax(1), nn.NLLLoss()
    for module in (soft, criterion):
        module.register_full_backward_hook(lambda *_: None)
    truth = dense_gauss_newton(network, _cross_entropy, START)
    assert_same(found(lambda params: criterion(soft(network(params)), CLASSES)), truth)


# Losses of two network outputs


def _apart(params: Params) -> tuple[Tensor, Tensor]:
    return torch.tanh(X @ params[0]), Y @ params[1]


def _chained(params: Params) -> tuple[Tensor, Tensor]:
    first = torch.tanh(X @ params[0])
    return first, first @ params[1]


@pytest.mark.parametrize("outputs", [_apart, _chained])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("loss", [F.mse_loss, F.huber_loss], ids=lambda f: f.__name__)
def test_a_distance_between_two_outputs(loss, outputs, swapped):
    def ordered(params):
        return outputs(params)[:: -1 if swapped else 1]

    truth = dense_gauss_newton(ordered, loss, START)
    assert_same(found(lambda params: loss(*ordered(params))), truth)


def test_a_distance_between_outputs_that_broadcast():
    def outputs(params):
        z = network(params)
        return z[:, None], z[None] * 2

    def distance(a, b):
        return (a - b).square().mean()

    def loss(params):
        a, b = outputs(params)
        return F.mse_loss(a.expand(6, 6, 3), b.expand(6, 6, 3))

    assert_same(found(loss), dense_gauss_newton(outputs, distance, START))


# Form 3: the outputs are the caller's


class Named(NamedTuple):
    """Outputs the caller names, and a loss of them and of the parameters."""

    name: str
    outputs: Callable[[Params], tuple[Tensor, ...]]
    convex: Callable[..., Tensor]
    further: Callable[[Params], Tensor] | None = None


def _z(params: Params) -> tuple[Tensor, ...]:
    return (network(params),)


def _gaussian(mean: Tensor, log_variance: Tensor) -> Tensor:
    return F.gaussian_nll_loss(mean, Y, log_variance.exp())


NAMED = (
    Named("own_loss", _z, lambda z: torch.logsumexp(z.square(), 1).mean()),
    Named("log_softmax-nll", _z, lambda z: F.nll_loss(z.log_softmax(1), CLASSES)),
    Named("cross_entropy", _z, _cross_entropy),
    Named("mse_and_sigmoid", _z, lambda z: F.mse_loss(z, Y) + z.sigmoid().mean()),
    Named("root_mean_square", _z, lambda z: F.mse_loss(z, Y).sqrt()),
    Named("l2_beside", _z, _cross_entropy, lambda params: 0.1 * _l2(params)),
    Named("sine_beside", _z, _cross_entropy, lambda params: 0.1 * params[0].sin().sum()),
    Named("mean_and_variance", _apart, _gaussian),
    Named("two_heads", _apart, lambda a, b: F.mse_loss(a, Y) + F.cross_entropy(b, CLASSES)),
    Named("kl_of_both", _apart, lambda a, b: F.kl_div(a.log_softmax(1), b.softmax(1))),
)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("row", NAMED, ids=lambda row: row.name)
def test_outputs_that_the_caller_names(row):
    params = [nn.Parameter(p.clone()) for p in START]

    def closure():
        outputs = row.outputs(params)
        loss = row.convex(*outputs)
        return loss if row.further is None else loss + row.further(params), outputs

    operator = GaussNewtonOperator.from_closure(closure, params)
    matrix = torch.stack([operator(e) for e in torch.eye(18, dtype=torch.float64)], dim=1)
    truth = dense_gauss_newton(row.outputs, row.convex, START)
    if row.further is not None:
        truth += dense_hessian(row.further, START)
    assert_same(matrix, truth)


# Numbers that double backward gets wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_at_the_ends_keep_the_curvature_of_their_logits(dtype):
    """By double backward through p the curvature at -20 would be -1e-3 and not 2e-9."""
    z = nn.Parameter(torch.tensor([-20.0, -5.0, 0.0, 15.0], dtype=dtype))
    target = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=dtype)
    operator = GaussNewtonOperator.from_closure(
        lambda: F.binary_cross_entropy(z.sigmoid(), target, reduction="sum"), [z]
    )
    p = z.detach().sigmoid()
    torch.testing.assert_close(operator(torch.ones_like(p)), p * (1 - p))


def test_a_norm_of_zero_has_finite_products():
    w = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    with torch.no_grad():
        w[0] = torch.tensor([3.0, 4.0, 0.0])
    operator = GaussNewtonOperator.from_closure(lambda: w.norm(dim=1).sum(), [w])
    product = operator(torch.ones(6, dtype=torch.float64)).view(2, 3)
    unit = w.detach()[0] / 5
    assert_same(product[0], (1 - unit * unit.sum()) / 5)
    assert not product[1].any()
