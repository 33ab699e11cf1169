"""Train a small convolutional network on scikit-learn's handwritten digits: `make train`.

Nothing is tuned here: no learning rate, no schedule. The data come with scikit-learn, so there is
nothing to fetch, and a run takes seconds.
"""

from __future__ import annotations

import torch
from common import Task, make_parser, parse, run
from data import load_digits, standardise
from torch import nn


def make_model() -> nn.Module:
    """Two convolutions over 8x8 pixels and a linear layer: 6,090 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # 4 x 4
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # 2 x 2
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


def main() -> None:
    """Train, and leave the table on screen, the plot and the CSV file in runs/digits."""
    args = parse(make_parser(__doc__.splitlines()[0], name="digits", epochs=12))
    torch.set_num_threads(1)  # so small a network gains nothing from more
    train, test = standardise(*load_digits(args))
    task = Task(
        title="Handwritten digits",
        model=make_model().to(args.device),
        train=train,
        test=test,
        # hf starts with small samples, where light steps are cheap, and ends with a quarter of all
        batch_sizes={"hf": 64, "adam": 32, "sgd": 32, "lbfgs": 1437},
        growth=1.02,
        curvature_fraction=0.5,
        # 1,437 cases are few: a pull to zero is worth a percent of test accuracy
        weight_decay=3e-3,
        score_train=True,
        averaging=0.9,  # a step on few cases is noisy, the mean of the last ten is steady
    )
    run(task, args)


if __name__ == "__main__":
    main()
