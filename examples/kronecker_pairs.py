"""Predict the affinity of pairs, such as drug and target, from features of both.

python examples/kronecker_pairs.py

The data are synthetic: features of 300 drugs and 200 targets, and noisy affinities of pairs that
depend on products of features in a way that no linear model of these products can express.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from torch_hf.kronecker import KroneckerFactors, KroneckerLinear, KroneckerSGD

DRUGS, TARGETS, NOISE = 300, 200, 0.1


def make_data(pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features of drugs and targets, and for each pair its drug, its target and its affinity.

    128 and 96 features that express 6 hidden traits of each.
    """
    traits = torch.randn(DRUGS, 6), torch.randn(TARGETS, 6)
    drugs, targets = (
        t @ torch.randn(6, width) + 0.1 * torch.randn(len(t), width)
        for t, width in zip(traits, (128, 96), strict=True)
    )
    chosen = torch.randperm(DRUGS * TARGETS)[:pairs]
    rows, cols = chosen // TARGETS, chosen % TARGETS
    bindings = torch.randn(2, 6, 6) / 6
    first, second = torch.einsum("np,kpq,nq->kn", traits[0][rows], bindings, traits[1][cols])
    affinity = torch.relu(first) - torch.relu(second) + NOISE * torch.randn(pairs)
    return drugs, targets, rows, cols, (affinity - affinity.mean()) / affinity.std()


def ridge(known: KroneckerFactors, affinity: Tensor, new: KroneckerFactors) -> Tensor:
    """Predictions of Kronecker kernel ridge regression, the usual linear baseline."""
    gram = known.gram()
    gram.diagonal().add_(0.03)
    return known.cross(new) @ torch.linalg.solve(gram, affinity)


def train(
    known: KroneckerFactors, affinity: Tensor, new: KroneckerFactors, args: argparse.Namespace
) -> Tensor:
    """Predictions of a network on the products, with any layers on top."""
    hidden = KroneckerLinear(known, 256)
    top = nn.Sequential(nn.ReLU(), nn.Linear(256, 1))
    groups = [{"params": hidden.parameters(), "lr": 10.0}, {"params": top.parameters()}]
    optimizer = KroneckerSGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.max_steps)
    for _ in range(args.max_steps):
        batch = torch.randint(len(known), (64,))
        optimizer.zero_grad()
        loss = (top(hidden(batch)).squeeze(1) - affinity[batch]).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return top(hidden.predict(new)).squeeze(1)


def explained(predicted: Tensor, truth: Tensor) -> float:
    """R², the share of the variance that is explained."""
    return 1 - float((predicted - truth).square().sum() / (truth - truth.mean()).square().sum())


def main() -> None:
    """Train on four fifths of the pairs, predict the rest, leave a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5000, help="a fifth of them for the test")
    parser.add_argument("--max-steps", type=int, default=3000, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights")
    parser.add_argument("--out", type=Path, default=Path("runs/kronecker_pairs"), help="folder")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    drugs, targets, rows, cols, affinity = make_data(args.pairs)
    cut = args.pairs * 4 // 5
    pairs = KroneckerFactors.from_pairs(drugs, targets, rows, cols, normalize=True)
    known, new = pairs.select(torch.arange(cut)), pairs.select(torch.arange(cut, args.pairs))
    truth = affinity[cut:]

    found = {
        "Kronecker kernel ridge": ridge(known, affinity[:cut], new),
        "network, KroneckerSGD": train(known, affinity[:cut], new, args),
    }
    print(f"{known}, {len(new):,} pairs held out\n")
    for name, predicted in found.items():
        print(f"{name:24s} R² = {explained(predicted, truth):.3f}")
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.5), sharex=True, sharey=True)
    for axes, (name, predicted) in zip(panels, found.items(), strict=True):
        axes.scatter(truth, predicted, s=6, alpha=0.5)
        axes.axline((0, 0), slope=1, color="k", linewidth=0.8)
        axes.set(title=f"{name}: R² = {explained(predicted, truth):.2f}", xlabel="affinity")
    panels[0].set_ylabel("predicted")
    args.out.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(args.out / "pairs.png", dpi=120)
    print(f"\nPicture: {args.out / 'pairs.png'}")


if __name__ == "__main__":
    main()
