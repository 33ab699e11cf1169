"""Operations with gaps in autograd: a step meets each, or says where it is and what to do."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import torch_hf
from torch_hf import HFOptimizer, diagnose

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
INDICES = torch.randint(10, (6, 4), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
SEQUENCES = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Inside(nn.Module):
    """An operation between two layers, in a module of its own name."""

    class Operation(nn.Module):
        def __init__(self, operation):
            super().__init__()
            self.operation = operation

        def forward(self, x):
            return self.operation(x)

    def __init__(self, operation, width=8):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.middle = self.Operation(operation)
        self.last = nn.LazyLinear(3)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant, first=False):
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Identity() if first else nn.Linear(8, 8)
        self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(checkpoint(self.inner, x, use_reentrant=self.reentrant).tanh())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        q = self.query(x).view(3, 5, 2, 4).transpose(1, 2)
        return self.last(F.scaled_dot_product_attention(q, q, q).mean((1, 2)).repeat(1, 2))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(8, 6, batch_first=True)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.cell(x)[0][:, -1])


def sequential(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


def distances(x):
    return torch.cdist(x, x.detach()[:3] + 0.5, p=1.0)


class Row(NamedTuple):
    """A network, and how a step meets it: an engine, or what its error says."""

    name: str
    build: object
    input: torch.Tensor
    engines: tuple[str, ...] = ("double_backward",)
    says: tuple[str, ...] = ()
    module: str = ""


DOUBLE = ("double_backward",)
EITHER = ("double_backward", "finite_differences")  # by the version of torch
DIFFERENCES = ("finite_differences",)
FAST = ("tangent_rules",)

ROWS = [
    # Gaps in double backward, met by differences.
    Row(
        "embedding_bag",
        sequential(lambda: nn.EmbeddingBag(10, 8), lambda: nn.Linear(8, 3)),
        INDICES,
        DIFFERENCES,
        module="Sequential.0 (EmbeddingBag)",
    ),
    Row(
        "hardsigmoid",
        sequential(lambda: nn.Linear(8, 5), nn.Hardsigmoid, lambda: nn.Linear(5, 3)),
        X,
        DIFFERENCES,
        module="Sequential.1 (Hardsigmoid)",
    ),
    Row(
        "compiled",
        lambda: Inside(
            torch.compile(nn.Sequential(nn.Linear(8, 4), nn.Tanh()), backend="aot_eager")
        ),
        X,
        DOUBLE,
    ),
    Row("cdist", lambda: Inside(distances), X, EITHER),
    Row("pdist", lambda: Inside(lambda x: F.pdist(x).expand(6, -1)), X, EITHER),
    # No way through.
    Row(
        "reentrant",
        lambda: Checkpointed(True),
        X,
        (),
        ("reentrant", "use_reentrant=False", "Checkpointed"),
    ),
    Row(  # its parameters are not in the graph, and would never be trained
        "reentrant_first",
        lambda: Checkpointed(True, first=True),
        X.clone().requires_grad_(),
        (),
        ("reentrant", "use_reentrant=False", "Checkpointed"),
    ),
    Row(
        "sparse",
        sequential(lambda: nn.Embedding(10, 8, sparse=True), nn.Flatten, lambda: nn.Linear(32, 3)),
        INDICES,
        (),
        ("sparse gradient", "Sequential.0 (Embedding)", "sparse=False"),
    ),
    # Said to have gaps somewhere, none of them here.
    Row("checkpoint", lambda: Checkpointed(False), X),
    Row("attention", Attention, SEQUENCES),
    Row(
        "encoder",
        sequential(
            lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            nn.Flatten,
            lambda: nn.Linear(40, 3),
        ),
        SEQUENCES,
        FAST,
    ),
    Row("lstm", lambda: Recurrent(nn.LSTM), SEQUENCES),
    Row("gru", lambda: Recurrent(nn.GRU), SEQUENCES),
    Row("rnn", lambda: Recurrent(nn.RNN), SEQUENCES),
    Row("hardswish", lambda: Inside(F.hardswish), X),
    Row("inplace_relu", lambda: Inside(nn.ReLU(inplace=True)), X),
    Row("batch_norm", lambda: Inside(nn.BatchNorm1d(8)), X, FAST),
    Row("layer_norm", lambda: Inside(nn.LayerNorm(8)), X, FAST),
    Row("dropout", lambda: Inside(nn.Dropout(0.2)), X),
    Row("rrelu", lambda: Inside(nn.RReLU()), X),
    Row(
        "weight_norm",
        lambda: Inside(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))),
        X,
    ),
    Row(
        "spectral_norm",
        lambda: Inside(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))),
        X,
    ),
    Row(
        "grid_sample",
        sequential(
            lambda: nn.Conv2d(2, 2, 3),
            lambda: Inside.Operation(
                lambda x: F.grid_sample(x, torch.zeros(4, 3, 3, 2) + 0.1, align_corners=False)
            ),
            nn.Flatten,
            lambda: nn.Linear(18, 3),
        ),
        IMAGES,
        FAST + DIFFERENCES,  # by the version of torch
    ),
    Row(
        "group_norm",
        sequential(
            lambda: nn.Conv2d(2, 4, 3),
            lambda: nn.GroupNorm(2, 4),
            nn.Flatten,
            lambda: nn.LazyLinear(3),
        ),
        IMAGES,
        FAST,
    ),
    Row(
        "pooling",
        sequential(
            lambda: nn.Conv2d(2, 4, 3),
            lambda: nn.MaxPool2d(2),
            nn.Flatten,
            lambda: nn.LazyLinear(3),
        ),
        IMAGES,
        FAST,
    ),
]


def made(row):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = row.build()
        model(row.input)  # lazy layers
    return model


def step(row, model, **options):
    optimizer = HFOptimizer(model.parameters(), cg_max_iter=5, **options)
    labels = torch.arange(len(row.input)) % 3

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(row.input), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return optimizer.last_report


@pytest.mark.filterwarnings("ignore")  # torch's own, about compilation and checkpointing
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_step_meets_it_or_says_what_to_do(row):
    model = made(row)
    before = [p.detach().clone() for p in model.parameters()]
    found = diagnose(model, row.input)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    if row.says:
        with pytest.raises(RuntimeError) as caught:
            step(row, model)
        for part in row.says:
            assert part in str(caught.value)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert not found.ok
        assert found.findings
        assert "A step would fail" in str(found)
        return
    report = step(row, model)
    assert report.accepted
    assert report.new_loss < report.loss
    assert report.engine in row.engines
    assert found.ok
    assert found.engine == report.engine
    if report.engine == "finite_differences":
        assert found.findings[0].module.startswith(row.module)
        assert found.findings[0].module in str(found)
        assert found.findings[0].instead in str(found)
    else:
        assert not found.findings


LOSSES = {
    "ctc_loss": lambda z: F.ctc_loss(
        z.view(6, 1, -1).log_softmax(-1),
        torch.tensor([[1, 2]]),
        torch.tensor([6]),
        torch.tensor([2]),
    ),
    "multi_margin_loss": lambda z: F.multi_margin_loss(z, torch.arange(6) % 3),
    "multilabel_margin_loss": lambda z: F.multilabel_margin_loss(
        z, torch.tensor([[1, -1, -1]]).expand(6, -1)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_without_a_second_derivative(name):
    model = nn.Linear(8, 3)
    optimizer = HFOptimizer(model.parameters())
    with pytest.raises(RuntimeError, match=f'(?s){name}.*curvature="hessian"'):
        optimizer.step(lambda: LOSSES[name](model(X)))
    if name == "ctc_loss":  # the others are linear but for kinks
        optimizer = HFOptimizer(model.parameters(), curvature="hessian")
        optimizer.step(lambda: LOSSES[name](model(X)))
        assert optimizer.last_report.engine == "finite_differences"
        assert optimizer.last_report.new_loss < optimizer.last_report.loss


def test_a_named_output_of_such_a_loss():
    model = nn.Linear(8, 3)
    optimizer = HFOptimizer(model.parameters())

    def closure():
        z = model(X)
        return LOSSES["ctc_loss"](z), z

    with pytest.raises(RuntimeError, match=r"CtcLoss.*the closure.*hessian"):
        optimizer.step(closure)


def test_the_innermost_module_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleDict({"gates": nn.Sequential(nn.Linear(8, 3), nn.Hardsigmoid())})

        def forward(self, x):
            return self.body["gates"](x)

    (finding,) = diagnose(Net(), X).findings
    assert finding.module == "Net.body.gates.1 (Hardsigmoid)"
    assert finding.operation == "Hardsigmoid"
    assert "Sigmoid" in finding.instead


def test_a_good_model():
    found = diagnose(nn.Linear(8, 3), X)
    assert found.ok
    assert not found.findings
    assert "would go well" in str(found)
    assert found.deterministic is None


def test_a_closure_and_its_loss():
    model = nn.Linear(8, 3)
    params = list(model.parameters())
    found = diagnose(
        closure=lambda: F.cross_entropy(model(X), torch.zeros(6).long()), params=params
    )
    assert found.ok
    assert found.deterministic
    found = diagnose(closure=lambda: model(X).sin().sum(), params=params)
    assert not found.ok
    assert "return loss, outputs" in found.error
    found = diagnose(closure=lambda: (model(X) / 0).square().sum(), params=params)
    assert "Check the batch" in found.error


def test_a_closure_that_draws_its_own_batches():
    model = nn.Linear(8, 3)
    own = torch.Generator().manual_seed(0)

    def closure():
        return model(torch.randn(6, 8, generator=own)).square().mean()

    found = diagnose(closure=closure, params=model.parameters())
    assert found.deterministic is False
    assert not found.ok
    assert "torch.Generator" in str(found)


def test_nothing_to_diagnose():
    with pytest.raises(TypeError, match=r"diagnose\(model, x\)"):
        diagnose()
    with pytest.raises(TypeError, match=r"params=model.parameters\(\)"):
        diagnose(closure=lambda: None)
    with pytest.raises(ValueError, match="curvature must be one of"):
        diagnose(nn.Linear(8, 3), X, curvature="fisher")
    with pytest.raises(TypeError, match="depends on its parameters"):
        diagnose(Constant(), X)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x


def test_it_is_at_hand():
    assert torch_hf.diagnose is diagnose
