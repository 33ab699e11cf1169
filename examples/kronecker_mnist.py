"""Train a network on all degree-2 products of MNIST pixels, 616,225 inputs, that are never formed.

python examples/kronecker_mnist.py --download

Each input is x̄ ⊗ x̄ with x̄ the 784 pixels and a constant; on them a layer of ReLU units, trained by
exact SGD. Beside it stand kernel ridge regression on the same inputs and a network on the pixels.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from data import Batch, add_data_arguments, load_mnist
from torch import Tensor, nn
from torch.nn import functional as F

from torch_hf.kronecker import KroneckerFactors, KroneckerLinear, KroneckerSGD


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Percentage of cases whose largest output is the label's."""
    return 100 * (outputs.argmax(dim=1) == labels).double().mean().item()


def products(pixels: Tensor) -> KroneckerFactors:
    """All products of up to two pixels; inner products are (1 + ⟨x, y⟩)² / 4."""
    return KroneckerFactors.power(pixels, 2, constant=True, normalize=True)


def ridge(train: Batch, test: Batch, args: argparse.Namespace) -> list[float]:
    """Test accuracy of kernel ridge regression on the labels' indicators, solved at once."""
    known, new = (products(x.double()) for x, _ in (train, test))
    gram = known.gram()
    gram.diagonal().add_(1e-3)
    weights = torch.linalg.solve(gram, F.one_hot(train[1], 10).double())
    return [accuracy(known.cross(new) @ weights, test[1])] * args.epochs


def train_kronecker(train: Batch, test: Batch, args: argparse.Namespace) -> list[float]:
    """Test accuracy after each epoch of the network on the products."""
    hidden, new = KroneckerLinear(products(train[0]), args.neurons), products(test[0])
    top = nn.Sequential(nn.ReLU(), nn.Linear(args.neurons, 10)).to(args.device)
    groups = [{"params": hidden.parameters(), "lr": 8.0}, {"params": top.parameters()}]
    optimizer = KroneckerSGD(groups, lr=0.05, momentum=0.9)
    places = torch.arange(len(train[1]), device=args.device)  # a layer takes numbers of points
    model = nn.Sequential(hidden, top)
    return fit(model, optimizer, (places, train[1]), lambda: top(hidden.predict(new)), test, args)


def train_plain(train: Batch, test: Batch, args: argparse.Namespace) -> list[float]:
    """The same of a network with as many hidden units on the pixels."""
    layers = nn.Linear(784, args.neurons), nn.ReLU(), nn.Linear(args.neurons, 10)
    model = nn.Sequential(*layers).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return fit(model, optimizer, train, lambda: model(test[0]), test, args)


def fit(model, optimizer, train, predict, test, args) -> list[float]:
    """Train in batches of 64, for the epochs or steps asked for; the accuracy after each epoch."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    found, left = [], args.max_steps or 10**9
    while left and len(found) < args.epochs:
        batches = torch.randperm(len(train[1]), device=args.device).split(64)[:left]
        for batch in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][batch]), train[1][batch]).backward()
            optimizer.step()
        left -= len(batches)
        schedule.step()
        with torch.no_grad():
            found.append(accuracy(predict(), test[1]))
    return found


def main() -> None:
    """Train all three on rows of pixels of length 1, and leave the plot in the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--images", type=int, default=10_000, help="of the training set")
    add("--neurons", type=int, default=1024, help="hidden units")
    add("--epochs", type=int, default=10, help="passes over the training set")
    add("--max-steps", type=int, help="stop after so many steps")
    add("--device", default="cpu", help="as in torch")
    add("--out", type=Path, default=Path("runs/kronecker_mnist"))
    add_data_arguments(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    train, test = ((F.normalize(x.flatten(1)), y) for x, y in load_mnist(args))
    train = (train[0][: args.images], train[1][: args.images])

    print(f"{len(train[1]):,} images, {products(train[0]).features:,} products\n")
    names = ("products, KroneckerSGD", "pixels, SGD", "products, kernel ridge")
    curves = {}
    for name, run in zip(names, (train_kronecker, train_plain, ridge), strict=True):
        start = time.perf_counter()
        curves[name] = run(train, test, args)
        seconds = time.perf_counter() - start
        print(f"{name:24s} test accuracy {curves[name][-1]:.2f} %  {seconds:4.0f} s")
    plot(curves, args.out / "accuracy.png")


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """Accuracy by epoch."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), curve, marker=".", label=name)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title="MNIST, all products of two pixels")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Plot: {path}")


if __name__ == "__main__":
    main()
