"""Train a recurrent network on the adding problem of Hochreiter & Schmidhuber (1997).

python examples/adding.py

Each sequence has 20 numbers from [0, 1] of which two are marked, one in each half; at its end
the network has to say their sum. The answer hangs on two inputs far back, so gradients are
small and badly scaled: recurrent networks without gates were trained on it by Hessian-free
optimization first (Martens & Sutskever 2011). Always saying 1, the mean, has an error of 1/6.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from torch_hf import GrowingBatchSampler, HFOptimizer
from torch_hf.tracking import CSVLogger


def make_data(cases: int, length: int) -> tuple[Tensor, Tensor]:
    """Sequences (cases, length, 2) of numbers and markers, and the sums (cases, 1)."""
    numbers, markers = torch.rand(cases, length), torch.zeros(cases, length)
    half = length // 2
    for low, high in ((0, half), (half, length)):
        markers.scatter_(1, torch.randint(low, high, (cases, 1)), 1.0)
    return torch.stack([numbers, markers], dim=2), (numbers * markers).sum(1, keepdim=True)


class Adder(nn.Module):
    """A plain tanh recurrence, and a linear layer on its last state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.recurrence = nn.RNN(2, width, batch_first=True)
        self.top = nn.Linear(width, 1)
        # a rotation neither forgets nor blows up what it has seen
        nn.init.orthogonal_(self.recurrence.weight_hh_l0)
        nn.init.normal_(self.recurrence.weight_ih_l0, std=0.1)
        nn.init.ones_(self.top.bias)  # the mean of the sums: what is left to learn is the rest

    def forward(self, sequences: Tensor) -> Tensor:
        """(cases, length, 2) to (cases, 1)."""
        states, _ = self.recurrence(sequences)
        return self.top(states[:, -1])


def main() -> None:
    """Train, and leave the picture and the CSV file in runs/adding."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--max-steps", type=int, default=20, help="of the optimizer")
    parser.add_argument("--length", type=int, default=20, help="of a sequence")
    parser.add_argument("--width", type=int, default=24, help="of the recurrence")
    parser.add_argument("--cases", type=int, default=2000, help="sequences for training")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights")
    parser.add_argument("--out", type=Path, default=Path("runs") / "adding", help="folder")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    sequences, sums = make_data(args.cases, args.length)
    test = make_data(1000, args.length)
    model = Adder(args.width)
    # the default, curvature along the first gradient, is that of the mean: far too large here
    optimizer = HFOptimizer(model.parameters(), damping=1e-3, cg_max_iter=50)
    sampler = GrowingBatchSampler(args.cases, batch_size=args.cases // 4, growth=1.3)

    seconds, step, errors = 0.0, 0, []
    with CSVLogger(args.out / "training.csv") as logger:
        while step < args.max_steps:
            for indices in sampler:
                inputs, targets = sequences[indices], sums[indices]
                start = time.perf_counter()
                # backward() in the closure is optional: a loss with its graph does as well
                optimizer.step(lambda x=inputs, y=targets: nn.functional.mse_loss(model(x), y))
                seconds += time.perf_counter() - start
                step += 1
                with torch.no_grad():
                    errors.append(nn.functional.mse_loss(model(test[0]), test[1]).item())
                report = optimizer.last_report
                logger.log(report, elapsed=seconds, test_squared_error=errors[-1])
                if step % 5 == 0 or step == args.max_steps:
                    print(
                        f"step {step:3d}  batch {report.batch_cases:5d}  test error "
                        f"{errors[-1]:.2e}  CG {report.cg_iterations:3d}  {seconds:.1f} s"
                    )
                if step == args.max_steps:
                    break
            sampler.set_epoch(sampler.epoch + 1)
    draw(args.out / "adding.png", model, test, errors)


@torch.no_grad()
def draw(path: Path, model: nn.Module, test: tuple[Tensor, Tensor], errors: list[float]) -> None:
    """The error by step, and the network's sums beside the true ones."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.semilogy(range(1, len(errors) + 1), errors, color="#0072B2")
    left.axhline(1 / 6, color="k", linestyle=":", label="always 1")
    left.set(xlabel="step", ylabel="mean squared error on new sequences")
    left.legend(frameon=False)
    right.scatter(test[1], model(test[0]), s=6, alpha=0.5, color="#0072B2")
    right.axline((0, 0), slope=1, color="k", linewidth=0.8)
    right.set(xlabel="sum of the two marked numbers", ylabel="the network's answer")
    figure.savefig(path, dpi=120)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
