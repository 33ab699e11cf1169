"""The root of the Gauss-Newton matrix against dense Jacobians and Hessians, float64."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from torch_hf.capture.capture import Capture
from torch_hf.curvature.jacobian import (
    BATCHED,
    ONE_BACKWARD,
    count_rows,
    jacobian_cost,
    jacobian_root,
)
from torch_hf.loss.ggn_split import Split, split_by_calls, split_by_outputs

N = 6
_generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator, dtype=torch.float64)


X, POINTS, IMAGES, SERIES = normal(N, 3), normal(N, 2), normal(N, 2, 5, 5), normal(N, 4, 3)
SIGNALS = normal(N, 2, 7)
WORDS = torch.randint(0, 5, (N, 4), generator=_generator)
Y1, Y2, Y3 = normal(N, 1), normal(N, 2), normal(N, 3)
YS = normal(N, 4, 2)
CLASSES = torch.tensor([0, 2, 1, 1, 0, 2])
BITS = (normal(N, 3) > 0).double()
TOKENS = torch.randint(0, 5, (N, 4), generator=_generator)


# --- networks -------------------------------------------------------------------------------


class Mean(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.mean(1)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).tanh()
        return self.one(h), self.two(h)


class Shared(nn.Module):
    """One matrix three times, once transposed; one bias twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(normal(3, 3)), nn.Parameter(normal(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.weight, self.bias))
        h = torch.tanh(h @ self.weight + self.bias)
        return h @ self.weight.T


class Columns(nn.Module):
    """Cases in columns: ``W X``, and a bias by row."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.bias = (nn.Parameter(normal(*s)) for s in ((4, 3), (2, 4), (4, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return (self.two @ torch.tanh(self.one @ x.T + 0.1)).T


class Direct(nn.Module):
    """Parameters in operations of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.log_scale, self.shift = (
            nn.Parameter(normal(*s)) for s in ((), (3,), (1, 3))
        )
        self.weight, self.vector, self.prelu = (
            nn.Parameter(normal(*s)) for s in ((3, 3), (3,), (1,))
        )
        self.low, self.rank = nn.Parameter(normal(3, 1)), nn.Parameter(normal(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.slope * x) * self.log_scale.exp() + self.shift
        z = F.prelu(z @ (self.low @ self.rank + self.weight), self.prelu)
        z = z - x / (2.0 + self.slope.square()) + (1.5 - self.log_scale) / 3 * x
        return torch.stack([z @ self.vector, 1.0 - z[:, 0] * self.slope], 1)


class Differences(nn.Module):
    """Parameters on both sides of sums, differences and quotients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.one, self.two, self.three = (nn.Parameter(normal(3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sub(self.layer(x).tanh(), self.one, alpha=0.5)
        h = torch.add(torch.sub(self.two, h.sin(), alpha=2.0), self.three, alpha=3.0)
        h = torch.rsub(h.sin(), self.three) / (2.0 + self.one.square())
        return self.two / (2.0 + h.sin()) + torch.addmm(self.one, h, self.layer.weight, alpha=0.3)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(normal(3, 4)), nn.Parameter(normal(4, 2))
        self.token = nn.Parameter(normal(1, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), 1, 3), x], 1)
        return torch.einsum("nti,ij->ntj", x, self.one).tanh().mean(1) @ self.two


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 4, padding_idx=0), nn.LayerNorm(4)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 5)
        nn.init.normal_(self.norm.weight), nn.init.normal_(self.norm.bias)

    def forward(self, words: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(self.embed(words))).chunk(3, -1)
        return self.out(torch.softmax(q @ k.transpose(1, 2), -1) @ v)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.RNNCell(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.out(h)


class Last(nn.Module):
    """What torch's recurrent layers say last; inside they run through time first."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.out = layer(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.place = nn.Parameter(normal(1, 4, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        return self.layer(self.embed(words) + self.place).mean(1)


class TimeFirst(nn.Module):
    """The first dimension of what the layer sees is time, so that rows are not cases."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x.transpose(0, 1).contiguous()).tanh().sum(0))


class Mixing(nn.Module):
    """Cases are mixed a little by a mean over them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.out((h + 1e-3 * h.mean(0)).tanh())


class FixedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.norm.running_mean.copy_(normal(3)), self.norm.running_var.copy_(normal(3).exp())
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x).tanh())


class PerCaseTable(nn.Module):
    """A row of parameters for each case."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.out = nn.Parameter(normal(N, 3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x + self.codes).tanh())


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convolutional(**options: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
    )


def signals() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, stride=2, dilation=1), nn.Tanh(), nn.ConvTranspose1d(3, 2, 2), Mean()
    )


# --- losses of what a network gives ---------------------------------------------------------


def derivative(values: Tensor, points: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), points, create_graph=True)[0]


def poisson(model: nn.Module) -> tuple[Tensor, ...]:
    p = POINTS.clone().requires_grad_()
    slope = derivative(model(p), p)
    laplacian = sum(derivative(slope[:, i], p)[:, i : i + 1] for i in range(2))
    return -laplacian - p.detach().prod(1, keepdim=True), model(POINTS[:4]) - Y1[:4]


def burgers(model: nn.Module) -> tuple[Tensor, ...]:
    p = POINTS.clone().requires_grad_()
    u = model(p)
    slope = derivative(u, p)
    u_xx = derivative(slope[:, 1], p)[:, 1:]
    return (slope[:, :1] + u * slope[:, 1:] - 0.01 * u_xx,)


class Inverse(nn.Module):
    """A heat equation with an unknown coefficient and adaptive slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.log_nu = mlp(2, 4, 1), nn.Parameter(torch.tensor(-1.0))
        self.slope = nn.Parameter(torch.tensor(0.7))

    def forward(self, p: Tensor) -> Tensor:
        return self.net(self.slope * p)


def inverse(model: Inverse) -> tuple[Tensor, ...]:
    p = POINTS.clone().requires_grad_()
    slope = derivative(model(p), p)
    return slope[:, :1] - model.log_nu.exp() * derivative(slope[:, 1], p)[:, 1:], model(POINTS) - Y1


def of(x: Tensor) -> Callable[[nn.Module], tuple[Tensor, ...]]:
    def run(model: nn.Module) -> tuple[Tensor, ...]:
        z = model(x)
        return z if isinstance(z, tuple) else (z,)

    return run


def squares(*residuals: Tensor) -> Tensor:
    return sum(r.square().mean() * (i + 1) for i, r in enumerate(residuals))


def mse(target: Tensor) -> Callable[..., Tensor]:
    return lambda z: F.mse_loss(z, target)


def mse_of_one(z: Tensor) -> Tensor:
    return (z.square() * (torch.arange(N)[:, None] == 2)).sum()


def two_losses(a: Tensor, b: Tensor) -> Tensor:
    return F.huber_loss(a, Y1) + 0.3 * F.cross_entropy(b, CLASSES)


class Row(NamedTuple):
    name: str
    model: Callable[[], nn.Module]
    outputs: Callable[[nn.Module], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    route: str = ONE_BACKWARD
    named: bool = False  # whether the outputs are named, and not found


TABLE = [
    Row("mlp, mse", lambda: mlp(3, 5, 2), of(X), mse(Y2)),
    Row("mlp, huber", lambda: mlp(3, 5, 2), of(X), lambda z: F.huber_loss(z, Y2, delta=0.7)),
    Row("mlp, cross entropy", lambda: mlp(3, 5, 3), of(X), lambda z: F.cross_entropy(z, CLASSES)),
    Row(
        "mlp, bce",
        lambda: mlp(3, 5, 3),
        of(X),
        lambda z: F.binary_cross_entropy_with_logits(z, BITS),
    ),
    Row(
        "mlp, bce of sigmoid",
        lambda: mlp(3, 5, 3),
        of(X),
        lambda z: F.binary_cross_entropy(torch.sigmoid(z), BITS),
    ),
    Row("mlp, norm", lambda: mlp(3, 5, 2), of(X), lambda z: (z - Y2).norm(dim=1).mean()),
    Row("mlp, whole norm", lambda: mlp(3, 5, 2), of(X), lambda z: torch.linalg.norm(z - Y2)),
    Row(
        "mlp, own loss",
        lambda: mlp(3, 5, 2),
        of(X),
        lambda z: (z - Y2).square().sum(1).add(1).sqrt().mean(),
        named=True,
    ),
    Row("one output", lambda: mlp(3, 5, 1), of(X), mse(Y1)),
    Row(
        "no output dimension",
        lambda: nn.Sequential(mlp(3, 5, 1), nn.Flatten(0)),
        of(X),
        mse(Y1[:, 0]),
    ),
    Row(
        "distance of two outputs",
        lambda: mlp(3, 5, 2),
        lambda m: (m(X), m(X.flip(0).contiguous() * 0.5)),
        F.mse_loss,
    ),
    Row("two heads", TwoHeads, of(X), two_losses),
    Row("shared weights", Shared, of(X), mse(Y3)),
    Row("cases in columns", Columns, of(X), mse(Y2)),
    Row("parameters used directly", Direct, of(X), mse(Y2)),
    Row("differences and quotients", Differences, of(X), mse(Y3)),
    Row("einsum", Einsum, of(SERIES), mse(Y2)),
    Row("a bias of a sequence", lambda: nn.Linear(3, 2), of(SERIES), mse(YS)),
    Row(
        "weight norm",
        lambda: nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)),
        of(X),
        mse(Y2),
    ),
    Row("recurrent", Recurrent, of(SERIES), mse(Y2)),
    Row("convolution", convolutional, of(IMAGES), mse(Y3)),
    Row("convolution in groups", lambda: convolutional(groups=2, stride=2), of(IMAGES), mse(Y3)),
    Row("signals", signals, of(SIGNALS), lambda z: z.square().mean()),
    Row(
        "embedding",
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), Mean(), nn.Linear(3, 2)),
        of(WORDS),
        mse(Y2),
    ),
    Row(
        "attention",
        Attention,
        of(WORDS),
        lambda z: F.cross_entropy(z.transpose(1, 2), TOKENS),
    ),
    Row(
        "attention, positions as cases",
        Attention,
        lambda m: (m(WORDS).view(-1, 5),),
        lambda z: F.cross_entropy(z, TOKENS.view(-1)),
    ),
    Row("fixed batch norm", FixedNorm, of(X), mse(Y2)),
    Row("poisson", lambda: mlp(2, 4, 4, 1), poisson, squares),
    Row("burgers", lambda: mlp(2, 4, 4, 1), burgers, squares),
    Row("inverse problem", Inverse, inverse, squares),
    Row(
        "a part of the points",
        lambda: mlp(2, 4, 1),
        lambda m: (lambda u: (u[1:4] - Y1[1:4], u[[0, 4, 5]] - Y1[:3], u[::2]))(m(POINTS)),
        squares,
    ),
    Row("every case but one is dead", lambda: mlp(3, 5, 2), of(X), mse_of_one),
    Row("time first", TimeFirst, of(SERIES), mse(Y2)),
    *(
        Row(layer.__name__, lambda layer=layer: Last(layer), of(SERIES), mse(Y2))
        for layer in (nn.RNN, nn.GRU, nn.LSTM)
    ),
    Row("transformer", Encoder, of(WORDS), lambda z: z.square().mean()),
    Row(
        "every position for itself",
        lambda: mlp(3, 5, 2),
        lambda m: (m(SERIES).view(-1, 2),),
        mse(YS.view(-1, 2)),
    ),
    Row("mixed cases", Mixing, of(X), mse(Y2), BATCHED),
    Row(
        "batch norm",
        lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)),
        of(X),
        mse(Y2),
        BATCHED,
    ),
    Row("a row for each case", PerCaseTable, of(X), mse(Y2), BATCHED),
    Row(
        "another order of the points",
        lambda: mlp(2, 4, 1),
        lambda m: (m(POINTS)[[4, 1, 2]],),
        squares,
        BATCHED,
    ),
    Row("bilinear", lambda: nn.Bilinear(3, 3, 2), lambda m: (m(X, X),), mse(Y2), BATCHED),
]


def built(row: Row) -> tuple[nn.Module, list[Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = row.model().double()
        row.outputs(model)  # what is lazy is made
    return model, list(model.parameters())


def split_of(row: Row, model: nn.Module, params: list[Tensor]) -> tuple[Split, Tensor]:
    def closure() -> tuple[Tensor, tuple[Tensor, ...]]:
        outputs = row.outputs(model)
        return row.loss(*outputs), outputs

    record = Capture(params).run(closure)
    loss, outputs = record.returned
    if row.named:
        return split_by_outputs(record, loss, outputs, params), loss
    return split_by_calls(record, loss, params), loss


def dense(row: Row, model: nn.Module, params: list[Tensor]) -> Tensor:
    """``J^T H J`` from a backward pass for each number."""
    outputs = row.outputs(model)
    lines = []
    for z in outputs:
        for entry in z.reshape(-1):
            found = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
            lines.append(
                torch.cat(
                    [
                        torch.zeros(p.numel()).double() if g is None else g.reshape(-1)
                        for g, p in zip(found, params, strict=True)
                    ]
                )
            )
    sizes = [z.numel() for z in outputs]

    def joined(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        return row.loss(*(p.view(z.shape) for p, z in zip(parts, outputs, strict=True)))

    point = torch.cat([z.detach().reshape(-1) for z in outputs])
    jacobian = torch.stack(lines)
    return jacobian.T @ torch.autograd.functional.hessian(joined, point) @ jacobian


def relative(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.norm(a - b) / torch.linalg.norm(b))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_the_square_is_the_gauss_newton_matrix(row):
    model, params = built(row)
    split, loss = split_of(row, model, params)
    root = jacobian_root(split, params)
    assert relative(root.rows.T @ root.rows, dense(row, model, params)) <= 1e-10
    assert set(root.routes) == {row.route}
    assert len(root.rows) <= count_rows(split, params)
    gradient = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, params, materialize_grads=True)]
    )
    ours = root.rows.T @ root.residual
    ours = ours if root.rest is None else ours + root.rest
    assert relative(ours, gradient) <= 1e-10


@pytest.mark.parametrize("name", ["mlp, mse", "shared weights", "two heads", "fixed batch norm"])
def test_rows_are_those_of_jacrev(name):
    (row,) = (r for r in TABLE if r.name == name)
    model, params = built(row)
    split, _ = split_of(row, model, params)
    root = jacobian_root(split, params)
    names = [n for n, _ in model.named_parameters()]

    def outputs(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (X,))
        return z if isinstance(z, tuple) else (z,)

    found = torch.func.jacrev(outputs)(tuple(p.detach() for p in params))
    total = torch.zeros(())
    for term in split.loss_terms:
        (i,) = (k for k, z in enumerate(row.outputs(model)) if z.shape == term.outputs[0].shape)
        jacobian = torch.cat([j.flatten(term.outputs[0].ndim) for j in found[i]], -1)
        curved = torch.stack([term.hessian(column)[0] for column in jacobian.movedim(-1, 0)], -1)
        total = total + jacobian.flatten(0, -2).T @ curved.flatten(0, -2)
    assert relative(root.rows.T @ root.rows, total) <= 1e-10


def test_a_penalty_on_parameters_is_a_diagonal():
    model = mlp(3, 4, 2).double()
    params = list(model.parameters())

    def closure():
        loss = F.mse_loss(model(X), Y2)
        return loss + 0.1 * sum(p.square().sum() for p in params[:3])

    record = Capture(params).run(closure)
    split = split_by_calls(record, record.returned, params)
    root = jacobian_root(split, params)
    assert len(root.rows) == count_rows(split, params) == Y2.numel()
    weights = torch.cat(
        [torch.full((p.numel(),), 0.2 * (i < 3), dtype=torch.float64) for i, p in enumerate(params)]
    )
    assert relative(root.diagonal, weights) <= 1e-15
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(record.returned, params)])
    assert relative(root.rows.T @ root.residual + root.rest, gradient) <= 1e-10


def test_a_negative_penalty_has_no_root():
    model = mlp(3, 4, 2).double()
    params = list(model.parameters())
    record = Capture(params).run(lambda: F.mse_loss(model(X), Y2) - 0.1 * params[0].square().sum())
    with pytest.raises(RuntimeError, match="bypasses"):  # it is no loss term
        jacobian_root(split_by_calls(record, record.returned, params), params)


def test_a_parameter_that_is_not_reached_has_columns_of_zeros():
    model, unused = mlp(3, 4, 2).double(), nn.Parameter(normal(3))
    params = [unused, *model.parameters()]
    record = Capture(params).run(lambda: F.mse_loss(model(X), Y2))
    root = jacobian_root(split_by_calls(record, record.returned, params), params)
    assert torch.equal(root.rows[:, :3], torch.zeros(12, 3).double())
    assert root.routes == [ONE_BACKWARD]


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_of_backward_passes(chunk):
    (row,) = (r for r in TABLE if r.name == "mixed cases")
    model, params = built(row)
    root = jacobian_root(split_of(row, model, params)[0], params, chunk)
    assert relative(root.rows.T @ root.rows, dense(row, model, params)) <= 1e-10


class NoBatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.numpy() * 2)


def test_a_function_of_the_users_is_differentiated_one_by_one():
    layer = nn.Linear(3, 2).double()
    x = normal(N, 3)
    params = list(layer.parameters())
    row = Row(
        "own",
        lambda: layer,
        lambda m: (NoBatches.apply((m(x) + m(x).mean(0)).tanh()),),
        mse(Y2),
    )
    root = jacobian_root(split_of(row, layer, params)[0], params)
    assert root.routes == [BATCHED]
    assert relative(root.rows.T @ root.rows, dense(row, layer, params)) <= 1e-10


def test_in_float32_the_rows_are_in_float32():
    model = mlp(3, 4, 2)
    params = list(model.parameters())
    record = Capture(params).run(lambda: F.mse_loss(model(X.float()), Y2.float()))
    root = jacobian_root(split_by_calls(record, record.returned, params), params)
    assert root.rows.dtype == torch.float32
    assert root.routes == [ONE_BACKWARD]


def test_random_numbers_are_left_alone():
    (row,) = (r for r in TABLE if r.name == "mlp, mse")
    model, params = built(row)
    split, _ = split_of(row, model, params)
    before = torch.get_rng_state()
    jacobian_root(split, params)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cost_is_counted():
    (row,) = (r for r in TABLE if r.name == "mlp, cross entropy")
    model, params = built(row)
    split, _ = split_of(row, model, params)
    cost = jacobian_cost(split, params)
    numbers = sum(p.numel() for p in params)
    assert cost.operations == N * 2 * numbers
    assert cost.bytes == 8 * (N * 2 + N) * numbers
    assert cost.passes == 3
    assert jacobian_cost(split, params, BATCHED).passes == N * 2


def test_rows_of_zeros_need_no_backward_pass_each():
    """As of a network whose units are all dead."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    nn.init.constant_(model[0].bias, -100.0)
    params = list(model.parameters())
    record = Capture(params).run(lambda: F.mse_loss(model(X), Y2))
    root = jacobian_root(split_by_calls(record, record.returned, params), params)
    assert root.routes == [ONE_BACKWARD]
    assert not root.rows.any()


def test_a_term_that_bypasses_the_outputs_is_refused():
    layer = nn.Linear(3, 2).double()
    params = list(layer.parameters())

    def closure():
        return F.mse_loss(layer(X), Y2) + layer.weight.sin().sum()

    record = Capture(params).run(closure)
    with pytest.raises(RuntimeError, match="bypasses the network's outputs"):
        jacobian_root(split_by_calls(record, record.returned, params), params)
