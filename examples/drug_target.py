"""Predict how strongly a drug binds a kinase: the Davis data, beside the tools one would take.

python examples/drug_target.py --data davis.npz

The file holds ``kd_nanomolar`` (68 drugs x 442 targets), ``drugs`` and ``targets``, the similarity
matrices of both: numpy.savez of the Davis files in the public DeepDTA repository. Predicted is
pKd = 9 - log10(Kd). Two splits: a sixth of the pairs at random, and all pairs of a sixth of the
drugs ("cold"), which a model has never seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from pairs import concordance, features, load, ridge, split
from torch import Tensor, nn

from torch_hf.kronecker import KroneckerFactors, KroneckerLinear, KroneckerSGD


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, y: Tensor, args: argparse.Namespace):
    """Trains on pairs by their numbers."""
    steps = min(args.max_steps, args.epochs * len(y) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(y), (128,))
        optimizer.zero_grad()
        (model(batch)[:, 0] - y[batch]).square().mean().backward()
        optimizer.step()
        schedule.step()


def network(a: Tensor, b: Tensor, y: Tensor, held: Tensor, args: argparse.Namespace) -> Tensor:
    """A network on the products of drugs' and targets' features."""
    every, known = torch.ones_like(held).nonzero().T, (~held).nonzero().T
    pairs = KroneckerFactors.from_pairs(a, b, *known, constant=True, normalize=True)
    hidden = KroneckerLinear(pairs, args.width, std=0.1)
    top = nn.Sequential(nn.ReLU(), nn.Linear(args.width, 1))
    groups = [{"params": hidden.parameters(), "lr": 10.0}, {"params": top.parameters()}]
    optimizer = KroneckerSGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-5)
    fit(nn.Sequential(hidden, top), optimizer, y[~held].float(), args)
    grid = KroneckerFactors.from_pairs(a, b, *every, constant=True, normalize=True)
    return top(hidden.predict(grid)).view_as(y).detach()


def dense(a: Tensor, b: Tensor, y: Tensor, held: Tensor, args: argparse.Namespace) -> Tensor:
    """A network of the same width on the features themselves, side by side, with Adam."""
    every, known = torch.ones_like(held).nonzero().T, (~held).nonzero().T
    x = torch.cat([a[known[0]], b[known[1]]], 1)
    model = nn.Sequential(nn.Linear(x.shape[1], args.width), nn.ReLU(), nn.Linear(args.width, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    fit(lambda batch: model(x[batch]), optimizer, y[~held].float(), args)
    return model(torch.cat([a[every[0]], b[every[1]]], 1)).view_as(y).detach()


def main() -> None:
    """Three models on two splits; a table and a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("davis.npz"), help="see the file's head")
    parser.add_argument("--width", type=int, default=64, help="hidden units of both networks")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0, help="of splits and weights")
    parser.add_argument("--out", type=Path, default=Path("runs/drug_target"), help="folder")
    args = parser.parse_args()
    if not args.data.exists():
        parser.error(f"{args.data} is not there. The head of this file says what it holds.")
    drugs, targets, affinity = load(args.data)
    a, b = features(drugs), features(targets)
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.5), sharex=True, sharey=True)
    print(f"{'':12s}{'':26s}{'mean squared error':>20s}{'concordance':>13s}")
    for axes, kind in zip(panels, ("random pairs", "cold drugs"), strict=True):
        torch.manual_seed(args.seed)
        held = split(kind, affinity.shape)
        mean, spread = affinity[~held].mean(), affinity[~held].std()
        y = (affinity - mean) / spread
        found = {
            "mean of the known": torch.zeros_like(y),
            "Kronecker kernel ridge": ridge(drugs, targets, y, held, penalty=0.03),
            "dense network, Adam": dense(a, b, y, held, args),
            "network, KroneckerSGD": network(a, b, y, held, args),
        }
        truth = affinity[held]
        for name, values in found.items():
            predicted = values.double()[held] * spread + mean
            error = float((predicted - truth).square().mean())
            print(f"{kind:14s}{name:24s}{error:20.3f}{concordance(predicted, truth):13.3f}")
        axes.scatter(truth, predicted, s=4, alpha=0.3)
        axes.axline((7, 7), slope=1, color="k", linewidth=0.8)
        axes.set(title=kind, xlabel="pKd measured")
    panels[0].set_ylabel("pKd predicted, KroneckerSGD")
    args.out.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(args.out / "pairs.png", dpi=120)
    print(f"\nPicture: {args.out / 'pairs.png'}")


if __name__ == "__main__":
    main()
