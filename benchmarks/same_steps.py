"""Whether the working tree's package takes the same steps as another revision's, bit for bit.

python benchmarks/same_steps.py d80ce1e

For changes that must change nothing: code that moves, is renamed or is cut up. Both packages carry
out a list of small runs, on one thread. Of each step are compared: parameters, gradients and
buffers (SHA-256 of their bytes), what the step returned, the report but for its seconds, and the
random generator; after the last step the optimizer's state too. The runs are defined here, with
what both packages make public. Fields of reports and of states that only the working tree has are
listed; any other difference makes the exit status 1.

python benchmarks/same_steps.py --write-checkpoint tests/data/checkpoint-0.1.pt

writes what a later version must be able to go on from: see ``write_checkpoint``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import torch_hf as hf
from torch_hf import kronecker
from torch_hf.curvature import GaussNewtonOperator, HessianOperator

ROOT = Path(__file__).resolve().parents[1]
#: What a later revision may add to the fields of a step; all else must be the same.
MAY_GROW = ("report.", "state.")
Row = dict[str, str]

# --- what is recorded -----------------------------------------------------------------------


def digest(value: Any) -> str:
    """Equal for two values if they have the same bits."""
    if hasattr(value, "to_local"):  # of a parameter under fully_shard
        value = value.to_local()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(digest, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_sparse:
        return f"sparse {digest([value._indices(), value._values()])}"
    own = value.detach().contiguous().reshape(-1).view(torch.uint8)
    hashed = hashlib.sha256(bytes(own.tolist())).hexdigest()
    return f"{value.dtype} {tuple(value.shape)} {hashed}"


def leaves(name: str, value: Any) -> Row:
    """The digests of what is in nested dictionaries, by path."""
    if not isinstance(value, Mapping):
        return {name: digest(value)}
    return {k: d for key, v in value.items() for k, d in leaves(f"{name}.{key}", v).items()}


@dataclass
class Record:
    """What a run did, a dictionary of digests a step."""

    rows: list[Row] = field(default_factory=list)

    def note(self, **values: Any) -> None:
        """A step that is told of by these values and by the random generator."""
        values["generator"] = torch.get_rng_state()
        self.rows.append({k: d for name, v in values.items() for k, d in leaves(name, v).items()})

    def step(self, model: nn.Module, optimizer: Any, returned: Any, **others: Any) -> None:
        """A step of an optimizer on a model."""
        report = getattr(optimizer, "last_report", None)
        row = report.to_dict() if report else {}
        self.note(
            parameter=dict(model.named_parameters()),
            grad={name: p.grad for name, p in model.named_parameters()},
            buffer=dict(model.named_buffers()),
            returned=returned,
            report={k: v for k, v in row.items() if not k.startswith("seconds")},
            **others,
        )

    def end(self, optimizer: Any) -> None:
        """The optimizer's state, as of the last step."""
        state = optimizer.state_dict()
        groups = {i: dict(group) for i, group in enumerate(state["param_groups"])}
        entries = {key: dict(found) for key, found in state["state"].items()}
        numbers = moved_numbers([*groups.values(), *entries.values()])
        self.rows[-1] |= leaves("state", {"groups": groups, "numbers": numbers} | entries)


def moved_numbers(places: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers that moved from the first group to the first parameter's state, taken out of all.

    None, where there was no step to tell of, became nan, and 0 for cases.
    """
    none = {"last_loss": math.nan, "last_cases": 0.0, "last_ratio": math.nan}
    found: dict[str, Any] = {}
    for place in places:
        for name in ("steps", "rejections", *none):
            if name in place:
                found.setdefault(name, place.pop(name))
    return {k: none.get(k) if v is None else v for k, v in found.items()}


# --- what is trained ------------------------------------------------------------------------


class Wired(nn.Module):
    """Modules by name, and how a forward pass goes through them."""

    def __init__(self, route: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.route = route
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.route(self, x)


class Task:
    """A network, one batch, ``loss(outputs, *targets)``, and what is added to it."""

    def __init__(
        self,
        loss: Callable[..., Tensor],
        model: nn.Module,
        *batch: Tensor,
        penalty: Callable[[Any], Any] = lambda model: 0.0,
        context: Callable[[], Any] = nullcontext,
    ) -> None:
        self.loss, self.model, self.batch = loss, model, batch
        self.penalty, self.context = penalty, context

    def __call__(self, batch: Sequence[Tensor]) -> tuple[Tensor, Any]:
        with self.context():
            outputs = self.model(batch[0])
            return self.loss(outputs, *batch[1:]) + self.penalty(self.model), outputs

    def to(self, dtype: torch.dtype) -> Task:
        self.model.to(dtype)
        self.batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in self.batch)
        return self


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def cnn(*middle: nn.Module, last: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *middle, nn.Flatten(), nn.Linear(last, 3))


def strides_and_groups() -> nn.Module:
    cut = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    return cnn(nn.ReLU(), cut, nn.Tanh(), nn.Conv2d(6, 4, 3, padding=2, dilation=2), last=36)


def recurrent(kind: type[nn.RNNBase]) -> nn.Module:
    net = kind(2, 5, batch_first=True)
    return Wired(lambda m, x: m.out(m.net(x)[0][:, -1]), net=net, out=nn.Linear(5, 3))


def attention() -> nn.Module:
    mix = nn.MultiheadAttention(4, 2, batch_first=True)
    return Wired(lambda m, x: m.out((x + m.mix(x, x, x)[0]).mean(1)), mix=mix, out=nn.Linear(4, 3))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
    return Wired(lambda m, x: m.out(m.layer(x).mean(1)), layer=layer, out=nn.Linear(4, 3))


def tied_embedding() -> nn.Module:
    table, out = nn.Embedding(7, 3), nn.Linear(3, 7)
    out.weight = table.weight
    return nn.Sequential(table, nn.Linear(3, 3), nn.Tanh(), out)


def tied_autoencoder() -> nn.Module:
    code = nn.Linear(4, 3)
    return Wired(lambda m, x: F.linear(torch.tanh(m.code(x)), m.code.weight.T), code=code)


def two_heads() -> nn.Module:
    modules = {"trunk": nn.Linear(4, 6), "a": nn.Linear(6, 3), "b": nn.Linear(6, 2)}

    def route(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(m.trunk(x))
        return m.a(hidden), m.b(hidden)

    return Wired(route, **modules, unused=nn.Linear(6, 1))


def two_losses(z: Sequence[Tensor], y: Tensor, v: Tensor) -> Tensor:
    return F.cross_entropy(z[0], y) + 0.5 * F.mse_loss(z[1], v)


def frozen() -> nn.Module:
    model = mlp(4, 6, 5, 3)
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def physics() -> Task:
    """-u'' = sin x with u = 0 at both ends, by ``torch.autograd.grad`` inside the closure."""

    def residual(m: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = m.u(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return torch.autograd.grad(slope.sum(), x, create_graph=True)[0] + torch.sin(x)

    def ends(m: Any) -> Tensor:
        return m.u(torch.tensor([[0.0], [torch.pi]]).to(m.u[0].weight)).square().mean()

    model, x = Wired(residual, u=mlp(1, 8, 8, 1)), torch.linspace(0.1, 3.0, 15)[:, None]
    return Task(lambda z: z.square().mean(), model, x, penalty=ends)


def values(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def labels(classes: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(classes, shape)


def task(
    loss: Callable[..., Tensor],
    model: Callable[[], nn.Module],
    *batch: Callable[[], Tensor],
    **options: Any,
) -> Callable[[], Task]:
    return lambda: Task(loss, model(), *(t() for t in batch), **options)


def regression(loss: Callable[..., Tensor], target: Any = None, **options: Any) -> Any:
    return task(loss, lambda: mlp(4, 6, 2), values(20, 4), target or values(20, 2), **options)


def classes(model: Callable[[], nn.Module], *shape: int, loss: Any = None, **options: Any) -> Any:
    return task(loss or F.cross_entropy, model, values(20, *shape), labels(3, 20), **options)


def three(loss: Callable[..., Tensor], target: Any = None) -> Any:
    return task(loss, lambda: mlp(4, 6, 3), values(20, 4), target or labels(3, 20))


MATH = {"context": lambda: sdpa_kernel(SDPBackend.MATH)}  # others have no second derivative
AUTOCAST = {"context": lambda: torch.autocast("cpu", dtype=torch.bfloat16)}
CE, PADDING = F.cross_entropy, torch.tensor([1, 4, 5])
TASKS: dict[str, Callable[[], Task]] = {
    "linear, mse": task(F.mse_loss, lambda: nn.Linear(4, 2), values(20, 4), values(20, 2)),
    "tanh, mse": regression(F.mse_loss),
    "mean of squares by hand": regression(lambda z, y: ((z - y) ** 2).mean()),
    "sum of squares": regression(lambda z, y: 0.5 * (z - y).square().sum()),
    "huber": regression(partial(F.huber_loss, delta=0.8)),
    "smooth l1": regression(partial(F.smooth_l1_loss, beta=0.7)),
    "poisson": regression(F.poisson_nll_loss, lambda: torch.randint(4, (20, 2)).float()),
    "bce with logits": regression(
        F.binary_cross_entropy_with_logits, lambda: torch.randint(2, (20, 2)).float()
    ),
    "loss and penalty": regression(
        F.mse_loss, penalty=lambda m: 1e-2 * sum(p.square().sum() for p in m.parameters())
    ),
    "physics-informed": physics,
    "relu, cross entropy": classes(lambda: mlp(4, 6, 5, 3, activation=nn.ReLU), 4),
    "label smoothing": three(partial(CE, label_smoothing=0.1)),
    "ignore_index": three(CE, lambda: torch.randint(3, (20,)).index_fill(0, PADDING, -100)),
    "class weights": three(lambda z, y: CE(z, y, weight=torch.tensor([0.5, 1, 3]).to(z))),
    "probabilities": three(CE, lambda: torch.randn(20, 3).softmax(1)),
    "log_softmax, nll": three(lambda z, y: F.nll_loss(F.log_softmax(z, dim=-1), y)),
    "cnn": classes(lambda: cnn(nn.ReLU(), nn.AvgPool2d(3), last=16), 1, 6, 6),
    "batch norm": classes(lambda: cnn(nn.BatchNorm2d(4), nn.Tanh(), last=64), 1, 4, 4),
    "strides and groups": classes(strides_and_groups, 1, 6, 6),
    "conv1d": classes(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), 2, 6
    ),
    "layer norm": classes(lambda: nn.Sequential(nn.LayerNorm(4), *mlp(4, 6, 3)), 4),
    "dropout": classes(lambda: nn.Sequential(mlp(4, 9, 9), nn.Dropout(0.3), nn.Linear(9, 3)), 4),
    "lstm": classes(lambda: recurrent(nn.LSTM), 4, 2),
    "gru": classes(lambda: recurrent(nn.GRU), 4, 2),
    "attention": classes(attention, 3, 4, **MATH),
    "attention, fused": classes(attention, 3, 4),
    "transformer layer": classes(transformer, 3, 4, **MATH),
    "frozen": classes(frozen, 4),
    "autocast": classes(lambda: mlp(4, 8, 3), 4, **AUTOCAST),
    "embedding": task(
        CE,
        lambda: nn.Sequential(nn.Embedding(6, 2), nn.Flatten(), nn.Linear(8, 3)),
        labels(6, 20, 4),
        labels(3, 20),
    ),
    "tied embedding": task(
        lambda z, y: CE(z.flatten(0, 1), y.flatten()),
        tied_embedding,
        labels(7, 5, 4),
        labels(7, 5, 4),
    ),
    "tied autoencoder": task(F.mse_loss, tied_autoencoder, values(20, 4), values(20, 4)),
    "two heads": task(two_losses, two_heads, values(20, 4), labels(3, 20), values(20, 2)),
}

# --- the runs -------------------------------------------------------------------------------

CASES: dict[str, Callable[[Record], None]] = {}
#: Runs of two ranks; they find their rank in ``torch.distributed``.
RANKED: dict[str, Callable[[Record], None]] = {}


def named(name: str, cases: dict[str, Any] = CASES, **options: Any) -> Callable[..., Any]:
    """Enters a run into the list; a function may be entered with several options."""

    def enter(run: Callable[..., None]) -> Callable[..., None]:
        assert name not in CASES | RANKED, name
        cases[name] = partial(run, **options)
        return run

    return enter


class Training:
    """A task and its optimizer; ``form`` is how the closure is written."""

    def __init__(
        self,
        record: Record,
        task: str = "tanh, mse",
        form: str = "backward",
        dtype: torch.dtype = torch.float32,
        groups: Callable[[Any], Any] = lambda model: model.parameters(),
        **options: Any,
    ) -> None:
        self.record, self.form, self.task = record, form, TASKS[task]().to(dtype)
        self.model, self.batch = self.task.model, self.task.batch
        self.optimizer = hf.HFOptimizer(groups(self.model), **options)

    def closure(self, batch: Sequence[Tensor] | None = None) -> Any:
        batch = self.batch if batch is None else batch
        backward = self.form in ("backward", "detached")
        if backward:
            self.optimizer.zero_grad()
        loss, outputs = self.task(batch)
        if backward:
            loss.backward()
        forms = {"outputs": (loss, outputs), "cases": (loss, outputs, len(batch[0]))}
        return loss.detach() if self.form == "detached" else forms.get(self.form, loss)

    def step(self, *batches: Any, closure: Callable[..., Any] | None = None, **others: Any) -> None:
        """One step, on the whole batch unless ``batches`` and ``curvature_batches`` are given."""
        returned = self.optimizer.step(closure or self.closure, *batches)
        self.record.step(self.model, self.optimizer, returned, **others)


def train(record: Record, steps: int = 6, cut: int = 0, part: int = 0, **options: Any) -> None:
    """Steps on one batch, maybe cut, with products on its first cases if ``part`` is given."""
    run = Training(record, **options)
    batches = [hf.split_batch(run.batch, cut)] if cut else []
    if part:
        batches = [*(batches or [[run.batch]]), [hf.head(run.batch, part)]]
    for _ in range(steps):
        run.step(*batches)
    record.end(run.optimizer)


def rates(model: nn.Module) -> list[dict[str, Any]]:
    first, *others = model.parameters()
    return [{"params": [first], "lr": 0.5}, {"params": others, "weight_decay": 1e-2}]


for name in TASKS:
    named(name, task=name)(train)
for form in ("detached", "loss", "outputs", "cases"):
    named(f"closure: {form}", form=form)(train)
    named(f"closure: {form}, two heads, batches", form=form, task="two heads", cut=8)(train)
for name in ("cnn", "ignore_index", "batch norm", "lstm"):
    named(f"batches: {name}", task=name, cut=7)(train)
    named(f"curvature_batches: {name}", task=name, cut=10, part=6)(train)
for name in ("lbfgs", "kronecker", "kronecker-lbfgs", "diagonal", "none"):
    few = {"preconditioner": name, "cg_max_iter": 12, "weight_decay": 1e-3}
    for task_name in ("relu, cross entropy", "cnn", "two heads"):
        named(f"{name}: {task_name}", task=task_name, **few)(train)
    named(f"{name}: hessian", curvature="hessian", damping=1.0, **few)(train)
    named(f"{name}: bfloat16", dtype=torch.bfloat16, **few)(train)
for name in ("tanh, mse", "cnn", "tied embedding", "gru", "physics-informed"):
    named(f"float64: {name}", task=name, dtype=torch.float64)(train)
for name, option in {
    "damping": {"damping": 0.1},
    "weight_decay": {"weight_decay": 1e-2},
    "lr": {"lr": 0.6},
    "lr 0": {"lr": 0.0},
    "lr and weight_decay by group": {"groups": rates},
    "maximize": {"maximize": True, "task": "relu, cross entropy", "steps": 4},
    "cg_max_iter": {"cg_max_iter": 5},
    "cg_tol": {"cg_tol": 0.0, "cg_max_iter": 60},
    "cg_decay 0": {"cg_decay": 0.0},
    "cg_decay 0.95": {"cg_decay": 0.95},
    "history_size": {"history_size": 10, "preconditioner": "lbfgs"},
    "named parameters": {"groups": lambda model: model.named_parameters()},
}.items():
    named(f"option: {name}", **option)(train)


class Own:
    """A preconditioner of a user's making, with memory."""

    wants_layers, mean = True, None

    def begin(self, damping: float, curvature: Any) -> None:
        new = curvature.diagonal(damping)
        self.now = new if self.mean is None else 0.5 * (self.mean + new)

    def apply(self, r: Tensor) -> Tensor:
        return r / self.now

    def end(self) -> None:
        self.mean = self.now

    def observe(self, *pair: Any) -> None: ...
    def abandon(self) -> None: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {} if self.mean is None else {"mean": self.mean}


@named("preconditioner: own", make=Own)
@named("preconditioner: pairs on a diagonal", make=lambda: hf.LBFGSPreconditioner(8, "diagonal"))
def with_object(record: Record, make: Callable[[], Any]) -> None:
    train(record, preconditioner=make(), cg_max_iter=15)


RATIO, RELU = hf.RatioGrowth(0.05, 0.3), "relu, cross entropy"


@named("changing batches", growth=1, task=RELU)
@named("changing batches: lbfgs", growth=1, training={"preconditioner": "lbfgs"})
@named("changing batches: cnn, products on a part", growth=1, curvature_batch_size=3, task="cnn")
@named("growing batches: ratio", growth=RATIO, grow_every="step", curvature_batch_size=3)
@named("growing batches: variance", growth=hf.VarianceGrowth(0.5))
@named("growing batches: geometric", growth=hf.GeometricGrowth(1.5), curvature_batch_size=4)
@named("growing batches: ranks", RANKED, growth=RATIO)
def sampled(record: Record, task: str = RELU, training: Any = None, **options: Any) -> None:
    if dist.is_initialized():
        options |= {"num_replicas": 2, "rank": dist.get_rank()}
        training = {"process_group": dist.group.WORLD}
    sampler = hf.GrowingBatchSampler(20, 6, seed=3, **options)
    run = Training(record, task, **training or {})
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for indices in sampler:
            batch = tuple(t[indices] for t in run.batch)
            part = "curvature_batch_size" in options and sampler.curvature_batch_size
            run.step([batch], [hf.head(batch, part)] if part else None, indices=indices)
            sampler.update(run.optimizer.last_report)
    record.end(run.optimizer)
    record.rows[-1] |= leaves("sampler", sampler.state_dict())


@named("loss not finite", fault="loss")
@named("trials not finite, so rejected", fault="trials")
@named("rejected: kronecker", fault="trials", preconditioner="kronecker", damping=0.1)
@named("closure fails: in the gradient", fault="error", where=1)
@named("closure fails: later", fault="error", where=3)
@named("closure fails: dropout", fault="error", where=2, task="dropout")
def faulty(record: Record, fault: str, where: int = 0, **options: Any) -> None:
    """The third and fourth step meet a loss that is not finite, or an error."""
    run, calls = Training(record, form="loss", **options), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        bad = len(record.rows) in (2, 3)
        if bad and calls == where:
            raise OSError("a file is broken")
        bad = bad and fault == ("trials" if not torch.is_grad_enabled() else "loss")
        return run.closure() * (float("nan") if bad else 1.0)

    for _ in range(8):
        calls = 0
        try:
            run.step(closure=closure)
        except OSError as error:
            record.step(run.model, run.optimizer, repr(error))
            record.end(run.optimizer)
    record.end(run.optimizer)


def reloaded(saved: dict[str, Any]) -> dict[str, Any]:
    """As from a checkpoint's file."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save_atomically(saved, Path(folder, "checkpoint.pt"))
        return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


@named("checkpoint")
@named("checkpoint: cnn, lbfgs", task="cnn", preconditioner="lbfgs", history_size=6)
@named("checkpoint: groups", groups=rates, preconditioner="kronecker")
@named("checkpoint: batch norm", task="batch norm", dtype=torch.float64)
def resumed(record: Record, **options: Any) -> None:
    """After four steps a new model and optimizer take over."""
    run = Training(record, **options)
    for step in range(8):
        if step == 4:
            states = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
            batch, run, saved = run.batch, Training(record, **options), reloaded(states)
            run.batch = batch
            run.model.load_state_dict(saved["model"])
            run.optimizer.load_state_dict(saved["optimizer"])
        run.step()
    record.end(run.optimizer)


@named("add_param_group")
def thawed(record: Record) -> None:
    run = Training(record, groups=lambda model: model[2].parameters())
    for step in range(6):
        if step == 3:
            run.optimizer.add_param_group({"params": run.model[0].parameters(), "lr": 0.8})
        run.step()
    record.end(run.optimizer)


@named("products: tanh, mse", task="tanh, mse")
@named("products: cnn", task="strides and groups")
@named("products: two heads", task="two heads")
@named("products: dropout", task="dropout")
def products(record: Record, task: str) -> None:
    """Each engine's, those of given outputs, the Hessian's; and the diagnosis."""
    run = Training(record, task, form="loss")
    params = list(run.model.parameters())
    v = torch.randn(sum(p.numel() for p in params))
    for engine in ("auto", "double_backward", "tangent_rules", "finite_differences"):
        operator = GaussNewtonOperator.from_closure(run.closure, params, engine)
        record.note(engine=operator.engine, first=operator(v), again=operator(-2 * v))
    loss, outputs = run.task(run.batch)
    record.note(outputs=GaussNewtonOperator(loss, outputs, params)(v))
    record.note(hessian=HessianOperator(run.closure(), params)(v))
    found = hf.diagnose(closure=run.closure, params=params)
    record.note(diagnosis=[found.engine, found.error, found.operations, found.deterministic])


def walk(record: Record, model: nn.Module, loss: Callable[..., Tensor], **options: Any) -> None:
    """Ten steps of Kronecker SGD."""
    optimizer = kronecker.KroneckerSGD(model.parameters(), lr=0.3, **options)
    for _ in range(10):
        indices = torch.randperm(24)[:8]
        optimizer.zero_grad()
        value = loss(model(indices), indices % 3)
        value.backward()
        optimizer.step()
        record.step(model, optimizer, value, outputs=model(torch.arange(24)))
    record.end(optimizer)


@named("kronecker SGD: plain")
@named("kronecker SGD: momentum", momentum=0.9)
@named("kronecker SGD: nesterov, decay", momentum=0.5, nesterov=True, weight_decay=0.02)
@named("kronecker SGD: dampening, decay", momentum=0.7, dampening=0.2, weight_decay=0.1)
@named("kronecker SGD: none deferred", defer=0, momentum=0.9)
@named("kronecker SGD: refreshed", refresh_every=3, defer=10)
@named("kronecker SGD: joint start", widths=(8, 9), layer={"init": "joint"})
@named("kronecker SGD: rows of the Gram matrix", layer={"gram": "rows", "keep_initial": False})
def one_layer(record: Record, widths: Any = (3, 4), layer: Any = None, **options: Any) -> None:
    data = kronecker.KroneckerFactors(*(torch.randn(24, w) for w in widths), normalize=True)
    hidden = kronecker.KroneckerLinear(data, 10, **layer or {})
    walk(record, nn.Sequential(hidden, nn.ReLU(), nn.Linear(10, 3)), CE, **options)
    points = kronecker.KroneckerFactors(*(torch.randn(2, w) for w in widths), normalize=True)
    record.note(predicted=hidden.predict(points))


@named("kronecker SGD: two layers, scan", search="scan", momentum=0.5)
@named("kronecker SGD: two layers, tree", search="tree")
def two_layers(record: Record, search: str, **options: Any) -> None:
    data = kronecker.KroneckerFactors.power(torch.randn(24, 5), normalize=True)
    network = kronecker.TwoLayerNetwork(data, 64, search=search, shift=0.4)
    walk(record, network, lambda z, y: 0.5 * (z - y).square().sum(), **options)


@named("correlation tree")
def tree(record: Record) -> None:
    numbers = torch.randn(50, 6)
    searched = kronecker.CorrelationTree(numbers, branching=3)
    for _ in range(4):
        numbers[:5] = torch.randn(5, 6)
        searched.update(range(5))
        record.note(found=list(searched.query([0, 3, 5], 0.7)))


def sharded(model: nn.Module) -> Any:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,))).parameters()


@named("ranks: unequal shares", RANKED)
@named("ranks: in batches, lbfgs", RANKED, size=7, preconditioner="lbfgs")
@named("ranks: diagonal", RANKED, preconditioner="diagonal", cg_max_iter=6)
@named("ranks: DistributedDataParallel", RANKED, wrapped=True, task="batch norm")
@named("ranks: hessian", RANKED, curvature="hessian", damping=10.0)
@named("ranks: shard_state", RANKED, shard_state=True, task=RELU)
@named("ranks: shard_state, lbfgs", RANKED, shard_state=True, preconditioner="lbfgs", groups=rates)
@named("ranks: fully_shard", RANKED, preconditioner="lbfgs", cg_max_iter=4, groups=sharded)
def ranked(record: Record, size: int = 14, wrapped: bool = False, **options: Any) -> None:
    """The second rank has twice as many cases."""
    if options.get("groups") is not sharded:
        options["process_group"] = dist.group.WORLD
    run = Training(record, **options)
    own = slice(0, 7) if dist.get_rank() == 0 else slice(7, 20)
    batches = hf.split_batch(tuple(t[own] for t in run.batch), size)
    if wrapped:
        run.task.model = DistributedDataParallel(run.model)
    for _ in range(5):
        run.step(batches)
        hf.check_replicas(run.optimizer)
    record.end(run.optimizer)


# --- both sides, and the comparison ---------------------------------------------------------


def carried_out(run: Callable[[Record], None]) -> list[Row]:
    """What a run recorded; where it failed, its traceback at the end."""
    record = Record()
    torch.manual_seed(0)
    try:
        run(record)
    except Exception:
        record.rows.append({"failed": traceback.format_exc()})
    return record.rows


def record_rank(rank: int, folder: str) -> None:
    """One rank's part in the runs of two."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store, patience = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", store, patience, world_size=2, rank=rank)
    rows = {name: carried_out(run) for name, run in RANKED.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def record_all(file: Path, only: str) -> None:
    """Every run, with the package that is imported here; the hidden half of ``main``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = {name: carried_out(run) for name, run in CASES.items() if only in name}
    ranked_too = [name for name in RANKED if only in name]
    if ranked_too:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(record_rank, (folder,), nprocs=2)
            ranks = [json.loads(Path(folder, f"{r}.json").read_text()) for r in (0, 1)]
        for name in ranked_too:
            steps = zip_longest(*(r[name] for r in ranks), fillvalue={})
            rows[name] = [
                {f"{k}, rank {r}": d for r, row in enumerate(step) for k, d in row.items()}
                for step in steps
            ]
    file.write_text(json.dumps({"package": str(Path(hf.__file__).parent), "rows": rows}))


def recorded(tree: Path, only: str) -> dict[str, list[Row]]:
    """What the package in a tree does, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "record.json")
        command = [sys.executable, str(Path(__file__).resolve()), "--record", str(file)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **threads, "PYTHONPATH": str(tree)}
        subprocess.run([*command, "--only", only], env=environment, cwd=folder, check=True)
        found = json.loads(file.read_text())
    if Path(found["package"]).resolve() != (tree / "torch_hf").resolve():
        raise RuntimeError(f"{found['package']} was imported, not {tree / 'torch_hf'}")
    return found["rows"]


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A worktree of a revision, for as long as it is needed."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "old"))
        subprocess.run([*git, "add", "--detach", path, revision], check=True, capture_output=True)
        try:
            yield Path(path)
        finally:
            subprocess.run([*git, "remove", "--force", path], check=True)


def difference(old: list[Row], new: list[Row], added: set[str]) -> str:
    """Where two records first differ, empty where they do not; adds to the fields added."""
    for step, (a, b) in enumerate(zip(old, new, strict=False), 1):
        for where, row in (("before", a), ("now", b)):
            for text in (d for k, d in row.items() if k.startswith("failed")):
                return f"step {step}: fails {where}: {text.splitlines()[-1]}"
        grown = {k for k in b if k not in a and k.startswith(MAY_GROW)}
        added |= grown
        differ = [k for k in {**a, **b} if a.get(k) != b.get(k) and k not in grown]
        if differ:
            return f"step {step}: {differ[0]}, other fields: {len(differ) - 1}"
    return "" if len(old) == len(new) else f"{len(old)} steps before, {len(new)} now"


def compare(revision: str, only: str) -> int:
    """Prints the table; how many runs differ."""
    start, added = time.monotonic(), set[str]()
    with checked_out(revision) as folder:
        old = recorded(folder, only)
    new = recorded(ROOT, only)
    verdicts = {name: difference(old[name], new[name], added) for name in new}
    width = max(map(len, verdicts))
    print(f"{'run':{width}}  steps")
    for name, verdict in verdicts.items():
        print(f"{name:{width}}  {len(new[name]):5}  {verdict or 'identical'}")
    for name in sorted(added):
        print(f"only in the working tree: {name}")
    bad = sum(map(bool, verdicts.values()))
    print(f"the working tree beside {revision}, {time.monotonic() - start:.0f} s")
    print(f"{len(verdicts) - bad} of {len(verdicts)} runs bit-identical")
    return bad


def write_checkpoint(file: Path) -> None:
    """Writes what a later version must be able to go on from, with what it should arrive at.

    Six steps with the default preconditioner on the full batch, in float64. The problem is such
    that an ulp in the parameters stays one, since another machine rounds otherwise. The file holds
    the state dicts ``model`` and ``optimizer``, the batch ``inputs`` and ``targets``, the
    ``version`` that wrote it, and what three more steps give: ``expected_loss`` (the last
    report's ``new_loss``) and ``expected_parameters``, by name. They go::

        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        optimizer = HFOptimizer(model.parameters(), weight_decay=0.03, cg_max_iter=12)
        optimizer.step(lambda: F.mse_loss(model(inputs), targets))
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = mlp(4, 6, 2).double()
    inputs = torch.randn(40, 4).double()
    targets = torch.sin(1.5 * inputs[:, :2]) + 0.5 * inputs[:, 2:]
    optimizer = hf.HFOptimizer(model.parameters(), weight_decay=0.03, cg_max_iter=12)
    saved: dict[str, Any] = {"inputs": inputs, "targets": targets, "version": hf.__version__}
    for step in range(9):
        if step == 6:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved |= reloaded(states)  # a copy
        optimizer.step(lambda: F.mse_loss(model(inputs), targets))
    saved["expected_loss"] = optimizer.last_report.new_loss
    saved["expected_parameters"] = {k: p.detach() for k, p in model.named_parameters()}
    hf.save_atomically(saved, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("revision", nargs="?", default="HEAD~1", help="what to compare with (HEAD~1)")
    add("--only", default="", help="runs with this in their names")
    add("--write-checkpoint", type=Path, metavar="FILE", help="instead: see write_checkpoint")
    add("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_checkpoint:
        write_checkpoint(args.write_checkpoint)
    elif args.record:
        record_all(args.record, args.only)
    else:
        return bool(compare(args.revision, args.only))
    return 0


if __name__ == "__main__":
    sys.exit(main())
