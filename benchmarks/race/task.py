"""What a task of the race is, and the kind that most are: outputs of cases against targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_hf.sampling.growth import Growth

Tensors = tuple[Tensor, ...]
Metrics = dict[str, float]

#: Cases of the training set that the curve is measured on, and in memory at once.
CURVE_CASES = 10_000
CHUNK = 5_000


class Missing(Exception):
    """A task's data are not at hand, or what an optimizer is made of."""


@dataclass(frozen=True)
class Setting:
    """What all tasks of a race have in common.

    Attributes:
        data_root: Folder of the data sets.
        device: Where data and model live.
        large: Take the sizes meant for a GPU.
        download: Fetch MNIST and CIFAR-10 if they are missing.
        clock: ``"wall"``, or ``"cpu"`` for the CPU seconds of the process, which what else runs on
            the machine does not lengthen.
    """

    data_root: Path = Path("data")
    device: str = "cpu"
    large: bool = False
    download: bool = False
    clock: str = "wall"

    @property
    def kind(self) -> str:
        """What numbers of a race compare with: device, sizes and clock."""
        kind = torch.device(self.device).type + ("-large" if self.large else "")
        return kind + ("-seconds" if self.clock == "cpu" else "")


@dataclass(frozen=True)
class Batches:
    """How Hessian-free steps are fed where a step does not see all the data.

    Attributes:
        batch_size: Cases of the first gradient samples; peers have their own size.
        growth: Factor from epoch to epoch (or from step to step, see ``grow_every``), or a rule.
        grow_every: As in ``GrowingBatchSampler``.
        curvature_fraction: Part of the gradient sample that products are taken on.
        curvature_growth: Factor of the curvature sample; it keeps its part if None.
        max_batch_size: Where the growth ends; at all cases if None.
        gradient_split: Cases of the gradient sample at once; the whole of it if None.
        split_size: Cases of the curvature sample at once; the whole of it, which keeps its graph
            from product to product, if None.
    """

    batch_size: int
    growth: float | Growth = 1.2
    grow_every: str = "epoch"
    curvature_fraction: float = 1.0
    curvature_growth: float | None = None
    max_batch_size: int | None = None
    gradient_split: int | None = None
    split_size: int | None = None


def small_batches(setting: Setting) -> Batches:
    """How ours are fed on every task with minibatches: a plain closure on batches of 256."""
    return Batches(1_024 if setting.large else 256, growth=1.0, grow_every="step")


@dataclass
class RaceTask:
    """A problem to be raced on.

    Attributes:
        name: As on the command line.
        title: Written above table and plot.
        make_model: A new network from torch's generator, which the runner seeds.
        train: The training set's tensors, their first dimension the cases.
        loss: Model and batch to the mean loss over the cases and the network's outputs.
        residuals: Model and batch to tensors whose mean squares add up to the loss, the first
            dimension of each its cases: what optimizers for least squares need. None where the
            loss is of another kind.
        draw: Generator to a batch of new points, where every step of everybody sees others;
            ``train`` is then what the curve is measured on.
        evaluate: Model, and whether to look at the whole training set (else at a part where that
            is costly), to metrics; in all of them less is better.
        train_metric, test_metric: The two of the metrics that the table shows.
        targets: Metrics and the values whose times the table shows.
        batches: None if every step, the peers' too, sees all the data.
        peer_batch: Cases of a peer's step.
        lbfgs_batch: Cases of a step of torch's L-BFGS, which noise harms most.
        budget: Seconds that each run is given if the command line does not say.
        dtype: Of parameters and data.
        structurally_damped: Model, batch and a weight to the loss with structural damping and all
            outputs, where a network has hidden states; ours takes it with the option
            ``structural``.
        dimensions: Whatever is worth a place in the record, like the number of cases.
    """

    name: str
    title: str
    make_model: Callable[[], nn.Module]
    train: Tensors
    loss: Callable[[nn.Module, Tensors], tuple[Tensor, Any]]
    evaluate: Callable[[nn.Module, bool], Metrics]
    train_metric: str = "train_loss"
    test_metric: str = "test_loss"
    targets: Sequence[tuple[str, float]] = ()
    batches: Batches | None = None
    peer_batch: int = 500
    lbfgs_batch: int = 5_000
    budget: float = 60.0
    dtype: torch.dtype = torch.float32
    residuals: Callable[[nn.Module, Tensors], Tensors] | None = None
    draw: Callable[[torch.Generator], Tensors] | None = None
    structurally_damped: Callable[[nn.Module, Tensors, float], tuple[Tensor, Any]] | None = None
    dimensions: dict[str, Any] = field(default_factory=dict)

    @property
    def full_batch(self) -> bool:
        """Whether every step sees all the data."""
        return self.batches is None

    @property
    def cases(self) -> int:
        """Cases of the training set."""
        return len(self.train[0])

    def whole(self, generator: torch.Generator) -> Tensors:
        """What a step on the full batch sees: the training set, or points drawn anew."""
        return self.train if self.draw is None else self.draw(generator)


def supervised(
    name: str,
    title: str,
    make_model: Callable[[], nn.Module],
    train: Tensors,
    test: Tensors,
    loss: Callable[[Tensor, Tensor], Tensor],
    scores: dict[str, Callable[[Tensor, Tensor], Tensor]],
    **options: Any,
) -> RaceTask:
    """A task whose loss is a mean over cases of outputs against targets.

    Args:
        name: As in :class:`RaceTask`.
        title: As there.
        make_model: As there.
        train: Inputs and targets.
        test: Inputs and targets held out.
        loss: Outputs and targets to the mean loss.
        scores: Further metrics: outputs and targets to a number for each case.
        **options: As in :class:`RaceTask`.
    """
    part = tuple(tensor[:CURVE_CASES] for tensor in train)

    def evaluate(model: nn.Module, whole: bool) -> Metrics:
        found = {}
        for prefix, data in (("train", train if whole else part), ("test", test)):
            for key, value in _means(model, data, loss, scores).items():
                found[f"{prefix}_{key}"] = value
        return found

    def batch_loss(model: nn.Module, batch: Tensors) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        return loss(outputs, batch[1]), outputs

    def misfits(model: nn.Module, batch: Tensors) -> Tensors:
        return (model(batch[0]) - batch[1],)

    dimensions = {"train_cases": len(train[0]), "test_cases": len(test[0])}
    if loss is F.mse_loss:
        options = {"residuals": misfits, **options}
    return RaceTask(
        name, title, make_model, train, batch_loss, evaluate, dimensions=dimensions, **options
    )


@torch.no_grad()
def _means(
    model: nn.Module,
    data: Tensors,
    loss: Callable[[Tensor, Tensor], Tensor],
    scores: dict[str, Callable[[Tensor, Tensor], Tensor]],
) -> Metrics:
    sums = dict.fromkeys(["loss", *scores], 0.0)
    for inputs, targets in zip(*(tensor.split(CHUNK) for tensor in data), strict=True):
        outputs = model(inputs)
        sums["loss"] += float(loss(outputs, targets)) * len(inputs)
        for key, score in scores.items():
            sums[key] += float(score(outputs, targets).sum())
    return {key: value / len(data[0]) for key, value in sums.items()}


def wrong(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 for each case whose largest output is not the target's: the mean is the error rate."""
    return (outputs.argmax(dim=1) != targets).float()
