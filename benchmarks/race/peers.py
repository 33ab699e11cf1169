"""What a user would pick instead, with the rates that are tried for each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .broyden import SelfScaledBroyden
from .flat import FlatProblem
from .gauss_newton import LevenbergMarquardt, NaturalGradient
from .task import Missing, RaceTask, Tensors


@dataclass(frozen=True)
class PeerSpec:
    """How a peer is made.

    Attributes:
        make: Model and options to the optimizers that step together; of a dense method, problem and
            options to what has a ``step()``.
        rates: Learning rates to try; the search goes on at an end that wins.
        variants: Further options, each tried with each rate.
        searched: The option that takes the rates.
        factor: By which the search goes on.
        create_graph: Whether its gradients need a graph (for Hessian products).
        schedule: ``"cosine"`` lowers the rate to zero over the budget, ``"then-lbfgs"`` hands
            over to L-BFGS after a quarter of it.
        dense: Whether it is a dense method for least squares on the full batch.
    """

    make: Callable[..., Any]
    rates: Sequence[float]
    variants: Sequence[dict[str, Any]] = ({},)
    searched: str = "lr"
    factor: float = math.sqrt(10)
    create_graph: bool = False
    schedule: str = ""
    dense: bool = False


class Peer:
    """A first-order or quasi-Newton optimizer on a task, in its usual batches."""

    def __init__(
        self, spec: PeerSpec, task: RaceTask, model: nn.Module, seed: int, options: dict[str, Any]
    ) -> None:
        self.spec, self.task, self.model = spec, task, model
        options = dict(options)
        usual = task.lbfgs_batch if spec.make is lbfgs else task.peer_batch
        size = options.pop("batch_size", usual)
        self.optimizers: Sequence[Optimizer] = spec.make(model, **options)
        self.rates = [[g["lr"] for g in optimizer.param_groups] for optimizer in self.optimizers]
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = self._draw(size, self.generator)

    def step(self, progress: float) -> None:
        self._follow(progress)
        batch = self.task.whole(self.generator) if self.task.full_batch else next(self.batches)

        def closure() -> Tensor:
            self.model.zero_grad()
            loss, _ = self.task.loss(self.model, batch)
            loss.backward(create_graph=self.spec.create_graph)
            return loss

        if isinstance(self.optimizers[0], torch.optim.LBFGS):
            self.optimizers[0].step(closure)
            return
        closure()  # not every package takes one
        for optimizer in self.optimizers:
            optimizer.step()
        if self.spec.create_graph:
            self.model.zero_grad()  # gradients with a graph keep each other alive

    def notes(self) -> dict[str, float]:
        return {}

    def _follow(self, progress: float) -> None:
        if self.spec.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
            for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
        over = self.spec.schedule == "then-lbfgs" and progress > 0.25
        if over and not isinstance(self.optimizers[0], torch.optim.LBFGS):
            self.optimizers = lbfgs(self.model, history_size=100)

    def _draw(self, size: int, generator: torch.Generator) -> Iterator[Tensors]:
        cases = self.task.cases
        size = min(size, cases)
        device = self.task.train[0].device
        while True:
            order = torch.randperm(cases, generator=generator).to(device)
            for indices in order[: cases - cases % size].split(size):
                yield tuple(tensor[indices] for tensor in self.task.train)


class DensePeer:
    """A dense method for least squares, which takes the parameters as one vector."""

    def __init__(
        self, spec: PeerSpec, task: RaceTask, model: nn.Module, seed: int, options: dict[str, Any]
    ) -> None:
        self.problem = FlatProblem(task, model, seed)
        self.method = spec.make(self.problem, **options)

    def step(self, progress: float) -> None:
        self.problem.draw()
        self.method.step()

    def notes(self) -> dict[str, float]:
        return {}


def adam(model: nn.Module, **options: Any) -> Sequence[Optimizer]:
    return [torch.optim.Adam(model.parameters(), **options)]


def adamw(model: nn.Module, **options: Any) -> Sequence[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), **options)]


def sgd(model: nn.Module, **options: Any) -> Sequence[Optimizer]:
    return [torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **options)]


def lbfgs(model: nn.Module, lr: float = 1.0, **options: Any) -> Sequence[Optimizer]:
    """Without the tolerances, at which it would rest where these tasks begin to be of interest."""
    options = {"tolerance_grad": 0.0, "tolerance_change": 0.0, **options}
    return [torch.optim.LBFGS(model.parameters(), lr=lr, line_search_fn="strong_wolfe", **options)]


def muon(model: nn.Module, lr: float, adamw_ratio: float = 0.1) -> Sequence[Optimizer]:
    """Muon on matrices, AdamW on the rest at ``adamw_ratio`` times the rate."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizers: list[Optimizer] = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0)]
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=adamw_ratio * lr, weight_decay=0.0))
    return optimizers


def soap(model: nn.Module, **options: Any) -> Sequence[Optimizer]:
    return [_package().SOAP(model.parameters(), weight_decay=0.0, **options)]


def shampoo(model: nn.Module, **options: Any) -> Sequence[Optimizer]:
    """The blocked variant; roots anew every 20 steps, as its default of 1,000 is meant for days."""
    make = _package().ScalableShampoo
    return [make(model.parameters(), preconditioning_compute_steps=20, **options)]


def kron(model: nn.Module, **options: Any) -> Sequence[Optimizer]:
    dtype = next(model.parameters()).dtype
    return [_package().Kron(model.parameters(), precondition_dtype=dtype, **options)]


def adahessian(model: nn.Module, **options: Any) -> Sequence[Optimizer]:
    return [_package().AdaHessian(model.parameters(), **options)]


def kfac(model: nn.Module, **options: Any) -> Sequence[Optimizer]:
    """SINGD in its ``kfac_like`` form with dense factors: K-FAC with inverses kept up to date."""
    try:
        from singd.optim.optimizer import SINGD
    except ImportError as error:
        raise Missing("pip install singd") from error
    return [SINGD(model, kfac_like=True, normalize_lr_cov=True, **options)]


def _package() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pytorch_optimizer
    except ImportError as error:
        raise Missing("pip install pytorch-optimizer") from error
    return pytorch_optimizer


def geodesic(problem: FlatProblem, **options: Any) -> LevenbergMarquardt:
    return LevenbergMarquardt(problem, geodesic=True, **options)


USUAL = (3e-4, 1e-3, 3e-3, 1e-2)
#: Dampings matter by their power of ten; the search goes on by factors of thirty.
dense = partial(PeerSpec, searched="damping", factor=10**1.5, dense=True)

PEERS: dict[str, PeerSpec] = {
    "adam": PeerSpec(adam, USUAL),
    "adamw": PeerSpec(adamw, USUAL, variants=({"weight_decay": 0.01},)),
    "adam-cosine": PeerSpec(adam, (1e-3, 3e-3, 1e-2), schedule="cosine"),
    "sgd": PeerSpec(sgd, (3e-3, 1e-2, 3e-2, 0.1)),
    "lbfgs": PeerSpec(lbfgs, (1.0,), variants=({"history_size": 10}, {"history_size": 100})),
    "adam-lbfgs": PeerSpec(adam, (1e-3, 3e-3, 1e-2), schedule="then-lbfgs"),
    "muon": PeerSpec(muon, (3e-3, 1e-2, 3e-2, 0.1)),
    "soap": PeerSpec(soap, (1e-3, 3e-3, 1e-2)),
    "shampoo": PeerSpec(shampoo, (3e-3, 1e-2, 3e-2, 0.1)),
    "kron": PeerSpec(kron, (3e-4, 1e-3, 3e-3, 1e-2)),
    "adahessian": PeerSpec(adahessian, (0.03, 0.1, 0.3), create_graph=True),
    "kfac": PeerSpec(kfac, (1e-3, 3e-3, 1e-2), variants=({"damping": 1e-3}, {"damping": 1e-2})),
    "lm": dense(
        *(LevenbergMarquardt, (1e-6, 1e-3)),
        variants=({"rule": "nielsen"}, {"rule": "tenfold"}, {"rule": "nielsen", "scaled": True}),
    ),
    "lm-geodesic": dense(
        *(geodesic, (1e-6, 1e-3)),
        variants=({"rule": "delayed"}, {"rule": "nielsen"}, {"rule": "delayed", "scaled": True}),
    ),
    "engd": dense(NaturalGradient, (1e-12, 1e-9, 1e-6)),
    "spring": dense(
        NaturalGradient, (1e-12, 1e-9, 1e-6), variants=({"momentum": 0.8}, {"momentum": 0.95})
    ),
    "ssbroyden": PeerSpec(
        SelfScaledBroyden,
        (1.0,),
        variants=({"update": "ssbroyden"}, {"update": "ssbfgs"}),
        dense=True,
    ),
}
