"""Train on handwritten digits with Accelerate and HFOptimizer: an L-BFGS loop, prepared.

Accelerate wraps the optimizer: ``step(closure)`` goes through it, and the optimizer itself, with
its ``last_report``, is ``optimizer.optimizer``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from data import load_digits, standardise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_hf import GrowingBatchSampler, HFOptimizer
from torch_hf.plotting import plot_training
from torch_hf.tracking import CSVLogger


def main() -> None:
    """Train, and leave the plot and the CSV file in runs/accelerate_digits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs") / "accelerate_digits")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a network gains nothing from more

    # gradient_accumulation_steps stays at 1: HFOptimizer takes several batches in one step
    # instead (optimizer.optimizer.step(closure, batches=[...])).
    accelerator = Accelerator(cpu=True)
    args.device = accelerator.device
    train, test = standardise(*load_digits(args))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = HFOptimizer(model.parameters(), weight_decay=3e-3)
    sampler = GrowingBatchSampler(len(train[0]), batch_size=180, growth=1.2, drop_last=True)
    loader = DataLoader(TensorDataset(*train), batch_sampler=sampler)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    with CSVLogger(args.out / "training.csv") as logger:
        steps, epoch = 0, 0
        while steps < args.max_steps:
            sampler.set_epoch(epoch)  # the batches of this epoch are larger
            for inputs, targets in loader:

                def closure(inputs=inputs, targets=targets):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(inputs), targets)
                    accelerator.backward(loss)  # in the place of loss.backward()
                    return loss

                optimizer.step(closure)
                report = optimizer.optimizer.last_report  # behind Accelerate's wrapper
                with torch.no_grad():
                    hits = model(test[0]).argmax(dim=1) == test[1]
                accuracy = float(hits.float().mean())
                logger.log(report, test_accuracy=accuracy)
                steps += 1
                if steps == args.max_steps:
                    break
            epoch += 1
            print(f"step {steps}: loss {report.new_loss:.4f}, accuracy {accuracy:.3f}")
    plot_training(args.out / "training.csv", args.out / "training.png", title="Digits, Accelerate")
    print(f"Steps: {args.out / 'training.csv'}   Plot: {args.out / 'training.png'}")


if __name__ == "__main__":
    main()
