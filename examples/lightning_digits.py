"""Train on handwritten digits with Lightning and HFOptimizer, by a module as it stands.

Only ``configure_optimizers`` names the optimizer. Lightning hands its closure to
``optimizer.step``, and HFOptimizer evaluates it several times a step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from data import load_digits, standardise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_hf import GrowingBatchSampler, HFOptimizer
from torch_hf.plotting import plot_training
from torch_hf.tracking import CSVLogger


class Digits(lightning.LightningModule):
    """A network of one hidden layer."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        """The loss, as for any optimizer; a step evaluates it several times."""
        inputs, targets = batch
        return nn.functional.cross_entropy(self.network(inputs), targets)

    def configure_optimizers(self):
        """All that is said of HFOptimizer here; the rate needs no schedule."""
        return HFOptimizer(self.parameters(), weight_decay=3e-3)


class LogReports(lightning.Callback):
    """Writes each step's report to a CSV file, with the accuracy on held-out cases.

    A loss that ``training_step`` logs would be that of a trial point: the report has the step's.
    Lightning counts the batches of an epoch once, so that epochs of fewer, larger batches never
    come to its own validation: here the callback evaluates.
    """

    def __init__(self, logger, test):
        self.logger, self.test = logger, test

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        """After a step."""
        report = trainer.optimizers[0].last_report
        inputs, targets = self.test
        accuracy = float((module.network(inputs).argmax(dim=1) == targets).float().mean())
        self.logger.log(report, test_accuracy=accuracy)
        if report.step % 5 == 0:
            print(f"step {report.step}: loss {report.new_loss:.4f}, accuracy {accuracy:.3f}")


def main() -> None:
    """Train, and leave the plot and the CSV file in runs/lightning_digits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs") / "lightning_digits")
    args = parser.parse_args()
    args.device = "cpu"
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a network gains nothing from more
    train, test = standardise(*load_digits(args))
    # Lightning calls set_epoch, and each epoch's batches are larger than the last's.
    sampler = GrowingBatchSampler(len(train[0]), batch_size=180, growth=1.2, drop_last=True)
    with CSVLogger(args.out / "training.csv") as logger:
        trainer = lightning.Trainer(
            max_epochs=-1,
            max_steps=args.max_steps,
            accelerator="cpu",
            callbacks=[LogReports(logger, test)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(Digits(), DataLoader(TensorDataset(*train), batch_sampler=sampler))
    plot_training(args.out / "training.csv", args.out / "training.png", title="Digits, Lightning")
    print(f"Steps: {args.out / 'training.csv'}   Plot: {args.out / 'training.png'}")


if __name__ == "__main__":
    main()
