"""Train a convolutional network on CIFAR-10, with HFOptimizer or one of three others.

python examples/cifar10.py --download
python examples/cifar10.py --data-root FOLDER    # with train/CLASS/* and test/CLASS/* in it

A folder of images in the layout of torchvision's ImageFolder does as well as torchvision's own
files, so that a part of CIFAR-10 can be used; accuracy on a part is not accuracy on CIFAR-10.
"""

from __future__ import annotations

from common import Task, make_parser, parse, run
from data import add_data_arguments, load_cifar10, standardise
from torch import nn


def make_model() -> nn.Module:
    """Three convolutions, the resolution halved at each, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 16, kernel_size=5, stride=2, padding=2),  # 16 x 16
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # 8 x 8
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # 4 x 4
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def main() -> None:
    """Train, and leave the table on screen, the plot and the CSV file in runs/cifar10."""
    parser = make_parser(__doc__.splitlines()[0], name="cifar10", epochs=10)
    add_data_arguments(parser)
    args = parse(parser)
    train, test = standardise(*load_cifar10(args))
    task = Task(
        title=f"CIFAR-10 images ({len(train[0]):,} for training)",
        model=make_model().to(args.device),
        train=train,
        test=test,
        batch_sizes={"hf": 256, "adam": 128, "sgd": 128, "lbfgs": 2000},
        max_batch_size=10_000,
        weight_decay=1e-3,
    )
    run(task, args)


if __name__ == "__main__":
    main()
