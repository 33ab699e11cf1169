"""The table of problems the tests run over: small networks, float64, fixed seeds.

A test over all of them is::

    @every_case
    def test_product(case):
        model = case.model()
        loss = case.closure_loss(model)  # as a user writes it
        truth = case.gauss_newton(model)  # dense, by torch.func
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from basics import normal
from reference import dense_gauss_newton, dense_hessian
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def _math_attention() -> AbstractContextManager:
    # The fused attention kernels, the CPU's among them, have no double backward.
    return sdpa_kernel(SDPBackend.MATH)


@dataclass(frozen=True)
class Case:
    """A network, one batch and a loss.

    The network's outputs are the natural ones, logits and not probabilities: those in
    which the loss is convex and has curvature. `criterion(*outputs, *targets)` is
    written as a user writes it. `denominator` is that of the mean, None where two
    losses have different ones or where the loss is a sum.
    """

    name: str
    build: Callable[[], nn.Module]
    criterion: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    denominator: float | None
    n_outputs: int = 1
    # What a second derivative has to be taken under.
    context: Callable[[], AbstractContextManager] = nullcontext

    def model(self) -> nn.Module:
        """A new network, the same at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().double()

    def outputs(self, model: nn.Module) -> tuple[Tensor, ...]:
        return _as_tuple(model(*self.inputs))

    def closure_loss(self, model: nn.Module) -> Tensor:
        return self.loss_of_outputs(*self.outputs(model))

    def loss_of_outputs(self, *outputs: Tensor) -> Tensor:
        return self.criterion(*outputs, *self.targets)

    def params(self, model: nn.Module) -> list[Tensor]:
        """Detached copies of the trainable parameters, in the optimizer's order."""
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]

    def output_fn(self, model: nn.Module) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
        """The outputs as a function of trainable parameters; `model` is not changed."""
        names = [name for name, p in model.named_parameters() if p.requires_grad]

        def output_fn(params: Sequence[Tensor]) -> tuple[Tensor, ...]:
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            state = dict(zip(names, params, strict=True)) | buffers
            with self.context():
                return _as_tuple(functional_call(model, state, self.inputs))

        return output_fn

    def loss_fn(self, model: nn.Module) -> Callable[[Sequence[Tensor]], Tensor]:
        """The loss as a function of trainable parameters; `model` is not changed."""
        output_fn = self.output_fn(model)
        return lambda params: self.loss_of_outputs(*output_fn(params))

    def gauss_newton(self, model: nn.Module) -> Tensor:
        with self.context():
            return dense_gauss_newton(
                self.output_fn(model), self.loss_of_outputs, self.params(model)
            )

    def hessian(self, model: nn.Module) -> Tensor:
        with self.context():
            return dense_hessian(self.loss_fn(model), self.params(model))


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# Data. Each call has a seed of its own, so that a new case leaves the others alone.


def _classes(seed: int, n_classes: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(n_classes, shape, generator=generator)


def _probabilities(seed: int, *shape: int) -> Tensor:
    return normal(seed, *shape).softmax(-1)


# Networks


def _mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )


def _cnn_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(2, 4, batch_first=True)
        self.readout = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.rnn(x)
        return self.readout(hidden)


class _GRULoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2, 3)
        self.readout = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            hidden = self.cell(step, hidden)
        return self.readout(hidden)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, num_heads=2, batch_first=True)
        self.readout = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.readout((x + mixed).mean(1))


class _TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 3)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.encoder(x))
        return F.linear(code, self.encoder.weight.T, self.bias)


class _TiedEmbedding(nn.Module):
    """One parameter under two names, as language models tie it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.mix = nn.Linear(3, 3)
        self.readout = nn.Linear(3, 7)
        self.readout.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.mix(self.embedding(tokens))))


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.never_called = nn.Linear(5, 2)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.label = nn.Linear(5, 3)
        self.value = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return self.label(hidden), self.value(hidden)


def _frozen() -> nn.Module:
    model = _mlp(4, 5, 5, 3)
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


# Losses, each as a user writes it


def _two_losses(label: Tensor, value: Tensor, y: Tensor, v: Tensor) -> Tensor:
    return F.cross_entropy(label, y) + 0.5 * F.mse_loss(value, v)


def _log_softmax_nll(z: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(z, dim=-1), y)


def _sigmoid_bce(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(torch.sigmoid(z), y)


def _kl_batchmean(z: Tensor, p: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(z, dim=-1), p, reduction="batchmean")


def _mean_square(z: Tensor, y: Tensor) -> Tensor:
    residual = z - y
    return (residual**2).mean()


def _sum_of_squares(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - y).square().sum()


def _token_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


# The table


def _classifier(name: str, criterion: Callable[..., Tensor], **changes) -> Case:
    """A tanh network with three classes and ten cases."""
    fields = {
        "build": lambda: _mlp(4, 6, 3),
        "inputs": (normal(1, 10, 4),),
        "targets": (_classes(2, 3, 10),),
        "denominator": 10,
    }
    return Case(name, criterion=criterion, **(fields | changes))


def _regression(name: str, criterion: Callable[..., Tensor], **changes) -> Case:
    """A tanh network with two values and ten cases, 20 numbers in the mean."""
    fields = {
        "build": lambda: _mlp(4, 6, 2),
        "inputs": (normal(3, 10, 4),),
        "targets": (2 * normal(4, 10, 2),),
        "denominator": 20,
    }
    return Case(name, criterion=criterion, **(fields | changes))


_CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
_PADDED_CLASSES = _classes(2, 3, 10).index_fill(0, torch.tensor([1, 4, 5]), -100)
_BITS = _classes(5, 2, 10, 2).double()

CASES: tuple[Case, ...] = (
    _classifier(
        "mlp-cross_entropy",
        F.cross_entropy,
        build=lambda: _mlp(4, 6, 5, 3, activation=nn.ReLU),
    ),
    _regression("mlp-mse", F.mse_loss, build=lambda: _mlp(4, 6, 2, activation=nn.Softplus)),
    _regression("tanh-bce_with_logits", F.binary_cross_entropy_with_logits, targets=(_BITS,)),
    _classifier(
        "cnn-cross_entropy",
        nn.CrossEntropyLoss(),
        build=_cnn,
        inputs=(normal(6, 8, 1, 6, 6),),
        targets=(_classes(7, 3, 8),),
        denominator=8,
    ),
    _classifier(
        "cnn_batch_norm-cross_entropy",
        F.cross_entropy,
        build=_cnn_batch_norm,
        inputs=(normal(6, 8, 1, 6, 6),),
        targets=(_classes(7, 3, 8),),
        denominator=8,
    ),
    _regression(
        "rnn-mse",
        nn.MSELoss(),
        build=_Recurrent,
        inputs=(normal(8, 6, 5, 2),),
        targets=(normal(9, 6, 5, 1),),
        denominator=30,
    ),
    _regression(
        "gru_loop-mse",
        F.mse_loss,
        build=_GRULoop,
        inputs=(normal(8, 6, 5, 2),),
        targets=(normal(9, 6, 2),),
        denominator=12,
    ),
    _classifier(
        "attention-cross_entropy",
        F.cross_entropy,
        build=_Attention,
        inputs=(normal(10, 6, 5, 4),),
        targets=(_classes(11, 3, 6),),
        denominator=6,
        context=_math_attention,
    ),
    _regression(
        "tied_autoencoder-mse",
        F.mse_loss,
        build=_TiedAutoencoder,
        inputs=(normal(12, 8, 6),),
        targets=(normal(12, 8, 6),),
        denominator=48,
    ),
    _classifier(
        "tied_embedding-cross_entropy",
        _token_cross_entropy,
        build=_TiedEmbedding,
        inputs=(_classes(13, 7, 5, 4),),
        targets=(_classes(14, 7, 5, 4),),
        denominator=20,
    ),
    _classifier(
        "embedding_linear-cross_entropy",
        F.cross_entropy,
        build=lambda: nn.Sequential(nn.Embedding(6, 2), nn.Flatten(), nn.Linear(8, 3)),
        inputs=(_classes(15, 6, 10, 4),),
    ),
    _classifier("frozen-cross_entropy", F.cross_entropy, build=_frozen),
    _classifier("unused-cross_entropy", F.cross_entropy, build=_Unused),
    _classifier(
        "two_heads-cross_entropy+mse",
        _two_losses,
        build=_TwoHeads,
        targets=(_classes(2, 3, 10), normal(4, 10, 2)),
        denominator=None,
        n_outputs=2,
    ),
    _classifier("log_softmax-nll", _log_softmax_nll),
    _regression("sigmoid-bce", _sigmoid_bce, targets=(_BITS,)),
    _regression("huber", lambda z, y: F.huber_loss(z, y, delta=1.5)),
    _regression("smooth_l1", lambda z, y: F.smooth_l1_loss(z, y, beta=0.7)),
    _classifier("kl_div", _kl_batchmean, targets=(_probabilities(16, 10, 3),)),
    _classifier(
        "cross_entropy-class_weights",
        lambda z, y: F.cross_entropy(z, y, weight=_CLASS_WEIGHTS.to(z.device)),
        denominator=_CLASS_WEIGHTS[_classes(2, 3, 10)].sum().item(),
    ),
    _classifier(
        "cross_entropy-label_smoothing",
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    ),
    _classifier(
        "cross_entropy-ignore_index",
        F.cross_entropy,
        targets=(_PADDED_CLASSES,),
        denominator=7,
    ),
    _classifier(
        "cross_entropy-probabilities",
        F.cross_entropy,
        targets=(_probabilities(16, 10, 3),),
    ),
    _regression("mean_square-by_hand", _mean_square),
    _regression("sum_of_squares-by_hand", _sum_of_squares, denominator=None),
)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
