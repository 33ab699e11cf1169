"""Random cases of a step: models, losses, options, closures, scales and faults.

``python tests/helpers/fuzz.py --cases 5000`` runs many and prints what was found;
``--seed 17`` runs one case and says what it is.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import linecache
import math
import random
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from interrupts import PACKAGE, Tracer, settings
from snapshots import assert_identical, snapshot
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_hf import HFOptimizer, LBFGSPreconditioner

# Models: each takes the rows of (n, 4) and gives (n, 3) numbers, or two such tensors


class Once(torch.autograd.Function):
    """The identity, which cannot be differentiated twice."""

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell = cell(2, 3, batch_first=True)
        self.readout = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.cell(x.unflatten(1, (2, 2)))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, num_heads=1, batch_first=True)
        self.readout = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (2, 2))
        return self.readout((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Tied(nn.Module):
    """One weight used forwards and backwards, and a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        again = F.linear(torch.tanh(self.layer(x)), self.layer.weight.T)
        return self.gain * self.layer(again)


class Free(nn.Module):
    """Parameters of no layer only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3) / 2)
        self.power = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) * torch.exp(self.power)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return self.one(hidden), self.two(hidden)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.never_called = mlp(nn.Tanh()), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    return model


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), *middle, nn.Linear(3, 3))


def as_tokens(x: Tensor) -> Tensor:
    return x.detach().nan_to_num().sign().long() + 1


def embedding() -> nn.Module:
    return nn.Sequential(Apply(as_tokens), nn.Embedding(3, 2), nn.Flatten(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    picture = Apply(lambda x: x.reshape(-1, 1, 2, 2))
    return nn.Sequential(
        picture, nn.Conv2d(1, 2, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "no bias": lambda: nn.Linear(4, 3, bias=False),
    "tanh": lambda: mlp(nn.Tanh()),
    "relu": lambda: mlp(nn.ReLU()),
    "deep": lambda: mlp(nn.Softplus(), nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 3), nn.GELU()),
    "batch norm": lambda: mlp(nn.BatchNorm1d(3), nn.Tanh()),
    "layer norm": lambda: mlp(nn.LayerNorm(3), nn.Tanh()),
    "dropout": lambda: mlp(nn.Tanh(), nn.Dropout(0.3)),
    "noisy": lambda: mlp(nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(0.3)),
    "once": lambda: mlp(Apply(Once.apply), nn.Tanh()),
    "cnn": cnn,
    "embedding": embedding,
    "rnn": lambda: Recurrent(nn.RNN),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": Attention,
    "tied": Tied,
    "free": Free,
    "two heads": TwoHeads,
    "unused": Unused,
    "frozen": frozen,
}


def outputs_of(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    z = model(x)
    return z if isinstance(z, tuple) else (z,)


# Losses of outputs and real targets of the same shape


def classes(t: Tensor) -> Tensor:
    return t.nan_to_num().argmax(1)


def signs(t: Tensor) -> Tensor:
    return torch.where(t > 0, 1.0, -1.0).to(t.dtype)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "squares": lambda z, t: 0.5 * (z - t).square().sum(1).mean(),
    "sum": lambda z, t: F.mse_loss(z, t, reduction="sum"),
    "rmse": lambda z, t: F.mse_loss(z, t).sqrt(),
    "cross entropy": lambda z, t: F.cross_entropy(z, classes(t)),
    "smoothed": lambda z, t: F.cross_entropy(z, classes(t), label_smoothing=0.1),
    "soft targets": lambda z, t: F.cross_entropy(z, t.softmax(1)),
    "log-sum-exp": lambda z, t: (z.logsumexp(1) - z.gather(1, classes(t)[:, None])[:, 0]).mean(),
    "bce": lambda z, t: F.binary_cross_entropy_with_logits(z, t.sigmoid()),
    "softplus": lambda z, t: F.softplus(-signs(t) * z).mean(),
    "huber": F.huber_loss,
    "smooth l1": F.smooth_l1_loss,
    "kl": lambda z, t: F.kl_div(z.log_softmax(1), t.softmax(1), reduction="batchmean"),
    "poisson": lambda z, t: F.poisson_nll_loss(z, t.abs()),
    "log cosh": lambda z, t: (z - t).cosh().log().mean(),
    "charbonnier": lambda z, t: ((z - t).square() + 1e-3).sqrt().mean(),
    "quartic": lambda z, t: (z - t).pow(4).mean(),
    "l1": F.l1_loss,
    "not convex": lambda z, t: torch.sin(z - t).square().mean(),
}

# Closures, each of a run and a batch


def lbfgs(run: Run, batch: tuple[Tensor, ...]) -> Any:
    run.optimizer.zero_grad()
    loss, _ = run.forward(batch)
    loss.backward()
    return loss


def zeroing(run: Run, batch: tuple[Tensor, ...]) -> Any:
    run.optimizer.zero_grad(set_to_none=False)
    loss, _ = run.forward(batch)
    loss.backward()
    return loss.item()


def returning(run: Run, batch: tuple[Tensor, ...]) -> Any:
    return run.forward(batch)[0]


def explicit(run: Run, batch: tuple[Tensor, ...]) -> Any:
    return run.forward(batch)


def with_cases(run: Run, batch: tuple[Tensor, ...]) -> Any:
    loss, z = run.forward(batch)
    return loss, z, len(batch[0])


def autocast(run: Run, batch: tuple[Tensor, ...]) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = run.forward(batch)
    return loss


FORMS = {f.__name__: f for f in (lbfgs, zeroing, returning, explicit, with_cases, autocast)}

# A case


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one step: ``kind``, at which call or line, and the value or error."""

    kind: str
    at: int = 0
    value: float = math.nan
    error: type[BaseException] = OSError


@dataclass(frozen=True)
class Case:
    seed: int
    model: str
    loss: str
    dtype: torch.dtype
    form: str
    rows: int
    data_scale: float
    target_scale: float
    loss_scale: float
    batching: str
    changing: bool
    groups: bool
    preconditioner: str
    faults: tuple[Fault | None, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def has_ordinary_data(self) -> bool:
        """Whether variances of it, which batch norm keeps, are finite in any type."""
        large = any(f and f.kind == "batch" and 1e15 < abs(f.value) < math.inf for f in self.faults)
        return self.data_scale < 1e15 and not large


PRECONDITIONERS: dict[str, Callable[[], Any]] = {
    "lbfgs": lambda: "lbfgs",
    "kronecker": lambda: "kronecker",
    "kronecker-lbfgs": lambda: "kronecker-lbfgs",
    "diagonal": lambda: "diagonal",
    "none": lambda: "none",
    "pairs on diagonal": lambda: LBFGSPreconditioner(4, base="diagonal"),
}
BATCHINGS = ("whole", "whole", "parts", "parts", "curvature", "parts and curvature")
SCALES = (1e-30, 1e-20, 1e-10, 1e-4, 1e4, 1e10, 1e20, 1e30)


def scale(draw: random.Random) -> float:
    return draw.choice(SCALES) if draw.random() < 0.25 else 1.0


def some(draw: random.Random, common: Any, *others: Any) -> Any:
    """The common value half of the time."""
    return common if draw.random() < 0.5 else draw.choice(others)


def draw_fault(draw: random.Random) -> Fault | None:
    kind = draw.choices(
        ["", "call", "line", "batch", "double"], weights=[0.7, 0.1, 0.08, 0.1, 0.02]
    )[0]
    if kind == "call":
        error = draw.choice([OSError, KeyboardInterrupt, MemoryError, ValueError, RuntimeError])
        return Fault(kind, draw.randint(1, 10), error=error)
    if kind == "line":
        place = int(math.exp(draw.uniform(0, math.log(20_000))))
        return Fault(kind, place, error=draw.choice([KeyboardInterrupt, MemoryError]))
    if kind == "batch":
        return Fault(kind, value=draw.choice([math.nan, math.inf, -math.inf, 1e30]))
    return Fault(kind) if kind else None


def draw_case(seed: int) -> Case:
    """The case of a seed, the same in every process."""
    draw = random.Random(seed)
    options = {
        "curvature": some(draw, "ggn", "hessian"),
        "solver": some(draw, "auto", "cg", "exact", "lanczos", "broyden", "lbfgs"),
        "damping": some(draw, None, 0.0, 1e-30, 1e-6, 1.0, 1e6, 1e30),
        "lr": some(draw, 1.0, 0.0, 1e-3, 0.5, 3.0),
        "weight_decay": some(draw, 0.0, 1e-30, 1e-4, 0.1, 10.0, 1e10),
        "maximize": some(draw, False, False, True),
        "history_size": draw.choice([2, 4, 20]),
        "cg_max_iter": some(draw, None, 1, 2, 11, 40),
        "cg_tol": some(draw, 5e-3, 0.0, 5e-4, 0.5),
        "cg_decay": some(draw, None, 0.0, 0.95, 1.0),
    }
    batching = draw.choice(BATCHINGS)
    often = ["with_cases"] * 10 if batching.startswith("parts") else []
    return Case(
        seed,
        model=draw.choice(list(MODELS)),
        loss=draw.choice(list(LOSSES)),
        dtype=some(draw, torch.float32, torch.float64, torch.float64, torch.bfloat16),
        form=draw.choice([*FORMS, *often]),
        rows=draw.randint(4, 9),
        data_scale=scale(draw),
        target_scale=scale(draw),
        loss_scale=scale(draw),
        batching=batching,
        changing=draw.random() < 0.3,
        groups=draw.random() < 0.3,
        preconditioner=some(draw, "kronecker-lbfgs", *PRECONDITIONERS),
        faults=tuple(draw_fault(draw) for _ in range(draw.randint(2, 5))),
        options={k: v for k, v in options.items() if draw.random() < 0.4},
    )


class Run:
    """A case on its way: model, optimizer and data of the next step."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(case.seed)
        numpy.random.seed(case.seed % 2**32)
        random.seed(case.seed)
        self.model = MODELS[case.model]().to(case.dtype)
        self.optimizer = self.make_optimizer()
        self.dtype = case.dtype
        self.fault: Fault | None = None
        self.calls = 0
        self.data = self.draw_data(0)

    def make_optimizer(self) -> HFOptimizer:
        given: Any = list(self.model.parameters())
        if self.case.groups and len(given) > 1:
            given = [{"params": given[:1], "weight_decay": 0.01}, {"params": given[1:]}]
        preconditioner = PRECONDITIONERS[self.case.preconditioner]()
        return HFOptimizer(given, preconditioner=preconditioner, **self.case.options)

    def draw_data(self, number: int) -> tuple[Tensor, Tensor]:
        case = self.case
        generator = torch.Generator().manual_seed(case.seed + 7919 * number)
        x = torch.randn(case.rows, 4, generator=generator, dtype=torch.float64)
        t = torch.randn(case.rows, 3, generator=generator, dtype=torch.float64)
        return case.data_scale * x, case.target_scale * t

    def forward(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, t = (tensor.to(self.dtype) for tensor in batch)
        z = outputs_of(self.model, x)
        loss = sum(LOSSES[self.case.loss](one, t.to(one.dtype)) for one in z)
        sign = -1.0 if self.case.options.get("maximize") else 1.0
        return loss * (sign * self.case.loss_scale), z

    def closure(self, batch: tuple[Tensor, ...] | None = None) -> Any:
        self.calls += 1
        result = FORMS[self.case.form](self, self.data if batch is None else batch)
        fault = self.fault
        if fault and fault.kind == "call" and self.calls == fault.at:
            raise fault.error("injected")
        return result

    def parts(self) -> list[tuple[Tensor, Tensor]] | None:
        if not self.case.batching.startswith("parts"):
            return None
        x, t = self.data
        return [(x[:2], t[:2]), (x[2:], t[2:])]

    def prepare(self, number: int, fault: Fault | None) -> None:
        """Data, type and fault of the next step."""
        self.calls, self.fault = 0, fault
        self.data = self.draw_data(number if self.case.changing else 0)
        if fault and fault.kind == "batch":
            x, _ = self.data
            x[1, 2] = fault.value
        if fault and fault.kind == "double":
            self.model.double()
            self.dtype = torch.float64

    def step(self) -> None:
        x, t = self.data
        batches = self.parts()
        own = "curvature" in self.case.batching
        if own and batches is None:
            batches = [self.data]
        self.optimizer.step(self.closure, batches, [(x[:3], t[:3])] if own else None)

    def take(self, number: int, fault: Fault | None) -> BaseException | None:
        """One step with its fault; what it raised."""
        self.prepare(number, fault)
        if fault and fault.kind == "line":
            return Tracer(fault.at, fault.error).run(self.step)
        try:
            self.step()
        except (Exception, KeyboardInterrupt) as error:
            return error
        return None

    @torch.no_grad()
    def objective(self, noise: Tensor) -> float:
        """The loss on the data of the step, with penalty, evaluated apart from the optimizer."""
        after, buffers = torch.get_rng_state(), copy.deepcopy(dict(self.model.named_buffers()))
        torch.set_rng_state(noise)
        total = 0.0
        for batch in self.parts() or [self.data]:
            with sdpa_kernel(SDPBackend.MATH):  # as in a step; the fused kernel rounds otherwise
                loss = self.forward(batch)[0]
            total += loss.double().item() * self.share(batch)
        torch.set_rng_state(after)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        sign = -1.0 if self.case.options.get("maximize") else 1.0
        return sign * total + self.penalty()

    def objective_in_double(self, noise: Tensor) -> float:
        """The same without rounding, as far as float64 can."""
        other = copy.copy(self)
        other.model, other.dtype = copy.deepcopy(self.model).double(), torch.float64
        return other.objective(noise)

    def share(self, batch: tuple[Tensor, ...]) -> float:
        return len(batch[0]) / len(self.data[0])

    def penalty(self) -> float:
        return sum(
            0.5 * group["weight_decay"] * p.detach().double().square().sum().item()
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        )

    def snapshot(self) -> dict[str, Any]:
        found = snapshot(self.model, self.optimizer)
        report = found.pop("report")
        row = report.to_dict() if report else {}
        found["report"] = {k: v for k, v in row.items() if not k.startswith("seconds")}
        return found | {"settings": settings()}


# What must hold

KINDS = (
    "risen loss",
    "not finite",
    "changed after an exception",
    "raw error",
    "lambda",
    "state",
    "settings",
    "report",
)


@dataclass(frozen=True)
class Finding:
    kind: str
    text: str


def same(found: Any, truth: Any) -> bool:
    try:
        assert_identical(found, truth)
    except (AssertionError, AttributeError):  # a tensor in the place of None
        return False
    return True


def differences(found: dict[str, Any], truth: dict[str, Any]) -> list[str]:
    """Where two snapshots differ, with what the comparison says."""
    differing = []
    for key in truth:
        try:
            assert_identical(found[key], truth[key], key)
        except (AssertionError, AttributeError) as error:  # a tensor in the place of None
            differing.append(f"{key}: {str(error)[:300]}")
    return differing


def is_of_the_package(error: BaseException) -> bool:
    """Whether a ``raise`` of the package made it, and not a call that failed there."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not isinstance(error, (RuntimeError, ValueError, TypeError)):
        return False
    last = frames[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    return last.filename.startswith(PACKAGE) and line.startswith("raise ")


def injected(error: BaseException, fault: Fault | None) -> bool:
    if fault is None or fault.kind not in ("call", "line"):
        return False
    return isinstance(error, fault.error) and (fault.kind == "line" or "injected" in str(error))


class Checker:
    """Takes the steps of a case and looks at each.

    Args:
        case: The case.
        counts: What happened is counted here, so that a reader sees what was tried.
    """

    def __init__(self, case: Case, counts: Counter[str]) -> None:
        self.case, self.counts = case, counts
        self.findings: list[Finding] = []

    def add(self, kind: str, text: str) -> None:
        self.findings.append(Finding(kind, text))

    def run(self) -> list[Finding]:
        try:
            run = Run(self.case)
        except Exception as error:
            self.counts["refused options"] += 1
            self.look_at_error(error, None, "construction")
            return self.findings
        for number, fault in enumerate(self.case.faults):
            self.one_step(run, number, fault)
            if self.findings:
                return self.findings
        if self.case.seed % 2:  # it takes as long as all of the rest
            self.resume(run)
        return self.findings

    def one_step(self, run: Run, number: int, fault: Fault | None) -> None:
        run.prepare(number, fault)  # a cast of the model is no part of the step
        before, noise = run.snapshot(), torch.get_rng_state()
        error = run.take(number, fault)
        after, place = run.snapshot(), f"step {number}, {fault}"
        if not same(after["settings"], before["settings"]):
            self.add("settings", f"{place}: {before['settings']} became {after['settings']}")
        if error is not None:
            self.counts["exceptions"] += 1
            self.look_at_error(error, fault, place)
            self.look_at_change(before, after, number, fault, place)
        else:
            self.look_at_report(run, noise, place)
        if not all(bool(p.isfinite().all()) for p in run.model.parameters()):
            self.add("not finite", f"{place}: parameters {run.optimizer.last_report}")
        if self.case.has_ordinary_data and not all(
            bool(b.isfinite().all()) for b in run.model.buffers()
        ):
            self.add("not finite", f"{place}: buffers {run.optimizer.last_report}")
        damping = run.optimizer.param_groups[0]["damping"]
        if damping is not None and not (math.isfinite(damping) and damping >= 0.0):
            self.add("lambda", f"{place}: {damping}")

    def look_at_error(self, error: BaseException, fault: Fault | None, place: str) -> None:
        if injected(error, fault):
            self.counts["injected"] += 1
        elif is_of_the_package(error):
            if (name := f"refused: {str(error)[:60]}") not in self.counts:
                print(f"seed {self.case.seed} first {name}", flush=True)
            self.counts[name] += 1
        else:
            trace = "".join(traceback.format_exception(error)[-6:])
            self.add("raw error", f"{place}: {type(error).__name__}: {error}\n{trace}")

    def look_at_change(
        self, before: Any, after: Any, number: int, fault: Fault | None, place: str
    ) -> None:
        changed = differences(after, before)
        if changed and fault and fault.kind == "line":  # the step may be whole
            changed = differences(after, self.replayed(number))
        if changed:
            self.add("changed after an exception", f"{place}: {changed}")

    def replayed(self, number: int) -> dict[str, Any]:
        """The state after that step without its fault, all that came before the same."""
        run = Run(self.case)
        for k, fault in enumerate(self.case.faults[:number]):
            run.take(k, fault)
        run.take(number, None)
        return run.snapshot()

    def look_at_report(self, run: Run, noise: Tensor, place: str) -> None:
        report = run.optimizer.last_report
        assert report is not None
        self.counts["accepted" if report.accepted else "not accepted"] += 1
        if report.solver == "kronecker" and "taken back" in report.reason:
            self.counts["taken back"] += 1
            return
        if report.solver == "kronecker" and math.isnan(report.new_loss):
            self.counts["light"] += 1  # the next batch judges it
            return
        if not math.isfinite(report.loss):
            self.counts["not finite before"] += 1
            if report.accepted:
                self.add("risen loss", f"{place}: accepted at {report.loss}")
            return
        if not report.new_loss <= report.loss:
            self.add("risen loss", f"{place}: {report.loss!r} to {report.new_loss!r}")
        if self.case.form == "autocast" or self.case.loss in ("sum",):
            return
        if report.accepted:
            found = run.objective(noise)
            eps = torch.finfo(run.dtype).eps
            rounding = 16 * eps * abs(report.loss)
            if abs(found - report.new_loss) > rounding:  # how far off is the loss itself?
                rounding = max(rounding, 4 * abs(found - run.objective_in_double(noise)))
            if not found <= report.loss + rounding:
                self.add("risen loss", f"{place}: evaluated {found!r}, {report}")
            if not abs(found - report.new_loss) <= max(rounding, 1e-5 * abs(found)) + 1e-37:
                self.add("report", f"{place}: evaluated {found!r}, {report}")

    def resume(self, run: Run) -> None:
        """A saved state goes on bit for bit as the run does."""
        other = copy.copy(run)
        other.model = copy.deepcopy(run.model)
        other.optimizer = other.make_optimizer()
        file = io.BytesIO()
        torch.save(run.optimizer.state_dict(), file)
        file.seek(0)
        try:
            other.optimizer.load_state_dict(torch.load(file, weights_only=True))
        except Exception as error:
            self.add("state", f"not loaded: {type(error).__name__}: {error}")
            return
        for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        start, number = generators(), len(self.case.faults)
        ends = []
        for each in (run, other):
            set_generators(start)
            errors = [each.take(number + k, None) for k in range(2)]
            ends.append(each.snapshot() | {"errors": [repr(e) for e in errors]})
            if errors[-1]:  # the report is still that of a step before
                del ends[-1]["report"]
        if not ends[0]["state"]["state"]:  # no step was ever taken; a state loaded is laid out
            del ends[0]["state"]["state"]
            del ends[1]["state"]["state"]
        changed = differences(ends[1], ends[0])
        if changed:
            self.add("state", f"a resumed run differs in {changed}")
        self.counts["resumed"] += 1


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state(), numpy.random.get_state(), random.getstate()


def set_generators(saved: tuple[Any, ...]) -> None:
    torch.set_rng_state(saved[0])
    numpy.random.set_state(saved[1])
    random.setstate(saved[2])


def check(seed: int, counts: Counter[str] | None = None) -> list[Finding]:
    """What is wrong in the case of a seed."""
    before = generators()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Checker(draw_case(seed), Counter() if counts is None else counts).run()
    finally:
        set_generators(before)


def report_findings(seeds: Iterable[int]) -> int:
    """Runs the cases and prints what was found; how many findings there were."""
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    cases = 0
    for seed in seeds:
        cases += 1
        for finding in check(seed, counts):
            kinds[finding.kind] += 1
            print(f"seed {seed}: {finding.kind}: {finding.text}\n  {draw_case(seed)}", flush=True)
    print(f"{cases} cases")
    for name, count in counts.most_common():
        print(f"  {count:6d} {name}")
    for kind in KINDS:
        print(f"{kinds[kind]:6d} {kind}")
    return sum(kinds.values())


def main() -> int:
    parser = argparse.ArgumentParser(description="Random cases of a step.")
    parser.add_argument("--cases", type=int, default=5000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--seed", type=int, help="this case alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.seed is not None:
        print(dataclasses.asdict(draw_case(given.seed)))
        return int(report_findings([given.seed]) > 0)
    return int(report_findings(range(given.first, given.first + given.cases)) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
