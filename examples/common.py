"""What the examples share: their arguments, one training loop for every optimizer, the table.

A ``torch.optim.LBFGS`` closure is all that :class:`torch_hf.HFOptimizer` asks for, and Adam and SGD
take one as well, so a single loop trains with any of the four.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from data import Batch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from torch_hf import GrowingBatchSampler, HFOptimizer, RatioGrowth, head, split_batch
from torch_hf.plotting import plot_training
from torch_hf.sampling.growth import Growth
from torch_hf.tracking import CSVLogger, progress_postfix

Record = dict[str, Any]


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 for each case whose largest output is the target's, else 0: accuracy is the mean."""
    return (outputs.argmax(dim=1) == targets).float()


@dataclass
class Task:
    """What is trained, and how :class:`~torch_hf.HFOptimizer` is driven there.

    Attributes:
        title: Written above the plot and the table.
        model: The network.
        train: Inputs and targets of the training set.
        test: Inputs and targets held out.
        batch_sizes: The first batch size of each optimizer; only hf's grows.
        growth: Factor by which it grows from step to step, or a rule.
        max_batch_size: Where it ends; at all cases if None.
        curvature_fraction: Part of the batch that a step of hf takes curvature products on.
        split_size: Cases in memory at once, the whole batch if None: a step of hf averages over
            parts of that size.
        weight_decay: For hf, adam and sgd, where it means the same; torch's L-BFGS has none.
        options: Further arguments of ``HFOptimizer``.
        loss: Outputs and targets to the mean loss over cases.
        score: Outputs and targets to a number for each case; its mean is reported.
        score_name: Its name in the table and the CSV file.
        score_train: Whether it is reported for the training set too.
        averaging: Part of the running mean of weights that a step leaves; that mean is what is
            evaluated. 0 for the weights themselves.
    """

    title: str
    model: nn.Module
    train: Batch
    test: Batch
    batch_sizes: Mapping[str, int]
    growth: float | Growth = field(default_factory=RatioGrowth)
    max_batch_size: int | None = None
    curvature_fraction: float = 0.25
    split_size: int | None = None
    weight_decay: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    score: Callable[[Tensor, Tensor], Tensor] = correct
    score_name: str = "accuracy"
    score_train: bool = False
    averaging: float = 0.0


def make_parser(description: str, *, name: str, epochs: int) -> argparse.ArgumentParser:
    """The arguments that every example takes; results go to ``runs/<name>``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--optimizer", choices=("hf", "adam", "sgd", "lbfgs"), default="hf", help="who trains")
    add("--lr", type=float, help="learning rate, if not the optimizer's usual one")
    add("--epochs", type=int, default=epochs, help="passes over the training set")
    add("--max-steps", type=int, help="stop after so many steps")
    add("--seconds", type=float, help="stop after so much training time")
    add("--batch-size", type=int, help="the first batch size; with hf it grows")
    add("--evaluate-every", type=int, help="steps from row to row of the table, if not an epoch")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="as in torch")
    add("--seed", type=int, default=0, help="of the weights and the order of the cases")
    add("--out", type=Path, default=Path("runs") / name, help="folder for the CSV file and plot")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse and check the arguments, and seed the generator that will draw the weights."""
    args = parser.parse_args()
    for name in ("lr", "epochs", "max_steps", "seconds", "batch_size", "evaluate_every"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive; got {value}")
    try:
        torch.zeros((), device=args.device)
    except (RuntimeError, AssertionError):
        parser.error(f"--device {args.device} is not at hand; --device cpu always is")
    torch.manual_seed(args.seed)
    return args


def run(task: Task, args: argparse.Namespace) -> None:
    """Train with a progress bar, write ``training.csv`` and ``training.png``, print the table."""
    csv_path, png_path = args.out / "training.csv", args.out / "training.png"
    with CSVLogger(csv_path) as logger:
        training = Training(task, args, logger)
        training.run()
    title = f"{task.title}, {type(training.optimizer).__name__}"
    plot_training(csv_path, png_path, score=task.score_name, title=title)
    print(f"{title}\n\n{format_table(training.rows)}\n\nSteps: {csv_path}   Plot: {png_path}")


class Training:
    """One run: the loop, its clock, and the rows of the table."""

    def __init__(self, task: Task, args: argparse.Namespace, logger: CSVLogger) -> None:
        self.task, self.args, self.logger = task, args, logger
        self.optimizer = make_optimizer(task, args)
        self.sampler = make_sampler(task, args)
        self.rows: list[dict[str, str]] = []
        self.recent: list[Record] = []  # the steps since the last row
        self.steps, self.clock = 0, 0.0
        mean_of = get_ema_multi_avg_fn(task.averaging)
        self.mean = AveragedModel(task.model, multi_avg_fn=mean_of, use_buffers=True)

    def run(self) -> None:
        """Train until the epochs, the steps or the seconds are used up."""
        cases = len(self.task.train[0])
        with progress(self.args.epochs * cases) as bar:
            for epoch in range(self.args.epochs):
                bar.set_description(f"epoch {epoch + 1}/{self.args.epochs}", refresh=False)
                self.sampler.set_epoch(epoch)  # the batches of this epoch are larger
                for batch, indices in enumerate(self.sampler, start=1):
                    postfix = self.step(indices)
                    epoch_ended = batch == len(self.sampler)
                    over = self.over(epoch + epoch_ended)
                    self.report(epoch, evaluate=over or self.row_due(epoch_ended))
                    bar.set_postfix(postfix, refresh=False)
                    bar.update((epoch + 1) * cases - bar.n if epoch_ended else len(indices))
                    if over:
                        return

    def step(self, indices: list[int]) -> dict[str, str]:
        """Take one step on these cases, on the clock; return what the progress bar shows."""
        start = time.perf_counter()
        batch = (self.task.train[0][indices], self.task.train[1][indices])

        def closure(part: Batch = batch) -> Tensor:  # the same for every optimizer
            inputs, targets = part
            self.optimizer.zero_grad()
            loss = self.task.loss(self.task.model(inputs), targets)
            loss.backward()
            return loss

        if isinstance(self.optimizer, HFOptimizer):
            self.step_hf(closure, batch)
            record, postfix = self.read_report()
        else:
            loss = self.optimizer.step(closure).detach().item()
            record = {"step": self.steps + 1, "loss": loss, "batch_cases": len(indices)}
            postfix = {"loss": f"{loss:.4g}"}
        if self.task.averaging:
            self.mean.update_parameters(self.task.model)
        self.clock += time.perf_counter() - start
        self.steps += 1
        self.recent.append(record)
        return postfix

    def step_hf(self, closure: Callable[..., Tensor], batch: Batch) -> None:
        """Step on the batch, or on parts of it where they have a size."""
        size = self.task.split_size or len(batch[0])
        # the curvature sample has to be a part of the gradient sample: its first cases
        first = head(batch, self.sampler.curvature_batch_size)
        self.optimizer.step(
            closure, batches=split_batch(batch, size), curvature_batches=split_batch(first, size)
        )

    def read_report(self) -> tuple[Record, dict[str, str]]:
        """What the step did, as a row of the CSV file and as the progress bar's postfix."""
        report = self.optimizer.last_report
        self.sampler.update(report)  # a rule that watches the gradient may grow the batches
        return report.to_dict(), progress_postfix(report)

    def over(self, epochs: int) -> bool:
        """Whether the epochs, the steps or the seconds are used up."""
        args = self.args
        used_up = args.seconds is not None and self.clock >= args.seconds
        return used_up or epochs == args.epochs or self.steps == args.max_steps

    def row_due(self, epoch_ended: bool) -> bool:
        """Whether this step ends a row of the table."""
        every = self.args.evaluate_every
        return self.steps % every == 0 if every else epoch_ended

    def report(self, epoch: int, evaluate: bool) -> None:
        """Log the last step; evaluate the model and add a row to the table where one is due."""
        scores = self.evaluate() if evaluate else {}
        self.logger.log(self.recent[-1], epoch=epoch + 1, elapsed=self.clock, **scores)
        if evaluate:
            self.rows.append(table_row(epoch + 1, self.steps, self.recent, scores, self.clock))
            self.recent = []

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and score of the test set, and the score of the training set if asked for."""
        task, name = self.task, self.task.score_name
        model = self.mean.module if task.averaging else task.model
        model.eval()
        loss, score = self.mean_over(task.test, model)
        scores = {"test_loss": loss, f"test_{name}": score}
        if task.score_train:
            scores[f"train_{name}"] = self.mean_over(task.train, model)[1]
        model.train()
        return scores

    def mean_over(self, batch: Batch, model: nn.Module) -> tuple[float, float]:
        """Mean loss and score over a whole set, a part at a time."""
        loss, score = 0.0, 0.0
        for inputs, targets in zip(*(tensor.split(5000) for tensor in batch), strict=True):
            outputs = model(inputs)
            loss += float(self.task.loss(outputs, targets)) * len(inputs)
            score += float(self.task.score(outputs, targets).sum())
        return loss / len(batch[0]), score / len(batch[0])


def make_optimizer(task: Task, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer of that name; the rates are those that each is commonly started with."""
    parameters, decay = task.model.parameters(), task.weight_decay
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=args.lr or 1e-3, weight_decay=decay)
    if args.optimizer == "sgd":
        lr = args.lr or 0.05
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay)
    if args.optimizer == "lbfgs":
        return torch.optim.LBFGS(parameters, lr=args.lr or 1.0, line_search_fn="strong_wolfe")
    return HFOptimizer(parameters, lr=args.lr or 1.0, weight_decay=decay, **task.options)


def make_sampler(task: Task, args: argparse.Namespace) -> GrowingBatchSampler:
    """Batches that grow for hf; a growth of 1 is any other optimizer's fixed batch size."""
    cases = len(task.train[0])
    size = min(args.batch_size or task.batch_sizes[args.optimizer], cases)
    growth = task.growth if args.optimizer == "hf" else 1.0
    return GrowingBatchSampler(
        cases,
        batch_size=size,
        growth=growth,
        grow_every="step",
        max_batch_size=max(size, task.max_batch_size or cases),
        curvature_batch_size=max(1, round(task.curvature_fraction * size)),
        curvature_growth=None,  # the curvature sample keeps its part
        drop_last=True,  # a short batch at the end would make a noisy step
        seed=args.seed,
    )


def progress(cases: int) -> tqdm:
    """A progress bar; where its output is a file or a pipe, a plain line every ten seconds."""
    shown = sys.stderr.isatty()
    plain = {} if shown else {"ascii": True, "mininterval": 10.0, "ncols": 100}
    return tqdm(total=cases, unit=" cases", unit_scale=True, **plain)


def table_row(
    epoch: int, steps: int, recent: list[Record], scores: dict[str, float], seconds: float
) -> dict[str, str]:
    """One row: batch size, means of loss and CG iterations, the last step's damping."""
    last = recent[-1]
    row = {
        "epoch": f"{epoch}",
        "steps": f"{steps}",
        "batch size": f"{max(record['batch_cases'] for record in recent)}",
        "loss": f"{mean(record['loss'] for record in recent):.4f}",
    }
    for name, value in scores.items():
        if name.endswith("accuracy"):
            row[name.replace("_", " ")] = f"{100 * value:.2f} %"
        elif name != "test_loss":
            row[name.replace("_", " ")] = f"{value:.3f}"
    if "damping" in last:
        row["λ"] = f"{last['damping']:.2e}"
        row["CG iterations"] = f"{mean(record['cg_iterations'] for record in recent):.1f}"
    return {**row, "seconds": f"{seconds:.1f}"}


def format_table(rows: list[dict[str, str]]) -> str:
    """Rows under their column names, right-aligned."""
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    lines = [names, ["-" * width for width in widths], *(list(row.values()) for row in rows)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)
