"""Train a network on all degree-2 products of MNIST pixels, 616,225 inputs, that are never formed.

python examples/kronecker_mnist.py --download

Each input is x̄ ⊗ x̄ with x̄ the 784 pixels, scaled to length 1, and a constant; on them a layer
of hidden ReLU units and a linear layer, trained by exact SGD. Beside it stand ridge regression with
the polynomial kernel of the same inputs, and a plain network on the pixels.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import format_table
from data import Batch, add_data_arguments, load_mnist
from torch import Tensor, nn
from torch.nn import functional as F

from torch_hf.kronecker import KroneckerFactors, KroneckerLinear, KroneckerSGD


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Percentage of cases whose largest output is the label's."""
    return 100 * (outputs.argmax(dim=1) == labels).double().mean().item()


def subset(batch: Batch, cases: int) -> Batch:
    """The first cases: rows of pixels of length 1, and labels."""
    pixels, labels = batch[0][:cases].flatten(1), batch[1][:cases]
    return F.normalize(pixels), labels


def products(pixels: Tensor) -> KroneckerFactors:
    """All products of up to two pixels; inner products are (1 + ⟨x, y⟩)² / 4."""
    return KroneckerFactors.power(pixels, 2, constant=True, normalize=True)


def ridge(train: Batch, test: Batch, strength: float = 1e-3) -> float:
    """Test accuracy of kernel ridge regression on the labels' indicators."""
    known, new = (products(x.double()) for x, _ in (train, test))
    gram = known.gram()
    gram.diagonal().add_(strength)
    weights = torch.linalg.solve(gram, F.one_hot(train[1], 10).double())
    return accuracy(known.cross(new) @ weights, test[1])


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor, limit: int
) -> int:
    """One pass in batches of 64, or ``limit`` steps of it; returns how many there were."""
    batches = torch.randperm(len(labels), device=labels.device).split(64)[:limit]
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
    return len(batches)


def train_kronecker(train: Batch, test: Batch, args: argparse.Namespace) -> list[float]:
    """Test accuracy after each epoch of the network on the products."""
    hidden = KroneckerLinear(products(train[0]), args.neurons)
    top = nn.Sequential(nn.ReLU(), nn.Linear(args.neurons, 10)).to(args.device)
    model, new = nn.Sequential(hidden, top), products(test[0])
    groups = [{"params": hidden.parameters(), "lr": args.lr}, {"params": top.parameters()}]
    optimizer = KroneckerSGD(groups, lr=0.05, momentum=0.9)
    places = torch.arange(len(train[1]), device=args.device)  # a layer takes numbers of points
    return fit(model, optimizer, (places, train[1]), lambda: top(hidden.predict(new)), test, args)


def train_plain(train: Batch, test: Batch, args: argparse.Namespace) -> list[float]:
    """Test accuracy after each epoch of a network with as many hidden units on the pixels."""
    layers = (nn.Linear(784, args.neurons), nn.ReLU(), nn.Linear(args.neurons, 10))
    model = nn.Sequential(*layers).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return fit(model, optimizer, train, lambda: model(test[0]), test, args)


def fit(model, optimizer, train, predict, test, args) -> list[float]:
    """Train for the epochs or steps asked for."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    found, left = [], args.max_steps or 10**9
    for _ in range(args.epochs):
        if not left:
            break
        left -= train_epoch(model, optimizer, *train, limit=left)
        schedule.step()
        with torch.no_grad():
            found.append(accuracy(predict(), test[1]))
    return found


def main() -> None:
    """Train all three, print the table, and leave the plot in the folder of results."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=int, default=10_000, help="of the training set")
    add("--neurons", type=int, default=1024, help="hidden units")
    add("--epochs", type=int, default=10, help="passes over the training set")
    add("--max-steps", type=int, help="stop after so many steps")
    add("--lr", type=float, default=8.0, help="learning rate of the hidden layer")
    add("--device", default="cpu", help="as in torch")
    add("--seed", type=int, default=0, help="of the weights and the order of the cases")
    add("--out", type=Path, default=Path("runs/kronecker_mnist"), help="folder for the plot")
    add_data_arguments(parser)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train, test = load_mnist(args)
    train, test = subset(train, args.images), subset(test, len(test[1]))

    curves, rows = {}, []
    runs = {"products, KroneckerSGD": train_kronecker, "pixels, SGD": train_plain}
    for name, run in runs.items():
        start = time.perf_counter()
        curves[name] = run(train, test, args)
        rows.append(row(name, curves[name][-1], time.perf_counter() - start))
    start = time.perf_counter()
    least = ridge(train, test)
    rows.append(row("products, kernel ridge", least, time.perf_counter() - start))
    print(f"{len(train[1]):,} images, {products(train[0]).features:,} products\n")
    print(format_table(rows))
    plot(curves, least, args.out / "accuracy.png")


def row(name: str, percent: float, seconds: float) -> dict[str, str]:
    """A line of the table."""
    return {"model": name, "test accuracy": f"{percent:.2f} %", "seconds": f"{seconds:.0f}"}


def plot(curves: dict[str, list[float]], least: float, path: Path) -> None:
    """Accuracy by epoch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), curve, marker="o", label=name)
    axes.axhline(least, color="k", linestyle=":", label="products, kernel ridge")
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title="MNIST, all products of two pixels")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"\nPlot: {path}")


if __name__ == "__main__":
    main()
