"""Ours and its ablations: how a Hessian-free step is fed on each task.

A contender takes a step with ``step(progress)``, where progress is the part of the budget that is
used up; ``notes()`` is what else its curve should show.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torch_hf import GrowingBatchSampler, HFOptimizer, head, split_batch

from .peers import PEERS, DensePeer, Peer
from .task import Batches, RaceTask, Tensors

Options = dict[str, Any]
SAMPLING = {field.name for field in fields(Batches)}
#: Samples that grow by a factor, as in the paper; products on the first quarter.
GEOMETRIC = {"growth": 1.01, "batch_size": 1_000, "curvature_fraction": 0.25}
#: Samples that do not grow, and twice the size that growing ones begin with.
FIXED = {"growth": 1.0, "curvature_growth": 1.0, "batch_size": 2_000, "curvature_fraction": 0.5}
#: The method of arXiv 1309.1508 without its preconditioner, CG's start and end as published.
PLAIN = {"preconditioner": "none", "cg_max_iter": 250, "cg_decay": 0.95, "cg_tol": 5e-4}

#: Ours as a user gets it, and what of the paper's two ideas each ablation leaves out.
OURS: dict[str, Options] = {
    "hf": {},
    "hf-plain": {**PLAIN, **FIXED},
    "hf-pairs": {**PLAIN, **FIXED, "preconditioner": "lbfgs"},
    "hf-growing": {**PLAIN, **GEOMETRIC},
    "hf-both": {**PLAIN, **GEOMETRIC, "preconditioner": "lbfgs"},
    # the gradient over all cases, products on a fixed sample (Kingsbury et al. 2012)
    "hf-kingsbury": {**PLAIN, **FIXED, "whole_gradient": True},
}
#: Where every step sees all the data there is nothing to grow.
ON_FULL_BATCH = ("hf", "hf-plain")


class Contender(Protocol):
    """Who takes part in a race."""

    def step(self, progress: float) -> None:
        """Take one step; ``progress`` from 0 to 1 says how much of the budget is gone."""

    def notes(self) -> dict[str, float]:
        """Numbers worth a place beside the metrics."""


class HF:
    """``HFOptimizer`` on a task, with its growing batches where the task is not full batch."""

    def __init__(self, task: RaceTask, model: nn.Module, seed: int, options: Options) -> None:
        own = {key: value for key, value in options.items() if key not in SAMPLING}
        whole_gradient = own.pop("whole_gradient", False)
        self.structural = own.pop("structural", 0.0)
        if self.structural and task.structurally_damped is None:
            raise ValueError(f"{task.name} has no hidden states for structural damping")
        self.task, self.model = task, model
        self.optimizer = HFOptimizer(model.parameters(), **own)
        self.whole, self.generator = task.train, torch.Generator().manual_seed(seed)
        self.sampler: GrowingBatchSampler | None = None
        self.work = {"cg_iterations": 0, "products": 0, "evaluations": 0, "rejections": 0}
        self.parts: dict[str, float] = {}
        if task.batches is not None:
            sampling = {key: value for key, value in options.items() if key in SAMPLING}
            self.batches = replace(task.batches, **sampling)
            self.sampler = make_sampler(self.batches, task.cases, seed, whole_gradient)
            self.drawn = self._draw(self.sampler)

    def step(self, progress: float) -> None:
        if self.sampler is None:
            self.whole = self.task.whole(self.generator)
            self.optimizer.step(self._loss)
        elif self.batches.growth == 1.0 and self.batches.curvature_fraction == 1.0:
            batch = next(self.drawn)
            self.optimizer.step(lambda: self.task.loss(self.model, batch))
        else:
            batch = next(self.drawn)
            first = head(batch, self.sampler.curvature_batch_size)
            size = self.batches.split_size or len(first[0])
            self.optimizer.step(
                lambda part: self.task.loss(self.model, part),
                batches=split_batch(batch, self.batches.gradient_split or len(batch[0])),
                curvature_batches=split_batch(first, size),
            )
        report = self.optimizer.last_report
        assert report is not None
        if self.sampler is not None:
            self.sampler.update(report)  # a rule that reads it may make the batches grow
        for key in ("cg_iterations", "products", "evaluations"):
            self.work[key] += getattr(report, key)
        self.work["rejections"] += not report.accepted
        for key, value in report.seconds.items():
            self.parts[key] = self.parts.get(key, 0.0) + value

    def _loss(self) -> Any:
        damping = self.optimizer.param_groups[0]["damping"]
        if not self.structural or damping is None or not torch.is_grad_enabled():
            return self.task.loss(self.model, self.whole)
        assert self.task.structurally_damped is not None
        weight = self.structural * damping  # mu times lambda, as published
        return self.task.structurally_damped(self.model, self.whole, weight)

    def notes(self) -> dict[str, float]:
        report = self.optimizer.last_report
        if report is None:
            return {}
        last = {"damping": report.damping, "batch_cases": report.batch_cases}
        return {**self.work, **last, **{f"seconds_{k}": v for k, v in self.parts.items()}}

    def _draw(self, sampler: GrowingBatchSampler) -> Iterator[Tensors]:
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            for indices in sampler:
                yield take(self.task.train, indices)
            epoch += 1


def make_sampler(
    batches: Batches, cases: int, seed: int, whole_gradient: bool = False
) -> GrowingBatchSampler:
    """The sampler that these settings describe; sizes end at the number of cases."""
    size = min(batches.batch_size, cases)
    curvature = max(1, round(batches.curvature_fraction * size))
    return GrowingBatchSampler(
        cases,
        batch_size=cases if whole_gradient else size,
        growth=batches.growth,
        grow_every=batches.grow_every,
        max_batch_size=cases if whole_gradient else max(size, batches.max_batch_size or cases),
        curvature_batch_size=curvature,
        curvature_growth=batches.curvature_growth,
        drop_last=True,  # a short batch at the end would make a noisy step
        seed=seed,
    )


def take(data: Tensors, indices: Sequence[int] | Tensor) -> Tensors:
    """These cases."""
    return tuple(tensor[indices] for tensor in data)


def split_name(name: str) -> tuple[str, Options]:
    """``hf:cg_max_iter=20:growth=1.1`` to ``hf`` and its options."""
    base, *pairs = name.split(":")
    if base not in OURS and base not in PEERS:
        raise ValueError(f"no optimizer {base!r}; there are {', '.join([*OURS, *PEERS])}")
    return base, parse_options(pairs)


def parse_options(pairs: Sequence[str]) -> Options:
    """``key=value``, the value a Python literal or else a string."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"options are written key=value; got {pair!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


class Averaged:
    """A contender of whose weights the running mean is evaluated; taking it is on the clock.

    Args:
        contender: Who trains the model.
        model: The model.
        part: Of the mean, what a step leaves.
    """

    def __init__(self, contender: Contender, model: nn.Module, part: float) -> None:
        self.contender, self.model = contender, model
        self.mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(part), use_buffers=True)
        self.notes = contender.notes

    def step(self, progress: float) -> None:
        self.contender.step(progress)
        self.mean.update_parameters(self.model)


def evaluated(contender: Contender, model: nn.Module) -> nn.Module:
    """The weights that a curve shows: the model's, or their mean."""
    return contender.mean.module if isinstance(contender, Averaged) else model


def make_contender(
    name: str,
    task: RaceTask,
    model: nn.Module,
    seed: int,
    rate: Mapping[str, Any],
) -> tuple[Contender, Options]:
    """The contender of that name, and the options it runs with.

    Args:
        name: A name of :data:`OURS` or ``PEERS``, options behind colons.
        task: What it trains on.
        model: What it trains.
        seed: Of the order of the cases.
        rate: The peer's learning rate or damping, and what else was searched.
    """
    base, own = split_name(name)
    options = {**OURS.get(base, rate), **own}
    given = {key: value for key, value in options.items() if key != "averaging"}
    contender: Contender
    if base in OURS:
        contender = HF(task, model, seed, given)
    else:
        make = DensePeer if PEERS[base].dense else Peer
        contender = make(PEERS[base], task, model, seed, given)
    if part := options.get("averaging", 0.0):
        contender = Averaged(contender, model, part)
    return contender, options
