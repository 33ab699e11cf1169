"""Train a small convolutional network on MNIST, with HFOptimizer or one of three others.

python examples/mnist.py --download
python examples/mnist.py --optimizer adam
"""

from __future__ import annotations

from common import Task, make_parser, parse, run
from data import add_data_arguments, load_mnist, standardise
from torch import nn


def make_model() -> nn.Module:
    """Two convolutions, each halving the resolution, and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 8, kernel_size=5, stride=2, padding=2),  # 14 x 14
        nn.ReLU(),
        nn.Conv2d(8, 16, kernel_size=5, stride=2, padding=2),  # 7 x 7
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def main() -> None:
    """Train, and leave the table on screen, the plot and the CSV file in runs/mnist."""
    parser = make_parser(__doc__.splitlines()[0], name="mnist", epochs=3)
    add_data_arguments(parser)
    args = parse(parser)
    train, test = standardise(*load_mnist(args))
    task = Task(
        title="MNIST",
        model=make_model().to(args.device),
        train=train,
        test=test,
        batch_sizes={"hf": 256, "adam": 128, "sgd": 128, "lbfgs": 5000},
        weight_decay=1e-3,
    )
    run(task, args)


if __name__ == "__main__":
    main()
